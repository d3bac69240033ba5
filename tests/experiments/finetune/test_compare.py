"""compare: both sides start from the same weights and get the same rows."""

import pytest

from torchzoo import timing
from torchzoo.experiments.finetune import compare as module
from torchzoo.experiments.finetune.compare import compare, mean_and_error, save_plot
from torchzoo.experiments.finetune.jobs import Job
from torchzoo.finetuning import Recipe
from torchzoo.timing import time_modules


def test_a_swap_that_changes_nothing_makes_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    monkeypatch.setattr(module, "time_modules", cost)
    job = Job("timm:test_resnet", "digits", swaps=("Linear=DeltaLinear",), size=16)
    steps = []
    result = compare(
        job, Recipe(epochs=1, batch_size=256), seeds=2, progress=lambda *now: steps.append(now[:2])
    )
    assert result["runs"]["with"]["accuracy"] == result["runs"]["without"]["accuracy"]
    assert len(set(result["runs"]["with"]["test_loss"])) == 2
    assert result["difference"] == (0.0, 0.0)
    assert steps[-1] == (24, 24)
    assert [done for done, _ in steps] == list(range(1, 25))
    save_plot(result, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def cost(models, images):
    return time_modules(models, [images[0][:4]], rounds=2)


def test_standard_error():
    mean, error = mean_and_error([0.2, 0.4, 0.9])
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.13**0.5 / 3**0.5))
    assert mean_and_error([0.3]) == (0.3, 0.0)
