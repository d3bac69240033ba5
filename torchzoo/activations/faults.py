"""Bit flips in the memory that holds a network, and what they do to its accuracy.

Each bit of each stored word is wrong with the same probability, the bit error rate, independently
of the others: the words of weights, biases, statistics and thresholds alike. The number of flips is
binomial, and given it every set of places is equally likely; so places are drawn, not bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Format = Literal["float64", "float32", "bfloat16", "float16", "fixed", "int8"]
Targets = str | Callable[[str, Tensor], bool]

_FLOATS = {
    "float64": (torch.float64, torch.int64, 64),
    "float32": (torch.float32, torch.int32, 32),
    "bfloat16": (torch.bfloat16, torch.int16, 16),
    "float16": (torch.float16, torch.int16, 16),
}


@dataclass(frozen=True)
class BitFlips:
    """Which bits were flipped.

    Attributes:
        positions: For each tensor, by name, the flipped bits: word times bits of a word, plus the
            bit, of which 0 is the lowest.
        bits: Bits that could have flipped, of all tensors.
    """

    positions: Mapping[str, Tensor]
    bits: int

    @property
    def count(self) -> int:
        """Number of flips."""
        return sum(len(places) for places in self.positions.values())


class FaultSweep(NamedTuple):
    """What bit flips cost, for each bit error rate.

    Attributes:
        mean: Mean accuracy over the trials, in [0, 1], `(R,)`.
        std: Standard deviation of the accuracy over the trials, `(R,)`.
        critical: Share of inputs whose class is another than without faults, `(R,)`.
    """

    mean: Tensor
    std: Tensor
    critical: Tensor


def inject_bit_flips(
    model: nn.Module,
    ber: float,
    *,
    format: Format = "float32",
    int_bits: int = 15,
    frac_bits: int = 16,
    generator: torch.Generator | None = None,
    targets: Targets = "all",
) -> AbstractContextManager[BitFlips]:
    """Flip bits of the tensors that a model stores, while the context is open.

    Where the format is a tensor's own type, its bits are flipped in place; else the tensor takes
    the values that its words in this format have, which rounds those too that no flip hits. When
    the context closes, by an exception too, every bit is as it was. Contexts may be nested.

    Args:
        model: Any module; its parameters and floating-point buffers of the `state_dict` count.
        ber: Probability that a bit is flipped, in [0, 1].
        format: How numbers are stored: a floating-point type; `"fixed"`, a sign, integer and
            fraction bits in two's complement; `"int8"`, with a scale for each tensor that is kept
            free of faults.
        int_bits: Integer bits of the fixed format.
        frac_bits: Fraction bits of the fixed format.
        generator: Draws number and places of the flips, on the CPU; None: torch's own.
        targets: `"all"`, a glob over names in the `state_dict`, or a predicate of name and tensor.

    Returns:
        A context manager that gives the `BitFlips`.

    Raises:
        ValueError: `ber` is not in [0, 1], the format is unknown or has too many bits, or no tensor
            is a target.

    Source:
        S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct:
        Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
        2024: the fault model.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> with inject_bit_flips(model, 1.0) as flips:
        ...     flips.count == flips.bits == 10 * 32
        True
    """
    if not 0 <= ber <= 1:
        raise ValueError(f"ber: expected a probability in [0, 1], got {ber}")
    known = (*_FLOATS, "fixed", "int8")
    if format not in known:
        raise ValueError(f"format: expected one of {', '.join(known)}, got {format!r}")
    for name, value in (("int_bits", int_bits), ("frac_bits", frac_bits)):
        if value < 0 or 1 + int_bits + frac_bits > 53:
            raise ValueError(f"{name}: expected 0 or more, at most 52 with both, got {value}")
    tensors = _targets(model, targets)
    return _flipped(tensors, ber, format, (int_bits, frac_bits), generator)


def fault_sweep(
    model: nn.Module,
    loader: Iterable[Any],
    bers: Sequence[float],
    trials: int,
    *,
    format: Format = "float32",
    int_bits: int = 15,
    frac_bits: int = 16,
    generator: torch.Generator | None = None,
    targets: Targets = "all",
) -> FaultSweep:
    """Accuracy of a classifier under bit flips.

    Args:
        model: The classifier; it is evaluated in evaluation mode and left in its own.
        loader: Batches `(x, y)`; gone through once for each trial.
        bers: Bit error rates.
        trials: Injections for each rate.
        format: As for `inject_bit_flips`.
        int_bits: As for `inject_bit_flips`.
        frac_bits: As for `inject_bit_flips`.
        generator: As for `inject_bit_flips`.
        targets: As for `inject_bit_flips`.

    Returns:
        Mean and standard deviation of the accuracy, and the share of changed classes. Logits that
        are NaN or infinite count as wrong, and as changed.

    Raises:
        ValueError: `trials` is below 1, no batch comes, or as for `inject_bit_flips`.

    Example:
        >>> batch = torch.eye(3), torch.arange(3)
        >>> mean, std, critical = fault_sweep(nn.Linear(3, 3), [batch], [0.0, 1e-3], 2)
        >>> std[0], critical[0]
        (tensor(0., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    if trials < 1:
        raise ValueError(f"trials: expected 1 or more, got {trials}")
    clean, labels = predictions(model, loader)
    accuracy = torch.zeros(len(bers), trials, dtype=torch.float64)
    changed = torch.zeros_like(accuracy)
    for r, ber in enumerate(bers):
        for t in range(trials):
            with inject_bit_flips(
                model,
                ber,
                format=format,
                int_bits=int_bits,
                frac_bits=frac_bits,
                generator=generator,
                targets=targets,
            ):
                found, _ = predictions(model, loader)
            accuracy[r, t] = (found == labels).double().mean()
            changed[r, t] = (found != clean).double().mean()
    std = accuracy.std(1, correction=1 if trials > 1 else 0)
    return FaultSweep(accuracy.mean(1), std, changed.mean(1))


@torch.no_grad()
def predictions(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Predicted classes, -1 where a logit is not finite, and labels, both `(N,)` on the CPU.

    The model computes in evaluation mode and is left in its own.

    Raises:
        ValueError: No batch comes.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
        >>> predictions(nn.Identity(), [(logits, torch.ones(2))])
        (tensor([ 1, -1]), tensor([1., 1.]))
    """
    training = model.training
    model.eval()
    try:
        found, labels = [], []
        for x, y in loader:
            logits = model(x)
            bad = ~logits.isfinite().all(-1)
            found.append(logits.argmax(-1).masked_fill(bad, -1).cpu())
            labels.append(y.cpu())
    finally:
        model.train(training)
    if not found:
        raise ValueError("loader: expected at least one batch, got none")
    return torch.cat(found), torch.cat(labels)


def _targets(model: nn.Module, targets: Targets) -> dict[str, Tensor]:
    """The stored floating-point tensors that are targets, each once."""
    stored = set(model.state_dict())
    chosen = {
        name: tensor.detach()
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if name in stored
        and tensor.is_floating_point()
        and (
            targets == "all" or fnmatchcase(name, targets)
            if isinstance(targets, str)
            else targets(name, tensor)
        )
    }
    if not chosen:
        raise ValueError(f"targets: expected a rule that selects a stored tensor, got {targets!r}")
    return chosen


@contextmanager
def _flipped(
    tensors: dict[str, Tensor],
    ber: float,
    format: str,
    fixed: tuple[int, int],
    generator: torch.Generator | None,
) -> Iterator[BitFlips]:
    undo: list[Callable[[], Any]] = []
    positions, total = {}, 0
    try:
        for name, tensor in tensors.items():
            words, width, load = _store(tensor, format, fixed)
            bits = tensor.numel() * width
            places = _places(bits, ber, generator)
            index, mask = _masks(places.to(tensor.device), width, words.dtype)
            old = words.take(index)
            if load is None:  # the words are the tensor's own memory
                undo.append(partial(words.put_, index, old))
                words.put_(index, old ^ mask)
            else:
                undo.append(partial(tensor.copy_, tensor.clone()))
                tensor.copy_(load(words.put_(index, old ^ mask)))
            positions[name], total = places, total + bits
        yield BitFlips(positions, total)
    finally:
        for restore in reversed(undo):
            restore()


def _store(
    tensor: Tensor, format: str, fixed: tuple[int, int]
) -> tuple[Tensor, int, Callable[[Tensor], Tensor] | None]:
    """A tensor's words, the bits of one, and how words are read; None: they share its memory."""
    if format in _FLOATS:
        dtype, integer, width = _FLOATS[format]
        if tensor.dtype == dtype:
            return tensor.view(integer), width, None
        return tensor.to(dtype).view(integer), width, lambda words: words.view(dtype)
    if format == "int8":
        scale = (tensor.abs().amax() / 127 if tensor.numel() else tensor.new_ones(())).double()
        scale = torch.where(scale > 0, scale, 1.0)
        words = (tensor.double() / scale).round().to(torch.int8)
        return words, 8, lambda words: words.double() * scale
    int_bits, frac_bits = fixed
    width, sign = 1 + int_bits + frac_bits, 2 ** (int_bits + frac_bits)
    scaled = (tensor.double() * 2.0**frac_bits).round()
    words = scaled.nan_to_num(0.0).clamp(-sign, sign - 1).to(torch.int64)

    def load(words: Tensor) -> Tensor:
        extended = ((words & (2 * sign - 1)) ^ sign) - sign
        return extended.double() / 2.0**frac_bits

    return words, width, load


def _places(bits: int, ber: float, generator: torch.Generator | None) -> Tensor:
    """Distinct places among so many bits, on the CPU, in ascending order."""
    size, rate = (torch.tensor(float(value), dtype=torch.float64) for value in (bits, ber))
    count = int(torch.binomial(size, rate, generator=generator))
    if 4 * count > bits:
        return torch.randperm(bits, generator=generator)[:count].sort().values
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < count:  # distinct draws are as good as draws without replacement
        more = torch.randint(bits, (count - len(places),), generator=generator)
        places = torch.cat([places, more]).unique()
    return places


def _masks(places: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The words that are hit, and for each of them its flipped bits."""
    index, group = (places // width).unique(return_inverse=True)
    bit = torch.ones_like(places) << (places % width)
    return index, torch.zeros_like(index).index_add_(0, group, bit).to(dtype)
