"""Activations of the zoo in the place of a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchzoo.activations import replace_activation
from torchzoo.surgery import Init, Match, Swapped, convert, find, swap
from torchzoo.swaps.selectors import activation_names

_TORCH = {"relu": (nn.ReLU,), "gelu": (nn.GELU,), "silu": (nn.SiLU,)}


def swap_activations(
    model: nn.Module,
    match: Match,
    factory: Callable[[], nn.Module],
    *,
    init: Init = "match",
    inputs: Any = None,
) -> Swapped:
    """Replace activations of a model, in place; the report says how far from the old they start.

    Args:
        model: The model to change.
        match: `"relu"`, `"gelu"`, `"silu"` or `"activation"`, which stand for the classes of torch,
            timm and transformers and for functions that modules hold as attributes; else as for
            `torchzoo.surgery.find`.
        factory: Makes a new activation.
        init: As for `torchzoo.surgery.swap`.
        inputs: As there.

    Returns:
        What changed.

    Raises:
        UnknownNameError: Nothing is selected.

    Example:
        >>> from torchzoo.activations import CRReLU
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> print(swap_activations(model, "relu", CRReLU))
        parameters 40 → 41
          1: ReLU → CRReLU  0 → 1
        note: CRReLU starts within 0.0061 of ReLU
    """
    names = activation_names(match) if isinstance(match, str) else ()
    if not names:
        first = next(iter(find(model, match).values()), None)
        report = swap(model, match, lambda old: factory(), init=init, inputs=inputs)
    else:
        inside = {type(module) for module in model.modules() if type(module).__name__ in names}
        types = (*inside, *(kind for word in _words(str(match)) for kind in _TORCH[word]))
        first = next((m for m in model.modules() if type(m) in types), types[0]())
        report = convert(model, lambda m: replace_activation(m, types, factory), inputs=inputs)
    assert first is not None
    return report.with_notes(_distance(first, model.get_submodule(report.names[0])))


def _words(word: str) -> tuple[str, ...]:
    return tuple(_TORCH) if word == "activation" else (word,)


@torch.no_grad()
def _distance(old: nn.Module, new: nn.Module) -> str:
    """How far two activations are from each other on [-4, 4], in a sentence."""
    like = next(new.parameters(), torch.empty(0))
    x = torch.linspace(-4, 4, 801, device=like.device, dtype=like.dtype)[:, None]
    try:
        far = float((new(x) - old(x)).abs().max())
    except (ValueError, RuntimeError):  # one a feature, it may be
        return f"{type(new).__name__} can't be compared with {type(old).__name__} on one feature"
    names = type(new).__name__, type(old).__name__
    return f"{names[0]} starts " + (f"within {far:.2g} of {names[1]}" if far else f"as {names[1]}")
