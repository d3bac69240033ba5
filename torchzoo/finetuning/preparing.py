"""What a training run needs before its first step: where it runs, what learns, an average."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchzoo.catalogue import suggest
from torchzoo.errors import TorchzooError, UnknownNameError

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(precision: str, device: str | None, fsdp: bool) -> Accelerator:
    """An accelerator of its own for a run, whatever the one before it used.

    Args:
        precision: `"no"`, `"bf16"` or `"fp16"`.
        device: `"cpu"`, or None for what is there.
        fsdp: Whether to shard the model.

    Raises:
        TorchzooError: fp16 on a CPU.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if fsdp else None
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu", fsdp_plugin=plugin)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise TorchzooError("precision: fp16 needs a GPU; expected no or bf16 on a CPU")
    return accelerator


def freeze(model: nn.Module, globs: tuple[str, ...]) -> None:
    """Keep the parameters that fit a glob as they are.

    Raises:
        UnknownNameError: A glob fits none.
        TorchzooError: No parameter is left.
    """
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UnknownNameError(f"freeze: {glob!r} fits no parameter{suggest(glob, names)}")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, glob) for glob in globs):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TorchzooError("freeze: expected a parameter that learns, got none")


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model for the exponential average of its weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
