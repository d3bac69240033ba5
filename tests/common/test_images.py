"""Image quality against scikit-image and plain numpy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from torchzoo.common.images import ms_ssim, psnr, ssim, ssim_map


def photographs(noise=0.1, side=200):
    """A colour photograph and a noisy copy, float64 `(3, H, W)`."""
    image = data.astronaut()[:side, :side].transpose(2, 0, 1) / 255.0
    noisy = image + noise * np.random.default_rng(0).standard_normal(image.shape)
    return torch.from_numpy(image), torch.from_numpy(noisy)


@pytest.mark.parametrize("data_range", [1.0, 2.5])
def test_ssim_is_that_of_scikit_image(data_range):
    x, y = photographs()
    _, expected = structural_similarity(
        x.numpy(),
        y.numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=data_range,
        full=True,
    )
    inner = (slice(None), slice(5, -5), slice(5, -5))
    found = ssim_map(x, y, data_range=data_range)
    np.testing.assert_allclose(found.numpy()[inner], expected[inner], atol=1e-12)
    single = ssim_map(x.float(), y.float(), data_range=data_range).numpy()[inner]
    np.testing.assert_allclose(single, expected[inner], atol=2e-4)
    assert np.abs(single - expected[inner]).mean() < 1e-5


@pytest.mark.parametrize("shape", [(20, 17), (131, 67), (3, 64)])
def test_windows_of_another_size_and_zeros_beyond_the_border(shape):
    x, y = (image[:, : shape[0], : shape[1]] for image in photographs())
    offset = np.arange(7) - 3
    weights = np.exp(-(offset**2) / (2 * 0.8**2))
    weights /= weights.sum()

    def blur(image):
        for axis in (1, 2):
            image = correlate1d(image, weights, axis, mode="constant")
        return image

    a, b = x.numpy(), y.numpy()
    mx, my = blur(a), blur(b)
    vx, vy, c = blur(a * a) - mx**2, blur(b * b) - my**2, blur(a * b) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * c + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    found = ssim_map(x, y, window=7, sigma=0.8)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert ssim(x, y, window=7, sigma=0.8).item() == pytest.approx(expected.mean(), abs=1e-12)


def test_psnr_is_that_of_scikit_image():
    x, y = photographs()
    for data_range in (1.0, 2.0):
        expected = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=data_range)
        assert psnr(x, y, data_range=data_range).item() == pytest.approx(expected, abs=1e-9)
    assert psnr(x, x).isinf()


def test_each_image_of_a_batch_has_its_own_value():
    x, y = photographs(side=192)
    pair = (torch.stack([x, y])[:, None], torch.stack([y, y])[:, None])
    for measure in (psnr, ssim, ms_ssim):
        batched = measure(*pair)
        assert batched.shape == (2, 1)
        torch.testing.assert_close(batched[0, 0], measure(x, y))
    assert ssim(*pair)[1].item() == pytest.approx(1)


def test_scales_are_multiplied_with_their_weights():
    x, y = photographs(noise=0.3, side=181)
    offset = np.arange(11) - 5
    weights = np.exp(-(offset**2) / 4.5)
    weights /= weights.sum()

    def blur(image):
        for axis in (1, 2):
            image = correlate1d(image, weights, axis, mode="constant")
        return image[:, 5:-5, 5:-5]

    a, b, expected = x.numpy(), y.numpy(), np.ones(3)
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            a, b = (
                image[:, : image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
                .reshape(3, image.shape[1] // 2, 2, image.shape[2] // 2, 2)
                .mean((2, 4))
                for image in (a, b)
            )
        mx, my = blur(a), blur(b)
        vx, vy, c = blur(a * a) - mx**2, blur(b * b) - my**2, blur(a * b) - mx * my
        factor = (2 * c + 9e-4) / (vx + vy + 9e-4)
        if scale == 4:
            factor = factor * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
        expected = expected * factor.mean((1, 2)) ** weight
    assert ms_ssim(x, y).item() == pytest.approx(expected.mean(), abs=1e-12)
    assert ms_ssim(x, 1 - x).item() == 0  # anticorrelated, and no NaN of a negative power


def test_gradients():
    x, y = (image[None, :2, 60:72, 60:73].clone() for image in photographs())
    assert torch.autograd.gradcheck(ssim, (x.requires_grad_(), y.requires_grad_()))
    (slope,) = torch.autograd.grad(ssim(x, x.detach()).sum(), x)
    assert slope.abs().max() < 1e-12


def test_half_precision_is_computed_in_single():
    x, y = (image.bfloat16() for image in photographs())
    assert ssim(x, y).dtype == torch.float32
    torch.testing.assert_close(ssim(x, y), ssim(x.float(), y.float()))
    x, y = x.float(), y.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim_map(x, y)
    assert torch.equal(found, ssim_map(x, y))


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
def test_bad_arguments(measure):
    x = torch.zeros(3, 176, 176)
    with pytest.raises(ValueError, match=r"y: expected the shape of x, \(3, 176, 176\), got"):
        measure(x, x[:, :8])
    with pytest.raises(ValueError, match=r"x: expected \(..., C, H, W\), got \(176, 176\)"):
        measure(x[0], x[0])
    with pytest.raises(ValueError, match="data_range: expected a number > 0, got 0"):
        measure(x, x, data_range=0)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_bad_windows(measure):
    x = torch.zeros(3, 176, 176)
    with pytest.raises(ValueError, match="window: expected an odd number ≥ 1, got 10"):
        measure(x, x, window=10)
    with pytest.raises(ValueError, match="sigma: expected a number > 0"):
        measure(x, x, sigma=0)
    with pytest.raises(ValueError, match="x: expected sides of 176 at least"):
        ms_ssim(x[:, 1:], x[:, 1:])
