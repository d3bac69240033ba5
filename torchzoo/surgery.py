"""Find, replace, swap and watch the layers of any model, whoever wrote it.

`replace` puts new modules in place; `swap` also carries weights and hooks over, reports what it
changed, and `restore` undoes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as dataclass_replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn

from torchzoo._carry import Init, carry
from torchzoo._undo import noted, undo
from torchzoo.catalogue import suggest
from torchzoo.errors import UnknownNameError
from torchzoo.flops import Inputs, count_flops

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


@dataclass(frozen=True)
class Change:
    """One module that gave way: its name, both classes, and the parameters of both."""

    name: str
    old: str
    new: str
    parameters: tuple[int, int]


@dataclass(frozen=True)
class Swapped(Replaced):
    """What a swap did; as text a tree.

    Attributes:
        names: The modules that gave way, in the model's order.
        changes: For each of them what it was and is.
        parameters: Parameters of the whole model before and after.
        flops: Floating-point operations of a forward before and after; None without inputs.
        notes: What a user should know, a sentence each.
    """

    changes: tuple[Change, ...] = ()
    parameters: tuple[int, int] = (0, 0)
    flops: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"count": self.count}

    def with_notes(self, *notes: str) -> Swapped:
        """The same report with more notes."""
        return dataclass_replace(self, notes=(*self.notes, *notes))

    def __str__(self) -> str:
        lines = [f"parameters {self.parameters[0]:,} → {self.parameters[1]:,}"]
        if self.flops:
            lines += [f"FLOPs {self.flops[0]:,} → {self.flops[1]:,}"]
        shown: set[str] = set()
        for change in self.changes:
            parts = change.name.split(".")
            for depth in range(1, len(parts)):
                above = ".".join(parts[:depth])
                if above not in shown:
                    lines.append(f"{'  ' * depth}{parts[depth - 1]}")
                    shown.add(above)
            before, after = change.parameters
            what = f"{change.old} → {change.new}  {before:,} → {after:,}"
            lines.append(f"{'  ' * len(parts)}{parts[-1]}: {what}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def swap(
    model: nn.Module,
    selector: Match,
    factory: Callable[[nn.Module], nn.Module],
    *,
    init: Init = "match",
    inputs: Inputs | None = None,
) -> Swapped:
    """Put new modules in the place of those selected, in place, so that `restore` can undo it.

    Parameters and buffers that carry over are shared with the old module, so weights that are tied
    stay tied and an optimizer that has them keeps them; training the new module trains them.
    Forward and backward hooks move to the new module, and their handles go on working. Mode, device
    and dtype are taken over as `replace` does.

    Args:
        model: The model to change.
        selector: As for `find`.
        factory: Makes the new module from the old one.
        init: `"match"`: parameters and buffers of the new module that have name and shape of one of
            the old module are that one. `"fresh"`: nothing of the old is kept, whatever the new
            module holds is drawn by its `reset_parameters`; modules of the old one that the new
            one wraps are left alone. A function gets the new module and the old.
        inputs: What to call the model with, to count its operations before and after.

    Returns:
        What changed.

    Raises:
        UnknownNameError: Nothing is selected; the message names what is near.
        ValueError: The model itself is selected, or `init` is none of these.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> report = swap(model, nn.Linear, lambda old: nn.Linear(4, 4, bias=False))
        >>> print(report)
        parameters 20 → 16
          0: Linear → Linear  20 → 16
        >>> restore(model)
        ('0',)
        >>> model[0].bias is None
        False
    """
    if init not in ("match", "fresh") and not callable(init):
        raise ValueError(f"init: expected 'match', 'fresh' or a function, got {init!r}")
    if not find(model, selector):
        raise nothing_selected(model, selector)

    def make(old: nn.Module) -> nn.Module:
        return carry(factory(old), old, init)

    return convert(model, lambda model: replace(model, selector, make), inputs=inputs)


def convert(
    model: nn.Module,
    converter: Callable[[nn.Module], Replaced],
    *,
    inputs: Inputs | None = None,
    notes: tuple[str, ...] = (),
) -> Swapped:
    """Apply a function that replaces modules of a model in place, and note how to undo it.

    Args:
        model: The model to change.
        converter: For example `torchzoo.activations.convert_norm_act`; returns what it replaced.
            After an error in it the model's structure is as before.
        inputs: As for `swap`.
        notes: Put into the report.

    Returns:
        What changed, as `swap` says it.
    """
    before = dict(model.named_modules())
    sizes = {name: _size(module) for name, module in before.items()}
    flops = [count_flops(model, inputs)] if inputs is not None else []
    with noted(model):
        names = converter(model).names
        flops += [count_flops(model, inputs)] if inputs is not None else []
    after = dict(model.named_modules())
    changes = [
        Change(
            name,
            type(before[name]).__name__ if name in before else "function",
            type(after[name]).__name__,
            (sizes.get(name, 0), _size(after[name])),
        )
        for name in names
    ]
    return Swapped(
        names=tuple(names),
        changes=tuple(changes),
        parameters=(sizes[""], _size(model)),
        flops=(flops[0], flops[1]) if flops else None,
        notes=notes,
    )


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo every `swap` and `convert` of a model, the latest first.

    The old modules return as they are: with the parameters that they share with the new ones as
    trained, the others as they were before the swap; in the mode, on the device and in the dtype of
    the modules that they take the place of.

    Args:
        model: The model, or a copy of it.

    Returns:
        The names at which modules were put back.

    Raises:
        ValueError: There is nothing to undo.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> _ = swap(model, nn.ReLU, lambda old: nn.SiLU())
        >>> restore(model), model
        (('0',), Sequential(
          (0): ReLU()
        ))
    """
    changes = undo(model)
    if not changes:
        raise ValueError("model: expected one with swapped layers, got none that was swapped")
    returned = set()
    for step in chain.from_iterable(changes):
        if isinstance(step.old, nn.Module) and isinstance(step.new, nn.Module):
            _like(step.old.train(step.new.training), iter([step.new, model]))
            returned.add(step.old)
    return tuple(name for name, module in model.named_modules() if module in returned)


def nothing_selected(model: nn.Module, selector: Match) -> UnknownNameError:
    """The error that a selector found nothing, with names and classes that are near."""
    wrong = selector if isinstance(selector, str) else getattr(selector, "__name__", str(selector))
    known = {name for name, _ in model.named_modules() if name}
    known |= {type(module).__name__ for module in model.modules()}
    return UnknownNameError(
        f"selector: {wrong!r} selects nothing of {type(model).__name__} ({kinds(model)})"
        f"{suggest(wrong, sorted(known))}"
    )


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


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
