"""A layer on several gloo ranks against one process that has all tokens and experts."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.moe.parallel_layers import OWNERS, E, batches, spread, the_layer, whole
from torchzoo.moe import FSSDPExperts, parallel, reshard
from torchzoo.testing.ranks import run_ranks


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
