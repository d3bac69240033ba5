"""What a circuit is told, and the checks of it: shapes and types, values that leaves can have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["Evidence", "check_evidence", "check_values"]


class Evidence(NamedTuple):
    """What is told about samples `(N, ...)`: the arguments of `Circuit.forward`."""

    x: Tensor | None
    mask: Tensor | None
    log_w: Tensor | None

    def rows(self, index: Tensor) -> Evidence:
        """What is told about some of the samples."""
        return Evidence(*(None if told is None else told[index] for told in self))


def check_evidence(
    circuit: Circuit, x: Tensor | None, mask: Tensor | None, log_w: Tensor | None
) -> None:
    """Refuse evidence of the wrong shape or type, naming the argument."""
    size = circuit.num_variables
    if x is None and log_w is None:
        raise ValueError("x: got None, expected values, or log_w for soft evidence")
    if x is not None and (x.dim() == 0 or x.shape[-1] != size):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (*, {size})")
    finite = circuit.leaf.num_categories
    if x is not None and finite and (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"x: got dtype {x.dtype}, expected integers for {circuit.leaf!r}")
    if log_w is not None:
        if finite is None:
            raise ValueError(f"log_w: got soft evidence, expected none for {circuit.leaf!r}")
        wanted = (*(log_w.shape[:-2] if x is None else x.shape[:-1]), size, finite)
        if tuple(log_w.shape) != wanted:
            wish = wanted if x is not None else f"(*, {size}, {finite})"
            raise ValueError(f"log_w: got shape {tuple(log_w.shape)}, expected {wish}")
    if mask is not None:
        if x is None:
            raise ValueError("mask: got a mask without x, expected x")
        if mask.shape != x.shape or mask.dtype != torch.bool:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"mask: got {got}, expected bool of shape {tuple(x.shape)}")


def check_values(circuit: Circuit, folds: Tensor, observed: Tensor | None) -> None:
    """Refuse observed values that the leaves can't have; a compiled graph leaves it to the user."""
    if torch.compiler.is_compiling() or folds.device.type == "meta":
        return
    wrong = circuit.leaf.invalid(folds)
    if observed is not None:
        wrong = wrong & observed
    if wrong.any():
        fold, row = wrong.nonzero()[0].tolist()
        allowed = circuit.leaf.num_categories
        expected = f"0 to {allowed - 1}" if allowed else "a finite number"
        raise ValueError(
            f"x: got {folds[fold, row].item()} for variable {int(circuit.scope[fold])}, "
            f"expected {expected}"
        )
