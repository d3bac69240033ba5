"""Sorting by expert against loops over tokens and slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.moe import Routing, apply_capacity, permute_tokens, unpermute_tokens

shapes = {
    "tokens": st.integers(0, 6),
    "k": st.integers(1, 3),
    "num_experts": st.integers(1, 4),
    "seed": st.integers(0, 999),
}


def random_routing(tokens, k, num_experts, seed, unused=0.3):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(num_experts, (tokens, k), generator=generator)
    mask = torch.rand(tokens, k, generator=generator) >= unused
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64) * mask
    logits = torch.zeros(tokens, num_experts)
    return Routing(weights, experts, logits, logits.softmax(-1), mask)


def features(tokens, dim=3):
    return torch.arange(tokens * dim, dtype=torch.float64).reshape(tokens, dim) + 1


def rows_by_loop(routing, num_experts):
    """For each expert the (token, slot) pairs in use, in the order of the tokens."""
    tokens, k = routing.mask.shape
    return [
        [
            (t, s)
            for t in range(tokens)
            for s in range(k)
            if routing.mask[t, s] and routing.experts[t, s] == e
        ]
        for e in range(num_experts)
    ]


@pytest.mark.claim(69, "Dispatch has exactly the slots in use, sorted by expert, in token order")
@settings(max_examples=80, deadline=None)
@given(**shapes)
def test_permute_by_loop(tokens, k, num_experts, seed):
    routing, x = random_routing(tokens, k, num_experts, seed), features(tokens)
    dispatch = permute_tokens(x, routing, num_experts)
    groups = rows_by_loop(routing, num_experts)
    pairs = [pair for group in groups for pair in group]
    ends = [sum(len(g) for g in groups[: e + 1]) for e in range(num_experts)]
    assert dispatch.offs.tolist() == ends
    assert dispatch.offs.dtype == torch.int32
    assert dispatch.src.tolist() == [t for t, _ in pairs]
    assert dispatch.weights.tolist() == [float(routing.weights[t, s]) for t, s in pairs]
    assert dispatch.xs.tolist() == [x[t].tolist() for t, _ in pairs]
    assert [b - a for a, b in zip([0, *ends], ends, strict=False)] == routing.load.tolist()


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_unpermute_by_loop(tokens, k, num_experts, seed):
    routing, x = random_routing(tokens, k, num_experts, seed), features(tokens)
    dispatch = permute_tokens(x, routing, num_experts)
    y = unpermute_tokens(2 * dispatch.xs, dispatch.src, dispatch.weights, tokens)
    expected = 2 * x * routing.weights.sum(-1, keepdim=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.claim(69, "A capacity keeps the first C slots of an expert, or the C largest weights")
@settings(max_examples=80, deadline=None)
@given(**shapes, capacity=st.integers(0, 4), policy=st.sampled_from(["position", "probs"]))
def test_capacity_by_loop(tokens, k, num_experts, seed, capacity, policy):
    routing = random_routing(tokens, k, num_experts, seed)
    kept = torch.zeros_like(routing.mask)
    for pairs in rows_by_loop(routing, num_experts):
        if policy == "probs":
            pairs = sorted(pairs, key=lambda pair: -float(routing.weights[pair]))
        for pair in pairs[:capacity]:
            kept[pair] = True
    found = apply_capacity(routing, num_experts, capacity, drop_policy=policy)
    assert torch.equal(found.mask, kept)
    assert torch.equal(found.weights, torch.where(kept, routing.weights, 0))
    assert torch.equal(found.experts, routing.experts)
    x = features(tokens)
    dispatch = permute_tokens(x, routing, num_experts, capacity=capacity, drop_policy=policy)
    plain = permute_tokens(x, found, num_experts)
    for a, b in zip(dispatch[:4], plain[:4], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dispatch.routing.mask, kept)


@pytest.mark.claim(69, "A routing made by hand, 3 experts, gives these drops token by token")
def test_capacity_by_hand():
    experts = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
    logits = torch.zeros(4, 3)
    routing = Routing(weights, experts, logits, logits, torch.ones_like(experts).bool())
    # Expert 0 is asked for by (0,0) .6, (1,0) .9, (2,1) .5, (3,0) .7; expert 1 by (0,1) .4,
    # (2,0) .5, (3,1) .3; expert 2 by (1,1).
    early = apply_capacity(routing, 3, 2)
    assert early.mask.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    assert early.dropped_fraction.item() == pytest.approx(3 / 8)
    assert early.load.tolist() == [2, 2, 1]
    heavy = apply_capacity(routing, 3, 2, drop_policy="probs")
    assert heavy.mask.tolist() == [[False, True], [True, True], [True, False], [True, False]]
    one = apply_capacity(routing, 3, 1)
    assert one.mask.tolist() == [[True, True], [False, True], [False, False], [False, False]]
    dispatch = permute_tokens(features(4), routing, 3, capacity=2)
    y = unpermute_tokens(dispatch.xs, dispatch.src, dispatch.weights, 4)
    assert (y[3] == 0).all()


def test_equal_weights_are_dropped_from_the_end():
    experts, weights = torch.zeros(40, 1, dtype=torch.int64), torch.full((40, 1), 0.5)
    routing = Routing(weights, experts, weights, weights, torch.ones_like(experts).bool())
    kept = apply_capacity(routing, 1, 15, drop_policy="probs").mask[:, 0]
    assert kept.tolist() == [True] * 15 + [False] * 25


def test_weights_of_unused_slots_are_ignored():
    routing = random_routing(6, 2, 3, seed=0)
    assert not routing.mask.all()
    weights = torch.where(routing.mask, routing.weights, torch.nan).requires_grad_()
    dispatch = permute_tokens(features(6), routing._replace(weights=weights), 3)
    y = unpermute_tokens(dispatch.xs, dispatch.src, dispatch.weights, 6)
    y.sum().backward()
    expected = torch.where(routing.mask, features(6).sum(-1, keepdim=True), 0)
    torch.testing.assert_close(weights.grad, expected)


def test_traced_dispatch_has_a_fixed_length():
    x = features(6)

    def dispatch(*routing):
        return permute_tokens(x, Routing(*routing), 3)[:4]

    torch._dynamo.reset()
    compiled = torch.compile(dispatch, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            routing = random_routing(6, 2, 3, seed)
            routing = routing._replace(weights=routing.weights + 1)  # in unused slots too
            xs, offs, src, weights = compiled(*routing)
            assert xs.shape == (12, 3)
            eager = permute_tokens(x, routing, 3)
            n = len(eager.src)
            assert n < 12
            assert torch.equal(offs, eager.offs)
            for long, short in zip(
                (xs, src, weights), (eager.xs, eager.src, eager.weights), strict=True
            ):
                assert torch.equal(long[:n], short)
            assert (weights[n:] == 0).all()


def test_sum_is_accumulated_in_float32():
    """`(1 + 2^-7)^2 - (1 + 2^-6) = 2^-14`; the product rounded to bfloat16 would leave 0."""
    ys, weights = torch.tensor([[1 + 2**-7], [1.0]]), torch.tensor([1 + 2**-7, -(1 + 2**-6)])
    src = torch.zeros(2, dtype=torch.int64)
    y = unpermute_tokens(ys.bfloat16(), src, weights.bfloat16(), 1)
    assert y.dtype == torch.bfloat16
    assert y.item() == 2**-14


def test_bad_input():
    routing = random_routing(6, 2, 3, seed=0)
    with pytest.raises(ValueError, match=r"x: expected \(6, d\), as in routing, got \(5, 3\)"):
        permute_tokens(features(5), routing, 3)
    with pytest.raises(ValueError, match="num_experts: expected 3, as in routing, got 4"):
        permute_tokens(features(6), routing, 4)
    with pytest.raises(ValueError, match="capacity: expected at least 0, got -1"):
        apply_capacity(routing, 3, -1)
    with pytest.raises(ValueError, match=r"drop_policy: expected one of .* got 'random'"):
        permute_tokens(features(6), routing, 3, drop_policy="random")
    with pytest.raises(ValueError, match="ys, src, weights: expected"):
        unpermute_tokens(features(6), torch.zeros(5, dtype=torch.int64), torch.ones(6), 3)
