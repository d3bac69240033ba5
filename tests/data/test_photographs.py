import pytest
import torch
from scipy.ndimage import map_coordinates

from torchzoo.data.photographs import PHOTOGRAPHS, camera_films, photograph, views


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_real(name):
    image = photograph(name)
    assert (image.shape, image.dtype) == ((427, 640, 3), torch.float32)
    assert 0 <= image.min() < image.max() <= 1
    assert image.std() > 0.1
    with pytest.raises(ValueError, match="name: expected one of"):
        photograph("cat")


def test_views_on_the_pixel_grid_are_cuts_and_means():
    image = photograph("china")
    spots = torch.tensor([[100.0, 200.0], [3.0, 3.0]])
    cut = views(image, spots, torch.ones(2), 6)
    torch.testing.assert_close(cut[0], image[97:103, 197:203], rtol=0, atol=1e-4)
    torch.testing.assert_close(cut[1], image[:6, :6], rtol=0, atol=1e-4)
    coarse = views(image, spots[:1], torch.tensor([4.0]), 6)[0]
    block = image[88:112, 188:212].view(6, 4, 6, 4, 3).mean((1, 3))
    torch.testing.assert_close(coarse, block, rtol=0, atol=1e-4)


def test_views_between_pixels_equal_scipys_interpolation():
    image, spot, scale = photograph("flower").double(), (50.3, 620.6), 1.7  # over the right edge
    seen = views(
        image, torch.tensor([spot], dtype=torch.float64), torch.tensor([scale]).double(), 20
    )
    offset = scale * ((torch.arange(40) + 0.5) / 2 - 10) - 0.5  # two samples a side
    at = torch.meshgrid(spot[0] + offset, spot[1] + offset, indexing="ij")
    for channel in range(3):
        expected = map_coordinates(
            image[..., channel].numpy(), torch.stack(at).numpy(), order=1, mode="nearest"
        )
        expected = torch.from_numpy(expected).view(20, 2, 20, 2).mean((1, 3))
        torch.testing.assert_close(seen[0, ..., channel], expected, rtol=0, atol=1e-6)


def test_a_still_camera_sees_the_same_until_it_moves():
    films = camera_films(6, frames=5, size=16, hold=3, noise=0.0, seed=1).frames
    assert (films[:, 1:3] == films[:, :1]).all()
    assert (films[:, 3] == films[:, 4]).all()
    assert ((films[:, 3] != films[:, 2]).double().mean((1, 2, 3)) > 0.5).all()


def test_light_is_summed_over_a_pixel():
    """The mean of the film is that of what it shows, at any scale."""
    whole = camera_films(4, frames=1, size=1, scale=427.0, pan=0.0, noise=0.0, seed=0)
    for value, label in zip(whole.frames.flatten(0, 3), whole.labels.tolist(), strict=True):
        image = photograph(PHOTOGRAPHS[label])
        means = image.mean(0).unfold(0, 427, 1).mean(-1)  # of all squares from top to bottom
        assert (means - value).abs().amax(1).min() < 2e-3
    fine = camera_films(3, frames=1, size=32, scale=2.0, noise=0.0, seed=4).frames
    coarse = camera_films(3, frames=1, size=16, scale=4.0, noise=0.0, seed=4).frames
    pooled = torch.nn.functional.avg_pool2d(fine.flatten(0, 1).permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(pooled.permute(0, 2, 3, 1), coarse.flatten(0, 1), rtol=0, atol=1e-5)


def test_a_pan_shifts_the_view_by_whole_pixels():
    """With a pan of 1 at most one pixel a move; what two frames share is the same light."""
    films = camera_films(
        40, frames=3, size=16, scale=2.0, pan=4.0, hold=2, noise=0.0, seed=0
    ).frames
    assert torch.equal(films[:, 0], films[:, 1])
    # frames that moved correlate best at a shift of length 4
    shifts = [(i, j) for i in range(-6, 7) for j in range(-6, 7)]
    lengths = []
    for film in films:
        first, moved = film[0], film[2]
        off = []
        for i, j in shifts:
            a = first[max(i, 0) : 16 + min(i, 0), max(j, 0) : 16 + min(j, 0)]
            b = moved[max(-i, 0) : 16 + min(-i, 0), max(-j, 0) : 16 + min(-j, 0)]
            off.append(float((a - b).square().mean()))
        best = shifts[off.index(min(off))]
        lengths.append((best[0] ** 2 + best[1] ** 2) ** 0.5)
    lengths = torch.tensor(lengths)
    assert ((lengths - 4).abs() < 0.8).double().mean() > 0.8  # but at edges and on plain skies


def test_a_zoom_shows_the_middle_larger_or_the_whole_smaller():
    films = camera_films(30, frames=2, size=16, scale=4.0, pan=0.0, zoom=2.0, noise=0.0, seed=0)
    first, second = films.frames.permute(1, 0, 4, 2, 3)
    halves = torch.nn.functional.avg_pool2d
    inward = (halves(second, 2) - first[..., 4:12, 4:12]).abs().mean((1, 2, 3))
    outward = (halves(first, 2) - second[..., 4:12, 4:12]).abs().mean((1, 2, 3))
    assert (torch.minimum(inward, outward) < 0.01).all()  # but for how finely light is sampled
    assert 5 < (inward < outward).sum() < 25


def test_noise_has_the_size_asked_for_and_the_seed_decides():
    quiet = camera_films(4, frames=8, hold=8, noise=0.0, seed=2)
    noisy = camera_films(4, frames=8, hold=8, noise=0.03, seed=2)
    inside = (quiet.frames > 0.2) & (quiet.frames < 0.8)
    assert (noisy.frames - quiet.frames)[inside].std().item() == pytest.approx(0.03, rel=0.03)
    assert 0 <= noisy.frames.min() <= noisy.frames.max() <= 1
    again = camera_films(4, frames=8, hold=8, noise=0.03, seed=2)
    assert torch.equal(noisy.frames, again.frames)
    assert torch.equal(noisy.labels, again.labels)
    assert not torch.equal(noisy.frames, camera_films(4, frames=8, hold=8, seed=3).frames)
    assert camera_films(0, frames=3, size=8).frames.shape == (0, 3, 8, 8, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"frames": 0}, "frames"),
        ({"size": 0}, "size"),
        ({"hold": 0}, "hold"),
        ({"zoom": 0.5}, "zoom"),
        ({"noise": -1.0}, "noise"),
        ({"scale": 0.0}, "scale"),
        ({"size": 200}, "size, scale, zoom: a view of 800"),
        ({"zoom": 1.2}, "size, scale, zoom"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        camera_films(1, **options)
