"""What a quickstart measured, in one object that knows its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torchzoo.experiments.quickstart.composition import Part
from torchzoo.experiments.quickstart.figures import Row
from torchzoo.experiments.quickstart.finetune import Run
from torchzoo.experiments.quickstart.model import ZooVisionModel
from torchzoo.experiments.quickstart.outliers import Outliers
from torchzoo.experiments.quickstart.temporal import Temporal
from torchzoo.experiments.quickstart.timing import Timing


@dataclass(frozen=True)
class Outcome:
    """What a quickstart measured.

    Attributes:
        model: The fine-tuned model of the first seed, on the CPU.
        parts: What it is made of.
        runs: The runs of each arm, a run a seed.
        stream: The films.
        outliers: Digits and other pictures.
        timings: The timed parts.
        rows: The figures in short.
        setup: What was run: seed, budget, device, versions, sizes, seconds.
    """

    model: ZooVisionModel
    parts: Part
    runs: dict[str, list[Run]]
    stream: Temporal
    outliers: Outliers
    timings: list[Timing]
    rows: list[Row]
    setup: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON."""
        points = [asdict(point) for point in self.stream.points]
        return {
            "setup": self.setup,
            "figures": [row.to_json() for row in self.rows],
            "composition": self.parts.to_json(),
            "fine_tuning": {
                key: [
                    {
                        "epochs": run.epochs,
                        "test_accuracy": run.accuracy,
                        "temperature": run.temperature,
                        "expert_load": run.load,
                        "experts_per_token": run.active,
                    }
                    for run in runs
                ]
                for key, runs in self.runs.items()
            },
            "moving_digits": {
                "points": points,
                "chosen": self.stream.chosen,
                "dense_accuracy": self.stream.dense_accuracy,
            },
            "digits_or_not": self.outliers.to_json(),
            "timings": [asdict(row) for row in self.timings],
        }
