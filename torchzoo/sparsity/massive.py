"""Massive activations: a meter of a model's residual stream, and interventions on it.

Gallego-Feliciano, McClendon, Morinelli, Zervoudakis and Saravanos, "Hidden Dynamics of Massive
Activations in Transformer Training", 2025, after Sun, Chen, Kolter and Liu, "Massive activations in
large language models", 2024. For the output h (S, d) of a transformer block, after its residual
sum, and one sequence,

    r = max abs(h) / median abs(h)                 over all S·d entries,
    massive: abs(a) > 100 and abs(a) >= 1000 · median abs(h).

The median of an even number of entries is the mean of the two in the middle. Over several
sequences r is the mean of the maxima over the mean of the medians. How r grows in training is the
subject of `EmergenceCurve`.

Deviations: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.sparsity.hosts import Watch, find_blocks
from torchzoo.surgery import Match, find

ABS_MIN, RATIO = 100.0, 1000.0


def massive_mask(h: Tensor, *, abs_min: float = ABS_MIN, ratio: float = RATIO) -> Tensor:
    """Which entries of a residual stream are massive.

    Args:
        h: Output of a block; the last two dimensions are one sequence.
        abs_min: Massive entries are larger than this, in absolute value.
        ratio: And at least this many medians of their sequence.

    Shape:
        - h: `(..., S, d)`
        - output: `(..., S, d)`, bool

    Raises:
        ValueError: Fewer than 2 dimensions, or no entries.

    Source:
        Sun, Chen, Kolter and Liu, "Massive activations in large language models", 2024, section 2.

    Example:
        >>> h = torch.ones(3, 4)
        >>> h[0, 2] = -2000.0
        >>> massive_mask(h).nonzero().tolist()
        [[0, 2]]
    """
    sizes = _sizes(h)
    medians = exact_median(sizes.flatten(-2))[..., None, None]
    return (sizes > abs_min) & (sizes >= ratio * medians)


def exact_median(values: Tensor) -> Tensor:
    """Median over the last dimension: of an even number the mean of the two in the middle.

    Example:
        >>> exact_median(torch.tensor([4.0, 1.0, 2.0, 9.0]))
        tensor(3.)
    """
    n = values.shape[-1]
    upper = values.kthvalue(n // 2 + 1, dim=-1).values
    return upper if n % 2 else (values.kthvalue(n // 2, dim=-1).values + upper) / 2


class MassiveReport(NamedTuple):
    """What a meter saw, on the CPU, a row a block.

    Attributes:
        names: Names of the blocks.
        ratios: Largest over median, `(L,)`.
        medians: Mean median of the sequences, `(L,)`.
        topk: The largest sizes of all, `(L, top)`.
        positions: Token and channel of these, `(L, top, 2)`.
        counts: How many entries were massive by the meter's rule, `(L,)`.
        sequences: How many sequences were measured.
    """

    names: tuple[str, ...]
    ratios: Tensor
    medians: Tensor
    topk: Tensor
    positions: Tensor
    counts: Tensor
    sequences: int

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        lines = [f"{'block':{width}}  max/median    median  massive  largest at (token, channel)"]
        rows = zip(*self[:-1], strict=True)
        for name, ratio, median, sizes, places, count in rows:
            largest = ", ".join(
                f"{size:.3g} ({token}, {channel})"
                for size, (token, channel) in zip(sizes.tolist(), places.tolist(), strict=True)
            )
            lines.append(f"{name:{width}}  {ratio:10.4g}  {median:8.3g}  {count:7d}  {largest}")
        return "\n".join(lines)


class MassiveActivationMeter(Watch):
    """Watches how far the largest activation of each block stands out, while it is entered.

    Every call of a block is a step of the history; the sequences of all steps make the other
    figures. Nothing waits for the device until a figure is read. Values are compared in float32
    (float64 for float64). Compiled models run eagerly while the meter is open.

    Args:
        model: The model to watch.
        blocks: Which modules put out the residual stream `(..., S, d)`, alone or as the first of a
            tuple; None: the blocks that `find_blocks` finds.
        top: How many of the largest entries to keep.
        rule: Which entries are counted as massive: `"ratio"`: those of at least 1000 medians,
            `"sun2024"`: those that are above 100 too.
        every: Measure one of so many calls of a block, beginning with the first.
        average: Of several sequences: `"ratio_of_means"`, the mean of the largest over the mean of
            the medians, or `"mean_of_ratios"`.
        sample: Where a sequence has more entries than this, take the median of so many, drawn at
            random: of n entries from a normal distribution its standard error is 1.17 / sqrt(n) of
            the median, about 1 % for 10,000.

    Raises:
        ValueError: No block, `top` or `every` or `sample` < 1, an unknown rule or average, or a
            block that puts out something else.

    Source:
        Gallego-Feliciano et al., "Hidden Dynamics of Massive Activations in Transformer Training",
        2025, section 3.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        >>> with MassiveActivationMeter(model) as meter:
        ...     _ = model(torch.randn(3, 5, 8))
        >>> meter.ratios.shape, meter.history.shape, meter.positions.shape
        (torch.Size([2]), torch.Size([1, 2]), torch.Size([2, 3, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Match | None = None,
        *,
        top: int = 3,
        rule: Literal["ratio", "sun2024"] = "ratio",
        every: int = 1,
        average: Literal["ratio_of_means", "mean_of_ratios"] = "ratio_of_means",
        sample: int | None = None,
    ):
        super().__init__()
        for name, value in (("top", top), ("every", every), ("sample", sample)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if rule not in ("ratio", "sun2024"):
            raise ValueError(f"rule: expected 'ratio' or 'sun2024', got {rule!r}")
        if average not in ("ratio_of_means", "mean_of_ratios"):
            raise ValueError(
                f"average: expected 'ratio_of_means' or 'mean_of_ratios', got {average!r}"
            )
        self._blocks = _choose(model, blocks)
        self.top, self.every, self.average, self.sample = top, every, average, sample
        self._abs_min = ABS_MIN if rule == "sun2024" else 0.0
        self.reset()

    def reset(self) -> None:
        """Forget all that was measured."""
        self._seen = {name: _Seen() for name in self._blocks}
        self._calls = dict.fromkeys(self._blocks, 0)
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks that were called, in the model's order."""
        return tuple(name for name, seen in self._seen.items() if seen.steps)

    @property
    def ratios(self) -> Tensor:
        """Largest over median of all sequences, `(L,)`."""
        return self._rows(lambda seen: self._ratio(torch.stack(seen.steps).sum(0)))

    @property
    def history(self) -> Tensor:
        """Largest over median of each step, `(steps, L)`.

        Raises:
            ValueError: The blocks were not called equally often.
        """
        steps = {len(self._seen[name].steps) for name in self.names}
        if len(steps) > 1:
            raise ValueError(f"history: expected blocks called equally often, got {sorted(steps)}")
        return self._rows(lambda seen: self._ratio(torch.stack(seen.steps))).mT

    @property
    def topk(self) -> Tensor:
        """The largest sizes over all sequences, `(L, top)`; 0 where there were fewer entries."""
        return self._rows(lambda seen: seen.sizes)

    @property
    def positions(self) -> Tensor:
        """Token and channel of the largest entries, `(L, top, 2)`."""
        return self._rows(lambda seen: seen.places)

    @property
    def counts(self) -> Tensor:
        """How many entries were massive, by the rule, `(L,)`."""
        return self._rows(lambda seen: torch.stack(seen.massive).sum())

    def compute(self) -> MassiveReport:
        """All figures at once; printed, they say where a model keeps its attention sinks."""
        totals = self._rows(lambda seen: torch.stack(seen.steps).sum(0))
        return MassiveReport(
            self.names,
            self.ratios,
            totals[:, 1] / totals[:, 3],
            self.topk,
            self.positions,
            self.counts,
            int(totals[0, 3]),
        )

    def _ratio(self, sums: Tensor) -> Tensor:
        """From sums over sequences of maximum, median, ratio and 1, in the last dimension."""
        largest, median, ratio, count = sums.unbind(-1)
        return largest / median if self.average == "ratio_of_means" else ratio / count

    def _rows(self, figure: Callable[[_Seen], Tensor]) -> Tensor:
        if not self.names:
            raise ValueError("meter: nothing measured yet; run the model inside the context first")
        return torch.stack([figure(self._seen[name]).cpu() for name in self.names])

    def _hooks(self) -> list[Callable[[], None]]:
        return [
            _on_stream(name, block, partial(self._measure, name))
            for name, block in self._blocks.items()
        ]

    @torch.no_grad()
    def _measure(self, name: str, h: Tensor) -> None:
        self._calls[name] += 1
        if (self._calls[name] - 1) % self.every or not h.numel():
            return
        sizes = _sizes(h).reshape(-1, *h.shape[-2:])
        flat = sizes.flatten(-2)
        medians, largest = self._medians(flat), flat.amax(-1)
        massive = (flat > self._abs_min) & (flat >= RATIO * medians[:, None])
        sums = (largest, medians, largest / medians, torch.ones_like(medians))
        step = torch.stack([values.double().sum() for values in sums])
        self._seen[name].add(step, massive.sum(), sizes, self.top)

    def _medians(self, flat: Tensor) -> Tensor:
        if self.sample is None or flat.shape[-1] <= self.sample:
            return exact_median(flat)
        device = flat.device
        if device not in self._generators:  # one of its own, to leave the model's draws as they are
            self._generators[device] = torch.Generator(device).manual_seed(0)
        places = torch.randint(
            flat.shape[-1], (self.sample,), device=device, generator=self._generators[device]
        )
        return exact_median(flat[:, places])


class _Seen:
    """What was measured of one block, on its device."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.massive: list[Tensor] = []
        self.sizes = torch.zeros(0)
        self.places = torch.zeros(0, 2, dtype=torch.int64)

    def add(self, step: Tensor, massive: Tensor, sizes: Tensor, top: int) -> None:
        self.steps.append(step)
        self.massive.append(massive)
        largest = sizes.flatten().topk(min(top, sizes.numel()))
        inside = largest.indices % (sizes.shape[-2] * sizes.shape[-1])
        places = torch.stack([inside // sizes.shape[-1], inside % sizes.shape[-1]], -1)
        if not len(self.sizes):
            self.sizes, self.places = sizes.new_zeros(top), places.new_zeros(top, 2)
        both = torch.cat([self.sizes, largest.values])
        self.sizes, order = both.topk(top)
        self.places = torch.cat([self.places, places])[order]


@contextmanager
def intervene(
    model: nn.Module,
    mode: Literal["zero", "mean", "clamp"] = "zero",
    *,
    blocks: Match | None = None,
    abs_min: float = ABS_MIN,
    ratio: float = RATIO,
    limit: float | None = None,
) -> Iterator[None]:
    """Change the massive entries that blocks put out, while the context is open, and no others.

    Args:
        model: The model. Compiled, it runs eagerly inside the context.
        mode: `"zero"`: they become 0; `"mean"`: the mean of the massive entries of their channel,
            over sequences and tokens; `"clamp"`: they keep their sign, and get the size `limit`
            where they are larger.
        blocks: Which modules put out the residual stream; None: those that `find_blocks` finds.
        abs_min: Rule for what is massive, as for `massive_mask`.
        ratio: The same.
        limit: For `"clamp"`; None: the largest size in the sequence that is not massive.

    Returns:
        A context manager; after it the model is as before.

    Raises:
        ValueError: An unknown mode, no block, `limit` < 0 or with another mode, or a block that
            puts out something else.

    Source:
        Sun, Chen, Kolter and Liu, "Massive activations in large language models", 2024, section 3:
        setting massive activations to zero breaks a model, to their mean doesn't.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        >>> with intervene(model, "zero", abs_min=0.5, ratio=0.0):
        ...     y = model(torch.randn(3, 2))
        >>> y.abs().max() < 0.5
        tensor(True)
    """
    if mode not in ("zero", "mean", "clamp"):
        raise ValueError(f"mode: expected 'zero', 'mean' or 'clamp', got {mode!r}")
    if limit is not None and (mode != "clamp" or not limit >= 0):
        raise ValueError(
            f"limit: expected a number ≥ 0 with mode='clamp', got {limit} for {mode!r}"
        )

    def changed(h: Tensor) -> Tensor:
        mask = massive_mask(h, abs_min=abs_min, ratio=ratio)
        if mode == "zero":
            return torch.where(mask, 0.0, h)
        if mode == "mean":
            over = tuple(range(h.ndim - 1))
            count = mask.sum(over).clamp_min(1)
            mean = torch.where(mask, h, 0.0).sum(over, dtype=torch.float64) / count
            return torch.where(mask, mean.to(h.dtype), h)
        most = h.abs().masked_fill(mask, 0.0).amax((-2, -1), keepdim=True)
        most = most if limit is None else torch.full_like(most, limit)
        return torch.where(mask, h.sign() * h.abs().minimum(most), h)

    with _Rewrite(_choose(model, blocks), changed):
        yield


class _Rewrite(Watch):
    """Puts something else in the place of what blocks put out."""

    def __init__(self, blocks: dict[str, nn.Module], changed: Callable[[Tensor], Tensor]):
        super().__init__()
        self._blocks, self._changed = blocks, changed

    def _hooks(self) -> list[Callable[[], None]]:
        return [_on_stream(name, block, self._changed) for name, block in self._blocks.items()]


def _on_stream(
    name: str, block: nn.Module, see: Callable[[Tensor], Tensor | None]
) -> Callable[[], None]:
    """Show what a block puts out; a tensor that comes back takes its place. Gives what ends it."""

    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        h = see(_stream(name, output))
        return (h, *output[1:]) if h is not None and isinstance(output, tuple) else h

    return block.register_forward_hook(hook).remove


def _choose(model: nn.Module, blocks: Match | None) -> dict[str, nn.Module]:
    if blocks is None:
        return find_blocks(model)
    found = find(model, blocks)
    if not found:
        raise ValueError(f"blocks: expected a rule that selects a module, got none for {blocks!r}")
    return found


def _stream(name: str, output: Any) -> Tensor:
    h = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(h, Tensor) or h.ndim < 2:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"blocks: expected {name} to put out a tensor (..., S, d), got {got}")
    return h


def _sizes(h: Tensor) -> Tensor:
    """Absolute values, in at least float32."""
    if h.ndim < 2 or not h.shape[-1] * h.shape[-2]:
        raise ValueError(f"h: expected shape (..., S, d) with entries, got {tuple(h.shape)}")
    return h.detach().abs().to(torch.promote_types(h.dtype, torch.float32))
