"""The sparse collectives on gloo ranks against the dense ones, formulas and each other.

The checks share one spawn a number of ranks.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.moe.parallel_layers import DIM, HIDDEN, OWNERS, E, drawn
from torchzoo.moe import (
    EPExperts,
    ExpertPlacement,
    FSSDPExperts,
    GroupedExperts,
    MoELayer,
    TopKGate,
    Traffic,
    exchange_rows,
    parallelize_moe,
    sparse_all_gather,
    sparse_reduce_scatter,
)
from torchzoo.testing.ranks import run_ranks


def placements(size):
    """Placements of all kinds: nothing copied, everything, some, on nodes of one and of all."""
    owner = torch.tensor(OWNERS[size])
    owned = owner[:, None] == torch.arange(size)
    some = owned | (drawn(3, E, size) > 0.3)
    hot = owned.clone()
    hot[1] = True
    for held in (owned, torch.ones_like(owned), some, hot):
        for node_size in (1, size):
            yield ExpertPlacement(owner, held, node_size=node_size)


def collective_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    for placement in placements(size):
        x, g = drawn(0, E, 3, 2), drawn(1, size, E, 3, 2)
        mine = x[placement.owned(rank)].requires_grad_()
        held = placement.held(rank)
        upstream = g[rank, held].requires_grad_()
        traffic = Traffic()
        y = sparse_all_gather(mine, placement, traffic=traffic)
        z = sparse_reduce_scatter(upstream, placement, traffic=traffic)
        torch.testing.assert_close(y, x[held], rtol=0, atol=0)
        total = (g * placement.materialized.T[..., None, None]).sum(0)
        torch.testing.assert_close(z, total[placement.owned(rank)], rtol=0, atol=1e-12)

        # adjoint: the sums over ranks of <spAG(x), g> and <x, spRS(g)>
        pair = torch.stack([(y * upstream).sum(), (mine * z).sum()]).detach()
        dist.all_reduce(pair)
        assert abs(pair[0] - pair[1]) < 1e-10
        # each is the other's backward, twice
        (back,) = torch.autograd.grad(y, mine, upstream, create_graph=True)
        torch.testing.assert_close(back, z, rtol=0, atol=0)
        (again,) = torch.autograd.grad(back, upstream, mine.detach())
        torch.testing.assert_close(again, x[held], rtol=0, atol=0)
        (back,) = torch.autograd.grad(z, upstream, mine.detach())
        torch.testing.assert_close(back, x[held], rtol=0, atol=0)

        check_bytes(placement, traffic, chunk=x[0].nbytes)


def check_bytes(placement, traffic, chunk):
    """Counters against formulas of the placement; spAG and spRS were each called twice or more."""
    size = placement.num_devices
    moved = sum(len(placement.replicas(e)) - 1 for e in range(E))
    most = placement.sparsity * E * chunk
    for name in ("sparse_all_gather", "sparse_reduce_scatter"):
        calls = traffic.calls[name]
        both = torch.tensor([traffic.sent[name], traffic.received[name]])
        assert both.sum() % calls == 0
        sent, received = (both // calls).tolist()
        assert (received if name == "sparse_all_gather" else sent) <= most
        assert (moved > 0) or (sent == received == 0)
        dist.all_reduce(both)
        assert both.tolist() == [calls * moved * chunk] * 2
        if 0 < placement.sparsity < 0.5:
            assert both[1] < calls * (size - 1) * E * chunk, "no fewer than an all-gather"


def dense_checks():
    """Everything everywhere is an all-gather; back, it is a reduce-scatter."""
    rank, size = dist.get_rank(), dist.get_world_size()
    owner = torch.arange(2 * size) // 2
    everywhere = torch.ones(2 * size, size, dtype=torch.bool)
    placement = ExpertPlacement(owner, everywhere, node_size=size)
    mine = drawn(rank, 2, 5)
    out = mine.new_empty(2 * size, 5)
    dist.all_gather_into_tensor(out, mine)
    assert sparse_all_gather(mine, placement).equal(out)
    g = drawn(7 + rank, 2 * size, 5)
    summed = g.clone()
    dist.all_reduce(summed)
    ours = sparse_reduce_scatter(g, placement)
    torch.testing.assert_close(ours, summed[placement.owned(rank)], rtol=0, atol=1e-12)


def exchange_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = torch.randint(0, 3, (size, size), generator=torch.Generator().manual_seed(0))
    send, receive = counts[rank].tolist(), counts[:, rank].tolist()
    source = torch.full((sum(send),), rank)
    target = torch.arange(size).repeat_interleave(counts[rank])
    x = torch.stack([source, target], 1).double().requires_grad_()
    traffic = Traffic()
    y = exchange_rows(x, send, receive, traffic=traffic)
    assert y[:, 0].tolist() == torch.arange(size).repeat_interleave(counts[:, rank]).tolist()
    assert (y[:, 1] == rank).all()
    (back,) = torch.autograd.grad(y, x, 10 * y.detach())
    assert back.equal(10 * x)
    row = x.element_size() * 2
    away = sum(send) - send[rank], sum(receive) - receive[rank]
    assert traffic.sent["exchange_rows"] == traffic.received["exchange_rows"] == sum(away) * row


def refusal_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    placement = next(placements(size))
    rows = torch.zeros(len(placement.owned(rank)) + 1, 2)
    for collective in (sparse_all_gather, sparse_reduce_scatter):
        with pytest.raises(ValueError, match=r"local: expected \d+ rows"):
            collective(rows, placement)
    alone = ExpertPlacement(torch.zeros(1).long(), torch.ones(1, 1) > 0, node_size=1)
    with pytest.raises(ValueError, match=f"placement: expected {size} ranks"):
        sparse_all_gather(rows, alone)
    with pytest.raises(ValueError, match="send, receive"):
        exchange_rows(rows, [1] * (size + 1), [1] * size)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    layer = MoELayer(TopKGate(DIM, E, 2), GroupedExperts(DIM, HIDDEN, E))
    with pytest.raises(ValueError, match="mode: expected 'ep' or 'fssdp', got 'tp'"):
        parallelize_moe(layer, mesh, mode="tp")
    with pytest.raises(ValueError, match=r"dim: expected one of \('ep',\)"):
        parallelize_moe(layer, mesh, dim="dp")
    with pytest.raises(ValueError, match="node_size"):
        FSSDPExperts(layer.experts, mesh, node_size=3)
    with pytest.raises(ValueError, match="mesh: expected one dimension"):
        EPExperts(layer.experts, init_device_mesh("cpu", (1, size)))


def all_collective_checks():
    collective_checks()
    dense_checks()
    exchange_checks()
    refusal_checks()


@pytest.mark.claim(
    56,
    "Sparse all-gather and sparse reduce-scatter are adjoint: <spAG x, g> = <x, spRS g>",
    tolerance=1e-10,
)
@pytest.mark.claim(
    56,
    "With owners as only holders both are identities that send nothing; with holders "
    "everywhere they are all-gather and reduce-scatter",
    tolerance=1e-12,
)
@pytest.mark.claim(
    56,
    "A device receives at most lambda S bytes in spAG and sends at most lambda S in spRS; in "
    "all, sum over experts of (holders - 1) S / E",
    tolerance=0.0,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_collectives(size):
    run_ranks(all_collective_checks, size)
