"""The experiment on HyperGaussians runs, and its criteria can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.splatting import hyper as unit
from torchzoo.ops import hyper_condition
from torchzoo.splatting import Cameras, HyperGaussian


def test_smoke_run():
    result = reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 5
    measured = result.measured()
    assert len(measured) == len(unit.ARMS) * len(unit.FIGURES) + 2 * 2 * len(unit.LATENTS)
    unit.plot(measured, Figure())


def test_arms_start_alike():
    points, colors, code = torch.randn(20, 3), torch.rand(20, 3), torch.randn(6)
    cameras = Cameras.orbit(1, radius=4.0, width=12, height=12)
    models = {arm: unit.build(arm, points, colors, 0) for arm in unit.ARMS}
    expected = models[unit.DIRECT]
    for arm, model in models.items():
        image = model.render(cameras, code).image
        torch.testing.assert_close(image, expected.base.render(cameras).image)
        for one, two in zip(model.embed.parameters(), expected.embed.parameters(), strict=True):
            assert torch.equal(one, two), arm
    counts = {arm: sum(p.numel() for p in m.head.parameters()) for arm, m in models.items()}
    assert counts[unit.DIRECT] == 9 * 13
    assert counts[unit.STATIC] == 9 * 13 + 20 * 13
    assert counts[unit.FREE] == 20 * 9 * 13
    triangles = 6 + 10 + 6 + 6
    assert counts[unit.HYPER] == 20 * (9 * 13 + 4 * 8 + triangles)


def test_rates():
    run = unit.Run(unit.build(unit.HYPER, torch.randn(5, 3), torch.rand(5, 3), 0), 2.0, 10)
    assert run.rates["base.means"] == pytest.approx(4 * 1.6e-4 * 2)
    assert run.rates["embed.network.0.weight"] == 1e-3
    assert run.rates["head.parts.scale.l21"] == 1e-2
    direct = unit.Run(unit.build(unit.STATIC, torch.randn(5, 3), torch.rand(5, 3), 0), 2.0, 10)
    assert (direct.rates["head.linear.weight"], direct.rates["head.own"]) == (1e-3, 1e-2)


def test_detail_is_amid_the_head():
    images, alpha = torch.zeros(1, 20, 20, 3), torch.zeros(1, 20, 20)
    alpha[:, 2:18, 2:18] = 1
    images[:, 2:18, 2:18] = 0.5  # its outline is the steepest there is
    images[:, 10, 5:15] = 0.7
    shown = unit.Film(Cameras.orbit(1, radius=4.0, width=20, height=20), None, images, alpha)
    mask = unit.detail(shown)[0]
    assert mask.sum() == round(0.1 * 14 * 14)
    rows, columns = mask.nonzero().T
    assert {9, 11} <= set(rows.tolist()) <= {9, 10, 11}
    assert columns.min() >= 4
    assert columns.max() <= 15


def test_both_forms_agree():
    random = torch.Generator().manual_seed(0)
    mean, z = (torch.randn(7, n, generator=random, dtype=torch.float64) for n in (8, 5))
    factor = torch.randn(7, 8, 8, generator=random, dtype=torch.float64)
    factor += 4 * torch.eye(8, dtype=torch.float64)
    root = factor.tril()
    items = HyperGaussian.from_joint(mean, root @ root.mT, out_dim=3)
    given = (items.mean_out, items.mean_latent, items.raw_l11, items.l21)
    expected = unit.through_covariance(z, mean, factor, 3)
    torch.testing.assert_close(hyper_condition(z, *given), expected)


def synthetic(whole=(1.0, 0.5, 0.7), fine=(1.2, 0.9, 0.8), **other):
    """Three seeds: gains over the direct head, and the figures that criteria compare."""
    options = {"static": 0.1, "ms": 11.0, "faster": 8.0, "smaller": 6.0} | other
    values = {"precision, d=32: ms": 2.0, "precision, d=32: MB": 3.0}
    values |= {f"precision, d={d}: ms": 2.0 for d in unit.LATENTS}
    values |= {f"covariance, d={d}: ms": 2.0 * options["faster"] for d in unit.LATENTS}
    values |= {"covariance, d=32: MB": 3.0 * options["smaller"]}
    values |= {f"{arm}: ms a step": 10.0 for arm in unit.ARMS[:3]}
    values |= {f"{unit.HYPER}: ms a step": options["ms"]}
    figures = {name: (value,) * 3 for name, value in values.items()}
    for name, gains in (("PSNR", whole), ("masked PSNR", fine)):
        for arm in unit.ARMS:
            figures[f"{arm}: {name}"] = (24.0,) * 3
        figures[f"{unit.STATIC}: {name}"] = (24.0 + options["static"],) * 3
        figures[f"{unit.HYPER}: {name}"] = tuple(24.0 + one for one in gains)
    return {name: Measurement(name, found) for name, found in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True] * 5),
        (synthetic((1.0, -0.1, 0.7)), [False, True, True, True, True]),
        (synthetic(fine=(3.0, 0.9, -0.1)), [False, True, True, True, True]),
        (synthetic(fine=(0.9, 0.5, 0.7)), [True, False, True, True, True]),
        (synthetic(static=0.8), [True, True, False, True, True]),
        (synthetic(ms=11.6), [True, True, True, False, True]),
        (synthetic(faster=4.9), [True, True, True, True, False]),
        (synthetic(smaller=3.9), [True, True, True, True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())
