"""The hash grid against its definition, corner by corner."""

import itertools
import math

import pytest
import torch

from torchzoo.common.encodings import HashGridEncoding

PRIMES = (1, 2654435761, 805459861)


def brute_force(encoding, x):
    """Features of one point, in Python's own integers and floats."""
    table, first, found = encoding.table.tolist(), 0, []
    for level in range(encoding.levels):
        n = math.floor(encoding.base * encoding.growth**level)
        size = min((n + 1) ** len(x), 2**encoding.log2_table)
        cell = [min(math.floor(v * n), n - 1) for v in x]
        total = [0.0] * encoding.features
        for corner in itertools.product((0, 1), repeat=len(x)):
            weight, key = 1.0, 0
            for i, (c, o, v) in enumerate(zip(cell, corner, x, strict=True)):
                weight *= (v * n - c) if o else 1 - (v * n - c)
                key = (
                    key + (c + o) * (n + 1) ** i
                    if size == (n + 1) ** len(x)
                    else (key ^ ((c + o) * PRIMES[i]) % 2**32)
                )
            row = table[first + key % size]
            total = [t + weight * value for t, value in zip(total, row, strict=True)]
        found += total
        first += size
    return found


def grid(**options):
    options = {"levels": 4, "features": 2, "log2_table": 7, "base": 3} | options
    torch.manual_seed(0)
    encoding = HashGridEncoding(options.pop("in_dim", 3), dtype=torch.float64, **options)
    torch.nn.init.normal_(encoding.table)
    return encoding


@pytest.mark.claim(
    26, "Trilinear interpolation of hashed tables equals the sum over corners", tolerance=1e-12
)
@pytest.mark.parametrize("options", [{}, {"in_dim": 2}, {"growth": 2.0, "features": 1}])
def test_equals_brute_force(options):
    encoding = grid(**options)
    x = torch.rand(20, encoding.in_dim, dtype=torch.float64)
    x[0], x[1] = 0, 1
    expected = torch.tensor([brute_force(encoding, p) for p in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(encoding(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(encoding(x[None] * 2 - 0.5)[0], encoding((x * 2 - 0.5).clamp(0, 1)))


@pytest.mark.claim(26, "Levels whose corners fit into the table have no collisions")
def test_dense_levels_are_bijective():
    encoding = grid(log2_table=9)
    dense = [encoding.is_dense(level) for level in range(4)]
    assert encoding.resolutions == (3, 4, 6, 9)
    assert dense == [True, True, True, False]
    assert encoding.sizes == (64, 125, 343, 512)
    assert len(encoding.table) == 64 + 125 + 343 + 512
    for level, n in enumerate(encoding.resolutions):
        corners = torch.cartesian_prod(*[torch.arange(n + 1)] * 3)
        rows = encoding.indices(corners, level)
        if dense[level]:
            assert torch.equal(rows.sort().values, torch.arange((n + 1) ** 3))
        else:
            assert rows.min() >= 0
            assert rows.max() < 512
            assert len(rows.unique()) > 400  # 1000 corners spread over nearly all entries


@pytest.mark.claim(26, "The encoding is continuous across the faces of cells", tolerance=1e-6)
def test_continuous_across_faces():
    encoding = grid()
    for n in encoding.resolutions:
        x = torch.rand(50, 3, dtype=torch.float64)
        x[:, 0] = torch.randint(1, n, (50,)) / n
        step = torch.tensor([1e-8, 0, 0], dtype=torch.float64)
        before, after = encoding(x - step), encoding(x + step)
        torch.testing.assert_close(before, after, atol=1e-6, rtol=0)
        assert (encoding(x + 1e6 * step) - before).abs().max() > 1e-3  # it does change


@pytest.mark.claim(26, "Gradients to table and points equal finite differences")
def test_gradcheck():
    encoding = grid(levels=2, log2_table=5)
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    table = encoding.table.detach().clone().requires_grad_()

    def function(x, table):
        return torch.func.functional_call(encoding, {"table": table}, (x,))

    assert torch.autograd.gradcheck(function, (x, table))


def test_shapes_types_and_initial_values():
    encoding = HashGridEncoding(3, levels=2, log2_table=6)
    assert 5e-5 < encoding.table.abs().max() <= 1e-4
    assert encoding(torch.rand(2, 0, 3)).shape == (2, 0, 4)
    assert encoding(torch.full((1, 3), torch.nan)).shape == (1, 4)  # no index out of the table
    full = HashGridEncoding(3, levels=16, log2_table=2)
    assert full.resolutions[-1] == 4084  # 16 · 1.447^15


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_dim": 8}, "in_dim"),
        ({"levels": 0}, "levels"),
        ({"log2_table": 31}, "log2_table"),
        ({"growth": 0.5}, "growth"),
        ({"growth": 1e9}, "growth"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        HashGridEncoding(**{"in_dim": 3} | options)
    with pytest.raises(ValueError, match=r"x: got \(4, 2\)"):
        HashGridEncoding(3, levels=1, log2_table=4)(torch.rand(4, 2))
