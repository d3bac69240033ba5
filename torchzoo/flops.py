"""Floating-point operations of a model, those of the zoo's own operators included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or arguments by name."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with one tensor, positional arguments, or arguments by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def count_flops(model: nn.Module, inputs: Inputs) -> int:
    """Floating-point operations of one forward in evaluation mode, by torch's counter.

    Counted are matrix products, convolutions and attention, two operations a multiply-add, and of
    the zoo's sparse operators the products of the experts and neurons that are computed.

    Args:
        model: The model; its mode is as before afterwards.
        inputs: What to call it with.

    Example:
        >>> count_flops(nn.Linear(3, 4), torch.randn(5, 3))
        120
    """
    modes = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    try:
        with torch.no_grad(), counter:
            call(model.eval(), inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.get_total_flops()


def _formulas() -> dict[Any, Any]:
    """Formulas by operator; torch's own registry stays as it is."""
    from torchzoo.ops import _sparse_ffn, grouped_ffn, grouped_mm  # noqa: F401 - defines them

    ops = torch.ops.torchzoo
    return {
        ops.grouped_mm: _grouped_mm,
        ops.grouped_ffn: _grouped_ffn,
        ops.sparse_ffn: _with_values(_sparse_ffn_flops),
    }


def _with_values(formula: Any) -> Any:
    formula._get_raw = True  # torch gives it tensors in place of their shapes
    return formula


def _grouped_mm(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def _grouped_ffn(
    x: Sequence[int],
    w_in: Sequence[int],
    w_out: Sequence[int],
    offsets: Sequence[int],
    src: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return 2 * src[0] * (prod(w_in[1:]) + prod(w_out[1:]))


def _sparse_ffn_flops(
    x: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    w_gate: Tensor | None,
    *more: Any,
    out_val: Any,
    **_: Any,
) -> int:
    """What all neurons cost, and what those cost that are active for a token."""
    on_product, active = more[8], int(out_val[3].sum())
    projections = 2 if w_gate is None else 3
    of_all = 2 if w_gate is not None and on_product else 1
    products = of_all * x.shape[0] * w_up.shape[0] + (projections - of_all) * active
    return 2 * x.shape[1] * products
