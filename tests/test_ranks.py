"""The launcher of ranks: results by rank, every traceback, and a rank that hangs."""

import time

import pytest
import torch.distributed as dist

from torchzoo.testing.ranks import RanksFailedError, run_ranks


def fail_on_one():
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def sleep_on_one():
    if dist.get_rank() == 1:
        time.sleep(60)
    return dist.get_rank()


def test_results_come_by_rank():
    assert run_ranks(dist.get_rank, 3) == [0, 1, 2]


def test_every_traceback_is_shown():
    with pytest.raises(RanksFailedError, match=r"KeyError: 'the cause'") as caught:
        run_ranks(fail_on_one, 2)
    assert "in fail_on_one" in caught.value.errors[1]


def test_a_rank_that_hangs_is_killed():
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1: had not ended when time was up"):
        run_ranks(sleep_on_one, 2, timeout=8)
    assert time.monotonic() - start < 20
