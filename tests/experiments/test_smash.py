"""The experiment on sparse products: its matrices, its verdict rules, and a short run."""

import math

import numpy as np
import pytest

from torchzoo import experiment
from torchzoo.experiment import Measurement
from torchzoo.experiments.ops.spgemm import banded, rmat, terms, uniform
from torchzoo.experiments.sparsity.smash import EXPERIMENT, MATRICES, TOLERANCE


def test_matrices():
    graph = rmat(9, 4096, seed=1)
    assert graph.shape == (512, 512)
    assert int(graph.sum()) == 4096
    rows, columns = (np.asarray(graph.sum(axis)).ravel() for axis in (1, 0))
    for halves in (rows, columns):  # the first bit is 0 with probability 0.57 + 0.19
        assert halves[:256].sum() / 4096 == pytest.approx(0.76, abs=0.03)
    assert rows.max() > 8 * rows.mean()
    assert int(uniform(100, 5).sum()) == 500
    band = banded(20, 5).toarray()
    near = np.abs(np.subtract.outer(np.arange(20), np.arange(20))) <= 2
    assert np.array_equal(band, near)
    ones = graph.astype(bool).astype("i8")
    assert terms(graph) == (ones @ ones).sum()


def measured(**change: float) -> dict[str, Measurement]:
    figures = {"native": 1.0, "inner": 2.0, "esc": 1.5, "ratio": 2.0, "error": 0.0} | change
    values = {
        "native": (figures["native"],),
        "log inner / hash, small R-MAT": (math.log(figures["inner"]),) * 2,
        "log esc / hash, large R-MAT": (
            math.log(figures["esc"]) - 0.2,
            math.log(figures["esc"]) + 0.2,
        ),
    }
    for name in MATRICES:
        values[f"bytes ESC / hash, {name}"] = (figures["ratio"],)
        values[f"compression, {name}"] = (2.0,)
        values[f"error, {name}"] = (figures["error"],)
    return {name: Measurement(name, value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [True, True, True]),
        ({"inner": 0.9}, [False, True, True]),
        ({"esc": 1.1}, [False, True, True]),  # above 1, but within its standard error
        ({"native": 0.0}, [None, True, True]),
        ({"ratio": 1.61}, [True, True, True]),
        ({"ratio": 1.59}, [True, False, True]),
        ({"error": 2 * TOLERANCE}, [True, True, False]),
    ],
)
def test_criteria(change, expected):
    found = [criterion.test(measured(**change))[0] for criterion in EXPERIMENT.criteria]
    assert found == expected


def test_smoke(tmp_path):
    pytest.importorskip("matplotlib")
    result = experiment.reproduce(EXPERIMENT, budget="smoke", out=tmp_path)
    assert (tmp_path / "smash.png").is_file()
    found = result.measured()
    for name in MATRICES:
        assert found[f"error, {name}"].mean <= TOLERANCE
        assert found[f"compression, {name}"].mean >= 1
    assert {c["holds"] for c in result.criteria[1:]} == {True}
