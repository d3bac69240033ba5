import math

import pytest
import torch

from torchzoo.data.segments import deviating_segments


def test_the_labelled_segment_is_the_one_that_deviates_by_the_amplitude():
    x, y = deviating_segments(4000, length=8, dim=4, segments=4, amplitude=1000.0, seed=1)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    assert torch.equal(z.unflatten(1, (4, 2)).abs().sum((2, 3)).argmax(1), y)
    torch.testing.assert_close(y.bincount() / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)
    inside = torch.arange(8) // 2 == y[:, None]
    size = (x * inside[..., None]).sum(1) / 2 - (x * ~inside[..., None]).sum(1) / 6
    gain = size.abs().mean(1) / 1000  # of each sample
    assert gain.log().mean().item() == pytest.approx(0, abs=0.05)
    assert gain.log().std().item() == pytest.approx(0.5**0.5, abs=0.03)
    assert (size > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_gain_offset_and_drift_have_the_stated_spread():
    x, _ = deviating_segments(4000, length=32, dim=8, amplitude=0.0, seed=2)
    time = torch.linspace(-1, 1, 32)[:, None]
    slope = (x * time).sum(1) / time.square().sum()
    assert slope.std(1).square().mean().item() == pytest.approx(
        (1 + 1 / time.square().sum().item()) * math.e,
        rel=0.15,  # E gain^2 = e
    )
    assert x.mean((1, 2)).std().item() == pytest.approx(3, rel=0.05)
    assert slope.mean().item() == pytest.approx(0, abs=0.05)


def test_the_seed_alone_decides():
    first, again, other = (deviating_segments(5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)


def test_length_must_be_a_multiple_of_segments():
    with pytest.raises(ValueError, match="length"):
        deviating_segments(3, length=10, segments=4)
