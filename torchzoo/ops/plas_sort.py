"""Sorting vectors on a grid so that neighbours are alike: Parallel Linear Assignment Sorting.

W. Morgenstern, F. Barthel, A. Hilsmann and P. Eisert, "Compact 3D Scene Representation via
Self-Organizing Gaussian Grids", 2024, section 3.1, with the details of the authors' code. While a
radius r shrinks by 5 % a round, from half the longer side to 1, the target T is the grid X blurred
with a Gaussian of odd size f = 2 floor(r) + 1 and standard deviation f, around the border in x and
mirrored in y. The grid, rolled at random, is cut into blocks, and a random permutation cuts the
cells of a block into groups of four; in each group the permutation p that minimises

    sum over i of the squared distance of x_p(i) to T_i

is the best of all 24. Groups are drawn anew while they gain, and blocks while their groups do.

Vectors are rounded to integers of up to 20 bits first. From there on all arithmetic is exact, so
that neither the device nor the number of threads changes the result. Groups are drawn on the CPU.

Deviations from the authors' code: a block is no larger than the grid, so that grids below 16 x 16
are sorted too; grids need not be square.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

SHRINK = 0.95
"""Factor of the radius from round to round."""

MIN_ROLLS = 4
"""Cuts into blocks that a round tries at least."""

DRAWS = 8
"""Permutations drawn at a time."""

_BITS, _WEIGHT_BITS = 20, 24
_FOURS = torch.tensor(list(itertools.permutations(range(4))))
"""The permutations of four, `(24, 4)`, the identity first."""


class PlasStats(NamedTuple):
    """What a sort did.

    Attributes:
        rounds: Targets.
        rolls: Cuts into blocks.
        passes: Draws of groups, each over all blocks.
        moved: Cells whose vector changed in any pass, summed over the passes.
    """

    rounds: int
    rolls: int
    passes: int
    moved: int


@torch.no_grad()
def plas_sort(
    features: Tensor,
    *,
    weights: Tensor | list[float] | None = None,
    improvement_break: float = 1e-4,
    min_block: int = 16,
    min_radius: float = 1,
    generator: torch.Generator | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PlasStats]:
    """Arrange vectors on a grid so that neighbours are alike.

    Args:
        features: Vectors, to be put row by row on a square, or a grid of them.
        weights: Factors of the D features; None: 1.
        improvement_break: A draw of groups that lowers the distance to the target by less than
            this share of it is the last of its blocks.
        min_block: Least side of a block, even; where the grid is smaller, it is the block.
        min_radius: The last radius, at least 1.
        generator: Draws blocks and groups.
        return_stats: Whether to return the `PlasStats` too.

    Shape:
        - features: `(N, D)` with N a square, or `(D, H, W)`
        - weights: `(D,)`
        - output: `(H W,)`, int64

    Returns:
        The vector of each cell, row by row: cell i gets `features[perm[i]]`.

    Raises:
        ValueError: N is not a square, a feature or weight is not finite, or an option is out of its
            range.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024.

    Example:
        >>> colors = torch.rand(256, 3, generator=torch.manual_seed(0))
        >>> perm = plas_sort(colors, generator=torch.manual_seed(0))
        >>> grid = colors[perm].view(16, 16, 3)
        >>> bool(grid.diff(dim=1).norm(dim=-1).mean() < 0.3)
        True
    """
    vectors, height, width = _vectors(features)
    _check_options(improvement_break, min_block, min_radius)
    if weights is not None:
        factors = torch.as_tensor(weights, dtype=vectors.dtype, device=vectors.device)
        if factors.shape != vectors.shape[1:]:
            got, expected = tuple(factors.shape), (vectors.shape[1],)
            raise ValueError(f"weights: got {got}, expected {expected}")
        vectors = vectors * factors
    if not vectors.isfinite().all():
        raise ValueError("features: got NaN or infinite values (with the weights), expected finite")
    items = _integers(vectors)
    order = torch.arange(len(items), device=items.device)
    random = torch.Generator().manual_seed(_seed(generator))
    done = PlasStats(0, 0, 0, 0)
    for radius in _radii(height, width, min_radius):
        side = _block(height, width, radius, min_block)
        if not side:
            break
        blurred = _blurred(items[order].view(height, width, -1), radius)
        target = blurred.flatten(0, 1).contiguous()
        tried, improved = 0, True
        while improved or tried < MIN_ROLLS:
            cells = _blocks(height, width, side, random).to(items.device)
            order, passes, moved = _exchange(items, target, order, cells, improvement_break, random)
            improved, tried = passes > 1, tried + 1
            done = done._replace(passes=done.passes + passes, moved=done.moved + moved)
        done = done._replace(rounds=done.rounds + 1, rolls=done.rolls + tried)
    return (order, done) if return_stats else order


def _exchange(
    items: Tensor,
    target: Tensor,
    order: Tensor,
    cells: Tensor,
    improvement_break: float,
    random: torch.Generator,
) -> tuple[Tensor, int, int]:
    """Draw groups in the blocks until they gain too little; the order, passes, moved cells."""
    passes = moved = 0
    while True:
        draws = torch.stack(
            [torch.randperm(cells.shape[1], generator=random) for _ in range(DRAWS)]
        )
        order, results = torch.ops.torchzoo.plas_passes(
            items, target, order, cells, draws.to(cells.device), improvement_break
        )
        _, ran, changes, going = results.tolist()
        passes, moved = passes + ran, moved + changes
        if not going:
            return order, passes, moved


@torch.library.custom_op("torchzoo::plas_passes", mutates_args=())
def _plas_passes(
    items: Tensor,
    target: Tensor,
    order: Tensor,
    cells: Tensor,
    draws: Tensor,
    improvement_break: float,
) -> tuple[Tensor, Tensor]:
    """Give groups of four cells their items in the best order, one pass after the other.

    Args:
        items: `(N, D)` int32.
        target: `(N, D)` int32, a row a cell.
        order: `(N,)` int64, the item of each cell.
        cells: `(B, S)` int64, the cells of B blocks; no cell is in two.
        draws: `(P, S)` int64, permutations; each cuts the cells of all blocks into groups.
        improvement_break: A pass is the last if it lowers the sum over these cells of the squared
            distances of their items to their targets by less than this share of it.

    Returns:
        The new order; and that sum in the end, the passes run, in how many cells items changed,
        counted in each pass, and whether the last pass gained enough, int64.
    """
    distance = int((items[order[cells]] - target[cells]).long().square().sum())
    order, moved, ran, going = order.clone(), 0, 0, True
    fours = _FOURS.to(order.device)
    chosen = torch.nn.functional.one_hot(fours, 4).double().flatten(1).T  # (cell item, 24)
    for draw in draws:
        groups = rearrange(cells[:, draw], "b (g k) -> (b g) k", k=4)
        held = order[groups]
        # Whole numbers in sums of no more than 53 bits: exact, in any order.
        likeness = target[groups].double() @ items[held].double().mT
        scores = likeness.flatten(1) @ chosen
        best = scores.argmax(-1)  # the first of several
        gain = 2 * int((scores.gather(1, best[:, None])[:, 0] - scores[:, 0]).long().sum())
        found = held.gather(1, fours[best])
        order[groups.flatten()] = found.flatten()
        moved, ran = moved + int((found != held).sum()), ran + 1
        going = gain > 0 and float(gain) >= improvement_break * float(distance)
        distance -= gain
        if not going:
            break
    return order, torch.tensor([distance, ran, moved, going], device=order.device)


@_plas_passes.register_fake
def _(
    items: Tensor,
    target: Tensor,
    order: Tensor,
    cells: Tensor,
    draws: Tensor,
    improvement_break: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(order), order.new_empty(4)


def _vectors(features: Tensor) -> tuple[Tensor, int, int]:
    """Vectors `(H W, D)` in float64, H and W."""
    if features.ndim not in (2, 3):
        raise ValueError(f"features: got {tuple(features.shape)}, expected (N, D) or (D, H, W)")
    if features.is_complex():
        raise ValueError(f"features: got {features.dtype}, expected real numbers")
    if features.ndim == 3:
        _, height, width = features.shape
        return rearrange(features.double(), "d h w -> (h w) d").contiguous(), height, width
    side = math.isqrt(len(features))
    if side * side != len(features):
        raise ValueError(f"features: got N={len(features)}, expected a square number of vectors")
    return features.double(), side, side


def _check_options(improvement_break: float, min_block: int, min_radius: float) -> None:
    if not improvement_break >= 0:
        raise ValueError(f"improvement_break: got {improvement_break}, expected at least 0")
    if min_block < 2 or min_block % 2:
        raise ValueError(f"min_block: got {min_block}, expected an even number from 2")
    if not min_radius >= 1:
        raise ValueError(f"min_radius: got {min_radius}, expected at least 1")


def _seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else None
    return int(torch.randint(1 << 62, (), generator=generator, device=device))


def _integers(vectors: Tensor) -> Tensor:
    """Vectors in steps as fine as keep all sums exact, int32.

    The sum of all squared distances, of numbers of bits + 1 each, has to fit into 62 bits, and that
    of three products of differences of vectors into the 53 bits of a float64.
    """
    if not vectors.numel():
        return vectors.int()
    all_bits, row_bits = (math.ceil(math.log2(n)) for n in (vectors.numel(), 3 * vectors.shape[1]))
    bits = min(_BITS, (60 - all_bits) // 2, (51 - row_bits) // 2)
    largest = vectors.abs().amax()
    # Two steps, as 2^bits / largest overflows for the smallest numbers.
    scaled = vectors / torch.where(largest > 0, largest, 1.0) * (1 << bits)
    return scaled.round().int().contiguous()


def _radii(height: int, width: int, last: float) -> list[int]:
    """The rounds' radii, rounded down."""
    radius, found = max(height, width) / 2 - 1, []
    while radius >= last:
        found.append(int(radius))
        radius *= SHRINK
    return found


def _block(height: int, width: int, radius: int, least: int) -> int:
    """The even side of a round's blocks; 0 where the grid is too small for any."""
    side = min(height, width)
    return min(max(least, min(2 * radius + 2, side)), side) // 2 * 2


def _blurred(grid: Tensor, radius: int) -> Tensor:
    """An integer grid `(H, W, D)` blurred along both axes, rounded after each."""
    height, width, _ = grid.shape
    rows = _blur_matrix(height, radius, circular=False).to(grid.device)
    columns = _blur_matrix(width, radius, circular=True).to(grid.device)
    one = 1 << _WEIGHT_BITS
    along = torch.einsum("vw, hwd -> hvd", columns, grid.double()).div(one).round()
    return torch.einsum("uh, hvd -> uvd", rows, along).div(one).round().int()


def _blur_matrix(size: int, radius: int, *, circular: bool) -> Tensor:
    """The blur of one axis, `(size, size)`: rows of integers whose sum is 2^24, up to rounding."""
    radius = min(radius, (size - 2) // 2) if size > 1 else 0  # no longer than the axis
    taps = torch.arange(-radius, radius + 1)
    weights = torch.softmax(-taps.double().square() / (2 * (2 * radius + 1) ** 2), 0)
    weights = (weights * (1 << _WEIGHT_BITS)).round()
    place = torch.arange(size)[:, None] + taps
    if circular:
        place = place % size
    else:
        place = place.abs()
        place = torch.where(place < size, place, 2 * (size - 1) - place)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, place, weights.expand(place.shape))


def _blocks(height: int, width: int, side: int, random: torch.Generator) -> Tensor:
    """The cells of each block of a randomly rolled grid, `(blocks, side^2)`."""
    down, right = torch.randint(side, (2,), generator=random).tolist()
    rows = (torch.arange(height // side * side) + down) % height
    columns = (torch.arange(width // side * side) + right) % width
    cells = rows[:, None] * width + columns
    return rearrange(cells, "(a y) (b x) -> (a b) (y x)", y=side, x=side)
