"""The experiment on SDM runs, and its criteria can fail."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.ndimage import rotate

from torchzoo.activations import SDMHead
from torchzoo.data.digits import digits
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.activations import sdm as unit


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 3
    unit.plot(result.measured(), Figure())


def test_shifts():
    x = digits(seed=0).test_x[:200]
    g = torch.Generator().manual_seed(0)
    noise = unit.shifted(x, "noise 2", g) - x
    assert noise.std().item() == pytest.approx(2 / 16, rel=0.02)
    assert torch.equal(unit.shifted(x, "inversion", g), 1 - x)
    assert torch.equal(unit.shifted(x, "test", g), x)
    theirs = rotate(x[:, 0].numpy(), 15, axes=(2, 1), reshape=False, order=1)
    ours = unit.shifted(x, "rotation 15°", g)[:, 0].numpy()
    inner = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-4)


def test_baselines():
    torch.manual_seed(0)
    head = SDMHead(5, 4, exemplar_dim=6)
    e, y = 3 * torch.randn(400, 5), torch.randint(4, (400,))
    y = torch.where(torch.rand(400) < 0.6, head(e).logits.argmax(-1), y)
    head.fit_support([(e, y)])
    baselines = unit.Baselines(head, e, y, 0.3)
    accepted = baselines.accept(e)
    assert set(accepted) | {unit.SDM, unit.CENTROID} == set(unit.METHODS)
    for name in unit.MATCHED[:2]:
        assert accepted[name].float().mean().item() == pytest.approx(0.3, abs=0.003)
    logits = head(e).logits.detach()
    losses = [float(F.cross_entropy(logits / t, y)) for t in np.geomspace(0.02, 50, 400)]
    assert float(F.cross_entropy(logits / baselines.t, y)) <= min(losses) + 1e-6
    sure = logits.softmax(-1).max(-1).values >= 0.95
    assert torch.equal(accepted["softmax at 0.95"], sure)
    sets = (1 - logits.softmax(-1)) <= baselines.quantile
    inside = sets[range(400), y].float().mean().item()
    assert 0.95 <= inside <= 0.955
    assert torch.equal(accepted[unit.CONFORMAL], sets.sum(-1) == 1)
    nothing = unit.Baselines(head, e, y, 0.0).accept(e)
    assert not any(nothing[name].any() for name in unit.MATCHED)


def measurements(
    sdm=(40, 39), nominal=(100, 90), strange=(0.1, 0.3, 0.1), classes=(30, 29), empty=0
):
    """Two seeds, accepted and right for each kind; shares of strangers accepted."""
    figures = {"empty region": (0, empty), "test images": (400, 400)}
    for name in unit.METHODS:
        accepted, right = sdm if name == unit.SDM else nominal
        for kind in (unit.TEST, *unit.SHIFTS):
            figures[f"{name}: accepted, {kind}"] = (accepted, accepted)
            figures[f"{name}: right, {kind}"] = (right, right)
        figures[f"{name}: accepted of 8 and 9"] = (strange[1], strange[1] + 0.01)
    figures[f"{unit.SDM}: accepted of 8 and 9"] = (strange[0], strange[0])
    figures["distance, matched: accepted of 8 and 9"] = (strange[2], strange[2] + 0.01)
    for kind in (unit.TEST, *unit.SHIFTS):
        figures[f"accuracy without refusals, {kind}"] = (0.9, 0.8)
    for c in unit.KNOWN:
        accepted, right = classes if c == 3 else (30, 30)
        figures[f"{unit.SDM}: accepted as {c}"] = (accepted, accepted)
        figures[f"{unit.SDM}: right as {c}"] = (right, right)
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (measurements(), [True, True, True]),
        (measurements(sdm=(40, 37)), [False, True, True]),
        (measurements(nominal=(100, 96)), [False, True, True]),
        (measurements(sdm=(3, 3)), [None, True, True]),
        (measurements(sdm=(0, 0)), [None, True, True]),
        (measurements(classes=(30, 28)), [True, False, True]),
        (measurements(classes=(9, 2)), [True, True, True]),
        (measurements(empty=1), [True, False, True]),
        (measurements(strange=(0.3, 0.3, 0.3)), [True, True, False]),
        (measurements(strange=(0.1, 0.3, 0.05)), [True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
