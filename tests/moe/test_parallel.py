"""Experts on several gloo ranks against one process that has all tokens and experts."""

import os
import signal
import time
import weakref

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from torchzoo.experiments.moe.parallel_ranks import train_on_ranks
from torchzoo.moe import (
    EPExperts,
    ExpertPlacement,
    FSSDPExperts,
    GroupedExperts,
    MoELayer,
    TopKGate,
    Traffic,
    exchange_rows,
    parallel,
    parallelize_moe,
    reshard,
    sparse_all_gather,
    sparse_reduce_scatter,
)
from torchzoo.testing.ranks import RanksFailedError, run_ranks

DIM, HIDDEN, E = 6, 8, 6
OWNERS = {2: [1, 0, 0, 1, 1, 0], 4: [2, 0, 0, 1, 1, 0]}  # of 4 ranks, rank 3 owns nothing


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# The collectives, all in one spawn a number of ranks


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


# The layer against one process


def the_layer(dtype=torch.float64, gate=None):
    torch.manual_seed(0)
    gate = gate or TopKGate(DIM, E, 2, dtype=dtype)
    with torch.no_grad():  # some experts with most of the tokens, one with next to none
        gate.weight.mul_(3)
        if gate.bias is not None:
            gate.bias.copy_(torch.tensor([2.0, 1, 0, 0, -1, -9]))
    return MoELayer(gate, GroupedExperts(DIM, HIDDEN, E, bias=True, dtype=dtype))


def the_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def batches(count, dtype=torch.float64):
    """Tokens of all ranks; 24 each, so that 1, 2, 3 or 4 ranks share them evenly."""
    return [
        (drawn(50 + i, 24, DIM).to(dtype), drawn(90 + i, 24, DIM).to(dtype)) for i in range(count)
    ]


def my_part(x):
    """This rank's tokens, unevenly: the first rank has none if there are 4."""
    size = dist.get_world_size()
    ends = {2: [0, 20, 24], 3: [0, 8, 16, 24], 4: [0, 0, 10, 13, 24]}[size]
    return x[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]


def optimizer_of(layer, steps_rate=0.05):
    experts = [*layer.experts.parameters()]
    return torch.optim.AdamW(
        [{"params": [*layer.gate.parameters()]}, {"params": experts, "weight_decay": 0.1}],
        lr=steps_rate,
    )


def whole(experts):
    """The unsharded weights, on every rank."""
    if isinstance(experts, FSSDPExperts):
        return experts.full_state_dict()
    return {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()
        for name, weight in experts.named_parameters()
    }


def summed(weight):
    """The gradient of a replicated parameter, over the tokens of all ranks."""
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    dist.all_reduce(grad)
    return grad


def train(layer, optimizer, steps, *, first=0, after=lambda i: None, part=my_part, dtype=None):
    """Losses of all tokens; summed over ranks, so that gradients of experts need no scaling."""
    losses = []
    for i, (x, target) in list(enumerate(batches(steps, dtype or torch.float64)))[first:]:
        optimizer.zero_grad()
        loss = (layer(part(x)) - part(target)).square().sum()
        loss.backward()
        total = loss.detach().clone()
        if part is my_part:
            dist.all_reduce(total)
            for weight in layer.gate.parameters():
                weight.grad = summed(weight)
        optimizer.step()
        losses.append(total.item())
        after(i)
    return losses


def alone(steps, dtype=torch.float64):
    """The reference: one process, all tokens."""
    layer = the_layer(dtype)
    losses = train(layer, optimizer_of(layer), steps, part=lambda x: x, dtype=dtype)
    return losses, {n: w.detach() for n, w in layer.experts.named_parameters()}


def first_step(make, dtype):
    """Output, input gradient and weight gradients of one forward and backward."""
    layer = make(the_layer(dtype))
    x = my_part(batches(1, dtype)[0][0]).requires_grad_()
    target = my_part(batches(1, dtype)[0][1])
    y = layer(x)
    (y * target).sum().backward()
    return layer, y.detach(), x.grad


def check_first_step(make, tolerance, dtype, copies=None):
    full = the_layer(dtype)
    x, target = (value.clone() for value in batches(1, dtype)[0])
    y = full(x.requires_grad_())
    (y * target).sum().backward()
    layer, ours, grad = first_step(make, dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(ours, my_part(y.detach()), **close)
    torch.testing.assert_close(grad, my_part(x.grad), **close)
    for name, weight in full.gate.named_parameters():
        torch.testing.assert_close(summed(layer.gate.get_parameter(name)), weight.grad, **close)
    for name, weight in full.experts.named_parameters():
        group = getattr(layer.experts, name)
        if isinstance(layer.experts, FSSDPExperts):
            for expert, mine in group.items():
                torch.testing.assert_close(mine.grad, weight.grad[int(expert)], **close)
        else:
            torch.testing.assert_close(group.grad.full_tensor(), weight.grad, **close)


def spread(mode="fssdp", owners=None, load=None, **options):
    """A maker of parallel layers, with owners and past loads of choice."""

    def make(layer):
        if mode == "ep":
            return parallelize_moe(layer, the_mesh(), mode="ep", **options)
        layer = parallelize_moe(layer, the_mesh(), mode="fssdp", **options)
        if load is not None:
            layer.experts.remember(torch.tensor(load))
        if owners is not None:
            optimizer = torch.optim.SGD([{"params": [*layer.experts.parameters()]}])
            reshard([layer.experts], optimizer, torch.tensor([owners]))
        return layer

    return make


def layer_checks():
    size = dist.get_world_size()
    load = [9, 7, 1, 1, 0, 0]
    makers = [
        spread("ep"),
        spread(),
        spread(load=load),
        spread(load=load, rematerialize=False),
        spread(load=load, overlap_degree=5, memory_capacity=1, node_size=1),
        spread(load=load, overlap_degree=E, memory_capacity=E, owners=OWNERS[size]),
        spread(load=load, overlap_degree=1, memory_capacity=0, owners=[0] * E),
        spread(calibrate={"expert_bytes": 1.0, "token_bytes": 1e9}),
    ]
    for make in makers:
        check_first_step(make, 1e-12, torch.float64)
        check_first_step(make, 1e-6, torch.float32)


def one_step_checks():
    """A whole AdamW step; and no gradient or optimizer state away from an expert's owner."""
    losses, weights = alone(2)
    layer = spread(load=[9, 7, 1, 1, 0, 0], overlap_degree=3, memory_capacity=2)(the_layer())
    optimizer = optimizer_of(layer)
    copied = []
    plain = layer.experts.holders
    layer.experts.holders = lambda counts: copied.append(plain(counts)) or copied[-1]
    ours = train(layer, optimizer, 2)
    torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole(layer.experts), weights, rtol=0, atol=1e-12)

    assert all(placement.sparsity > 0 for placement in copied)
    experts = layer.experts
    own = {f"{name}.{e}" for name in experts.names for e in experts.owned()}
    assert {name for name, _ in experts.named_parameters()} == own
    kept = {id(weight) for weight in [*experts.parameters(), *layer.gate.parameters()]}
    assert {id(weight) for weight in optimizer.state} == kept
    assert all(optimizer.state[w]["exp_avg"].shape == w.shape for w in experts.parameters())
    counts = torch.tensor([len(experts.owned())])
    dist.all_reduce(counts)
    assert counts == E


def live_peak(layers, rematerialize):
    """The most gathered weights alive at once, counted by their finalizers; and the gradients."""
    live, peak = set(), 0
    plain = parallel.sparse_all_gather

    def counted(*args, **options):
        nonlocal peak
        out = plain(*args, **options)
        live.add(id(out))
        weakref.finalize(out, live.discard, id(out))
        peak = max(peak, len(live))
        return out

    parallel.sparse_all_gather = counted
    try:
        stack = nn.Sequential(
            *(
                spread(load=[9, 7, 1, 1, 0, 0], rematerialize=rematerialize)(the_layer())
                for _ in range(layers)
            )
        )
        stack(my_part(batches(1)[0][0])).square().sum().backward()
    finally:
        parallel.sparse_all_gather = plain
    assert not live
    calls = [layer.experts.traffic.calls["sparse_all_gather"] for layer in stack]
    reduced = [layer.experts.traffic.calls["sparse_reduce_scatter"] for layer in stack]
    return peak, [w.grad for w in stack.parameters()], calls, reduced


def rematerialize_checks():
    freed, grads, calls, reduced = live_peak(3, True)
    kept, others, calls_kept, _ = live_peak(3, False)
    assert len(grads) == len(others)
    assert all((a is None and b is None) or a.equal(b) for a, b in zip(grads, others, strict=True))
    # a layer gathers four weights, of which autograd keeps two; biases are not needed again
    assert (freed, kept) == (4, 4 + 2 * 2)
    assert calls == [4 + 2] * 3, "a gather for forward, another for what backward needs"
    assert calls_kept == [4] * 3
    assert reduced == [4] * 3


def adamw_checks():
    """20 AdamW steps under drifting plans, with and without resharding; in float32 and float64."""
    losses, weights = alone(20)
    options = {"overlap_degree": 3, "memory_capacity": 2, "window": 2}
    curves = {}
    for name, reshard_every in {"still": None, "moving": 3}.items():
        layer = spread(**options, reshard_every=reshard_every)(the_layer())
        optimizer = optimizer_of(layer)
        owners = []

        def after(i, layer=layer, optimizer=optimizer, owners=owners):
            layer.experts.step(optimizer)
            owners.append(tuple(layer.experts.owner.tolist()))

        curves[name] = train(layer, optimizer, 20, after=after)
        assert len(set(owners)) > 1 if reshard_every else len(set(owners)) == 1
        torch.testing.assert_close(whole(layer.experts), weights, rtol=0, atol=1e-9)
        torch.testing.assert_close(curves[name], losses, rtol=1e-9, atol=0)
        assert layer.experts.load_history.sum() == 2 * 24 * 2
    torch.testing.assert_close(curves["still"], curves["moving"], rtol=1e-9, atol=0)

    layer = spread("ep")(the_layer())
    torch.testing.assert_close(train(layer, optimizer_of(layer), 20), losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(whole(layer.experts), weights, rtol=0, atol=1e-9)

    losses, weights = alone(20, torch.float32)
    layer = spread(**options, reshard_every=7)(the_layer(torch.float32))
    optimizer = optimizer_of(layer)
    ours = train(
        layer, optimizer, 20, after=lambda i: layer.experts.step(optimizer), dtype=torch.float32
    )
    torch.testing.assert_close(whole(layer.experts), weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=0)


def checkpointed_checks():
    """Activation checkpointing runs forward again in backward, with the plan of the first time."""
    for rematerialize in (True, False):
        results = []
        for wrapped in (False, True):
            layer = spread(load=[9, 7, 1, 1, 0, 0], rematerialize=rematerialize)(the_layer())
            for x, _ in batches(3):
                x = my_part(x)
                y = checkpoint(layer, x, use_reentrant=False) if wrapped else layer(x)
                y.square().sum().backward()
            results.append([w.grad for w in layer.parameters()])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


def joint_reshard_checks():
    """Owners of two layers are chosen together; a rank may end with any number of one layer's."""
    layers = [spread()(the_layer()) for _ in range(2)]
    layers[0].experts.remember(torch.tensor([9, 0, 1, 0, 0, 0]))
    layers[1].experts.remember(torch.tensor([5, 5, 9, 5, 5, 5]))
    before = [whole(layer.experts) for layer in layers]
    weights = [w for layer in layers for w in layer.experts.parameters()]
    optimizer = torch.optim.SGD([{"params": weights}], momentum=0.9, lr=0.1)
    reshard([layer.experts for layer in layers], optimizer)
    owned = sum(len(layer.experts.owned()) for layer in layers)
    assert owned == 2 * E // dist.get_world_size()
    for layer, weights in zip(layers, before, strict=True):
        torch.testing.assert_close(whole(layer.experts), weights, rtol=0, atol=0)
    mine = {id(w) for layer in layers for w in layer.experts.parameters()}
    assert {id(w) for w in optimizer.param_groups[0]["params"]} == mine
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="optimizer: expected one of the experts' parameters"):
        reshard([layers[0].experts], stranger, torch.zeros(1, E).long())


def all_layer_checks():
    layer_checks()
    one_step_checks()
    rematerialize_checks()
    adamw_checks()
    checkpointed_checks()
    joint_reshard_checks()


@pytest.mark.claim(
    56,
    "Output, input gradient, each expert's gradient and an AdamW step equal one process's in "
    "float64, for any copies and owners",
    tolerance=1e-12,
)
@pytest.mark.claim(
    56,
    "Over 20 AdamW steps in float32, weights equal one process's while copies and owners change",
    tolerance=1e-5,
)
@pytest.mark.claim(
    56,
    "Freeing copies and gathering them again gives bitwise equal gradients, and only one "
    "layer's copies live at a time",
    tolerance=0.0,
)
@pytest.mark.claim(56, "Parameters and optimizer state exist only on the owner", tolerance=0.0)
@pytest.mark.claim(
    56,
    "Resharding moves Adam's moments: the training curve is the same with and without",
    tolerance=1e-7,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layer(size):
    run_ranks(all_layer_checks, size, timeout=120)


# Beside FSDP2, after a crash, and at another number of ranks


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


# The launcher of ranks


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
