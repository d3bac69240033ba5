"""The experiment on CRReLU runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from torchzoo.experiment import Context, Measurement, reproduce
from torchzoo.experiments.activations import entropy_relu as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    measured = result.measured()
    assert len(result.criteria) == 2
    assert len(measured) == len(unit.SHORT) + len(unit.ARMS) + 4
    unit.plot(measured, Figure())


def test_the_language_model_sees_no_future():
    torch.manual_seed(0)
    model = unit.CausalModel(9).eval()
    tokens = torch.randint(9, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 9
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax() > 0.01


def test_all_activations_start_from_the_same_weights(monkeypatch):
    seen = []

    def record(model, *args, **kwargs):
        seen.append([p.detach().clone() for p in model.parameters() if p.ndim > 1])
        assert kwargs["generator"].initial_seed() == 3

    monkeypatch.setattr(unit.trainer, "fit", record)
    options = {"activations": tuple(unit.ACTIVATIONS), "epochs": 1}
    figures = unit.vision(Context(3, options, torch.device("cpu")))
    assert len(seen) == 8
    for weights in seen[1:]:
        torch.testing.assert_close(weights, seen[0])
    assert figures["vision: eps of block 0"] == pytest.approx(0.01)


def test_the_activation_is_swapped_before_fine_tuning(monkeypatch):
    kinds = []

    def record(model, source, steps, **options):
        kinds.append({type(block.activation) for block in model.blocks})

    monkeypatch.setattr(unit.language, "train", record)
    options = {"pretrain_steps": 1, "tune_steps": 1}
    unit.fine_tuning(Context(0, options, torch.device("cpu")))
    assert kinds == [{nn.GELU}, {nn.GELU}, {nn.ReLU}, {unit.CRReLU}]


def synthetic(**means):
    """Measurements of five seeds around means, with paired noise."""
    way = (0.2, -0.1, 0.0, 0.1, -0.2)
    values = {unit.accuracy(name): 95.0 for name in unit.SHORT}
    values |= {unit.loss(name): 1.5 for name in unit.ARMS}
    values |= {f"{part}: eps of block {b}": 0.02 for part in ("vision", "language") for b in (0, 1)}
    values |= {unit.accuracy("CRReLU"): 96.0, unit.loss("CRReLU"): 1.2}
    values |= {{"v": unit.accuracy, "l": unit.loss}[k[0]](k[2:]): v for k, v in means.items()}
    sign = {unit.accuracy("CRReLU"): -1, unit.loss("CRReLU"): -1}
    return {
        name: Measurement(name, tuple(mean + sign.get(name, 1) * w for w in way))
        for name, mean in values.items()
    }


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True]),
        (synthetic(v_CRReLU=95.1), [False, True]),
        (synthetic(v_PReLU=96.0), [False, True]),
        (synthetic(v_ReLU=97.0), [False, True]),
        (synthetic(l_CRReLU=1.45), [True, False]),
        (synthetic(l_CRReLU=1.8), [True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
