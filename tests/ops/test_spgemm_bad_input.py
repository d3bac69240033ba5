"""Bad matrices and broken patterns are refused by the sparse product and never crash it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.sparse_products import NATIVE, csr, native_only, pattern, raw, sparse
from torchzoo.ops import _spgemm
from torchzoo.ops.spgemm import spgemm, spgemm_stats

GOOD = csr(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
EYE = csr(torch.eye(3))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.eye(3), EYE, "a: expected a sparse CSR or COO matrix, got torch.strided"),
        (GOOD, None, "b: expected a sparse CSR or COO matrix, got NoneType"),
        (torch.ones(2, 2, 2).to_sparse(), EYE, r"a: expected a matrix .* \(2, 2, 2\)"),
        (GOOD, csr(torch.eye(4)), r"a.shape\[1\]=3, b.shape\[0\]=4"),
        (GOOD, EYE.double(), "b: expected the dtype of a, torch.float32, got torch.float64"),
        (GOOD, EYE.to("meta"), "b: expected the device of a"),
        (GOOD.int(), EYE, "a: expected a floating-point matrix, got torch.int32"),
        (
            GOOD,
            raw(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3]), torch.ones(3), (3, 3)),
            r"b: expected columns in \[0, 3\)",
        ),
        (
            raw(torch.tensor([0, 1, 1]), torch.tensor([-1]), torch.ones(1), (2, 3)),
            EYE,
            r"a: expected columns in \[0, 3\)",
        ),
        (
            raw(torch.tensor([0, 2, 1]), torch.tensor([1]), torch.ones(1), (2, 3)),
            EYE,
            "a: expected row starts that rise from 0 to 1",
        ),
        (
            raw(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1), (2, 3)),
            EYE,
            "a: expected 3 row starts",
        ),
    ],
)
def test_bad_matrices(a, b, message):
    with pytest.raises(ValueError, match=message):
        spgemm(a, b)


@pytest.mark.parametrize("option", ["semiring", "hash", "_method"])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f"{option}: expected one of .*, got 'x'"):
        spgemm(GOOD, EYE, **{option: "x"})


def test_too_many_entries_for_int32_is_a_value_error():
    def op():
        raise RuntimeError("the result has 2147483648 entries: use int64 indices")

    from torchzoo.ops.spgemm import _counted

    with pytest.raises(ValueError, match="2147483648"):
        _counted(op)


indices = st.integers(-2, 6)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(indices, min_size=1, max_size=6),
    st.lists(indices, max_size=8),
    st.lists(indices, min_size=1, max_size=6),
    st.lists(indices, max_size=8),
    st.integers(0, 6),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_broken_patterns_raise_and_never_crash(a_crow, a_col, b_crow, b_col, columns, index):
    """What is served has a valid pattern; all else is an error, in the operators too."""
    parts = [torch.tensor(t, dtype=index) for t in (a_crow, a_col, b_crow, b_col)]
    inner = len(b_crow) - 1
    a = raw(*parts[:2], torch.ones(len(a_col)), (len(a_crow) - 1, inner))
    b = raw(*parts[2:], torch.ones(len(b_col)), (inner, columns))
    valid = all(
        crow[0] == 0 and crow == sorted(crow) and crow[-1] == len(col)
        for crow, col in ((a_crow, a_col), (b_crow, b_col))
    )
    valid &= all(0 <= k < inner for k in a_col) and all(0 <= j < columns for j in b_col)
    if valid:
        assert spgemm(a, b).values().sum() == spgemm_stats(a, b).terms.sum()
        return
    with pytest.raises(ValueError, match="expected"):
        spgemm(a, b)
    if NATIVE:
        with pytest.raises(RuntimeError):
            _spgemm.pattern_of(parts, columns)
        with pytest.raises(RuntimeError):
            _spgemm.product(parts, a.values(), b.values(), columns, False, False, True)


@native_only
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
    st.lists(st.integers(-(2**62), 2**62) | indices, max_size=8),
    st.sampled_from([torch.int64]),
)
def test_wrong_result_patterns_never_crash(sizes, c_col, index):
    a, b = sparse(2, 5, 0.6), sparse(5, 6, 0.6, seed=1)
    crow = torch.tensor([0, sizes[0], sizes[0] + sizes[1]], dtype=index)
    known = [*pattern(a, b), crow, torch.tensor(c_col, dtype=index)]
    g = torch.randn(len(c_col), dtype=torch.float64)
    calls = [
        lambda: _spgemm.values_of(known, a.values(), b.values(), 6),
        lambda: _spgemm.grad_a(known, b.values(), g, 6),
        lambda: _spgemm.grad_b(known, a.values(), g, 6),
        lambda: _spgemm.select(known, a.values(), b.values(), 6, True),
    ]
    for call in calls:
        if int(crow[-1]) == len(c_col):
            call()
        else:
            with pytest.raises(RuntimeError, match="c: row starts"):
                call()
