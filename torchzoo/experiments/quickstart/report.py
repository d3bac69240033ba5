"""The report of a run: `report.json` with every figure, `report.html` for people, and the model.

The page is one file without scripts, fonts or anything else from elsewhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

from torchzoo.experiments.quickstart.composition import Part
from torchzoo.experiments.quickstart.figures import Row, step_text
from torchzoo.experiments.quickstart.outcome import Outcome
from torchzoo.experiments.quickstart.plots import Plot, plots
from torchzoo.files import write_json, write_text

NEXT = (
    ("torchzoo info GaussianAdaptiveAttention", "shapes, claims and an example that runs"),
    ("torchzoo reproduce 48 --budget smoke", "put a paper's claim to the test"),
    ("torchzoo list", "everything that is in the zoo"),
)
"""Commands to try next."""

MARKS = {True: "better", False: "worse", None: "about equal"}
"""What `Row.better` says, in words."""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; color: #1f2937;
  background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-weight: 500; font-size: 1.7rem; margin: .5rem 0 .25rem; }
h2 { font-weight: 500; font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-weight: 500; font-size: 1rem; margin: 0 0 .25rem; }
p { max-width: 46rem; margin: .4rem 0; }
.quiet, figcaption, th { color: #6b7280; font-size: .875rem; }
ul.findings { padding-left: 1.1rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: .925rem; }
th { text-align: left; font-weight: 400; }
th, td { padding: .35rem .9rem .35rem 0; vertical-align: top; border-bottom: 1px solid #e5e7eb; }
th.group { color: #1f2937; font-weight: 500; padding-top: 1.4rem; font-size: .95rem; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td span.against { display: block; color: #6b7280; font-size: .85rem; white-space: normal; }
.better { color: #005a8c; } .worse { color: #b34700; } .equal { color: #6b7280; }
.mark { display: block; font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 2.25rem 2.5rem; margin-top: 1rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
ul.tree, ul.tree ul { list-style: none; margin: 0; padding-left: 1.1rem; }
ul.tree ul { border-left: 1px solid #e5e7eb; }
ul.tree { padding-left: 0; } ul.tree li { margin: .15rem 0; }
.count { font-variant-numeric: tabular-nums; color: #005a8c; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: #f3f4f6;
  padding: .1rem .35rem; border-radius: 3px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .875rem; }
dt { color: #6b7280; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: .75rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  .figures, .figures tbody, .figures tr { display: block; }
  .figures thead { display: none; }
  .figures tr { display: grid; grid-template-columns: 1fr 1fr; column-gap: 1rem;
    border-bottom: 1px solid #e5e7eb; padding: .5rem 0; }
  .figures td, .figures th { border: 0; padding: .1rem 0; }
  .figures tr > :first-child, .figures td.result, .figures th.group { grid-column: 1 / -1; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
"""


def save(outcome: Outcome, folder: Path) -> None:
    """Write `model/`, `report.json` and `report.html` into a folder, each whole or not at all."""
    page = html(outcome)
    outcome.model.save_pretrained(folder / "model")
    write_json(folder / "report.json", outcome.to_json())
    write_text(folder / "report.html", page)


def findings(outcome: Outcome) -> list[str]:
    """The outcome in plain sentences, losses included."""
    rows = outcome.rows
    pretrained, versus, scratch = rows[:3]
    stream = outcome.stream
    exact, chosen = stream.points[0], stream.points[stream.chosen]
    lines = [
        f"Pretrained on digits 0 to 4, the model of zoo parts reaches {pretrained.ours.text} on "
        f"digits 5 to 9 with {outcome.setup['labels_per_class']} labels a class, "
        f"{pretrained.theirs.text} from scratch: {pretrained.result.text} from pretraining.",
        f"Against a transformer of the same size: {versus.result.text} where both are pretrained, "
        f"{scratch.result.text} where neither is.",
        f"In delta form the model gives the dense model's logits up to {exact.difference:.1g} and "
        f"skips {exact.skipped:.0%} of the multiply-accumulates of moving digits; inputs that are "
        f"zero give {exact.skipped_by_frame[0]:.0%} by themselves, on the first frame.",
    ]
    if chosen is not exact:
        lines[-1] += (
            f" Quantised to steps of {step_text(chosen.step)} of each layer's "
            f"inputs it skips {chosen.skipped:.0%} and gives the same class on "
            f"{chosen.agreement:.1%} of the frames."
        )
    lines.append(_outlier_finding(outcome))
    timed = [row for row in rows if row.result.unit == "x"]
    faster, slower = ([row for row in timed if row.better is side] for side in (True, False))
    which = f" and {len(slower)} slower: {'; '.join(row.what for row in slower)}" if slower else ""
    count = f"Of {len(timed)} timed parts {len(faster)} are faster than their dense counterpart"
    lines.append(f"{count}{which}.")
    return lines


def _outlier_finding(outcome: Outcome) -> str:
    """What the circuit and the classifier make of each kind of other pictures."""
    pairs = [
        f"{kind.name} {ours.number:.3f} (circuit) and {theirs.number:.3f} (classifier)"
        for kind in outcome.outliers.others
        for ours, theirs, _ in [outcome.outliers.areas(kind)]
    ]
    return (
        "The shipped circuit, which never saw a label, flags pictures that are no digits. Area "
        "under the ROC curve, beside that of the confidence of a classifier trained on the same "
        f"images: {'; '.join(pairs)}."
    )


def html(outcome: Outcome) -> str:
    """The report as one self-contained page."""
    setup, flagged = outcome.setup, outcome.outliers
    found = "".join(f"<li>{escape(line)}</li>" for line in findings(outcome))
    pictures = "".join(_figure(plot) for plot in plots(outcome))
    commands = "".join(f"<p><code>{escape(c)}</code> {escape(why)}</p>" for c, why in NEXT)
    facts = {
        "device": f"{setup['device']} (CPU threads for the times: {setup['threads']})",
        "seeds": f"{setup['seed']} to {setup['seed'] + setup['budget']['seeds'] - 1}",
        "parameters": f"{setup['parameters']:,}; transformer {setup['baseline_parameters']:,}",
        "learning rates": ", ".join(f"{k} {v:g}" for k, v in setup["learning_rates"].items()),
        "test images": f"{setup['test_images']}, each at a fixed place on a 12 x 12 canvas",
        "digits or not": f"{len(flagged.digits.bits)} test digits against "
        f"{len(flagged.others[0].bits)} pictures of each kind; the classifier is right on "
        f"{flagged.accuracy:.1%} of the test digits",
        "versions": ", ".join(f"{k} {v}" for k, v in setup["versions"].items()),
        "measured in": f"{setup['seconds']:.0f} s",
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>torchzoo quickstart</title><style>{_STYLE}</style></head><body>
<h1>torchzoo quickstart</h1>
<p class="quiet">Gaussian adaptive attention, a mixture of experts and delta layers in one small
model, and a probabilistic circuit beside it, on scikit-learn's handwritten digits.</p>
<ul class="findings">{found}</ul>
<h2>Figures</h2>
<table class="figures"><thead><tr><th>what</th><th>torchzoo</th><th>against</th>
<th>difference</th></tr></thead><tbody>{"".join(_rows(outcome.rows))}</tbody></table>
<p class="quiet">± is one standard error over seeds; differences of accuracy are paired by seed.
With so few seeds it is rough, and the {setup["test_images"]} test images, which all arms share, add
about {_test_error(outcome)} to each accuracy. Times are medians; those closer than their
interquartile range are called about equal. MACs are those of the linear layers; norms and the
attention's gates are elementwise and always computed. A delta layer also skips inputs that stay
zero, from the first frame on. The area under the ROC curve is the share of pairs of a digit and
another picture in which the digit gets the better score; its ± is over pictures (DeLong).</p>
<h2>Pictures</h2>
<div class="plots">{pictures}</div>
<h2>What the model is made of</h2>
<ul class="tree">{_tree(outcome.parts)}</ul>
<h2>How it was measured</h2>
<p class="quiet">Accuracies are those after the last epoch, never the best. Learning rates were
chosen on held-out training images, by the same grid for every arm. The same figures, with every
value behind them, are in report.json.</p>
<dl>{listed}</dl>
<h2>Next</h2>
{commands}
</body></html>
"""


def _test_error(outcome: Outcome) -> str:
    """Binomial standard error of the first accuracy."""
    share = outcome.rows[0].ours.number
    error = math.sqrt(share * (1 - share) / outcome.setup["test_images"])
    return f"{100 * error:.1f} points"


def _rows(rows: list[Row]) -> Iterator[str]:
    for group, members in groupby(rows, key=lambda row: row.group):
        yield f'<tr><th class="group" colspan="4">{escape(group)}</th></tr>'
        for row in members:
            mark = MARKS[row.better]
            yield (
                f"<tr><td>{escape(row.what)}</td>"
                f'<td class="number">{escape(row.ours.text)}</td>'
                f'<td class="number">{escape(row.theirs.text)}'
                f'<span class="against">{escape(row.against)}</span></td>'
                f'<td class="number result {mark.split()[-1]}">{escape(row.result.text)}'
                f'<span class="mark">{mark}</span></td></tr>'
            )


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg.encode()).decode()
    alt = escape(f"{plot.title}. {plot.caption}", quote=True)
    return (
        f'<figure><h3>{escape(plot.title)}</h3><img alt="{alt}" '
        f'src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _tree(part: Part) -> str:
    inside = "".join(_tree(child) for child in part.parts)
    text = f' <span class="quiet">{escape(part.text)}</span>' if part.text else ""
    return (
        f'<li>{escape(part.name)} <span class="count">{part.parameters:,}</span>{text}'
        + (f"<ul>{inside}</ul>" if inside else "")
        + "</li>"
    )
