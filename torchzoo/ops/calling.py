"""What the operators' public functions and references share around a call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def below_autograd(*tensors: Tensor | None) -> AbstractContextManager[Any]:
    """Call an operator inside this: without gradients to record, autograd's wrapper is left out.

    That wrapper is Python, and takes longer than a small step of some kernels.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return nullcontext()
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def loop_over_batch(op: Any) -> Any:
    """A vmap rule that calls an operator once for each element of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        columns = [
            arg.unbind(dim) if isinstance(dim, int) else [arg] * info.batch_size
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = [op(*row) for row in zip(*columns, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """References compute in the types that they say, inside autocast too."""
    kind = x.device.type  # meta tensors have no autocast
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where torch would go on with a tangent of zero."""
    if not forward_mode() or torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{op}: no forward-mode derivative, use reverse mode")


def values_readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read in Python here: not while tracing or batching."""
    symbolic = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta
    return not symbolic and not torch._C._functorch.is_batchedtensor(tensor)
