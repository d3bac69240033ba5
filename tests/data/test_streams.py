import pytest
import torch

from torchzoo.data.streams import moving_digits, place, random_offsets


def test_place_puts_each_image_at_its_corner_and_black_around_it():
    images = torch.rand(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([[0, 0], [4, 3], [1, 2], [3, 0], [0, 3]])
    placed = place(images, offsets, canvas=7)
    expected = torch.zeros(5, 2, 7, 7)
    for n, (row, column) in enumerate(offsets.tolist()):
        expected[n, :, row : row + 3, column : column + 4] = images[n]
    assert torch.equal(placed, expected)


def test_place_passes_gradients_and_takes_no_images():
    images = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: place(x, torch.tensor([[0, 1], [1, 0]]), 3), images)
    assert place(torch.zeros(0, 1, 8, 8), torch.zeros(0, 2, dtype=torch.int64)).shape[0] == 0


@pytest.mark.parametrize(
    "offsets", [[[5, 0]], [[0, -1]], [[0, 0], [0, 0]], [[0.0, 0.0]], [[0, 0, 0]]]
)
def test_place_refuses_offsets_that_do_not_fit(offsets):
    with pytest.raises(ValueError, match="offsets"):
        place(torch.zeros(1, 1, 8, 8), torch.tensor(offsets), canvas=12)


def test_random_offsets_are_even_and_repeatable():
    drawn = random_offsets(5000, room=4, generator=torch.Generator().manual_seed(1))
    again = random_offsets(5000, room=4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    share = drawn.flatten().bincount() / drawn.numel()
    torch.testing.assert_close(share, torch.full((5,), 0.2), atol=0.02, rtol=0)


def corner(frame):
    """Upper left corner of the only lit square."""
    lit = frame[0].nonzero()
    return lit.min(0).values


def test_a_digit_moves_by_one_pixel_every_hold_frames_and_stays_whole():
    films = moving_digits(torch.ones(20, 1, 8, 8), frames=40, hold=3, noise=0.0, seed=4)
    assert films.shape == (20, 40, 1, 12, 12)
    assert (films.sum((2, 3, 4)) == 64).all()  # never cut off at the edge
    for film in films:
        corners = torch.stack([corner(frame) for frame in film])
        jumps = corners.diff(dim=0).abs()
        moves = jumps.amax(1)
        expected = torch.tensor([1 if frame % 3 == 0 else 0 for frame in range(1, 40)])
        assert torch.equal(moves, expected)
        # the same axes all the way: along one of them, or along both
        assert (jumps[2::3] == jumps[2]).all()
        assert jumps[2].sum() in (1, 2)


def test_noise_has_the_size_asked_for_and_is_new_in_each_frame():
    grey = torch.full((4, 1, 8, 8), 0.5)
    quiet = moving_digits(grey, frames=30, hold=30, noise=0.0, seed=2)
    films = moving_digits(grey, frames=30, hold=30, noise=0.05, seed=2)
    inside = (films - quiet)[quiet > 0]
    assert inside.std().item() == pytest.approx(0.05, rel=0.05)
    assert inside.mean().item() == pytest.approx(0, abs=0.003)
    assert (films[:, 1:] != films[:, :-1])[quiet[:, 1:] > 0].double().mean() > 0.999
    assert (films.min(), films.max() <= 1) == (0, True)


def test_the_seed_decides_a_film():
    image = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first = moving_digits(image, frames=6, seed=7)
    assert torch.equal(first, moving_digits(image, frames=6, seed=7))
    assert not torch.equal(first, moving_digits(image, frames=6, seed=8))


@pytest.mark.parametrize(
    ("images", "options", "named"),
    [
        (torch.zeros(1, 1, 12, 12), {}, "images"),
        (torch.zeros(1, 1, 8, 6), {}, "images"),
        (torch.zeros(1, 8, 8), {}, "images"),
        (torch.zeros(1, 1, 8, 8), {"frames": 0}, "frames"),
        (torch.zeros(1, 1, 8, 8), {"hold": 0}, "hold"),
        (torch.zeros(1, 1, 8, 8), {"noise": -0.1}, "noise"),
    ],
)
def test_bad_films_are_refused(images, options, named):
    with pytest.raises(ValueError, match=named):
        moving_digits(images, **{"frames": 4, **options})
