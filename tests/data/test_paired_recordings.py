import math

import pytest
import torch

from torchzoo.data.paired_recordings import _turned, paired_recordings
from torchzoo.testing import assert_within_se


def test_latents_have_the_covariance_of_the_kernel():
    latents = paired_recordings(1000, num_steps=9, neurons=1, size=1, lengthscale=4.0).latents
    for lag in (0, 3, 8):
        products = latents[:, 0] * latents[:, lag]
        assert_within_se(products, math.exp(-(lag**2) / 32))
    assert_within_se(latents[:, 0, 0] * latents[:, 0, 1], 0.0)


def test_spikes_see_the_first_two_latents_and_images_the_last_two():
    data = paired_recordings(20, num_steps=10, neurons=3)
    design = torch.cat([data.latents, torch.ones(20, 10, 1)], -1).flatten(0, 1)
    found = torch.linalg.lstsq(design, data.rates.log().flatten(0, 1)).solution
    torch.testing.assert_close(found[2], torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[3].exp(), torch.full((3,), 0.5), atol=1e-4, rtol=0)
    assert (found[:2].abs() > 0.01).all()
    assert_within_se((data.spikes - data.rates).flatten(0, 1), 0.0)
    clean = _turned(data.latents[..., 1].flatten(), data.latents[..., 2].flatten(), 12)
    assert_within_se((data.images.flatten(0, 1) - clean).flatten().square(), 0.05**2)


def test_images_turn_and_grow():
    zero, quarter = torch.zeros(1), torch.full((1,), math.pi / 2 / 0.6)
    upright, turned, large = (
        _turned(*pair, 12).view(12, 12)
        for pair in ((zero, zero), (quarter, zero), (zero, torch.full((1,), 2.0)))
    )
    torch.testing.assert_close(turned, upright.rot90(1), atol=1e-4, rtol=0)
    assert large.sum() > 1.3 * upright.sum()


def test_seeds_and_errors():
    one, two = (paired_recordings(2, num_steps=4, seed=seed).spikes for seed in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, paired_recordings(2, num_steps=4).spikes)
    with pytest.raises(ValueError, match="trials"):
        paired_recordings(0)
    with pytest.raises(ValueError, match="lengthscale"):
        paired_recordings(1, lengthscale=0.0)
