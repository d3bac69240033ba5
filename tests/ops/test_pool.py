"""Memory of large results: what of it is kept, for whom, and what can be done with a result."""

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torchzoo.ops import crrelu, library, release_memory, spgemm

MIB = 2**20
HUGE_PAGE = 2 * MIB

pytestmark = pytest.mark.skipif(
    library.backend("crrelu")[0] != "native" or library.torch_version() < (2, 11),
    reason="there is no kernel, or no torch that could tell what becomes of a result",
)
keeps = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="kernels under a sanitizer keep nothing, so that what is gone is known to be",
)


@pytest.fixture(autouse=True)
def nothing_is_waiting():
    release_memory()
    yield
    release_memory()


def result(mib, value=0.0):
    return crrelu(torch.full((mib * MIB // 4,), value), 0.0)


@keeps
def test_the_next_result_gets_the_memory_of_one_that_is_gone():
    first = result(8)
    place = first.data_ptr()
    assert place % HUGE_PAGE == 0
    assert result(8).data_ptr() != place
    del first
    assert result(8, 3.0).eq(3.0).all()
    assert place in {result(8).data_ptr() for _ in range(2)}


def test_a_view_keeps_what_it_shows():
    whole = result(8, 5.0)
    view = whole[7:]
    del whole
    others = [result(8, 1.0) for _ in range(3)]
    assert view.eq(5.0).all()
    assert all(other.eq(1.0).all() for other in others)


@keeps
@pytest.mark.parametrize(("mib", "fits"), [(16, True), (15, True), (12, False), (18, False)])
def test_memory_that_waits_goes_to_results_of_about_its_size(mib, fits):
    place = result(16).data_ptr()
    kept = release_memory()
    assert kept == 16 * MIB
    first = result(16)
    place = first.data_ptr()
    del first
    assert (result(mib).data_ptr() == place) == fits


@keeps
def test_the_smallest_that_fits_is_taken():
    large, small = result(32), result(30)
    place = small.data_ptr()
    del small, large
    assert result(30).data_ptr() == place


def test_small_results_are_not_kept():
    result(3)
    assert release_memory() == 0


@keeps
def test_what_was_given_back_is_gone():
    result(8)
    assert release_memory() == 8 * MIB
    assert release_memory() == 0


@keeps
def test_what_has_waited_longest_goes_first():
    results = [result(mib) for mib in (100, 140, 180, 220)]
    for _ in range(4):
        results.pop(0)
    assert release_memory() == (180 + 220) * MIB  # all four would be 640 of 512


@keeps
def test_more_than_all_that_is_kept_is_not_kept():
    result(8)
    result(520)
    assert release_memory() == 8 * MIB


def test_every_layout_is_that_of_the_input():
    x = torch.randn(8, 64, 64, 64)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last, x.transpose(0, 3), x[:, :, ::2].repeat(1, 1, 1, 2)[..., ::2]):
        y = crrelu(given, 0.25)
        assert y.stride() == torch.empty_like(given).stride()
        torch.testing.assert_close(y, given.relu() + 0.25 * given * (-given.square() / 2).exp())


def test_results_are_tensors_as_any_other():
    y = result(8, 2.0)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.load(file).equal(y)
    assert copy.deepcopy(y).equal(y)
    assert torch.from_numpy(y.numpy()).data_ptr() == y.data_ptr()
    shared = result(8, 2.0).share_memory_()
    assert shared.is_shared()
    assert shared.equal(y)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2 * y.numel())


def test_gradients_and_products_share_the_store():
    x = torch.randn(2**21, requires_grad=True)
    crrelu(x, 0.5).sum().backward()
    expected = x.grad.clone()
    for _ in range(3):
        x.grad = None
        crrelu(x, 0.5).sum().backward()
        assert x.grad.equal(expected)
    a = torch.ones(1500, 1500).to_sparse_csr()
    for _ in range(3):
        assert spgemm(a, a).values().eq(1500.0).all()


def test_threads_never_share_a_block():
    def work(seed):
        for i in range(20):
            value = float(31 * seed + i)
            one, other = result(4, value), result(6, value + 0.5)
            if not (one.eq(value).all() and other.eq(value + 0.5).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
