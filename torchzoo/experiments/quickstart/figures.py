"""The figures of a run as rows: ours, what it is compared with, and which of them is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchzoo.experiment import Measurement
from torchzoo.experiments.quickstart.outliers import Outliers
from torchzoo.experiments.quickstart.temporal import ASKED, Temporal
from torchzoo.experiments.quickstart.timing import Timing

Unit = Literal["%", "points", "skipped", "MAC", "s", "logit", "x"]


@dataclass(frozen=True)
class Value:
    """A number with its standard error, if it has one, and a unit.

    Shares are kept as fractions and shown as per cent or percentage points.
    """

    number: float
    unit: Unit
    std_error: float | None = None

    @property
    def text(self) -> str:
        """The number as a reader sees it."""
        error = self.std_error
        if self.unit == "%":
            return f"{_percent(self.number, error)} %"
        if self.unit == "skipped":
            return f"{_percent(self.number, error)} % skipped"
        if self.unit == "points":
            return f"{_percent(self.number, error, sign='+')} points"
        if self.unit == "s":
            return _seconds(self.number)
        if self.unit == "MAC":
            return f"{self.number / 1e3:,.1f} kMAC"
        if self.unit == "x":
            return f"{self.number:.2f}x"
        return f"{self.number:.1e} in logits"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"text": self.text}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        group: The part of the quickstart that it belongs to.
        what: What was measured.
        ours: The zoo's figure.
        against: What it is compared with, in words.
        theirs: That figure.
        result: The difference, ratio or share that follows.
        better: Whether the zoo's figure is the better one; None where it can't be told.
    """

    group: str
    what: str
    ours: Value
    against: str
    theirs: Value
    result: Value
    better: bool | None

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name).to_json() for name in ("ours", "theirs", "result")}
        return asdict(self) | values


def accuracy_rows(accuracies: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Rows for the arms' test accuracies, a value a seed, paired by seed."""
    arms = {key: Measurement(key, tuple(values)) for key, values in accuracies.items()}
    for what, ours, against, theirs in (
        ("zoo parts, pretrained", "zoo_pretrained", "from scratch", "zoo_scratch"),
        (
            "zoo parts, pretrained",
            "zoo_pretrained",
            "transformer, pretrained",
            "transformer_pretrained",
        ),
        (
            "zoo parts, from scratch",
            "zoo_scratch",
            "transformer, from scratch",
            "transformer_scratch",
        ),
    ):
        gain = arms[ours] - arms[theirs]
        yield Row(
            "fine-tuning: test accuracy",
            what,
            Value(arms[ours].mean, "%", arms[ours].std_error),
            against,
            Value(arms[theirs].mean, "%", arms[theirs].std_error),
            Value(gain.mean, "points", gain.std_error),
            None if abs(gain.mean) <= gain.std_error else gain.mean > 0,
        )


def temporal_rows(temporal: Temporal) -> Iterator[Row]:
    """Rows for the exact stream and the chosen step."""
    exact, chosen = temporal.points[0], temporal.points[temporal.chosen]
    for point in (exact,) if chosen is exact else (exact, chosen):
        yield Row(
            "moving digits: work per frame",
            "delta form, " + ("exact" if point is exact else f"step {step_text(point.step)}"),
            Value(point.macs, "MAC"),
            "dense, frame by frame",
            Value(point.dense_macs, "MAC"),
            Value(point.skipped, "skipped"),
            point.skipped > 0,
        )
    group = "moving digits: what it gives"
    yield Row(
        group,
        "exact: same class",
        Value(exact.agreement, "%"),
        "as the dense model, up to rounding",
        Value(1.0, "%"),
        Value(exact.difference, "logit"),
        exact.agreement == 1,
    )
    if chosen is not exact:
        yield Row(
            group,
            f"step {step_text(chosen.step)}: same class",
            Value(chosen.agreement, "%"),
            "asked for, on films of training digits",
            Value(ASKED, "%"),
            Value(chosen.agreement - ASKED, "points"),
            chosen.agreement >= ASKED,
        )
        gain = chosen.accuracy - temporal.dense_accuracy
        yield Row(
            group,
            f"step {step_text(chosen.step)}: right class",
            Value(chosen.accuracy, "%"),
            "dense, frame by frame",
            Value(temporal.dense_accuracy, "%"),
            Value(gain, "points"),
            None,
        )


def outlier_rows(outliers: Outliers) -> Iterator[Row]:
    """A row for each kind of other pictures; differences within their error count neither way."""
    for kind in outliers.others:
        ours, theirs, gain = outliers.areas(kind)
        yield Row(
            "digits or not: area under the ROC curve",
            f"circuit, {kind.name}",
            Value(ours.number, "%", ours.std_error),
            "a classifier's largest softmax",
            Value(theirs.number, "%", theirs.std_error),
            Value(gain.number, "points", gain.std_error),
            None if abs(gain.number) <= gain.std_error else gain.number > 0,
        )


def timing_rows(timings: Sequence[Timing]) -> Iterator[Row]:
    """A row for each timed part; differences within the spread count neither way."""
    for timing in timings:
        place = "GPU" if timing.device == "cuda" else f"CPU, threads: {timing.threads}"
        ours, theirs = timing.ours, timing.theirs
        tie = abs(ours.median - theirs.median) <= max(ours.iqr, theirs.iqr)
        yield Row(
            f"time, {place}",
            timing.part,
            Value(ours.median, "s"),
            timing.counterpart,
            Value(theirs.median, "s"),
            Value(timing.speedup, "x"),
            None if tie else ours.median < theirs.median,
        )


def step_text(step: float | None) -> str:
    """A quantisation step as a fraction of the inputs' root mean square."""
    return "exact" if step is None else f"1/{round(1 / step)} rms"


def _percent(number: float, error: float | None, *, sign: str = "-") -> str:
    text = f"{round(100 * number, 1) + 0.0:{sign}.1f}"  # + 0.0: no minus before a zero
    return text if error is None else f"{text} ± {100 * error:.1f}"


def _seconds(seconds: float) -> str:
    unit, scale = ("µs", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    digits = max(0, 2 - math.floor(math.log10(max(seconds * scale, 1e-9))))
    return f"{seconds * scale:.{digits}f} {unit}"
