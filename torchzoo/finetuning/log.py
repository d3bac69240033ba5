"""The log of a training run: a CSV file, events for TensorBoard, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torchzoo.files import atomic_path, write_text


def write(out: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write all rows to `log.csv`, and the last one as events where TensorBoard is installed."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in history for name in row))
    table = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_text(out / "log.csv", text.getvalue())
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "events")) as writer:
        for name, value in history[-1].items():
            if name not in ("epoch", "step"):
                writer.add_scalar(name, value, int(history[-1]["step"]))


def plot(out: Path, history: Sequence[Mapping[str, float]], metric: str) -> None:
    """Draw losses and metric over the epochs into `log.png`, where matplotlib is installed."""
    if not history or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name, label in (("loss", "training"), ("test_loss", "test")):
        left.plot(epochs, [row[name] for row in history], "o-", label=label, markersize=3)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend(frameon=False)
    right.plot(epochs, [row[metric] for row in history], "o-", color="C2", markersize=3)
    right.set(xlabel="epoch", ylabel=metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_path(out / "log.png") as part:
        figure.savefig(part, format="png")
