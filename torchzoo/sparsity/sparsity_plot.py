"""The picture of `SparsityMeter.plot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchzoo.sparsity.sparsity_meter import SparsitySummary

_LABELLED = 8  # layers that a legend may name; of more the colour says how deep they are

_ABOVE: Any = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "ncols": 2,
    "fontsize": 7,
    "frameon": False,
}


def draw(
    figure: Any,
    summary: SparsitySummary,
    samples: Mapping[str, Tensor],
    frequencies: Mapping[str, Tensor],
) -> Any:
    """Draw what a meter saw on a matplotlib figure (None: a new one), and give the figure.

    Args:
        figure: The figure.
        summary: The meter's summary.
        samples: What the neurons of each layer gave, `(n, f)`.
        frequencies: How often each neuron was active, `(f,)`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", dpi=110) if figure is None else figure
    (shares, macs), (values, often) = figure.subplots(2, 2)
    names = [row.activity.name or "the model" for row in summary.layers]
    colours = colormaps["viridis"](torch.linspace(0, 0.9, max(len(names), 1)).numpy())
    _shares(shares, summary, names)
    _macs(macs, summary, names)
    for name, colour, h, frequency in zip(
        names, colours, samples.values(), frequencies.values(), strict=True
    ):
        _values(values, h, colour, name)
        often.plot(
            torch.linspace(0, 100, len(frequency)),
            100 * frequency.sort(descending=True).values,
            color=colour,
            label=name,
        )
    values.set(xlabel="log10 of abs(h), zeros apart", ylabel="share of all values, %")
    values.set_title("what neurons give", fontsize=10)
    often.set(xlabel="neurons, the most frequent first, %", ylabel="tokens it is active for, %")
    often.set_title("how often each neuron is active", fontsize=10)
    often.set_ylim(-2, 102)
    if len(names) <= _LABELLED:
        values.legend(fontsize=7)
    else:
        values.annotate("dark: first layer, light: last", (0.02, 0.94), xycoords="axes fraction")
    return figure


def _shares(axes: Any, summary: SparsitySummary, names: list[str]) -> None:
    places = torch.arange(len(names)).double()
    active = [100 * row.activity.active for row in summary.layers]
    needed = [100 * row.needed for row in summary.layers]
    axes.barh(places - 0.2, active, 0.4, color="tab:blue", label="active")
    label = f"needed at CETT {summary.target:g}"
    axes.barh(places + 0.2, needed, 0.4, color="tab:orange", label=label)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of neurons a token, %")
    axes.set_title("neurons", fontsize=10, loc="left")
    axes.legend(**_ABOVE)


def _macs(axes: Any, summary: SparsitySummary, names: list[str]) -> None:
    rows = [
        (name, row.dense_macs, row.macs) for name, row in zip(names, summary.layers, strict=True)
    ]
    if summary.dense_delta_macs:
        rows.append(("delta steps", summary.dense_delta_macs, summary.delta_macs))
    for place, (_, dense, left) in enumerate(rows):
        axes.barh(place, dense, color="0.85", label=None if place else "dense")
        axes.barh(place, left, color="tab:green", label=None if place else "left")
        axes.text(dense, place, f" {100 * left / max(dense, 1):.0f} %", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("multiplications")
    axes.set_title(
        f"{100 * summary.skipped:.0f} % of the multiplications idle", fontsize=10, loc="left"
    )
    axes.legend(**_ABOVE)


def _values(axes: Any, h: Tensor, colour: Any, name: str) -> None:
    sizes = h.abs().flatten()
    logs = sizes[sizes > 0].log10().clamp_min(-6).double()
    zeros = 100 * float((sizes == 0).double().mean())
    axes.hist(
        logs.numpy(),
        bins=60,
        weights=torch.full_like(logs, 100 / len(sizes)).numpy(),
        histtype="step",
        color=colour,
        label=f"{name}: {zeros:.0f} % zeros",
    )
