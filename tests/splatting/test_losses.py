"""Losses against scikit-image and each other."""

import pytest
import torch
from skimage.metrics import structural_similarity

from torchzoo.splatting.losses import l1, photometric_loss


def pictures(*shape):
    random = torch.Generator().manual_seed(0)
    return torch.rand(2, *shape, generator=random, dtype=torch.float64)


def test_l1():
    image, target = pictures(2, 6, 5, 3)
    expected = sum(abs(a - b) for a, b in zip(image.flatten(), target.flatten(), strict=True))
    torch.testing.assert_close(l1(image, target), expected / 180)


def test_weights_of_the_two_parts():
    image, target = pictures(40, 50, 3)
    target = 0.6 * image + 0.4 * target
    similar = structural_similarity(
        *(torch.nn.functional.pad(x, (0, 0, 5, 5, 5, 5)).numpy() for x in (image, target)),
        channel_axis=2,
        gaussian_weights=True,
        use_sample_covariance=False,
        data_range=1.0,
    )  # its mean leaves out the border of 5, so zeros go there
    expected = 0.8 * l1(image, target).item() + 0.2 * (1 - similar)
    assert photometric_loss(image, target).item() == pytest.approx(expected, abs=1e-10)
    assert photometric_loss(image, target, ssim_weight=1).item() == pytest.approx(1 - similar)
    assert photometric_loss(image, target, ssim_weight=0) == l1(image, target)
    batch = torch.stack([image, target]), torch.stack([target, target])
    assert photometric_loss(*batch).item() == pytest.approx(expected / 2, abs=1e-10)


def test_gradient():
    image, target = pictures(1, 12, 13, 2)
    assert torch.autograd.gradcheck(photometric_loss, (image.requires_grad_(), target))


def test_bad_arguments():
    image = torch.zeros(4, 4, 3)
    with pytest.raises(ValueError, match=r"target: expected the shape of image, \(4, 4, 3\), got"):
        photometric_loss(image, image[1:])
    with pytest.raises(ValueError, match=r"ssim_weight: expected a number in \[0, 1\], got 1.5"):
        photometric_loss(image, image, ssim_weight=1.5)
