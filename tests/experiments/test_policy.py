"""The experiment on the mixture policy runs, and its scores and criteria are what they say."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from scipy.integrate import dblquad
from torch.func import functional_call

from torchzoo.experiment import Context, Measurement, reproduce
from torchzoo.experiments.moe import policy as unit
from torchzoo.moe import PMoEPolicy, SquashedGaussianMixture

CPU = torch.device("cpu")


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 5
    measured = result.measured()
    assert len(measured) == 5 * 4 + 2
    unit.plot(measured, Figure())


def test_optima_and_normaliser():
    s = torch.tensor([0.6, 0.8], dtype=torch.float64)
    angles = torch.atan2(*unit.optima(s).flip(-1).unbind(-1)) - math.atan2(0.8, 0.6)
    expected = torch.tensor([0, 2, -2], dtype=torch.float64) * math.pi / 3
    torch.testing.assert_close((angles - expected).cos(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        unit.optima(s).norm(dim=-1), torch.full((3,), 0.6, dtype=torch.float64)
    )

    def density(y, x):
        m = unit.optima(s).tolist()
        return sum(math.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.02) for a, b in m)

    total, _ = dblquad(density, -1.4, 1.4, -1.4, 1.4, epsabs=1e-5)
    assert math.log(total) == pytest.approx(unit.LOG_Z, abs=1e-4)
    a = torch.tensor([0.1, 0.5], dtype=torch.float64)
    assert unit.value(s, a).item() == pytest.approx(math.log(density(0.5, 0.1)))


class Known(torch.nn.Module):
    """Gaussians of deviation 0.1 at the first `count` optima, without squashing."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, s):
        loc = unit.optima(s)[..., : self.count, :]
        return SquashedGaussianMixture(
            loc.new_zeros(loc.shape[:-1]), loc, torch.full_like(loc, math.log(0.1)), squash=False
        )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_scores_of_known_policies(count):
    figures = unit.evaluate(Known(count), 2, CPU)
    exact = math.log(3 / count)
    torch.testing.assert_close(figures["KL"], torch.full((2,), exact), rtol=0, atol=0.02)
    assert figures["optima covered"].tolist() == [count, count]
    assert figures["router error"].shape == (2,)
    assert (figures["mean Q"] + 1).abs().max() < 0.05  # -E z^2 / 2 in two dimensions


def test_replicas_are_independent_policies():
    torch.manual_seed(0)
    stacked = unit.Replicas(3)
    s = unit.states(3, 5, CPU)
    pi = stacked(s)
    policy = PMoEPolicy(2, 2, hidden=(64, 64))
    for index in range(3):
        weights = {n: w[index] for n, w in zip(stacked.names, stacked.weights, strict=True)}
        alone = functional_call(policy, weights, (s[index],))
        torch.testing.assert_close(pi.loc[index], alone.loc)
        torch.testing.assert_close(pi.logits[index], alone.logits)
        torch.testing.assert_close(pi.log_std[index], alone.log_std)
    assert not torch.equal(pi.loc[0], pi.loc[1])
    assert len(list(stacked.parameters())) == len(list(policy.parameters()))


def test_trials_of_a_block_share_the_training(monkeypatch):
    trained = []

    def train(arm, replicas, seed, context):
        trained.append((arm, replicas, seed))
        return Known(2)

    monkeypatch.setattr(unit, "train", train)
    monkeypatch.setattr(unit, "_blocks", {})
    options = {"seeds": 2, "steps": 1, "batch": 1}
    first, second, third = (unit.trial(Context(seed, options, CPU)) for seed in (0, 1, 2))
    assert first.keys() == second.keys() == third.keys()
    assert first["score: mean Q"] != second["score: mean Q"]
    assert trained == [(arm, 4, block) for block in (0, 1) for arm in unit.ARMS]


def synthetic(choice="PMoE all", **changes):
    """Figures of two seeds at which all criteria hold, with some replaced."""
    values = {
        "unimodal: KL": (1.2, 1.3),
        "PMoE max: KL": (2.0, 2.1),
        "PMoE all: KL": (0.4, 0.5),
        "Gumbel: KL": (0.7, 0.9),
        "score: KL": (0.4, 0.45),
    }
    values |= {unit.figure_name(arm, "optima covered"): (2.5, 2.9) for arm in unit.ARMS}
    values |= {unit.choosing_name(arm): (2.0, 2.0) for arm in unit.PMOE}
    values[unit.choosing_name(choice)] = (0.4, 0.4)
    values |= {name.replace("_", " "): value for name, value in changes.items()}
    return {name: Measurement(name, value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 5),
        (synthetic(**{"PMoE all: KL": (0.4, 1.11)}), [False, True, True, True, True]),
        (synthetic(**{"unimodal: KL": (0.3, 0.6)}), [True, False, True, True, True]),
        (synthetic(**{"PMoE all: optima covered": (1.9, 3.0)}), [True, True, False, True, True]),
        (synthetic(**{"Gumbel: KL": (0.3, 0.41)}), [True, True, True, False, True]),
        (synthetic(**{"score: KL": (0.3, 0.41)}), [True, True, True, True, False]),
        (synthetic(choice="PMoE max"), [False, False, True, False, False]),
    ],
)
def test_criteria(measured, expected):
    assert [criterion.test(measured)[0] for criterion in unit.EXPERIMENT.criteria] == expected
