"""What the processes of one training run tell each other; nothing where there is but one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["broadcast", "count", "rank", "sum_gradients", "total"]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _grouped() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _grouped() else 1


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors."""
    if count() > 1:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all gradients, in one message."""
    if count() == 1:
        return
    learned = [value for value in parameters if value.requires_grad]
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    flat = total(torch.cat([gradient.flatten() for gradient in own]))
    parts = flat.split([value.numel() for value in learned])
    for parameter, part in zip(learned, parts, strict=True):
        parameter.grad = part.view_as(parameter)
