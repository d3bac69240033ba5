"""Where a model of another library has its feed-forward layers and its transformer blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchzoo.sparsity.ffn import SparseFFN
from torchzoo.sparsity.layouts import ACTIVATIONS, PROJECTIONS, is_mlp, linear_weight
from torchzoo.surgery import find, kinds

_ACTIVATION_PATHS = (*ACTIVATIONS, "intermediate.intermediate_act_fn")
_NO_LAYER = (nn.Dropout, nn.Identity)


class FFN(NamedTuple):
    """A feed-forward layer of a model.

    Attributes:
        module: The layer, or the block that it is a part of.
        down: Its down-projection; what goes into it are the layer's neurons.
        activation: Dotted name of the activation inside `module`; empty for a `SparseFFN`.
        gated: Whether the activation is multiplied by a second projection.
    """

    module: nn.Module
    down: nn.Module
    activation: str
    gated: bool = False

    @property
    def weight(self) -> Tensor:
        """The parameter of the down-projection, in its own layout."""
        weight = self.down.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def w_down(self) -> Tensor:
        """Weight of the down-projection, `(d, f)`."""
        return linear_weight(self.down).detach()


def find_ffns(model: nn.Module) -> dict[str, FFN]:
    """The feed-forward layers of a model, by name.

    Known are `SparseFFN`, an `nn.Sequential` of linear layer, activation and linear layer,
    `torch.nn.TransformerEncoderLayer` (and the decoder's), and the usual layers of timm and
    transformers.

    Args:
        model: The model.

    Raises:
        ValueError: It has none that is known.

    Example:
        >>> list(find_ffns(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))))
        ['']
    """
    parts = {name: _ffn(module) for name, module in model.named_modules()}
    found = {name: ffn for name, ffn in parts.items() if ffn is not None}
    if not found:
        raise ValueError(
            f"model: expected feed-forward layers of a known layout, got {kinds(model)}"
        )
    return found


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model, by name.

    A block is one of several modules of one class in a list or a sequence, has a norm inside, and
    is the innermost of this kind.

    Args:
        model: The model.

    Raises:
        ValueError: It has none.

    Example:
        >>> block = nn.TransformerEncoderLayer(4, 2, 8)
        >>> list(find_blocks(nn.TransformerEncoder(block, 2, enable_nested_tensor=False)))
        ['layers.0', 'layers.1']
    """
    held = {
        id(child)
        for parent in model.modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        and len({type(child) for child in parent}) == 1
        for child in parent
        if _has_norm(child)
    }
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) in held and sum(id(inner) in held for inner in module.modules()) == 1
    }
    if not found:
        raise ValueError(
            "model: expected blocks of one class in a list, each with a norm; name them by blocks="
        )
    return found


class Watch:
    """Hooks on modules while a context is open.

    Compiled models run eagerly inside, as compiled code may not call hooks that it was not
    compiled with.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def _hooks(self) -> list[Callable[[], None]]:
        """Register the hooks and return what ends each."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to load
            self._open.enter_context(torch.compiler.set_stance("force_eager"))
        for end in self._hooks():
            self._open.callback(end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()


def _ffn(module: nn.Module) -> FFN | None:
    if isinstance(module, SparseFFN):
        return FFN(module, module.down_proj, "", module.gated)
    if isinstance(module, nn.Sequential):
        layers = [pair for pair in module.named_children() if not isinstance(pair[1], _NO_LAYER)]
        return FFN(module, layers[2][1], layers[1][0]) if is_mlp(module) else None
    act = next((path for path in _ACTIVATION_PATHS if callable(_at(module, path))), None)
    if act is None:
        return None
    # Unlike the layouts that a SparseFFN can take the place of, the module may be more than a
    # feed-forward layer, and have dropout inside.
    for names in PROJECTIONS:
        up, down, gate = (_at(module, path) for path in names)
        if _is_linear(up) and _is_linear(down):
            return FFN(module, down, act, _is_linear(gate))
    return None


def _is_linear(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None) if name else None
    return found


def _has_norm(module: nn.Module) -> bool:
    inside = find(module, lambda name, m: name != "" and "norm" in type(m).__name__.lower())
    return bool(inside)
