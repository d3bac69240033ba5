"""Copies and gradients of experts under way beside computation, against waiting for each."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from torchzoo.experiments.moe.parallel_ranks import small_model, train
from torchzoo.moe import (
    ExpertPlacement,
    FSSDPExperts,
    GroupedExperts,
    collectives,
    parallelize_moe,
    prefetch_in_order,
    reshard,
)
from torchzoo.moe.collectives import start_all_gather, start_reduce_scatter
from torchzoo.moe.transfer import Transfer
from torchzoo.testing.ranks import run_ranks

LOADS = [9, 7, 1, 1, 5, 0, 0, 3, 2, 2, 8, 1, 0, 4, 1, 1]  # of 16 experts
CAPACITIES = {"overlap_degree": 6, "memory_capacity": 3}


def spread_model(linked=True, warm=True, **options):
    """Four layers of experts on all ranks, with or without prefetching."""
    model = small_model(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    for layer in model:
        parallelize_moe(layer, mesh, mode="fssdp", **CAPACITIES | options)
        if warm:
            layer.experts.remember(torch.tensor(LOADS))
    if options.get("prefetch") and linked:
        prefetch_in_order([layer.experts for layer in model])
    return model


def my_part(x):
    """This rank's tokens, unevenly: the first of four ranks has none."""
    ends = {2: [0, 50, 64], 4: [0, 0, 30, 33, 64]}[dist.get_world_size()]
    return x[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]


def run(model, x):
    """Outputs for tokens whose experts are drawn anew with the same seed each time."""
    generator = torch.Generator().manual_seed(3)
    for layer in model:
        layer.gate.logits = my_part(torch.randn(64, 16, generator=generator))
        x = x + layer(x)
    return x


def tokens():
    return my_part(torch.randn(64, 16, generator=torch.Generator().manual_seed(4)))


def bytes_of(model):
    names = ("sparse_all_gather", "sparse_reduce_scatter", "exchange_rows")
    return [
        {name: (t.sent[name], t.received[name], t.calls[name]) for name in names}
        for t in (layer.experts.traffic for layer in model)
    ]


def same(left, right):
    pairs = zip(left, right, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def moved_owners(model):
    """Owners of an uneven kind: the last rank owns nothing of the first layer."""
    size = dist.get_world_size()
    owners = torch.arange(16) % max(size - 1, 1)
    experts = model[0].experts
    reshard([experts], torch.optim.SGD([{"params": [*experts.parameters()]}]), owners[None])


def equality_checks():
    """Training, bit for bit; with all that changes what is gathered, kept and scaled."""
    for options in (
        {},
        {"average_gradients": True, "node_size": 1},
        {"overlap_degree": 16, "memory_capacity": 16, "rematerialize": False},
    ):
        plain, ahead = (spread_model(prefetch=on, **options) for on in (False, True))
        for model in (plain, ahead):
            moved_owners(model)
            train(model, 1, my_part, 2)
        assert same(plain.parameters(), ahead.parameters()), options
        assert same(
            (layer.experts.load_history for layer in plain),
            (layer.experts.load_history for layer in ahead),
        )
        assert bytes_of(plain) == bytes_of(ahead), options


def gradient_checks():
    """Gradients of inputs and weights through every way to ask autograd for them."""
    results = []
    for options in ({}, {"prefetch": True}, {"prefetch": True, "linked": False}):
        model = spread_model(**options)
        weights = [*model.parameters()]
        x = tokens().requires_grad_()
        with torch.no_grad():  # an evaluation in between leaves nothing behind
            run(model, x)
        y = run(model, x)
        late = torch.autograd.grad(y.square().sum(), [*model[2].parameters()], retain_graph=True)
        assert not any(layer.experts._ahead for layer in model)
        everything = torch.autograd.grad(y.square().sum(), [x, *weights], retain_graph=True)
        of_weights = torch.autograd.grad(
            y.square().sum(), [*model[1].experts.w_in.parameters()], create_graph=True
        )
        (twice,) = torch.autograd.grad(
            sum(g.square().sum() for g in of_weights), x, retain_graph=True
        )
        y.square().sum().backward()
        assert twice.any() or not len(x)
        results.append([*late, *everything, twice, x.grad, *(w.grad for w in weights)])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def frozen_checks():
    """Frozen experts, of which backward still needs copies for the gradient of their input."""
    grads = []
    for prefetch in (False, True):
        model = spread_model(prefetch=prefetch)
        for layer in (model[1], model[3]):
            layer.experts.requires_grad_(False)
        x = tokens().requires_grad_()
        run(model, x).square().sum().backward()
        grads.append([x.grad, *(w.grad for w in model.parameters())])
    assert same(*grads)

    grads = []
    for prefetch in (False, True):
        model = spread_model(prefetch=prefetch)
        with torch.no_grad():  # the layer that starts the gather of the next has no gradient itself
            model[0].gate.logits = my_part(torch.randn(64, 16, generator=torch.Generator()))
            x = model[0](tokens())
        model[1].gate.logits = model[0].gate.logits
        model[1](x).square().sum().backward()
        grads.append([w.grad for w in model.parameters()])
    assert any(g is not None and g.any() for g in grads[1])
    assert same(*grads)


def all_equality_checks():
    equality_checks()
    gradient_checks()
    frozen_checks()


@pytest.mark.claim(
    56,
    "With copies and gradients under way beside computation, training is bit for bit that which "
    "waits for each collective, and moves the same bytes",
    tolerance=0.0,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_results_are_the_same(size):
    run_ranks(all_equality_checks, size, timeout=120)


# When things are sent, computed and waited for


class Log:
    """What happens when: starts of transfers, waits for them, and experts that compute."""

    def __init__(self, model):
        self.events = []
        self.layers = {id(layer.experts.traffic): i for i, layer in enumerate(model)}
        for index, layer in enumerate(model):
            self.watch(index, layer.experts)

    def watch(self, index, experts):
        plain = experts.apply_experts

        def compute(weights, x, offsets):
            self.events.append(("experts", index))
            for following in experts._following:
                # Copies that were on their way before any rank began to compute can be waited for
                # here, on all ranks; were one rank to send after it has computed, all would hang.
                for transfer in following._ahead._gathering.values():
                    transfer.wait()
            y = plain(weights, x, offsets)
            self.events.append(("computed", index))
            y.register_hook(lambda grad: self.events.append(("backward", index)))
            return y

        experts.apply_experts = compute

    def transfer(self, what, rows, placement, group, traffic, **options):
        made = Transfer(what, rows, placement, group, traffic, **options)
        kind = "gather" if what == "sparse_all_gather" else "reduce"
        key = kind, self.layers[id(traffic)]
        self.events.append(("start", *key))
        for name in ("advance", "wait"):
            setattr(made, name, self.logged(getattr(made, name), (name, *key)))
        return made

    def logged(self, method, event):
        def call():
            self.events.append(event)
            return method()

        return call

    def span(self, *event, after=-1):
        """Where an event happens first and last, after a place."""
        found = [i for i, e in enumerate(self.events) if e == event and i > after]
        return found[0], found[-1]


def order_checks():
    model = spread_model(prefetch=True)
    log = Log(model)
    collectives.Transfer = log.transfer
    x = tokens().requires_grad_()
    y = run(model, x)
    forward = len(log.events)
    for layer in range(3):
        starts = log.span("start", "gather", layer + 1)
        computing = log.span("experts", layer)[0]
        waits = [
            i for i, e in enumerate(log.events[:forward]) if e == ("wait", "gather", layer + 1)
        ]
        assert starts[1] < computing < waits[0]
        assert len(waits) == 2 * 2, "for both weights, above and by the layer itself"
        assert starts[1] < log.span("advance", "gather", layer + 1)[0] < computing
        assert waits[1] < log.span("computed", layer)[0] < waits[2]
    y.square().sum().backward()
    for layer in range(3):
        computing = log.span("backward", layer + 1)[0]
        again = log.span("start", "gather", layer, after=forward - 1)
        assert again[1] < computing < log.span("wait", "gather", layer, after=forward - 1)[0]
        begun, done = (log.span(what, "reduce", layer + 1) for what in ("start", "wait"))
        before = log.span("backward", layer)[0]
        assert computing < begun[0]
        assert begun[1] < before < done[0]
        moved = [
            log.span("advance", *what, after=begun[1])[0]
            for what in (("gather", layer), ("reduce", layer + 1))
        ]
        assert max(moved) < before, "on to the next round as soon as the layer's backward begins"
        if layer:
            assert done[1] < log.span("backward", layer - 1)[0], "not more than a layer later"
    collectives.Transfer = Transfer
    plain = spread_model()
    other = tokens().requires_grad_()
    run(plain, other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)


def round_checks():
    """All rounds of a transfer but the last are over after as many advances; waiting is final."""
    rank, size = dist.get_rank(), dist.get_world_size()
    owner = torch.arange(3) % size
    placement = ExpertPlacement(owner, torch.ones(3, size, dtype=torch.bool), node_size=size)
    x = torch.arange(12.0).view(3, 4)
    gather = start_all_gather(x[placement.owned(rank)], placement)
    reduce = start_reduce_scatter((rank + 1) * x, placement)  # of both at once
    moves = [(gather.advance(), reduce.advance()) for _ in range(len(placement.rounds) + 1)]
    assert moves == [(i + 1 < len(placement.rounds),) * 2 for i in range(len(moves))]
    for _ in range(2):
        assert gather.wait().equal(x)
        assert reduce.wait().equal(x[placement.owned(rank)] * size * (size + 1) / 2)


def unneeded_checks():
    """A backward that ends early waits for what it had started to gather for the next layer."""
    made = []
    collectives.Transfer = lambda *args, **options: (
        made.append(Transfer(*args, **options)) or made[-1]
    )
    model = spread_model(prefetch=True)
    y = run(model, tokens())
    forward = len(made)
    assert any(transfer._works for transfer in made) is False
    torch.autograd.grad(y.sum(), [*model[2].parameters()])
    assert len(made) == forward + 2 * 3 + 2, "three layers' copies, one layer's gradients"
    assert not any(transfer._works for transfer in made)
    collectives.Transfer = Transfer


def live_checks():
    """No more than two layers' copies live at once, and none in the end."""
    live, peak = set(), 0

    def counted(what, *args, **options):
        nonlocal peak
        made = Transfer(what, *args, **options)
        if what == "sparse_all_gather":
            key = id(made.rows.untyped_storage())
            live.add(key)
            weakref.finalize(made.rows, live.discard, key)
            peak = max(peak, len(live))
        return made

    collectives.Transfer = counted
    model = spread_model(prefetch=True)
    run(model, tokens()).square().sum().backward()
    assert peak == 4, "of each layer two weights"
    assert not live


def all_order_checks():
    round_checks()
    order_checks()
    unneeded_checks()
    live_checks()


@pytest.mark.claim(
    56,
    "The next layer's copies are on their way before a layer's experts compute, those for backward "
    "likewise, and gradients are waited for after the experts of the layer before",
    tolerance=None,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_communication_starts_before_computation(size):
    run_ranks(all_order_checks, size)


# What may go wrong


@torch.no_grad()
def scale(factor, *models):
    for weight in (w for model in models for w in model.parameters()):
        weight.mul_(factor)


def recovery_checks():
    """Forwards that stop half-way, or leave out a layer, leave no message and no old copy."""
    plain, model = spread_model(), spread_model(prefetch=True)
    expected = run(plain, tokens())
    model[0].gate.logits = plain[0].gate.logits
    model[0](tokens())  # layer 1's copies are on their way, and stay there
    with pytest.raises(ValueError, match=r"offsets: expected \(16,\)"):
        model[0].experts(tokens(), torch.zeros(3))
    assert torch.equal(run(model, tokens()), expected)

    model[0](tokens())
    scale(1.5, plain, model)
    assert torch.equal(run(model, tokens()), run(plain, tokens()))

    def fail(*args):
        raise KeyError

    for layer in (0, 1):
        experts = model[layer].experts
        experts.holders, kept = fail, experts.holders
        with pytest.raises(KeyError):
            run(model, tokens())
        experts.holders = kept
        left = [*model[layer + 1].experts._ahead._gathering.values()]
        assert dist.get_world_size() > 2 or any(transfer._works for transfer in left)
        scale(1.1, plain, model)
        assert torch.equal(run(model, tokens()), run(plain, tokens()))
        assert not any(transfer._works for transfer in left)

    model[0](tokens())
    scale(2, model)
    with pytest.raises(RuntimeError, match="weights changed between the forward"):
        model[1](tokens())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_interrupted_forwards(size):
    run_ranks(recovery_checks, size)


def test_refusals():
    make = GroupedExperts(4, 4, 2)
    with pytest.raises(ValueError, match="prefetch: expected False with calibrate=True"):
        FSSDPExperts(make, prefetch=True, calibrate=True)
    with pytest.raises(ValueError, match=r"layers: expected prefetch=True of all, got .* \[1\]"):
        prefetch_in_order([FSSDPExperts(make, prefetch=True), FSSDPExperts(make)])
    one = FSSDPExperts(make, prefetch=True)
    with pytest.raises(ValueError, match="layers: expected each layer once"):
        prefetch_in_order([one, one])
    x, offsets = torch.randn(5, 4), torch.tensor([2, 5])
    assert torch.equal(one(x, offsets), make(x, offsets))
