"""Digits on a larger canvas, still or moving: frames whose every pixel is known."""

from __future__ import annotations

import torch
from torch import Tensor


def place(images: Tensor, offsets: Tensor, canvas: int = 12) -> Tensor:
    """Put each image on a black canvas.

    Args:
        images: The images.
        offsets: Row and column of each image's upper left corner.
        canvas: Side S of the canvas.

    Shape:
        - images: `(N, C, H, W)`
        - offsets: `(N, 2)`, integers
        - output: `(N, C, S, S)`

    Raises:
        ValueError: Offsets that are not one pair an image, or that push an image over the edge.

    Example:
        >>> place(torch.ones(1, 1, 2, 2), torch.tensor([[0, 1]]), canvas=3)[0, 0]
        tensor([[0., 1., 1.],
                [0., 1., 1.],
                [0., 0., 0.]])
    """
    n, channels, height, width = images.shape
    if offsets.shape != (n, 2) or offsets.is_floating_point():
        raise ValueError(f"offsets: expected integers ({n}, 2), got {tuple(offsets.shape)}")
    room = torch.tensor([canvas - height, canvas - width])
    if n and (int(offsets.min()) < 0 or bool((offsets.cpu() > room).any())):
        raise ValueError(f"offsets: expected from 0 to {room.tolist()}, got {offsets.tolist()}")
    rows = offsets[:, :1] + torch.arange(height, device=offsets.device)
    columns = offsets[:, 1:] + torch.arange(width, device=offsets.device)
    cells = (rows[:, :, None] * canvas + columns[:, None, :]).to(images.device)
    blank = images.new_zeros(n, channels, canvas * canvas)
    cells = cells.view(n, 1, height * width).expand(-1, channels, -1)
    return blank.scatter(2, cells, images.flatten(2)).view(n, channels, canvas, canvas)


def random_offsets(
    count: int, *, room: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """Corners `(count, 2)` drawn evenly from 0 to `room`, on the CPU.

    Example:
        >>> random_offsets(3, room=0).tolist()
        [[0, 0], [0, 0], [0, 0]]
    """
    return torch.randint(0, room + 1, (count, 2), generator=generator)


def moving_digits(
    images: Tensor,
    *,
    frames: int,
    canvas: int = 12,
    hold: int = 2,
    noise: float = 0.02,
    seed: int = 0,
) -> Tensor:
    """Films of images that walk over a black canvas and bounce off its edges.

    Each film has its own start and direction. An image moves by one pixel, along an axis or
    diagonally, and then stands still until `hold` frames have passed.

    Args:
        images: Square images with values in [0, 1].
        frames: Frames T of each film.
        canvas: Side S of the canvas.
        hold: Frames from one move to the next.
        noise: Standard deviation of the sensor's noise, new in every pixel and frame; the sum is
            clipped to [0, 1].
        seed: Seed of starts, directions and noise.

    Shape:
        - images: `(N, C, H, H)`
        - output: `(N, T, C, S, S)`, on the device of `images`

    Raises:
        ValueError: No frames, no `hold`, negative noise, images that are not square or have no
            room to move.

    Example:
        >>> film = moving_digits(torch.ones(1, 1, 8, 8), frames=4, hold=2, noise=0.0)
        >>> bool((film[:, 0] == film[:, 1]).all()), bool((film[:, 1] == film[:, 2]).all())
        (True, False)
    """
    room = canvas - images.shape[-1]
    if images.ndim != 4 or images.shape[-1] != images.shape[-2] or room < 1:
        raise ValueError(
            f"images: expected (N, C, H, H) with H < canvas = {canvas}, got {tuple(images.shape)}"
        )
    if frames < 1 or hold < 1 or noise < 0:
        raise ValueError(
            f"frames, hold, noise: expected >= 1, >= 1, >= 0, got {frames}, {hold}, {noise}"
        )
    generator = torch.Generator().manual_seed(seed)
    start = random_offsets(len(images), room=room, generator=generator)
    directions = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])
    velocity = directions[torch.randint(0, 8, (len(images),), generator=generator)]
    film = []
    for frame in range(frames):
        way = (start + velocity * (frame // hold)) % (2 * room)  # there and back again
        still = place(images, torch.minimum(way, 2 * room - way), canvas)
        grain = noise * torch.randn(still.shape, generator=generator)
        film.append((still + grain.to(still)).clamp(0, 1))
    return torch.stack(film, 1)
