"""Which splats Turbo-GS removes half-way, against the Jacobian of the pictures."""

import pytest
import torch

from tests.splatting.runs import splats, trainer, views
from tests.splatting.turbo_steps import DOUBLE, OFTEN, step_of
from torchzoo.splatting import TurboStrategy


@pytest.mark.claim(
    159,
    "The pruning half-way takes the given share of splats, those of the least sum of squared "
    "derivatives of the pictures by the opacity, as random signs estimate it",
    tolerance=1e-9,
)
def test_sensitivities():
    cameras, _ = views(2, size=8, dtype=DOUBLE)
    scene = splats(8, dtype=DOUBLE)

    def drawn(opacities):
        return scene.render(cameras, opacities=opacities).image

    slopes = torch.autograd.functional.jacobian(drawn, scene.opacities.detach())
    exact = slopes.square().sum((0, 1, 2, 3))
    strategy = TurboStrategy(cap_max=8, prune_share=0.4, refine_start=90, refine_stop=100)
    strategy.begin(scene, 400)
    step = step_of(scene, 0, [0] * 8, [0] * 8)
    estimate = torch.zeros(8, dtype=DOUBLE)
    for number in range(159, 201):  # only the last tenth before the middle counts
        step.number, step.output = number, scene.render(cameras)
        strategy.before_backward(step)
        if number > 160:
            draws = torch.Generator().manual_seed(number)
            signs = 2.0 * torch.randint(2, slopes.shape[:-1], generator=draws) - 1
            estimate += torch.einsum("chwf,chwfn->n", signs.double(), slopes).square()
    step.output.image.sum().backward()  # what was asked for left the graph as it was
    torch.testing.assert_close(strategy.sensitivity, estimate, rtol=1e-9, atol=0)
    spread = (2 / 40) ** 0.5  # of means of 40 squares of nearly normal variables
    assert (estimate / 40 / exact - 1).abs().max() <= 3 * spread
    order = estimate.argsort()
    least = order[:3]
    assert set(least.tolist()) <= set(exact.argsort()[:4].tolist())
    strategy.grad2d = strategy.count = strategy.color = torch.arange(8.0)
    strategy.after_step(step)
    assert scene.num_gaussians == 5
    gone = torch.ones(8, dtype=torch.bool).index_fill(0, least, False)
    assert torch.equal(scene.means, splats(8, dtype=DOUBLE).means[gone])
    for statistic in (strategy.grad2d, strategy.count, strategy.color):
        assert torch.equal(statistic, torch.arange(8.0)[gone])


def test_pruning_and_growing_together():
    counts = []
    strategy = TurboStrategy(
        cap_max=60,
        grow_grad2d=1e-9,
        prune_opacity=0.0,
        prune_share=0.6,
        **OFTEN | {"refine_every": 5},
    )
    note = [lambda step: counts.append(step.scene.num_gaussians)]
    trainer(strategy=strategy, callbacks=note).fit()
    assert counts[3] == 25 < counts[4]
    kept = counts[8] - int(0.6 * counts[8])
    assert counts[9] == min(strategy.allowed(10), 2 * kept)  # half-way: pruned first, then grown
