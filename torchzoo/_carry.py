"""What a new module takes over from the one whose place it takes: tensors and hooks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Literal

from torch import nn

Init = Literal["match", "fresh"] | Callable[[nn.Module, nn.Module], None]
"""How a new module starts: as `torchzoo.surgery.swap` says."""

_HOOKS = (
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_backward_hooks",),
    ("_backward_pre_hooks",),
)


def carry(new: nn.Module, old: nn.Module, init: Init) -> nn.Module:
    """The new module with what `init` says of the old one, and its hooks."""
    if init == "match":
        _share(new, old)
    elif init == "fresh":
        _draw(new, old)
    else:
        init(new, old)
    if old not in new.modules():  # else its hooks are called where it is
        _take_hooks(new, old)
    return new


def _share(new: nn.Module, old: nn.Module) -> None:
    """Make tensors of the new module those of the old one with the same name and shape."""
    theirs = {module: name for name, module in new.named_modules()}
    inside = set(old.modules())
    tensors = dict(chain(old.named_parameters(), old.named_buffers()))
    for holder, prefix in theirs.items():
        if holder in inside:
            continue
        for entries in (holder._parameters, holder._buffers):
            for key, value in entries.items():
                twin = tensors.get(f"{prefix}.{key}" if prefix else key)
                same = value is not None and twin is not None and value.shape == twin.shape
                if same and isinstance(twin, nn.Parameter) is isinstance(value, nn.Parameter):
                    entries[key] = twin


def _draw(new: nn.Module, old: nn.Module) -> None:
    """Draw the parameters of the new module anew, without touching a tensor of the old one."""
    inside, theirs = set(old.modules()), set(old.parameters())
    for module in new.modules():
        if module in inside:
            continue
        for key, value in module._parameters.items():
            if value is not None and value in theirs:
                module._parameters[key] = nn.Parameter(value.detach().clone())
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give the new module the old one's hooks: the dicts themselves, which the handles know."""
    for hooks, *options in _HOOKS:
        if vars(old)[hooks] and not vars(new)[hooks]:
            for name in (hooks, *options):
                vars(new)[name] = vars(old)[name]
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
