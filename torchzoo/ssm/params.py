"""Optimiser groups: parameters of the dynamics learn slowly and without weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def mark_dynamics(module: nn.Module, names: Sequence[str], lr: float) -> None:
    """Say which of a module's own parameters are dynamics, and how fast they learn at most.

    The note is kept by the module, as attributes of a parameter are lost in a deep copy; each
    parameter shows it too, as `_optim`. With a learning rate of 0 they are frozen.
    """
    module._dynamics = (tuple(names), lr)  # type: ignore[assignment]
    for name in names:
        parameter = module.get_parameter(name)
        parameter._optim = {"lr": lr, "weight_decay": 0.0}  # type: ignore[attr-defined]
        if lr == 0:
            parameter.requires_grad_(False)


def ssm_param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimiser: A, B and the time step of state spaces apart from all else.

    Args:
        model: A model with any number of state space layers.
        lr: Learning rate of all else. Dynamics get the smaller one of it and of their layer's.
        weight_decay: Weight decay of all else; dynamics get none.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, the one of all else first; each parameter of
        the model is in exactly one.

    Raises:
        ValueError: A learning rate or weight decay below 0.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022, the training details.

    Example:
        >>> import torch
        >>> from torchzoo.ssm import S4D
        >>> groups = ssm_param_groups(S4D(4, 8), lr=4e-3, weight_decay=0.05)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [(4, 0.004, 0.05), (3, 0.001, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    slow: dict[int, float] = {}
    for module in model.modules():
        names, own = getattr(module, "_dynamics", ((), 0.0))
        slow |= {id(module.get_parameter(name)): min(own, lr) for name in names}
    rest = {"params": [], "lr": lr, "weight_decay": weight_decay}
    groups: dict[float, dict[str, Any]] = {}
    for parameter in model.parameters():
        rate = slow.get(id(parameter))
        if rate is None:
            rest["params"].append(parameter)  # type: ignore[attr-defined]
        else:
            empty = {"params": [], "lr": rate, "weight_decay": 0.0}
            groups.setdefault(rate, empty)["params"].append(parameter)
    return [group for group in (rest, *groups.values()) if group["params"]]
