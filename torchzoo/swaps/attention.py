"""A Gaussian gate before the attention layers of a model, which starts as the identity.

    x → x + s · gate(x),   s = 0 at first,

is what an attention layer then gets. The layer itself, its class and its state stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.attention import MultiHeadGaussianAdaptiveAttention
from torchzoo.hub import ZooModel
from torchzoo.surgery import Match, Replaced, Swapped, convert, find, nothing_selected
from torchzoo.swaps.selectors import inputs_of, is_attention, query_of

NAME = "gaussian_gate"


class GaussianPreGate(ZooModel):
    """Gaussian adaptive attention as a residual gate that starts as the identity.

    Args:
        dim: Features D.
        num_heads: Chunks of the features; each has statistics of its own.
        norm_dim: Axis of the statistics. -1, features, sees one position at a time, so that a model
            that predicts the next token stays causal and takes any length; -2 is the sequence.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **gaam: More options of `MultiHeadGaussianAdaptiveAttention`.

    Shape:
        x and output: (..., n, D).

    Source:
        Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need, 2024; the residual
        with its scale is our packaging.

    Example:
        >>> x = torch.randn(2, 5, 16)
        >>> torch.equal(GaussianPreGate(16)(x), x)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        norm_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gaam: Any,
    ) -> None:
        super().__init__()
        self.gate = MultiHeadGaussianAdaptiveAttention(
            dim, num_heads, norm_dim=norm_dim, device=device, dtype=dtype, **gaam
        )
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gate to its paper's start, and its scale to zero."""
        self.gate.reset_parameters()
        nn.init.zeros_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.gate(x)


def add_gaussian_gate(
    model: nn.Module, match: Match = is_attention, *, inputs: Any = None, **options: Any
) -> Swapped:
    """Put a `GaussianPreGate` before attention layers, in place; the model computes what it did.

    The gate is a child of the attention layer, called by a hook; names of the layer's own weights
    stay, so that checkpoints of the model go on fitting but for the gates.

    Args:
        model: The model to change.
        match: As for `torchzoo.surgery.find`; by default every attention layer that is known.
        inputs: As for `torchzoo.surgery.swap`.
        **options: Options of `GaussianPreGate`.

    Returns:
        What changed.

    Raises:
        UnknownNameError: Nothing is selected.
        ValueError: A module that is no attention layer, or has a gate.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> add_gaussian_gate(model).names
        ('self_attn',)
        >>> model.self_attn.gaussian_gate.gate.dim
        8
    """
    found = find(model, match)
    if not found:
        raise nothing_selected(model, match)
    for name, layer in found.items():
        if not is_attention(name, layer) or NAME in layer._modules:
            raise ValueError(f"match: expected attention layers without a gate, got {name}")

    def add(model: nn.Module) -> Replaced:
        for layer in found.values():
            weight = next(layer.parameters())
            gate = GaussianPreGate(_dim(layer), device=weight.device, dtype=weight.dtype, **options)
            layer.add_module(NAME, gate.train(layer.training))
            layer.register_forward_pre_hook(_gated, with_kwargs=True)
        return Replaced(tuple(found))

    return convert(model, add, inputs=inputs)


def _dim(layer: nn.Module) -> int:
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim
    return inputs_of(query_of(layer))


def _gated(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gate the input; where keys and values are the same tensor as queries, they stay the same."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    x = next(value for value in tensors if value.is_floating_point())
    gated = layer.get_submodule(NAME)(x)
    return (
        tuple(gated if value is x else value for value in args),
        {key: gated if value is x else value for key, value in kwargs.items()},
    )
