"""Parallel linear assignment sorting against assignment solvers and dense blurs."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from torchzoo.ops import plas_sort
from torchzoo.ops.library import backend
from torchzoo.splatting import neighbor_distance

MODULE = __import__("sys").modules["torchzoo.ops.plas_sort"]  # the name itself is the function
PASSES = torch.ops.torchzoo.plas_passes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(blocks=3, size=16, features=5, passes=2, seed=0, most=1000):
    """Items, targets, an order, cells of blocks and draws, with cells that are in no block."""
    g = seeded(seed)
    count = blocks * size + 7
    items, target = (
        torch.randint(-most, most + 1, (count, features), generator=g, dtype=torch.int32)
        for _ in range(2)
    )
    order = torch.randperm(count, generator=g)
    cells = torch.randperm(count, generator=g)[: blocks * size].view(blocks, size)
    draws = torch.stack([torch.randperm(size, generator=g) for _ in range(passes)])
    return items, target, order, cells, draws


def distance(items, target, order, cells):
    return (items[order[cells]].long() - target[cells].long()).square().sum().item()


def is_permutation(perm, count):
    return torch.equal(perm.sort().values, torch.arange(count))


@pytest.mark.claim(
    27, "the result is a permutation, the same for the same seed and another for another"
)
@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 21), width=st.integers(1, 21), d=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_permutation(height, width, d, seed):
    grid = torch.rand(d, height, width, generator=seeded(seed))
    found = plas_sort(grid, generator=seeded(seed), improvement_break=0.05)
    assert found.dtype == torch.int64
    assert is_permutation(found, height * width)
    again = plas_sort(grid.double(), generator=seeded(seed), improvement_break=0.05)
    assert torch.equal(found, again)
    if height == width:
        rows = grid.flatten(1).T
        assert torch.equal(plas_sort(rows, generator=seeded(seed), improvement_break=0.05), found)
    if min(height, width) > 6:
        other = plas_sort(grid, generator=seeded(seed + 1), improvement_break=0.05)
        assert not torch.equal(found, other)
        if d > 1:
            assert neighbor_distance(grid.flatten(1)[:, found].view_as(grid)) < neighbor_distance(
                grid
            )


@pytest.mark.claim(
    27, "a group of four gets the cheapest of its assignments, as an assignment solver finds it"
)
def test_groups_are_solved_exactly():
    items, target, order, cells, draws = problem(blocks=250, size=16, passes=1)
    found, result = PASSES(items, target, order, cells, draws, 0.0)
    saved = 0
    for group in cells[:, draws[0]].reshape(-1, 4):  # 1,000 of them
        x, t = items[order[group]].double(), target[group].double()
        cost = torch.cdist(t, x).square().round().numpy()
        rows, columns = linear_sum_assignment(cost)
        mine = (items[found[group]].double() - t).square().sum().item()
        assert mine == cost[rows, columns].sum()
        assert set(found[group].tolist()) == set(order[group].tolist())
        saved += np.trace(cost) - mine
    assert result[0] == distance(items, target, order, cells) - saved
    outside = torch.ones(len(order), dtype=torch.bool)
    outside[cells.flatten()] = False
    assert torch.equal(found[outside], order[outside])
    assert result[2] == (found != order).sum()


@pytest.mark.claim(
    27, "no group moves away from the target, and the distance to it never grows within a round"
)
def test_distance_falls():
    items, target, order, cells, draws = problem(passes=12)
    before = distance(items, target, order, cells)
    for draw in draws:
        groups = cells[:, draw].reshape(-1, 4)
        found, result = PASSES(items, target, order, cells, draw[None], 0.0)
        old, new = (
            (items[o[groups]].long() - target[groups]).square().sum((1, 2)) for o in (order, found)
        )
        assert (new <= old).all()
        assert result[0] == distance(items, target, found, cells)
        assert result[0] <= before
        order, before = found, result[0].item()


def test_when_passes_end():
    items, target, order, cells, draws = problem(passes=6)
    start = distance(items, target, order, cells)
    falls, now, left = [], order, start
    for draw in draws:
        now, result = PASSES(items, target, now, cells, draw[None], 0.0)
        falls.append((left - result[0].item()) / left)
        left = result[0].item()
    for limit in (0.5 * sum(falls[1:3]), falls[0] * 1.001, 0.0):
        expected = next((k + 1 for k, f in enumerate(falls) if not f or f < limit), len(falls))
        _, result = PASSES(items, target, order, cells, draws, limit)
        assert result[1] == expected
        assert result[3] == (falls[expected - 1] >= limit and falls[expected - 1] > 0)


@pytest.mark.skipif(backend("plas_passes")[0] != "native", reason="needs the built kernel")
@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 9, 17])
def test_kernel_equals_reference(features):
    """Bit for bit, ties included; threads share the groups of a block."""
    for most in (1, 1000, 1 << 19):
        args = problem(blocks=341, size=36, features=features, passes=5, most=most)
        expected = MODULE._plas_passes._init_fn(*args, 1e-3)
        for threads in (1, 2):
            old = torch.get_num_threads()
            torch.set_num_threads(threads)
            found = PASSES(*args, 1e-3)
            torch.set_num_threads(old)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_operator():
    torch.library.opcheck(PASSES, (*problem(), 0.0))


def test_exchanges_go_on_until_one_gains_too_little():
    items, target, order, cells, _ = problem(blocks=4, size=64)
    start = distance(items, target, order, cells)
    found, passes, moved = MODULE._exchange(items, target, order, cells, 1e-3, seeded(3))
    assert passes > MODULE.DRAWS
    assert moved >= (found != order).sum()
    g, now, left = seeded(3), order, start
    for k in range(passes):
        if k % MODULE.DRAWS == 0:
            draws = [torch.randperm(64, generator=g) for _ in range(MODULE.DRAWS)]
        now, result = PASSES(items, target, now, cells, draws[k % 8][None], 0.0)
        gain, left = left - result[0].item(), result[0].item()
        assert (gain < 1e-3 * (left + gain)) == (k == passes - 1)
    assert torch.equal(now, found)


@pytest.mark.claim(
    27,
    "a round keeps the target that its grid had at the start, and ends with the fourth cut into "
    "blocks or the first one after it without improvement",
)
def test_rounds(monkeypatch):
    seen, passes, blurs = [], [], []
    exchange, blurred = MODULE._exchange, MODULE._blurred

    def watched(items, target, order, cells, *rest):
        after = exchange(items, target, order, cells, *rest)
        everywhere = torch.arange(len(order))[None]
        seen.append([distance(items, target, o, everywhere) for o in (order, after[0])])
        passes.append(after[1])
        assert torch.equal(target, blurs[-1][1].flatten(0, 1))
        return after

    def noted(grid, radius):
        blurs.append((grid, blurred(grid, radius), len(seen)))
        return blurs[-1][1]

    monkeypatch.setattr(MODULE, "_exchange", watched)
    monkeypatch.setattr(MODULE, "_blurred", noted)
    x = torch.rand(3, 20, 20, generator=seeded())
    order, stats = plas_sort(x, generator=seeded(), improvement_break=0.01, return_stats=True)
    assert len(blurs) == stats.rounds == len(MODULE._radii(20, 20, 1))
    assert len(seen) == stats.rolls
    assert all(after <= before for before, after in seen)
    starts = [start for *_, start in blurs]
    for start, end in itertools.pairwise([*starts, len(seen)]):
        more = [k for k in range(start, end) if k < start + 3 or passes[k] > 1]
        assert more == list(range(start, end - 1))
        assert all(a[1] == b[0] for a, b in itertools.pairwise(seen[start:end]))
    items = MODULE._integers(x.flatten(1).T.double())
    assert torch.equal(blurs[0][0].flatten(0, 1), items)
    assert not torch.equal(blurs[-1][0].flatten(0, 1), items)
    assert is_permutation(order, 400)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    for features in (1, 3, 9, 40):
        args = problem(blocks=40, size=36, features=features, passes=5)
        expected = MODULE._plas_passes._init_fn(*args, 1e-3)
        for found, wanted in zip(PASSES(*(t.cuda() for t in args), 1e-3), expected, strict=True):
            assert torch.equal(found.cpu(), wanted)
    x = torch.rand(4, 30, 40, generator=seeded())
    found = plas_sort(x.cuda(), generator=seeded(), improvement_break=1e-3)
    assert torch.equal(found.cpu(), plas_sort(x, generator=seeded(), improvement_break=1e-3))


@pytest.mark.claim(
    27,
    "the target is a Gaussian blur of odd size and as wide, around in x and mirrored in y",
    tolerance=1.01,
)
@pytest.mark.parametrize(("height", "width", "radius"), [(12, 12, 5), (9, 14, 3), (16, 16, 1)])
def test_target(height, width, radius):
    grid = torch.randint(-(1 << 19), 1 << 19, (height, width, 2), generator=seeded())
    size = 2 * radius + 1
    blurred = np.stack(
        [
            scipy.ndimage.gaussian_filter1d(
                scipy.ndimage.gaussian_filter1d(
                    grid[..., k].double().numpy(), size, axis=1, mode="wrap", radius=radius
                ),
                size,
                axis=0,
                mode="mirror",
                radius=radius,
            )
            for k in range(2)
        ],
        -1,
    )
    found = MODULE._blurred(grid.int(), radius)
    assert np.abs(found.numpy() - blurred).max() <= 1.01  # rounded twice


@pytest.mark.claim(27, "radii fall by 5 % a round from half the side less one, to one")
def test_radii():
    assert MODULE._radii(64, 64, 1)[:4] == [31, 29, 27, 26]
    assert len(MODULE._radii(64, 64, 1)) == 67
    assert MODULE._radii(64, 64, 1)[-1] == 1
    fewer = [11, 10, *[9] * 2, *[8] * 3, *[7] * 2, *[6] * 3, *[5] * 4, *[4] * 4]
    assert MODULE._radii(10, 24, 4) == fewer
    assert MODULE._radii(3, 3, 1) == []
    blocks = [MODULE._block(64, 64, r, 16) for r in (31, 12, 7, 3)]
    assert blocks == [64, 26, 16, 16]
    assert [MODULE._block(h, 40, 3, 16) for h in (11, 8, 1)] == [10, 8, 0]


def test_blocks_cover_cells_once():
    for height, width, side in ((20, 23, 6), (16, 16, 16), (5, 9, 2)):
        seen = set()
        for seed in range(40):
            cells = MODULE._blocks(height, width, side, seeded(seed))
            assert cells.shape == ((height // side) * (width // side), side * side)
            assert len(cells.unique()) == cells.numel()
            rows, columns = cells // width, cells % width
            for axis, size in ((rows, height), (columns, width)):
                apart = (axis - axis[:, :1]) % size
                assert apart.max() < side
            seen |= set(cells.flatten().tolist())
        assert seen == set(range(height * width))


@pytest.mark.claim(27, "equal vectors keep their places, and the sort ends")
def test_constant_features():
    order, stats = plas_sort(torch.full((400, 3), 0.7), return_stats=True, generator=seeded())
    assert torch.equal(order, torch.arange(400))
    assert stats.rolls == 4 * stats.rounds
    assert stats.passes == stats.rolls
    assert stats.moved == 0
    assert plas_sort(torch.empty(0, 3)).shape == (0,)
    assert plas_sort(torch.empty(9, 0)).tolist() == list(range(9))


def morton(colors, side):
    """Vectors in Morton order of their first ten bits, along a z-curve of cells."""
    bits = (colors.double() * 1023).long()
    key = sum(
        ((bits[:, k] >> b) & 1) << (3 * b + k) for b, k in itertools.product(range(10), range(3))
    )
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cell = sum(
        (((column >> b) & 1) << 2 * b) | (((row >> b) & 1) << (2 * b + 1)) for b in range(10)
    )
    perm = torch.empty(side * side, dtype=torch.long)
    perm[cell.flatten().argsort()] = key.argsort()
    return perm


@pytest.mark.claim(
    27,
    "neighbours of 4,096 random colours on 64 x 64 are at most 0.135 times as far apart as at "
    "random, and 0.6 times as in Morton order",
    tolerance=0.135,
)
@pytest.mark.slow
def test_quality():
    colors = torch.rand(4096, 3, generator=seeded())

    def apart(perm):
        return neighbor_distance(colors[perm].T.reshape(3, 64, 64)).item()

    random, curve = apart(torch.arange(4096)), apart(morton(colors, 64))
    assert random == pytest.approx(0.66, abs=0.01)
    assert curve / random == pytest.approx(0.239, abs=0.01)
    found = apart(plas_sort(colors, generator=seeded()))
    assert found <= 0.135 * random
    assert found <= 0.6 * curve


def test_small_quality():
    colors = torch.rand(400, 3, generator=seeded())
    perm = plas_sort(colors, generator=seeded(), improvement_break=1e-3)
    grids = [colors[p].T.reshape(3, 20, 20) for p in (perm, torch.arange(400))]
    sorted_, random = (neighbor_distance(g).item() for g in grids)
    assert sorted_ < 0.33 * random


def test_weights():
    x = torch.rand(256, 4, generator=seeded())
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = plas_sort(x, weights=weights, generator=seeded(), improvement_break=1e-2)
    expected = plas_sort(x[:, :2], generator=seeded(), improvement_break=1e-2)
    assert torch.equal(found, expected)
    weights = torch.tensor([8.0, 2.0, 0.5, 1.0])
    assert torch.equal(
        plas_sort(x, weights=weights.tolist(), generator=seeded(), improvement_break=1e-2),
        plas_sort(1024 * x * weights, generator=seeded(), improvement_break=1e-2),
    )


@pytest.mark.claim(27, "by default draws end below 1e-4, blocks at 16 and radii at 1")
def test_defaults():
    x = torch.rand(3, 20, 20, generator=seeded())
    _, stats = plas_sort(x, generator=seeded(), return_stats=True)
    options = {"improvement_break": 1e-4, "min_block": 16, "min_radius": 1}
    assert plas_sort(x, generator=seeded(), return_stats=True, **options)[1] == stats
    for name, value in {"improvement_break": 2e-4, "min_block": 18, "min_radius": 1.06}.items():
        changed = {**options, name: value}
        assert plas_sort(x, generator=seeded(), return_stats=True, **changed)[1] != stats


def test_integers():
    """Sums of squares and of products fit, by a factor of 8 at most, or there are 20 bits."""
    for count, features in ((4, 1), (1 << 16, 7), (1 << 14, 90), (4, 5000), (1 << 12, 700)):
        largest = MODULE._integers(torch.ones(count, features).double())[0, 0].item()
        squares = 4 * largest**2 * count * features / 2**62
        products = 3 * 4 * largest**2 * features / 2**53
        assert max(squares, products) <= 1
        assert largest == 1 << 20 or max(squares, products) > 1 / 8
    assert MODULE._integers(
        torch.tensor([[1e-300], [5e-301]], dtype=torch.float64)
    ).flatten().tolist() == [
        1 << 20,
        1 << 19,
    ]


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.rand(10, 3), {}, "features: got N=10, expected a square number"),
        (torch.rand(10), {}, r"features: got \(10,\), expected \(N, D\) or \(D, H, W\)"),
        (torch.full((9, 2), torch.nan), {}, "features: got NaN or infinite"),
        (torch.rand(9, 2), {"weights": [1.0]}, r"weights: got \(1,\), expected \(2,\)"),
        (torch.rand(9, 2), {"weights": [1.0, torch.inf]}, "features: got NaN or infinite"),
        (torch.rand(9, 2), {"improvement_break": -1.0}, "improvement_break: got -1.0"),
        (torch.rand(9, 2), {"min_block": 5}, "min_block: got 5, expected an even number"),
        (torch.rand(9, 2), {"min_radius": 0.5}, "min_radius: got 0.5, expected at least 1"),
    ],
)
def test_bad_input(features, options, message):
    with pytest.raises(ValueError, match=message):
        plas_sort(features, **options)
