"""How the feed-forward layers of other libraries are laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = (  # names of up-projection, down-projection and gate; gated layouts first
    ("up_proj", "down_proj", "gate_proj"),  # transformers: Llama, Mistral, Qwen, Gemma
    ("w3", "w2", "w1"),  # Llama's own names
    ("fc1_x", "fc2", "fc1_g"),  # timm: SwiGLU
    ("wi_1", "wo", "wi_0"),  # transformers: T5 v1.1
    ("up_proj", "down_proj", ""),
    ("fc1", "fc2", ""),  # timm: Mlp; transformers: CLIP, OPT, ViT
    ("c_fc", "c_proj", ""),  # transformers: GPT-2
    ("wi", "wo", ""),  # transformers: T5
    ("linear1", "linear2", ""),  # torch.nn.TransformerEncoderLayer
    ("lin1", "lin2", ""),  # transformers: DistilBERT
    ("dense_h_to_4h", "dense_4h_to_h", ""),  # transformers: GPT-NeoX
    ("intermediate.dense", "output.dense", ""),  # transformers: BERT
)
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "tanh gelu": lambda z: F.gelu(z, approximate="tanh"),
}


class MLPParts(NamedTuple):
    """The pieces of a feed-forward layer.

    Attributes:
        up: Up-projection.
        down: Down-projection; its input is what the layer's neurons give.
        gate: The projection that the activation is applied to, in a gated layer.
        activation: Name of the activation; `"unknown"` where it is none of those known.
        threshold: Of a layer that drops small values: the largest that it drops.
        on: What is compared with it.
    """

    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    activation: str
    threshold: Tensor | None = None
    on: Literal["act", "product"] = "act"


def mlp_parts(module: nn.Module) -> MLPParts:
    """Take a feed-forward layer apart.

    Args:
        module: A layer of timm (Mlp, SwiGLU), transformers (gated as in Llama; fc1 and fc2;
            GPT-2's c_fc and c_proj; T5's wi and wo) or this library, or an `nn.Sequential` of
            linear layer, activation and linear layer.

    Raises:
        ValueError: It is none of these, it has other parameters (a norm, say), or dropout.

    Example:
        >>> parts = mlp_parts(nn.Sequential(nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 2)))
        >>> parts.activation, parts.down.in_features
        ('silu', 6)
    """
    parts = _parts(module)
    if parts is None:
        known = "; ".join(", ".join(name for name in names if name) for names in PROJECTIONS)
        raise ValueError(
            f"module: expected a feed-forward layer with linear layers named {known}, or an "
            f"nn.Sequential of linear, activation, linear, got {type(module).__name__}"
        )
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout) and child.p > 0:
            raise ValueError(
                f"module: {name} of {type(module).__name__} has no place in a SparseFFN, got "
                f"{child}; set its p to 0 first"
            )
    return parts


def is_mlp(module: nn.Module) -> bool:
    """Whether `mlp_parts` knows the layout."""
    return _parts(module) is not None


def linear_weight(layer: nn.Module) -> nn.Parameter:
    """The weight `(out, in)` of a linear layer; of transformers' Conv1D a transposed copy."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return nn.Parameter(weight.detach().mT.contiguous()) if _is_conv1d(layer) else weight


def _parts(module: nn.Module) -> MLPParts | None:
    if isinstance(module, nn.Sequential):
        layers = [child for child in module if not isinstance(child, (nn.Dropout, nn.Identity))]
        if len(layers) != 3 or not (_is_linear(layers[0]) and _is_linear(layers[2])):
            return None
        return MLPParts(layers[0], layers[2], None, _activation_name(layers[1]))
    for names in PROJECTIONS:
        found: list[Any] = [getattr(module, name, None) if name else None for name in names]
        up, down, gate = found
        if not (_is_linear(up) and _is_linear(down) and _is_linear(gate, none=not names[2])):
            continue
        act = next((getattr(module, n) for n in ACTIVATIONS if hasattr(module, n)), None)
        threshold = getattr(module, "threshold", getattr(act, "threshold", None))
        on: Any = getattr(module, "threshold_on", "act")
        if act is None or (threshold is not None and not isinstance(threshold, Tensor)):
            return None
        if any(_has_own(m) for m in module.modules() if m not in (up, down, gate)):
            return None  # a whole block, it may be
        return MLPParts(up, down, gate, _activation_name(act), threshold, on)
    return None


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_conv1d(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _is_linear(layer: Any, *, none: bool = False) -> bool:
    if layer is None:
        return none
    if not (isinstance(layer, nn.Linear) or _is_conv1d(layer)):
        return False
    return layer.weight.is_floating_point()


def _activation_name(act: Any) -> str:
    """The name of an activation, found by what it does to a few numbers."""
    if isinstance(act, str):
        return act
    if hasattr(act, "threshold"):
        return "fatrelu"
    z = torch.linspace(-6.0, 6.0, 49, device="cpu")
    with torch.no_grad():
        value = act(z)
    for name, function in _KNOWN.items():
        if torch.allclose(value, function(z), rtol=1e-5, atol=1e-7):
            return name
    return "unknown"
