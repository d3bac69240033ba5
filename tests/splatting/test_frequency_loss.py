"""The frequency-modulated loss: its mask against scipy, its terms, and its guards."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data

from torchzoo.splatting import FrequencyModulatedLoss, l1, photometric_loss


def photographs(height=60, width=80):
    """Two pictures, float64 `(2, H, W, 3)`."""
    image = torch.from_numpy(data.astronaut() / 255.0)
    return torch.stack([image[:height, 150 : 150 + width], image[200 : 200 + height, :width]])


def blurred(plane, sigma):
    offset = np.arange(-round(3 * sigma), round(3 * sigma) + 1)
    weights = np.exp(-0.5 * (offset / sigma) ** 2)
    for axis in (0, 1):
        plane = ndimage.convolve1d(plane, weights / weights.sum(), axis, mode="constant")
    return plane


def level(image, w):
    """The stretched difference of Gaussians of one picture, sides multiples of 5, at w percent."""
    small = image.mean(-1)[2::5, 2::5]  # where pixels of five times the size have their centres
    sigma = 0.1 + 0.1 * (100 - w) if w >= 50 else 0.1 + 0.1 * w
    band = blurred(small, sigma) - blurred(small, 2 * sigma)
    places = np.meshgrid(*((np.arange(n) - 2) / 5 for n in image.shape[:2]), indexing="ij")
    large = ndimage.map_coordinates(band, places, order=1, mode="nearest")
    return (large - large.min()) / (large.max() - large.min())


@pytest.mark.claim(
    46,
    "The loss's mask is that of scipy's filters on a photograph, at the start, in the middle and "
    "at the end of the training",
    tolerance=1e-9,
)
@pytest.mark.parametrize("w", [0, 30, 50, 70, 100])
def test_mask_is_that_of_scipys_filters(w):
    images = photographs()
    mask = FrequencyModulatedLoss().mask(images, w / 100)
    assert mask.shape == (2, 60, 80)
    for image, found in zip(images.numpy(), mask.numpy(), strict=True):
        values = level(image, w)
        unsure = np.abs(values - 0.5) < 1e-9
        assert unsure.sum() < 5
        expected = (values if w >= 50 else 1 - values) >= 0.5
        assert 0.005 < expected.mean() < 0.995
        assert ((found == expected) | unsure).all()


@pytest.mark.claim(
    46,
    "The mask is of zeros and ones, and what it is before the middle of the training is the "
    "opposite of what it is as long after it",
    tolerance=None,
)
def test_mask_turns_over_in_the_middle():
    images, loss = photographs(), FrequencyModulatedLoss()
    before, after = (loss.mask(images, t) for t in (0.3, 0.7))
    assert ((before == 0) | (before == 1)).all()
    assert (before != after).double().mean() > 0.99


@pytest.mark.claim(
    46,
    "Without its masked term the loss is that of Gaussian splatting, and it is 0 for equal images",
    tolerance=1e-7,
)
def test_limits_of_the_loss():
    x, y = photographs().roll(3, 2), photographs()
    plain = FrequencyModulatedLoss(lambda_freq=0.0)(x, y, 0.2)
    torch.testing.assert_close(plain, photometric_loss(x, y), rtol=0, atol=1e-12)
    for progress in (0.0, 0.4, 1.0):
        assert abs(FrequencyModulatedLoss()(y, y, progress).item()) <= 1e-7


def test_terms_are_weighted():
    x, y = photographs().roll(3, 2), photographs()
    for source, picture in (("render", x), ("target", y)):
        loss = FrequencyModulatedLoss(lambda_ssim=0.3, lambda_freq=0.6, mask_source=source)
        inside = loss.mask(picture, 0.6)[..., None]
        masked = ((x - y).abs() * inside).mean()
        unlike = (photometric_loss(x, y, ssim_weight=1.0)).item()
        expected = 0.1 * l1(x, y) + 0.3 * unlike + 0.6 * masked
        torch.testing.assert_close(loss(x, y, 0.6), expected, rtol=1e-10, atol=0)
    default = FrequencyModulatedLoss()
    assert (default.lambda_ssim, default.lambda_freq, default.downscale) == (0.2, 0.5, 0.2)
    assert default.mask_source == "render"


@pytest.mark.claim(
    46, "No gradient flows through the mask, and a black image gives no NaN", tolerance=None
)
def test_gradients():
    x, y = photographs().roll(3, 2).requires_grad_(), photographs()
    loss = FrequencyModulatedLoss(lambda_ssim=0.0, lambda_freq=1.0)
    loss(x, y, 0.8).backward()
    inside = loss.mask(x, 0.8)
    assert not inside.requires_grad
    assert torch.equal(x.grad, inside[..., None] * (x - y).sign() / x.numel())
    black = torch.zeros(1, 20, 20, 3, requires_grad=True)
    default = FrequencyModulatedLoss()
    assert (default.mask(black, 0.2) == 1).all()
    value = default(black, torch.full_like(black, 0.5), 0.2)
    value.backward()
    assert torch.isfinite(black.grad).all()
    assert 0.4 < value < 0.65


def test_images_are_masked_one_by_one():
    images, loss = photographs(48, 37), FrequencyModulatedLoss()
    images[1] = 0
    together = loss.mask(images, 0.9)
    assert torch.equal(together[0], loss.mask(images[0], 0.9))
    assert (together[1] == 1).all()


@pytest.mark.parametrize(
    ("size", "progress", "name"),
    [((4, 20), 0.5, "image"), ((20, 20), 1.01, "progress"), ((20, 20), -0.1, "progress")],
)
def test_bad_inputs_are_refused(size, progress, name):
    image = torch.rand(1, *size, 3)
    with pytest.raises(ValueError, match=f"{name}: got"):
        FrequencyModulatedLoss()(image, image, progress)
    with pytest.raises(ValueError, match=f"{name}: got"):
        FrequencyModulatedLoss().mask(image, progress)
