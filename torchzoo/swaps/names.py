"""Swaps by name: `relu=CRReLU`, `mlp=MoELayer(num_experts=4)`, `blocks.*.attn=…`."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from torchzoo import registry
from torchzoo.catalogue import suggest
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.options import parse_options
from torchzoo.surgery import Init, Swapped
from torchzoo.swaps.selectors import WORDS, activation_names, selector

TARGETS: dict[str, str] = {
    "MoELayer": "experts:swap_experts",
    "SparseFFN": "feedforward:swap_sparse_ffn",
    "DeltaLinear": "delta:swap_delta",
    "DeltaConv2d": "delta:swap_delta",
    "GaussianAdaptiveAttention": "attention:add_gaussian_gate",
}
"""Layers of the zoo that take over what they replace, and the function that puts them in."""

_SWAP = re.compile(r"\s*([^=\s]+)\s*=\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class Swap(NamedTuple):
    """A swap as text: what gives way, what takes its place, with what options."""

    selector: str
    target: str
    options: dict[str, Any]


def parse(text: str) -> Swap:
    """Read `selector=Target` or `selector=Target(option=value, …)`.

    Args:
        text: The selector is a word of `WORDS`, a class name or a glob of dotted names; the target
            a layer of the zoo; values are Python literals.

    Raises:
        TorchzooError: Text of another form.

    Example:
        >>> parse("mlp=MoELayer(num_experts=4, k=1)")
        Swap(selector='mlp', target='MoELayer', options={'num_experts': 4, 'k': 1})
    """
    match = _SWAP.fullmatch(text)
    if match is None:
        raise TorchzooError(f"swap {text!r}: expected selector=Layer or selector=Layer(option=…)")
    return Swap(match[1], match[2], parse_options(match[3] or "", f"swap {text!r}"))


def apply(model: nn.Module, text: str, *, init: Init = "match", inputs: Any = None) -> Swapped:
    """Swap layers of a model as a text says, in place; `torchzoo.surgery.restore` undoes it.

    Args:
        model: The model to change.
        text: As for `parse`. EvoNorms take the place of pairs of norm and activation, whatever the
            selector says of norms: `norm=EvoNormS0(group_size=4)`.
        init: As for `torchzoo.surgery.swap`.
        inputs: As there.

    Returns:
        What changed.

    Raises:
        UnknownNameError: The selector selects nothing, or the zoo has no such layer.
        TorchzooError: Text of another form, or options that the layer refuses.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> apply(model, "relu=CRReLU(init=0.0)").notes
        ('CRReLU starts as ReLU',)
    """
    swap = parse(text)
    try:
        return _function(swap)(model, init=init, inputs=inputs)
    except UnknownNameError as error:
        words = f"; words are {', '.join(WORDS)}" if "selects nothing" in str(error) else ""
        wrong = str(error).partition("; did you mean")
        raise UnknownNameError(f"swap {text!r}: {wrong[0]}{words}{wrong[1]}{wrong[2]}") from error
    except TorchzooError:
        raise
    except (TypeError, ValueError) as error:
        raise TorchzooError(f"swap {text!r}: {error}") from error


def _function(swap: Swap) -> Callable[..., Swapped]:
    """The function of `model`, `init` and `inputs` that a swap stands for."""
    if swap.target in TARGETS:
        module, _, name = TARGETS[swap.target].partition(":")
        function = getattr(import_module(f"torchzoo.swaps.{module}"), name)
        fixed = () if module != "attention" else ("init",)  # a gate has one start
        return lambda model, **more: function(
            model,
            selector(swap.selector),
            **swap.options,
            **{key: value for key, value in more.items() if key not in fixed},
        )
    cls = _layer(swap.target)
    if cls.__name__.startswith("EvoNorm"):
        from torchzoo.swaps.evonorm import swap_evonorm

        return lambda model, init, inputs: swap_evonorm(model, cls, inputs=inputs, **swap.options)
    from torchzoo.swaps.activations import swap_activations

    match = swap.selector if activation_names(swap.selector) else selector(swap.selector)
    return lambda model, **more: swap_activations(model, match, lambda: cls(**swap.options), **more)


def _layer(name: str) -> type[nn.Module]:
    try:
        return registry.card(name).cls
    except UnknownNameError as error:
        known = [*TARGETS, *(card.name for card in registry.cards())]
        raise UnknownNameError(f"no layer {name!r}{suggest(name, known)}") from error
