"""The experiment on steered inpainting runs, and its criteria can fail."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.circuits import CategoricalLeaf, Circuit, hclt
from torchzoo.circuits.steering import linear_schedule
from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.circuits import steering as unit
from torchzoo.experiments.circuits import steering_toy as toy


@pytest.fixture(scope="module")
def smoke():
    return reproduce(unit.EXPERIMENT, budget="smoke")


def test_smoke_run(smoke):
    measured = smoke.measured()
    assert len(smoke.criteria) == 4
    assert len(measured) == 5 + 3 * (2 * 8 + 2 * 4) + 2 * 2 + 6 * 4
    assert smoke.criteria[3]["holds"]  # the exact toy is the same at every budget
    unit.plot(measured, Figure())


def test_masks():
    hidden = {name: mask.view(8, 8) for name, mask in unit.MASKS.items()}
    assert hidden["bottom half"][4:].all()
    assert not hidden["bottom half"][:4].any()
    assert torch.equal(hidden["right half"], hidden["bottom half"].T)
    assert hidden["centre block"][2:6, 2:6].all()
    assert hidden["centre block"].sum() == 16


def test_samplers_keep_what_is_known_and_reach_an_oracle():
    """With a guess that is the truth both samplers end in it, whatever the mask."""
    torch.manual_seed(0)
    image, truth = torch.rand(2, 4, 64)
    for mask in unit.MASKS.values():
        calls = []

        def guess(x, t, calls=calls):
            calls.append(t)
            return truth

        for sampler, extra in ((unit.replacement, ()), (unit.repaint, (37,))):
            calls.clear()
            found = sampler(guess, image, mask, 0, *extra)
            assert torch.equal(found[:, ~mask], image[:, ~mask])
            assert (found - truth)[:, mask].abs().max() < 1e-5
            assert len(calls) == 100 + sum(extra)
            assert sorted(calls, reverse=True) == calls


def test_samplers_of_a_gaussian_law():
    """With the exact guess for N(0.3, 0.5^2) the variances follow recursions of linear steps."""
    image, everywhere = torch.zeros(1000, 64), torch.ones(64, dtype=torch.bool)

    def gain(t):
        share = linear_schedule(t / 100)
        return share**0.5 * 0.25 / (share * 0.25 + 1 - share)

    def guess(x, t):
        return 0.3 + gain(t) * (x - linear_schedule(t / 100) ** 0.5 * 0.3)

    ddim = ddpm = 1.0
    for t in range(100, 0, -1):
        now, before = linear_schedule(t / 100), linear_schedule((t - 1) / 100)
        rest = ((1 - before) / (1 - now)) ** 0.5
        ddim *= (before**0.5 * gain(t) + rest * (1 - now**0.5 * gain(t))) ** 2
        kept = now / before
        slope = before**0.5 * (1 - kept) * gain(t) + kept**0.5 * (1 - before)
        for again in (True, False) if t % 2 == 0 else (False,):
            ddpm = (slope / (1 - now)) ** 2 * ddpm + (1 - kept) * rest**2
            if again:
                ddpm = kept * ddpm + 1 - kept
    for found, variance in (
        (unit.replacement(guess, image, everywhere, 0), ddim),
        (unit.repaint(guess, image, everywhere, 0, 50), ddpm),
    ):
        assert found.mean().item() == pytest.approx(0.3, abs=0.02)
        assert found.var().item() == pytest.approx(variance, rel=0.03)
        assert variance == pytest.approx(0.25, rel=0.2)


def test_discrepancy_is_the_squared_mmd():
    torch.manual_seed(0)
    found, truth = torch.randint(0, 17, (2, 6, 3))
    weights = torch.tensor([[1.0] * 6, [2.0, 0, 1, 1, 1, 1]])
    measured = unit.discrepancy(found, truth, weights)

    def kernel(a, b):
        return torch.exp(-((a[:, None] - b) ** 2 / 64.0) / (2 * unit.WIDTH**2)).mean()

    for row, index in enumerate((list(range(6)), [0, 0, 2, 3, 4, 5])):
        total = 0.0
        for p in range(3):
            a, b = found[index, p].float(), truth[index, p].float()
            total += (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item() / 3
        assert measured[row].item() == pytest.approx(total, abs=1e-6)


def test_tables_become_circuits():
    table = torch.rand(2, 2, 2, dtype=torch.float64)
    table = table / table.sum()
    states = torch.cartesian_prod(*[torch.arange(2)] * 3)
    found = toy.exact_circuit(table).log_prob(states).exp()
    assert (found - table.flatten()).abs().max() < 1e-12
    for law, _ in toy.LAWS.values():
        assert law().sum().item() == pytest.approx(1)
    ising = toy.four_bits()
    assert (ising[0, 0, 0, 0] / ising[0, 0, 0, 1]).log().item() == pytest.approx(3.2)
    assert (ising[0, 1, 1, 0] / ising[0, 0, 1, 1]).log().item() == pytest.approx(-3.2)


def test_toy_can_fail():
    """A circuit that is not the law is further off than its total correlation."""
    generator = torch.Generator().manual_seed(0)
    good = toy.divergences(toy.four_bits(), 2, 0.2, 50, generator)
    assert good["gap"] < 1e-8
    torch.manual_seed(0)
    original = toy.exact_circuit
    try:
        toy.exact_circuit = lambda table: Circuit(
            hclt([-1, 0, 1, 2]), CategoricalLeaf(2), num_units=2, dtype=torch.float64
        )
        bad = toy.divergences(toy.four_bits(), 2, 0.2, 50, generator)
    finally:
        toy.exact_circuit = original
    assert bad["gap"] > 0.01
    assert bad["mix 0"] > good["mix 0"]


def synthetic(*, paper=(60, 30), heavy=(60, 30), change=(-1e-3, -1e-3), worse=(), **other):
    """Measurements of 3 seeds of 150 images; gains and losses of all seeds under each mask."""
    figures = {"images": 150.0, "agreement on true images": 0.98}
    for mask in unit.MASKS:
        for name in unit.METHODS:
            figures[f"agreement, {mask}, {name}"] = 0.6
            figures[f"MMD, {mask}, {name}"] = 0.015
        for name, pair, shift in ((unit.PAPER, paper, change[0]), (unit.HEAVY, heavy, change[1])):
            gained, lost = (30, 30) if mask in worse else pair
            figures[f"gained, {mask}, {name}"] = gained / 3
            figures[f"lost, {mask}, {name}"] = lost / 3
            figures[f"MMD change, {mask}, {name}"] = shift
            figures[f"MMD change, standard error, {mask}, {name}"] = 3e-3
    for name in (unit.NO_Q, unit.INDEPENDENT):
        gained, lost = other.get("ablation", (150, 75))
        figures[f"gained, {unit.HEAVY} over {name}"] = gained / 3
        figures[f"lost, {unit.HEAVY} over {name}"] = lost / 3
    for law in toy.LAWS:
        for share in toy.SHARES:
            name = f"toy, {law}, {share}"
            figures |= {f"{name}: DM": 0.2, f"{name}: mix 0.5": other.get("mix", 0.1)}
            figures |= {f"{name}: mix 0": 0.05, f"{name}: gap": other.get("gap", 1e-12)}
    return {name: Measurement(name, (value,) * 3) for name, value in figures.items()}


MASKS = list(unit.MASKS)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 4),
        (synthetic(worse=MASKS[:1]), [True] * 4),
        (synthetic(worse=MASKS[:2]), [False, False, True, True]),
        (synthetic(paper=(45, 42)), [False, True, True, True]),
        (synthetic(paper=(30, 60)), [False, True, True, True]),
        (synthetic(heavy=(45, 42)), [True, False, True, True]),
        (synthetic(change=(3.3e-3, 0.0)), [True] * 4),
        (synthetic(change=(3.5e-3, 0.0)), [False, True, True, True]),
        (synthetic(change=(0.0, 3.5e-3)), [True, False, True, True]),
        (synthetic(ablation=(100, 99)), [True, True, False, True]),
        (synthetic(mix=0.21), [True, True, True, False]),
        (synthetic(gap=1e-7), [True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    heavy_only = expected[:2] == [False, True]
    assert unit.EXPERIMENT.criteria[1].test(measured)[1].startswith("only with") == heavy_only


def test_interval_of_a_paired_gain():
    measured = synthetic(paper=(60, 30))
    gain, low, high = unit.gain_interval(measured, f"{MASKS[0]}, P", 450)
    assert gain == pytest.approx(30 / 450)
    error = math.sqrt((90 / 450 - gain**2) / 450)
    assert low == pytest.approx(gain - 1.96 * error, abs=3e-3)
    assert high == pytest.approx(gain + 1.96 * error, abs=3e-3)
