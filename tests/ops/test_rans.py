"""rANS against an arithmetic coder of big integers, and its kernels against their reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.ops import (
    RansDecoder,
    RansEncoder,
    _rans,
    frequency_tables,
    ordered_matmul,
    rans,
    rans_decode,
    rans_encode,
)

OPS = torch.ops.torchzoo


def problem(n=200, categories=5, precision=12, seed=0, sharp=3.0):
    """Tables of a precision, and symbols drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(n, categories, generator=generator, dtype=torch.float64)
    cdf = frequency_tables(logits.softmax(-1), precision)
    freq = cdf.diff(dim=-1).double()
    symbols = (
        torch.multinomial(freq, 1, generator=generator).flatten() if n else torch.empty(0).long()
    )
    return symbols, cdf


def ideal_bits(symbols, cdf, precision):
    freq = cdf.diff(dim=-1).gather(1, symbols[:, None]).double()
    return float((precision - freq.log2()).sum())


def big_encode(symbols, cdf, precision):
    """Arithmetic coding with exact integers: the shortest binary fraction inside the interval."""
    low, width, bits = 0, 1, 0  # the interval is [low, low + width) / 2^bits
    for symbol, row in zip(symbols.tolist(), cdf.tolist(), strict=True):
        low = (low << precision) + width * row[symbol]
        width, bits = width * (row[symbol + 1] - row[symbol]), bits + precision
    for length in range(bits + 1):
        code = -(-low >> (bits - length))
        if code << (bits - length) < low + width:
            return code, length
    raise AssertionError


def big_decode(code, length, cdf, precision):
    """The symbols of the interval that the fraction code / 2^length lies in."""
    numerator, denominator, symbols = code, 1 << length, []
    for row in cdf.tolist():
        scaled = numerator << precision
        symbol = max(c for c in range(len(row) - 1) if row[c] * denominator <= scaled)
        symbols.append(symbol)
        numerator = scaled - row[symbol] * denominator
        denominator *= row[symbol + 1] - row[symbol]
    return symbols


@pytest.mark.claim(
    82,
    "The rANS coder and an arithmetic coder of big integers decode the same symbols, and their "
    "codes differ by 8 bytes at most",
    tolerance=8,
)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 300),
    categories=st.integers(1, 40),
    precision=st.integers(7, 28),
    sharp=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 99),
)
def test_equals_arithmetic_coding(n, categories, precision, sharp, seed):
    symbols, cdf = problem(n, categories, precision, seed, sharp)
    data = rans_encode(symbols, cdf, precision=precision)
    code, length = big_encode(symbols, cdf, precision)
    assert rans_decode(data, cdf, precision=precision).tolist() == symbols.tolist()
    assert big_decode(code, length, cdf, precision) == symbols.tolist()
    assert 0 <= len(data) - -(-length // 8) <= 8
    assert ideal_bits(symbols, cdf, precision) <= 8 * len(data) - 31


def test_the_state_moves_as_written():
    """Pushing f = 3, c = 4 of 2^4 from s = 2^31: s // 3 * 16 + s % 3 + 4, by hand."""
    encoder = RansEncoder(precision=4)
    encoder.push(torch.tensor([3]), torch.tensor([4]))
    state = 2**31 // 3 * 16 + 2**31 % 3 + 4
    assert encoder.flush() == state.to_bytes(8, "little")
    encoder.push(torch.full((60,), 1), torch.full((60,), 0))
    data = encoder.flush()
    # 60 symbols of 4 bits: 240 bits are 7 words, and 16 bits more in the state of 64
    assert len(data) == 8 + 4 * 7
    assert data[8:] == bytes(28)


@settings(max_examples=25, deadline=None)
@given(lanes=st.integers(1, 5), n=st.integers(0, 40), seed=st.integers(0, 99))
def test_lanes_share_one_stream(lanes, n, seed):
    symbols, cdf = problem(n * lanes, 6, 12, seed)
    tables = cdf.view(n, lanes, 7)
    at = symbols.view(n, lanes, 1)
    start = tables.gather(2, at)[..., 0]
    freq = tables.gather(2, at + 1)[..., 0] - start
    encoder = RansEncoder(lanes, 12)
    order = torch.arange(n).flip(0)
    for rows in order.split(7):  # several pushes, the last symbols first
        shape = (-1,) if lanes == 1 else (-1, lanes)
        encoder.push(freq[rows].view(shape), start[rows].view(shape))
    data = encoder.flush()
    decoder = RansDecoder(data, lanes, 12)
    parts = [decoder.pop(rows) for rows in tables.split(5)] if n else []
    found = torch.cat([torch.empty(0, lanes).long(), *parts])
    assert torch.equal(found, symbols.view(n, lanes))
    assert decoder.finished
    bound = ideal_bits(symbols, cdf, 12) + 64 * lanes
    assert 8 * len(data) <= bound + 32 * lanes


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    categories=st.integers(1, 300),
    precision=st.integers(10, 28),
    seed=st.integers(0, 99),
)
def test_tables_are_the_formula(rows, categories, precision, seed):
    generator = torch.Generator().manual_seed(seed)
    pmf = torch.rand(rows, categories, generator=generator, dtype=torch.float64) ** 9
    cdf = frequency_tables(pmf, precision)
    assert cdf.dtype == torch.int32
    for p, row in zip(pmf.tolist(), cdf.tolist(), strict=True):
        total = 0.0
        for value in p:
            total += value
        scale = (2**precision - categories) / total
        freq = [1 + math.floor(value * scale) for value in p]
        freq[p.index(max(p))] += 2**precision - sum(freq)
        assert row == [0, *np.cumsum(freq).tolist()]


def test_tables_of_ties_zeros_and_nonsense():
    rows = torch.tensor(
        [[0.0, 2, 2], [0, 0, 0], [1, math.nan, 1], [math.inf, 1, 1], [1e-300, 0, 0], [0, 0, 5]],
        dtype=torch.float64,
    )
    freq = frequency_tables(rows, 4).diff(dim=-1).tolist()
    # (16 - 3) / 4 * 2 = 6.5, so 1, 7, 7 and the last one to the first of the equals
    uniform = [1 + 4 + 1, 5, 5]
    assert freq == [[1, 8, 7], uniform, uniform, uniform, uniform, [1, 1, 14]]


def test_a_table_costs_what_it_says():
    """KL from p to f / 2^n is at most -log2(1 - C / 2^n) and a floor's loss."""
    generator = torch.Generator().manual_seed(0)
    pmf = torch.rand(50, 256, generator=generator, dtype=torch.float64) ** 12
    pmf /= pmf.sum(1, keepdim=True)
    q = frequency_tables(pmf, 16).diff(dim=-1).double() / 2**16
    loss = (pmf * (pmf / q).log2()).nan_to_num().sum(1)
    assert (loss <= -math.log2(1 - 256 / 2**16)).all()
    assert (loss >= 0).all()


@pytest.mark.claim(82, "The CPU kernels of the coder make the reference's bytes", tolerance=0)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 60),
    streams=st.integers(1, 4),
    lanes=st.integers(1, 3),
    precision=st.sampled_from([8, 16, 28]),
    seed=st.integers(0, 99),
)
def test_kernels_equal_the_reference(n, streams, lanes, precision, seed):
    symbols, cdf = problem(n, 9, precision, seed)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, n + 1, (streams,), generator=generator).sort().values
    ends[-1] = n
    start = cdf.gather(1, symbols[:, None])[:, 0]
    freq = cdf.gather(1, symbols[:, None] + 1)[:, 0] - start
    state = torch.randint(2**31, 2**62, (streams, lanes), generator=generator)
    ours = OPS.rans_encode(freq, start, ends, state, precision)
    oracle = _rans.rans_encode._init_fn(freq, start, ends, state, precision)
    assert all(torch.equal(a, b) for a, b in zip(ours, oracle, strict=True))
    words, counts, states = ours
    limit = counts.cumsum(0)
    reading = torch.cat([part.flip(0) for part in words.split(counts.tolist())])
    args = (cdf, ends, reading, limit - counts, limit, states, precision)
    ours = OPS.rans_decode(*args)
    oracle = _rans.rans_decode._init_fn(*args)
    assert all(torch.equal(a, b) for a, b in zip(ours, oracle, strict=True))
    assert torch.equal(ours[0], symbols)
    assert torch.equal(ours[2], state)
    pmf = cdf.double()[:, 1:] * torch.rand(n, 9, generator=generator, dtype=torch.float64)
    assert torch.equal(OPS.rans_tables(pmf, precision), _rans.rans_tables._init_fn(pmf, precision))


@pytest.mark.claim(
    82, "The ordered product has the bits of one product and one sum after the other", tolerance=0
)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(0, 9), st.integers(0, 37), st.integers(0, 99))
def test_ordered_product(rows, inner, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inner, rows, generator=generator, dtype=torch.float64).T
    weight = torch.randn(inner, columns, generator=generator, dtype=torch.float64).exp()
    found = ordered_matmul(x, weight)
    oracle = torch.zeros(rows, columns, dtype=torch.float64)
    for t in range(rows):
        for o in range(columns):
            total = 0.0
            for k in range(inner):
                total += float(x[t, k]) * float(weight[k, o])
            oracle[t, o] = total
    assert torch.equal(found, oracle)
    if rows:
        assert torch.equal(ordered_matmul(x[-1:], weight), found[-1:])


def test_threads_change_nothing():
    symbols, cdf = problem(40000, 17, 16)
    start = cdf.gather(1, symbols[:, None])[:, 0]
    freq = cdf.gather(1, symbols[:, None] + 1)[:, 0] - start
    ends = torch.arange(1, 5) * 10000
    pmf = torch.rand(5000, 31, dtype=torch.float64)
    weight = torch.rand(31, 40, dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            streams, _ = rans.encode_streams(freq, start, ends, 16)
            decoder = rans.StreamDecoder(streams, 16)
            symbol = decoder.pop(cdf, ends)
            found.append((streams, symbol, frequency_tables(pmf), ordered_matmul(pmf, weight)))
            assert decoder.unfinished() == []
    finally:
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_opcheck():
    symbols, cdf = problem(20, 5, 12)
    start = cdf.gather(1, symbols[:, None])[:, 0]
    freq = cdf.gather(1, symbols[:, None] + 1)[:, 0] - start
    ends, state = torch.tensor([8, 20]), torch.full((2, 1), 2**31)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.rans_encode.default, (freq, start, ends, state, 12), test_utils=tests)
    streams, _ = rans.encode_streams(freq, start, ends, 12)
    decoder = rans.StreamDecoder(streams, 12)
    args = (cdf, ends, decoder._words, decoder._position, decoder._limit, decoder._state, 12)
    torch.library.opcheck(OPS.rans_decode.default, args, test_utils=tests)
    pmf = torch.rand(3, 5, dtype=torch.float64)
    torch.library.opcheck(OPS.rans_tables.default, (pmf, 12), test_utils=tests)
    torch.library.opcheck(OPS.ordered_matmul.default, (pmf, pmf.T.contiguous()), test_utils=tests)


def test_a_stream_that_is_cut_or_read_with_other_tables():
    symbols, cdf = problem(300)
    data = rans_encode(symbols, cdf, precision=12)
    with pytest.raises(ValueError, match="ends before its last symbol"):
        rans_decode(data[:-8], cdf, precision=12)
    with pytest.raises(ValueError, match="left over"):
        rans_decode(data, cdf[:-1], precision=12)
    with pytest.raises(ValueError, match="left over"):
        rans_decode(data + bytes(4), cdf, precision=12)
    for bad in (b"", data[:4], data[:-1]):
        with pytest.raises(ValueError, match="multiple of 4 bytes"):
            RansDecoder(bad, precision=12)
    with pytest.raises(ValueError, match="states from"):
        RansDecoder(bytes(8))


TABLE = torch.tensor([0, 3, 16])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RansEncoder(0), "lanes: expected at least 1, got 0"),
        (lambda: RansEncoder(precision=29), "precision: expected 1 to 28, got 29"),
        (lambda: RansEncoder(2).push(torch.ones(3), torch.ones(3)), r"freq: expected \(n,\)"),
        (lambda: RansEncoder().push(torch.ones(3).int(), torch.ones(2).int()), "start: expected"),
        (lambda: RansEncoder().push(torch.ones(1), torch.ones(1)), "expected integers"),
        (lambda: RansEncoder().push(torch.tensor([0]), torch.tensor([0])), "1 <= freq"),
        (lambda: RansEncoder(precision=2).push(*torch.tensor([[2], [3]])), "freq . start <= 2.2"),
        (lambda: rans_encode(torch.tensor([2]), TABLE, precision=4), r"integers in \[0, 2\)"),
        (lambda: rans_encode(torch.tensor([0]), TABLE, precision=5), "rise from 0 to 2.5"),
        (lambda: rans_encode(torch.tensor([[0]]), TABLE, precision=4), r"symbols \(n,\)"),
        (lambda: rans_encode(torch.tensor([1]), torch.tensor([0, 16, 16]), precision=4), "1 <= f"),
        (lambda: rans_encode(torch.tensor([0]), torch.tensor([0, 9, 4, 16]), precision=4), "rise"),
        (lambda: rans_decode(bytes(8), TABLE), "n: expected the number"),
        (lambda: frequency_tables(torch.ones(3)), "pmf: expected float64"),
        (lambda: frequency_tables(torch.ones(9).double(), 4), r"C in \[1, 2\^3\]"),
        (lambda: frequency_tables(-torch.ones(3).double()), "no negative numbers"),
        (lambda: ordered_matmul(torch.ones(2, 3), torch.ones(2, 3)), "x, weight: expected"),
        (lambda: ordered_matmul(torch.ones(2, 3), torch.ones(3, 2)), "x: expected float64"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
