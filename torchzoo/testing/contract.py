"""The contract: its checks by name, what lifts them, and running them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo import registry
from torchzoo.testing import interface, lifecycle, numerics
from torchzoo.testing.subject import Subject

Check = Callable[[Subject], None]


def _named(*checks: Check) -> dict[str, Check]:
    return {check.__name__: check for check in checks}


CHECKS: dict[str, Check] = _named(
    numerics.leading_dims,
    numerics.batch_independence,
    numerics.empty_batch,
    numerics.noncontiguous,
    numerics.gradients,
    numerics.gradcheck_float64,
    numerics.float64_agrees,
    numerics.autocast_bf16,
    numerics.determinism,
    lifecycle.state_dict_round_trip,
    lifecycle.deepcopy_round_trip,
    lifecycle.pickle_round_trip,
    lifecycle.pretrained_round_trip,
    lifecycle.meta_device,
    lifecycle.factory_kwargs,
    lifecycle.compile_fullgraph,
    lifecycle.export_equal,
    interface.wrong_shapes,
    interface.wrong_options,
    interface.docstring_sections,
    interface.doctest_runs,
)
"""The contract: name to a function that raises where a `Subject` breaks it."""

SLOW_CHECKS: dict[str, Check] = _named(lifecycle.compile_inductor)
"""Checks that need a compiler and take seconds; not part of `check_module`."""

EXEMPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stateful": (
        "A call changes the module, so a second call with the same inputs may differ.",
        ("determinism",),
    ),
    "stochastic": (
        "Draws random numbers in evaluation too, one by one for the elements of a batch, so the "
        "same row gets other numbers in another batch or another precision.",
        ("batch_independence", "leading_dims", "float64_agrees", "autocast_bf16"),
    ),
    "couples-batch": (
        "Rows of a batch act on each other by design.",
        ("batch_independence",),
    ),
    "data-dependent-shape": (
        "Sizes of outputs depend on values of inputs, which no static graph can hold.",
        ("leading_dims", "batch_independence", "meta_device", "compile_fullgraph", "export_equal"),
    ),
    "fixed-rank": (
        "Inputs have exactly the documented number of dimensions.",
        ("leading_dims",),
    ),
}
"""For each capability: what it means, and the checks that it lifts."""


def applies(check: str, exempt: Collection[str], batch_dims: int = 1) -> bool:
    """Whether a module with these exemptions is held to a check."""
    if batch_dims == 0 and check in ("leading_dims", "batch_independence", "empty_batch"):
        return False
    return not any(check == item or check in EXEMPTIONS.get(item, ("", ()))[1] for item in exempt)


def check_module(
    factory: Callable[..., nn.Module],
    inputs: Sequence[Tensor],
    *,
    batch_dims: int = 1,
    bad_options: Mapping[str, Any] | None = None,
    exempt: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> None:
    """Hold a module to the contract: run every check and report all that fail.

    Args:
        factory: The class, or a callable with keyword arguments (`device`, `dtype` and those of
            `bad_options`) that gives a module.
        inputs: Positional inputs of `forward`, small; floating-point ones get gradients.
        batch_dims: How many leading dimensions of each input are batch dimensions; with 0 the
            checks of the batch are left out.
        bad_options: For some arguments a value that must raise a ValueError naming the argument.
        exempt: Capabilities of `EXEMPTIONS`, or names of checks, that lift checks.
        device: Where to run.

    Raises:
        AssertionError: Some checks fail; the message lists each with its reason.
        ValueError: `exempt` has an unknown name.
    """
    if unknown := sorted(set(exempt) - set(EXEMPTIONS) - set(CHECKS)):
        known = sorted({*EXEMPTIONS, *CHECKS})
        raise ValueError(f"exempt: expected names of {known}, got {unknown[0]!r}")
    subject = Subject(
        factory,
        tuple(inputs),
        batch_dims=batch_dims,
        bad_options=bad_options,
        exempt=frozenset(exempt),
        device=torch.device(device),
    )
    _run_all(subject)


def check_registered(name: str, device: torch.device | str = "cpu") -> None:
    """`check_module` for a registered module, by name, with the example of its card.

    Raises:
        AssertionError: Some checks fail; the message lists each with its reason.
        UnknownNameError: No such module.
    """
    _run_all(Subject.of(registry.card(name), device))


def _run_all(subject: Subject) -> None:
    failed = []
    for name, check in CHECKS.items():
        if applies(name, subject.exempt, subject.batch_dims):
            try:
                check(subject)
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                failed.append(f"{name}: {kind}{error}")
    if failed:
        count = f"{len(failed)} of {len(CHECKS)} checks"
        raise AssertionError("\n".join([f"{subject.name} fails {count}", *failed]))
