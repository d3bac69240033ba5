"""The report's pictures, as SVG, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from torchzoo.experiments.circuits.compression import LEVELS, SIDE
from torchzoo.experiments.quickstart.figures import Value, step_text
from torchzoo.experiments.quickstart.finetune import ARMS, Run
from torchzoo.experiments.quickstart.outcome import Outcome
from torchzoo.experiments.quickstart.outliers import KEPT
from torchzoo.experiments.quickstart.temporal import HOLD

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b7280"
COLORS = (BLUE, ORANGE, GREEN, PURPLE)
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelcolor": "#374151",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "svg.hashsalt": "torchzoo",
}


class Plot(NamedTuple):
    """A picture with its words.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: The picture.
    """

    title: str
    caption: str
    svg: str


def plots(outcome: Outcome) -> list[Plot]:
    """All pictures of a run."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return [
            _accuracy(outcome),
            _gates(outcome),
            _load(outcome),
            _skipped(outcome),
            _tradeoff(outcome),
            _outliers(outcome),
            _times(outcome),
        ]


def _draw(paint: Callable[[Any], None], *, width: float = 5.2, height: float = 3.3) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    paint(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _accuracy(outcome: Outcome) -> Plot:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for arm in ARMS:
            runs = outcome.runs[arm.key]
            values = torch.tensor([run.accuracy for run in runs])
            mean, error = values.mean(0), values.std(0) / len(runs) ** 0.5
            look = {"color": BLUE if arm.zoo else ORANGE, "ls": "-" if arm.weights else "--"}
            axes.plot(runs[0].epochs, mean, label=arm.title, lw=1.8, **look)
            axes.fill_between(
                runs[0].epochs, mean - error, mean + error, color=look["color"], alpha=0.13, lw=0
            )
        axes.axhline(0.2, color=GREY, lw=0.8, ls=":")
        axes.text(runs[0].epochs[-1], 0.205, "chance", ha="right", va="bottom", color=GREY, size=8)
        axes.set(xlabel="epoch", ylabel="test accuracy, digits 5 to 9", ylim=(0, 1))
        axes.grid(axis="y")
        _percent_axis(axes.yaxis)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8.5)

    labels = outcome.setup["labels_per_class"]
    seeds = outcome.setup["budget"]["seeds"]
    return Plot(
        "Accuracy by epoch",
        f"{labels} labelled images of each class; mean of {seeds} seeds, bands are ± one standard "
        "error. Every arm gets the same labels and the same number of updates.",
        _draw(paint),
    )


def _first(outcome: Outcome) -> Run:
    return outcome.runs["zoo_pretrained"][0]


def _gates(outcome: Outcome) -> Plot:
    run = _first(outcome)

    def paint(figure: Any) -> None:
        upper, lower = figure.subplots(2, sharex=True)
        upper.plot(run.epochs, run.temperature, color=PURPLE, lw=1.8)
        upper.set(ylabel="temperature", ylim=(0, 2.05))
        lower.plot(run.epochs, run.active, color=BLUE, lw=1.8)
        experts = len(run.load[0][0])
        lower.set(ylabel="experts a token", xlabel="epoch", ylim=(0.9, experts + 0.1))
        lower.set_yticks(range(1, experts + 1))
        for axes in (upper, lower):
            axes.grid(axis="y")

    return Plot(
        "From dense to sparse",
        "As the gates' temperature falls, fewer experts stay above the threshold of 0.1 "
        f"for a token: {run.active[0]:.1f} at first, {run.active[-1]:.1f} in the end "
        "(pretrained model, first seed).",
        _draw(paint),
    )


def _load(outcome: Outcome) -> Plot:
    run = _first(outcome)
    loads = torch.tensor(run.load)  # (looks, blocks, experts)

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, loads.shape[1], sharey=True, squeeze=False)[0]
        for block, axes in enumerate(panels):
            bands = axes.stackplot(
                run.epochs, loads[:, block].T, colors=[BLUE, "#56B4E9", "#F0E442", ORANGE]
            )
            for band in bands:
                band.set(edgecolor="white", linewidth=0.6)
            ends = loads[-1, block].cumsum(0) - loads[-1, block] / 2
            for expert, height in enumerate(ends.tolist()):
                if loads[-1, block, expert] > 0.04:
                    axes.text(1.01, height, str(expert + 1), transform=axes.transAxes, va="center")
            axes.set(xlabel="epoch", title=f"block {block + 1}", ylim=(0, 1))
            axes.margins(x=0)
        panels[0].set_ylabel("share of the work")
        _percent_axis(panels[0].yaxis)

    return Plot(
        "Which expert works",
        "Share of the tokens' slots that each expert has, by epoch; numbers on the right name the "
        "experts (pretrained model, first seed).",
        _draw(paint),
    )


def _skipped(outcome: Outcome) -> Plot:
    stream = outcome.stream
    exact, chosen = stream.points[0], stream.points[stream.chosen]
    frames = range(1, len(exact.skipped_by_frame) + 1)

    def paint(figure: Any) -> None:
        strip = torch.cat(list(stream.film[: min(8, len(stream.film))]), dim=1)
        film, axes = figure.subplots(2, height_ratios=(1, 4))
        film.imshow(strip, cmap="gray", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
        film.set_xticks([])
        film.set_yticks([])
        film.set_title(f"the first {strip.shape[1] // strip.shape[0]} frames of a film", size=9)
        for edge in range(1, strip.shape[1] // strip.shape[0]):
            film.axvline(edge * strip.shape[0] - 0.5, color="#56B4E9", lw=0.8)
        if chosen is not exact:
            axes.plot(
                frames,
                chosen.skipped_by_frame,
                "o-",
                ms=3.5,
                color=BLUE,
                label=f"step {step_text(chosen.step)}",
            )
        axes.plot(frames, exact.skipped_by_frame, "s--", ms=3, color=ORANGE, label="exact")
        axes.set(xlabel="frame", ylabel="MACs skipped", ylim=(0, 1))
        axes.grid(axis="y")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _percent_axis(axes.yaxis)
        axes.legend(loc="upper right", ncols=2, fontsize=8.5)

    return Plot(
        "Work skipped, frame by frame",
        f"Share of the linear layers' multiply-accumulates (MACs). The digit moves every {HOLD} "
        "frames; in between only sensor noise changes.",
        _draw(paint, height=3.8),
    )


def _tradeoff(outcome: Outcome) -> Plot:
    points, chosen = outcome.stream.points, outcome.stream.chosen

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        x = range(len(points))
        axes.axvspan(chosen - 0.3, chosen + 0.3, color="#e5e7eb", lw=0)
        axes.text(chosen, 0.02, "chosen", ha="center", color=GREY, size=8.5)
        axes.plot(
            x, [p.agreement for p in points], "s--", color=ORANGE, label="same class as dense"
        )
        axes.plot(x, [p.skipped for p in points], "o-", color=BLUE, label="MACs skipped")
        axes.set_xticks(list(x), [step_text(p.step).removesuffix(" rms") for p in points])
        axes.set(xlabel="quantisation step, in rms of a layer's inputs", ylim=(0, 1.04))
        axes.grid(axis="y")
        _percent_axis(axes.yaxis)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), fontsize=8.5)

    return Plot(
        "What a coarser step saves and costs",
        "On films of test digits. The step was chosen on films of training digits: the coarsest "
        "that gives the dense model's class on 99 % of the frames.",
        _draw(paint),
    )


def _outliers(outcome: Outcome) -> Plot:
    outliers = outcome.outliers
    kinds = [outliers.digits, *outliers.others]

    def paint(figure: Any) -> None:
        upper, lower = figure.subfigures(2, height_ratios=(1, 2.4))
        for axes, kind, color in zip(upper.subplots(1, len(kinds)), kinds, COLORS, strict=True):
            tiles = kind.levels[:6].view(2, 3, SIDE, SIDE)
            tiles = torch.nn.functional.pad(tiles, (1, 0, 1, 0), value=LEVELS - 1)
            axes.imshow(tiles.transpose(1, 2).reshape(2 * SIDE + 2, -1), cmap="gray")
            axes.set_title(
                kind.name.replace(", ", ",\n").replace(" of ", "\nof "), color=color, size=8.5
            )
            axes.axis("off")
        panels = lower.subplots(1, 2)
        for axes, scores in zip(
            panels,
            ([kind.bits for kind in kinds], [kind.confidence.exp() for kind in kinds]),
            strict=True,
        ):
            edges = torch.linspace(
                float(min(s.min() for s in scores)), float(max(s.max() for s in scores)), 26
            )
            for values, color in zip(scores, COLORS, strict=True):
                axes.hist(
                    values,
                    edges,
                    weights=torch.full_like(values, 1 / len(values)),
                    histtype="step",
                    lw=1.6,
                    color=color,
                )
            _percent_axis(axes.yaxis)
            axes.grid(axis="y")
        panels[0].axvline(outliers.threshold, color=GREY, lw=0.9, ls=":")
        panels[0].set(xlabel="circuit: bits a pixel", ylabel="share of the pictures")
        panels[1].set(xlabel="classifier: largest softmax")

    flagged = "; ".join(
        f"{kind.name} {ours:.0%} and {theirs:.0%}"
        for kind in outliers.others
        for ours, theirs in [outliers.flagged(kind)]
    )
    return Plot(
        "Digits, or something else?",
        "Six pictures of each kind, and the scores of all. Dotted: a threshold below which "
        f"{KEPT:.0%} of the digits stay. Where each of the two scores keeps as many, circuit and "
        f"classifier flag: {flagged}. Turned digits are easy for the circuit: digits leave the "
        "columns at the sides empty, and turned ones fill them.",
        _draw(paint, height=4.4),
    )


def _times(outcome: Outcome) -> Plot:
    rows = outcome.timings

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        places = torch.arange(len(rows)).flip(0).double()
        for shift, color, name, side in (
            (0.19, BLUE, "torchzoo", "ours"),
            (-0.19, ORANGE, "dense counterpart", "theirs"),
        ):
            seconds = [getattr(row, side).median for row in rows]
            axes.barh(places + shift, seconds, height=0.34, color=color, label=name)
            for place, value in zip(places + shift, seconds, strict=True):
                axes.text(value * 1.08, float(place), Value(value, "s").text, va="center", size=8)
        names = [_wrapped(row.part, gpu=row.device == "cuda") for row in rows]
        axes.set_yticks(places.tolist(), names, size=8.5)
        low = min(min(row.ours.median, row.theirs.median) for row in rows)
        high = max(max(row.ours.median, row.theirs.median) for row in rows)
        axes.set_xscale("log")
        axes.set(xlim=(low / 3, high * 6), xlabel="time of a call, median (log scale)")
        axes.xaxis.set_major_formatter(lambda seconds, _: _tick(seconds))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=2, fontsize=8.5)

    return Plot(
        "Time of each part",
        "Each beside its dense counterpart, named in the table above; shorter is faster.",
        _draw(paint, height=1.0 + 0.5 * len(rows)),
    )


def _tick(seconds: float) -> str:
    """A power of ten as a round number of µs, ms or s."""
    unit, scale = ("µs", 1e6) if seconds < 9e-4 else ("ms", 1e3) if seconds < 0.9 else ("s", 1.0)
    return f"{seconds * scale:.3g} {unit}"


def _wrapped(text: str, *, gpu: bool) -> str:
    first, _, rest = text.partition(", ")
    return f"{first}{' (GPU)' if gpu else ''}" + (f"\n{rest}" if rest else "")


__all__: Sequence[str] = ["Plot", "plots"]
