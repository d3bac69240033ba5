"""Training steps with gradients made by hand, of which Turbo-GS makes its choices."""

from types import SimpleNamespace

import torch

from torchzoo.splatting.protocol import TrainStep
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import adam

DOUBLE = torch.float64
OFTEN = {"refine_start": 2, "refine_stop": 18, "refine_every": 3, "prune_scale3d": 10.0}
"""A schedule that acts often in a run of twenty steps."""


def scene_of(scales):
    count = len(scales)
    random = torch.Generator().manual_seed(3)
    means, quats = (torch.randn(count, k, generator=random, dtype=DOUBLE) for k in (3, 4))
    log_scales = torch.tensor(scales, dtype=DOUBLE).log()[:, None].expand(count, 3)
    logits = torch.linspace(-1, 2, count, dtype=DOUBLE)
    return GaussianScene.from_tensors(
        means, quats, log_scales, logits, torch.zeros(count, 1, 3, dtype=DOUBLE)
    )


def step_of(scene, number, places, colors, visible=None, seed=0):
    """A step whose one picture of 40 x 20 has gradients of these lengths; places' in NDC."""
    count = scene.num_gaussians
    means2d, shown = (torch.zeros(1, count, k, dtype=DOUBLE, requires_grad=True) for k in (2, 3))
    means2d.grad, shown.grad = torch.zeros(1, count, 2).double(), torch.zeros(1, count, 3).double()
    means2d.grad[0, :, 0] = torch.tensor(places, dtype=DOUBLE) / 20
    shown.grad[0, :, 1:] = torch.tensor(colors, dtype=DOUBLE)[:, None] * torch.tensor([0.6, -0.8])
    visible = torch.ones(count) if visible is None else torch.tensor(visible)
    radii = 3 * visible.int()[None, :, None].expand(1, -1, 2)
    return TrainStep(
        number=number,
        scene=scene,
        optimizer=adam(scene),
        views=torch.arange(1),
        output=SimpleNamespace(info={"means2d": means2d, "radii": radii, "colors": shown}),
        target=torch.zeros(0),
        size=(20, 40),
        scene_scale=2.0,
        means_rate=1e-4,
        generator=torch.Generator().manual_seed(seed),
        loss=1.0,
    )
