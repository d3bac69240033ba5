"""Experts beside FSDP2, after a crash, at another number of ranks, and a rank's memory."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.moe.parallel_layers import DIM, OWNERS, batches, spread, the_layer, the_mesh, whole
from torchzoo.experiments.moe.parallel_ranks import train_on_ranks
from torchzoo.moe import parallelize_moe
from torchzoo.testing.ranks import RanksFailedError, run_ranks


class Block(nn.Module):
    """A dense layer, a mixture of experts with a residual, and a dense layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.moe = the_layer()
        self.last = nn.Linear(DIM, DIM, dtype=torch.float64)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.moe(x))


def even_part(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def sharded_block(mode, **options):
    """Dense parts under FSDP2, experts under `parallelize_moe`, an optimizer of both."""
    block, mesh = Block(), the_mesh()
    parallelize_moe(block.moe, mesh, mode=mode, average_gradients=True, **options)
    experts = [*block.moe.experts.parameters()]
    fully_shard(block, mesh=mesh, ignored_params={*experts})
    dense = [w for w in block.parameters() if not any(w is e for e in experts)]
    return block, torch.optim.AdamW([{"params": dense}, {"params": experts}], lr=0.05)


def mean_loss_steps(block, optimizer, count, part, *, first=0, after=lambda i: None):
    for i, (x, target) in list(enumerate(batches(count)))[first:]:
        optimizer.zero_grad()
        (block(part(x)) - part(target)).square().mean().backward()
        optimizer.step()
        after(i)


def block_alone(count):
    block = Block()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.05)
    mean_loss_steps(block, optimizer, count, lambda x: x)
    return block


def assert_same_block(block, expected, tolerance):
    close = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(
        whole(block.moe.experts),
        {n: w.detach() for n, w in expected.moe.experts.named_parameters()},
        **close,
    )
    for name, weight in expected.named_parameters():
        if "experts" not in name:
            ours = block.get_parameter(name).full_tensor()
            torch.testing.assert_close(ours, weight.detach(), **close)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(folder, block, optimizer):
    state = {"model": block.state_dict()}
    state["optimizer"] = get_optimizer_state_dict(block, optimizer, options=FLAT)
    dcp.save(state, checkpoint_id=folder)


def load(folder, block, optimizer):
    state = {"model": block.state_dict()}
    state["optimizer"] = get_optimizer_state_dict(block, optimizer, options=FLAT)
    dcp.load(state, checkpoint_id=folder)
    block.load_state_dict(state["model"])
    set_optimizer_state_dict(block, optimizer, state["optimizer"], options=FLAT)


def beside_fsdp2(mode):
    expected = block_alone(5)
    options = {"overlap_degree": 3, "memory_capacity": 1} if mode == "fssdp" else {}
    block, optimizer = sharded_block(mode, **options)
    mean_loss_steps(block, optimizer, 5, even_part)
    assert_same_block(block, expected, 1e-9)
    if mode == "fssdp":
        traffic = block.moe.experts.traffic
        assert (traffic.sent + traffic.received)["sparse_all_gather"] > 0


def train_and_die(folder, steps, saved, killed_at):
    """Save after step `saved`; rank 2 is killed in a later forward, before tokens are exchanged."""
    block, optimizer = sharded_block("fssdp", reshard_every=2)
    done = []

    def after(i):
        block.moe.experts.step(optimizer)
        done.append(i)
        if i == saved:
            save(folder, block, optimizer)

    def kill(*_):
        if len(done) == killed_at and dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    block.moe.gate.register_forward_hook(kill)
    mean_loss_steps(block, optimizer, steps, even_part, after=after)


def resume(folder, steps, saved):
    block, optimizer = sharded_block("fssdp", reshard_every=2)
    load(folder, block, optimizer)
    assert int(block.moe.experts.steps) == saved + 1
    assert block.moe.experts.load_history.any()
    mean_loss_steps(block, optimizer, steps, even_part, first=saved + 1)
    assert_same_block(block, block_alone(steps), 1e-9)


def all_fsdp2_checks():
    beside_fsdp2("ep")
    beside_fsdp2("fssdp")
    unsharded_checkpoint_checks()


def unsharded_checkpoint_checks():
    """Weights of one process load into each rank's shard, and back."""
    plain = the_layer()
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(1)
    layer = spread(owners=OWNERS[dist.get_world_size()])(the_layer())
    layer.load_state_dict(
        plain.state_dict()
        | {
            f"experts.{name}": layer.state_dict()[f"experts.{name}"]
            for name in ("steps", "load_history")
        }
    )
    full = {f"experts.{name}": weight for name, weight in whole(layer.experts).items()}
    gate = {f"gate.{name}": weight for name, weight in layer.gate.state_dict().items()}
    torch.testing.assert_close(full | gate, dict(plain.state_dict()), rtol=0, atol=0)
    broken = {**plain.state_dict(), "experts.w_in": plain.experts.w_in[:3]}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(broken)


@pytest.mark.claim(
    56, "With dense layers under FSDP2, AdamW steps equal those of one process", tolerance=1e-9
)
def test_beside_fsdp2():
    run_ranks(all_fsdp2_checks, 2)


@pytest.mark.claim(
    56,
    "A killed rank ends the job with an error that says so, and its checkpoint resumes, at "
    "another number of ranks too, to the weights of one process",
    tolerance=1e-9,
)
def test_killed_rank_and_resume(tmp_path):
    folder = str(tmp_path / "checkpoint")
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(train_and_die, 4, folder, 6, 2, 4)
    errors = caught.value.errors
    assert sorted(errors) == [0, 1, 2, 3]
    assert "ended with exit code -9" in errors.pop(2)
    assert any("start the job again from its last checkpoint" in text for text in errors.values())
    for size in (2, 3):
        run_ranks(resume, size, folder, 6, 2)


@pytest.mark.claim(
    56,
    "The experts' memory of a rank, copies at their peak among it, is below that of expert "
    "parallelism whose replicas have optimizer states of their own",
    tolerance=0.0,
)
def test_memory_of_a_rank():
    for rank in run_ranks(train_on_ranks, 4, 0, 3):
        assert rank["memory"] < rank["replicated"]
        assert 0 < rank["received"] < rank["all-gather"]
