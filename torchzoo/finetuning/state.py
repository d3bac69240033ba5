"""The tensors of a training run under flat names, and back, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

# Where a model is sharded, the first process alone gets what is moved to the CPU.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_EVERYWHERE = StateDictOptions(full_state_dict=True)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's weights, by the names of the model without any wrapper."""
    found: Any = get_model_state_dict(model, options=_WHOLE)
    return found


def tensors_of(
    model: nn.Module, optimizer: Optimizer, average: AveragedModel | None
) -> dict[str, Tensor]:
    """Weights as `model.NAME`, the optimizer's averages as `optimizer.KIND.NAME`, `ema.NAME`."""
    tensors = {f"model.{name}": value for name, value in weights_of(model).items()}
    averages: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    for name, values in averages.get("state", {}).items():
        tensors |= {f"optimizer.{kind}.{name}": value for kind, value in values.items()}
    if average is not None:
        tensors |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    return tensors


def load_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None,
) -> None:
    """Put back what `tensors_of` gave.

    Raises:
        RuntimeError: They are those of another model.
        KeyError: They are those of another optimizer.
    """
    held: dict[str, Any] = {"model": {}, "optimizer": {}, "ema": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        held[part][rest] = tensor
    set_model_state_dict(model, held["model"], options=_EVERYWHERE)
    averages: Any = get_optimizer_state_dict(model, optimizer, options=_EVERYWHERE)
    for kind_and_name, tensor in held["optimizer"].items():
        kind, _, name = kind_and_name.partition(".")
        averages["state"][name][kind] = tensor
    set_optimizer_state_dict(model, optimizer, averages, options=_EVERYWHERE)
    if average is not None:
        average.load_state_dict(held["ema"])
