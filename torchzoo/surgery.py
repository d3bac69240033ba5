"""Find, replace and watch the layers of any model, whoever wrote it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn

Match = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Replaced:
    """What `replace` did: the names of the modules that gave way, in the model's order."""

    names: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.names)


def find(model: nn.Module, match: Match) -> dict[str, nn.Module]:
    """The modules of a model that a rule selects, by dotted name.

    A module that the model holds in several places is given once, under its first name.

    Args:
        model: Any module; its own name is `""`.
        match: A class or classes (subclasses count), a glob over dotted names (`*` matches dots
            too: `"layers.*.mlp"`), or a predicate of name and module.

    Returns:
        Name to module, in the order of `named_modules`; empty where nothing is selected.

    Raises:
        ValueError: `match` is none of these.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.ReLU()))
        >>> list(find(model, nn.ReLU)), list(find(model, "2.*"))
        (['1', '2.0'], ['2.0'])
    """
    selects = _predicate(match)
    return {name: module for name, module in model.named_modules() if selects(name, module)}


def replace(model: nn.Module, match: Match, factory: Callable[[nn.Module], nn.Module]) -> Replaced:
    """Replace the modules that a rule selects, in place.

    The new module takes over training mode, and device and dtype of the old one's parameters (for a
    module without any: of the nearest module around it that has some). Whoever shared the old
    module shares the new one. Below a module that is replaced nothing is looked for.

    Args:
        model: The model to change.
        match: As for `find`.
        factory: Makes the new module from the old one; every module is made before the first is
            put in place, so that an error leaves the model as it was.

    Returns:
        The names of what was replaced.

    Raises:
        ValueError: Nothing is selected, or the model itself is (which has no place to put a new
            module into).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> replace(model, nn.ReLU, lambda old: nn.SiLU()).names
        ('1',)
    """
    found = find(model, match)
    if "" in found:
        raise ValueError("match: selects the model itself; call the factory on it instead")
    outermost = {
        name: old for name, old in found.items() if not any(up in found for up in _above(name))
    }
    if not outermost:
        raise ValueError(
            f"match: expected a rule that selects a module, got none of {kinds(model)}"
        )
    modules = dict(model.named_modules())
    made = {}
    for name, old in outermost.items():
        around = (modules[up] for up in chain([name], _above(name)))
        made[id(old)] = _like(factory(old).train(old.training), around)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and id(child) in made:
                parent._modules[child_name] = made[id(child)]
    return Replaced(tuple(outermost))


@contextmanager
def capture(model: nn.Module, match: Match) -> Iterator[dict[str, list[Any]]]:
    """Record what the selected modules return, while the context is open.

    Args:
        model: The model to watch.
        match: As for `find`.

    Returns:
        A context manager; it gives a dict from name to the outputs of each call so far, as the
        module returned them (gradients flow through).

    Raises:
        ValueError: Nothing is selected.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with capture(model, nn.ReLU) as outputs:
        ...     y = model(torch.ones(5, 2))
        >>> outputs["1"][0] is y
        True
    """
    found = find(model, match)
    if not found:
        raise ValueError(
            f"match: expected a rule that selects a module, got none of {kinds(model)}"
        )
    outputs: dict[str, list[Any]] = {name: [] for name in found}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: outputs[name].append(output)

    handles = [module.register_forward_hook(recorder(name)) for name, module in found.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _predicate(match: Match) -> Callable[[str, nn.Module], bool]:
    if isinstance(match, str):
        return lambda name, module: fnmatchcase(name, match)
    classes = match if isinstance(match, tuple) else (match,)
    if all(isinstance(one, type) and issubclass(one, nn.Module) for one in classes):
        return lambda name, module: isinstance(module, classes)  # type: ignore[arg-type]
    if callable(match) and not isinstance(match, type):
        return match
    raise ValueError(
        f"match: expected module classes, a glob of names or a predicate, got {match!r}"
    )


def _above(name: str) -> Iterator[str]:
    """The names of the modules around one, the nearest first: `a.b.c` gives `a.b`, `a` and ``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _like(module: nn.Module, models: Iterator[nn.Module]) -> nn.Module:
    """Move a module to device and dtype of the first of these that has a floating parameter."""
    for model in models:
        for tensor in chain(model.parameters(), model.buffers()):
            if torch.is_floating_point(tensor):
                return module.to(tensor.device, tensor.dtype)
    return module


def kinds(model: nn.Module) -> str:
    """The commonest classes of a model's modules with their counts, for messages."""
    counts = Counter(type(module).__name__ for module in model.modules())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(6))
