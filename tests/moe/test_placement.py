"""Plans against their invariants, brute force, and plans worked out by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.moe import (
    ExpertPlacement,
    calibrate,
    heterogeneous_shard,
    plan_dispatch,
    simulate_step,
    sparse_materialize,
)
from torchzoo.moe.placement import contiguous_owner
from torchzoo.moe.planning import _shares
from torchzoo.moe.simulate import CONSTANTS, link_seconds, overlap_degree
from torchzoo.moe.token_plan import token_flow


@st.composite
def clusters(draw):
    """Nodes, devices a node, experts with owners, loads, t and m."""
    nodes, node_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    devices = nodes * node_size
    experts = draw(st.integers(1, 12))
    owner = draw(st.lists(st.integers(0, devices - 1), min_size=experts, max_size=experts))
    load = draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    t, m = draw(st.integers(0, 14)), draw(st.integers(0, 4))
    options = {"overlap_degree": t, "memory_capacity": m}
    options |= {"node_size": node_size, "num_devices": devices}
    return torch.tensor(owner), torch.tensor(load), options


def one_hot(owner, devices):
    return owner[:, None] == torch.arange(devices)


def top(load, t):
    """The t highest loads, ties to the lowest id."""
    return sorted(range(len(load)), key=lambda e: (-load[e].item(), e))[:t]


def even(experts, devices):
    return contiguous_owner(experts, devices)


@pytest.mark.claim(
    56,
    "Owners stay holders; a device gets at most m copies, and only of the t experts of most load",
    tolerance=0.0,
)
@given(clusters())
def test_materialisation_keeps_its_bounds(cluster):
    owner, load, options = cluster
    held = sparse_materialize(owner, load, **options)
    owned = one_hot(owner, options["num_devices"])
    extra = held & ~owned
    assert (held | owned).equal(held)
    assert extra.sum(0).max() <= options["memory_capacity"]
    copied = set(extra.any(1).nonzero().flatten().tolist())
    assert copied <= set(top(load, options["overlap_degree"]))
    placement = ExpertPlacement(owner, held, node_size=options["node_size"])
    assert placement.sparsity == len(copied) / len(load)


@pytest.mark.claim(56, "With t <= m exactly the t experts of most load go everywhere", tolerance=0)
@given(clusters())
def test_few_experts_go_everywhere(cluster):
    owner, load, options = cluster
    options["memory_capacity"] = options["overlap_degree"]
    expected = one_hot(owner, options["num_devices"])
    expected[top(load, options["overlap_degree"])] = True
    assert sparse_materialize(owner, load, **options).equal(expected)


@pytest.mark.claim(56, "With t = 0 or m = 0 nothing is copied, at equal loads too", tolerance=0.0)
@pytest.mark.parametrize("zero", ["overlap_degree", "memory_capacity"])
@pytest.mark.parametrize("load", [torch.ones(6), torch.arange(6)])
def test_no_copies(zero, load):
    options = {"overlap_degree": 3, "memory_capacity": 2} | {zero: 0}
    held = sparse_materialize(even(6, 4), load, **options, node_size=2, num_devices=4)
    assert held.equal(one_hot(even(6, 4), 4))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(lambda x: sorted(x, reverse=True)),
    st.integers(0, 10),
    st.integers(0, 4),
)
def test_shares_are_the_nearest_within_their_bounds(load, slots, most):
    (got,) = _shares(np.array([load], float), np.array([slots]), most).tolist()
    if not most or slots < len(load):
        assert got == [int(most > 0 and e < slots) for e in range(len(load))]
        return
    total = min(slots, most * len(load))
    quota = [slots * x / sum(load) if sum(load) else slots / len(load) for x in load]

    def far(shares):
        return sum((n - q) ** 2 for n, q in zip(shares, quota, strict=True))

    choices = [n for n in product(range(1, most + 1), repeat=len(load)) if sum(n) == total]
    assert tuple(got) in choices
    assert far(got) == pytest.approx(min(map(far, choices)))


def test_copies_go_to_nodes_that_lack_the_expert():
    options = {"overlap_degree": 2, "memory_capacity": 1, "node_size": 2, "num_devices": 6}
    load = torch.tensor([40, 20, 0, 0, 0, 0])
    # 6 slots: 4 copies of expert 0, 2 of expert 1; each goes first to the nodes without it
    held = sparse_materialize(even(6, 6), load, **options)
    assert held[0].tolist() == [True, True, True, True, True, False]
    assert held[1].tolist() == [True, True, False, False, False, True]


@given(clusters())
def test_rounds_bring_each_copy_once_from_one_who_has_it(cluster):
    owner, load, options = cluster
    held = sparse_materialize(owner, load, **options)
    placement = ExpertPlacement(owner, held, node_size=options["node_size"])
    have = one_hot(owner, options["num_devices"])
    sends = torch.zeros(len(load), options["num_devices"])
    for transfers in placement.rounds:
        assert all(have[e, source] for e, source, _ in transfers)
        for e, source, target in transfers:
            assert not have[e, target]
            sends[e, source] += 1
            have[e, target] = True
    assert have.equal(held)
    assert all(
        sends[e].max() <= (len(placement.replicas(e)) - 1).bit_length() for e in range(len(load))
    )


def test_a_tree_enters_each_node_once():
    held = torch.ones(1, 32, dtype=torch.bool)
    placement = ExpertPlacement(torch.tensor([13]), held, node_size=8)
    across = [s // 8 != t // 8 for transfers in placement.rounds for _, s, t in transfers]
    assert (len(across), sum(across), len(placement.rounds)) == (31, 3, 5)


@pytest.mark.claim(
    56, "Sharding gives every device the same number of experts, one more or less", tolerance=1
)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
)
def test_shards_are_equal(layers, experts, nodes, node_size, t):
    devices = nodes * node_size
    loads = torch.randint(0, 20, (layers, experts), generator=torch.Generator().manual_seed(t))
    owners = heterogeneous_shard(loads, overlap_degree=t, num_devices=devices, node_size=node_size)
    slots = owners.flatten().bincount(minlength=devices)
    assert owners.shape == loads.shape
    assert len(slots) == devices
    assert slots.max() - slots.min() <= (layers * experts % devices != 0)


def test_sharding_by_hand():
    # Cold experts: layer 1 (highest load 9) first, 5 and 4 on different nodes, 3 beside 4, and
    # layer 0's into what is left. Hot experts (10 and 9) fill the last slots.
    loads = torch.tensor([[2.0, 8.0, 1.0, 0.0], [9.0, 3.0, 4.0, 5.0]])
    owners = heterogeneous_shard(loads, overlap_degree=1, num_devices=4, node_size=2)
    assert owners[1, 1:].tolist() == [3, 2, 0]
    cold = owners[0, [0, 2, 3]]
    assert len(set((cold // 2).tolist()[:2])) == 2, "the two nodes share layer 0's cold load"
    assert sorted(owners.flatten().tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sharding_balances_what_is_not_copied():
    torch.manual_seed(0)
    loads = torch.rand(6, 32) ** 4
    spread = {}
    for name, owners in {
        "blocks": even(32, 8).expand(6, 32),
        "sharded": heterogeneous_shard(loads, overlap_degree=4, num_devices=8, node_size=4),
    }.items():
        cold = loads.clone()
        cold.scatter_(1, loads.topk(4, 1).indices, 0)
        busy = torch.zeros(6, 8).scatter_add(1, owners, cold)
        spread[name] = (busy.max(1).values / busy.mean(1)).mean()
    assert spread["sharded"] - 1 < 0.5 * (spread["blocks"] - 1), spread


@pytest.mark.claim(
    56,
    "Dispatch keeps every token, sends it to a holder, stays on the node where it can, and splits "
    "evenly to one token",
    tolerance=1,
)
@given(clusters(), st.integers(0, 99))
def test_dispatch(cluster, seed):
    owner, load, options = cluster
    devices, node_size = options["num_devices"], options["node_size"]
    held = sparse_materialize(owner, load, **options)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (devices, len(load)), generator=generator)
    plan = plan_dispatch(counts, held, node_size)
    assert plan.sum(-1).equal(counts)
    assert token_flow(counts, held, node_size).equal(plan.sum(1).double())
    assert not plan[:, ~held].any()
    for source, expert in product(range(devices), range(len(load))):
        holders = set(held[expert].nonzero().flatten().tolist())
        near = {d for d in holders if d // node_size == source // node_size}
        allowed = {source} if source in holders else near or holders
        sent = plan[source, expert]
        assert set(sent.nonzero().flatten().tolist()) <= allowed
        split = sent[sorted(allowed)]
        assert split.max() - split.min() <= 1


def test_remainders_go_to_different_holders():
    held = torch.tensor([[False] * 4 + [True] * 4])
    counts = torch.ones(8, 1, dtype=torch.int64)
    assert plan_dispatch(counts, held, 4)[:4, 0, 4:].sum(0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertPlacement(torch.tensor([0, 5]), one_hot(even(2, 2), 2), node_size=2),
         "owner: expert 1 has 0 owners"),
        (lambda: ExpertPlacement(torch.tensor([0, -1]), one_hot(even(2, 2), 2), node_size=2),
         "owner: expert 1 has 0 owners"),
        (lambda: ExpertPlacement(torch.tensor([1, 1]), one_hot(even(2, 2), 2), node_size=2),
         "materialized: expected expert 0 at its owner, rank 1, got it at"),
        (lambda: ExpertPlacement(even(3, 2), one_hot(even(2, 2), 2), node_size=2),
         r"materialized: expected bool of shape \(3, D\)"),
        (lambda: ExpertPlacement(even(2, 2), one_hot(even(2, 2), 2), node_size=3), "node_size"),
        (lambda: ExpertPlacement(even(2, 2)[:0], one_hot(even(2, 2), 2)[:0], node_size=2),
         r"owner: expected integers of shape \(E,\)"),
        (lambda: sparse_materialize(even(2, 2), torch.ones(3), overlap_degree=1,
                                    memory_capacity=1, node_size=2, num_devices=2), "load"),
        (lambda: sparse_materialize(even(2, 2), torch.ones(2), overlap_degree=1,
                                    memory_capacity=-1, node_size=2, num_devices=2),
         "memory_capacity: expected an integer at least 0, got -1"),
        (lambda: heterogeneous_shard(torch.ones(3), overlap_degree=1, node_size=1, num_devices=1),
         r"loads: expected \(L, E\)"),
        (lambda: plan_dispatch(torch.ones(3, 2).long(), one_hot(even(2, 2), 2), 2), "counts"),
        (lambda: plan_dispatch(-torch.ones(2, 2).long(), one_hot(even(2, 2), 2), 2), "counts"),
        (lambda: plan_dispatch(torch.ones(2, 2).long(), torch.zeros(2, 2) > 0, 2),
         "materialized: expected a holder of expert 0"),
        (lambda: simulate_step(torch.ones(2, 2).long(),
                               ExpertPlacement(even(2, 2), one_hot(even(2, 2), 2), node_size=2),
                               flops=0.0), "flops"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The cost model


def simulated(counts, held, owner=None, node_size=2, **options):
    owner = even(*held.shape) if owner is None else owner
    return simulate_step(counts, ExpertPlacement(owner, held, node_size=node_size), **options)


def test_cost_of_a_step_by_hand():
    # Two nodes of two devices, an expert each. Device 0 has 8 tokens for expert 0, 4 for expert 1
    # and 6 for expert 2; the others have none.
    counts = torch.tensor([[8, 4, 6, 0], *3 * [[0, 0, 0, 0]]])
    constants = {"flops": 10.0, "bw_intra": 2.0, "bw_inter": 1.0, "token_bytes": 3.0}
    constants |= {"expert_bytes": 5.0, "flops_per_token": 7.0, "non_moe_seconds": 1.0}
    step = simulated(counts, torch.eye(4) > 0, **constants)
    assert step["compute_time"] == pytest.approx(3 * 8 * 7 / 10)
    assert step["a2a_time"] == pytest.approx(4 * 6 * 3 / 1)  # the nodes' link, not 4 * 4 * 3 / 2
    assert step["exposed_time"] == 0
    assert step["latency"] == pytest.approx(3 + 4 * 18 + 16.8)
    assert step["balanced"] == pytest.approx(3 + 3 * 4.5 * 7 / 10)
    assert step["straggler_ratio"] == pytest.approx(8 / 4.5)
    assert step["bytes"] == 4 * 10 * 3
    # expert 2 on devices 0 and 2: its tokens stay; one transfer of 5 bytes over the link of 1
    held = torch.eye(4) > 0
    held[2, 0] = True
    step = simulated(counts, held, **constants)
    assert step["gather_time"] == 5
    assert step["a2a_time"] == pytest.approx(4 * 4 * 3 / 2)
    assert step["compute_time"] == pytest.approx(3 * 14 * 7 / 10)
    assert step["exposed_time"] == pytest.approx((5 - 1) + (5 + 5 - 2))
    assert step["bytes"] == 4 * 4 * 3 + 3 * 5


def test_links_of_a_node_are_shared():
    flow = torch.zeros(4, 4, dtype=torch.float64)
    flow[0, 2], flow[1, 3], flow[0, 1], flow[2, 2] = 6, 4, 8, 100
    assert link_seconds(flow, 2, bw_intra=2.0, bw_inter=1.0) == 10
    assert link_seconds(flow, 2, bw_intra=0.5, bw_inter=1.0) == 16
    assert link_seconds(flow.T, 2, bw_intra=2.0, bw_inter=1.0) == 10
    to_one = torch.zeros(4, 4)
    to_one[:2, 2] = 3.0  # the receiver's link within the node, or the sender's, is the busiest
    for one_node in (to_one, to_one.T):
        assert link_seconds(one_node, 4, bw_intra=2.0, bw_inter=1.0) == 3


def test_overlap_degree():
    assert overlap_degree(2.0, 10.0, 3.0, 100) == 6
    assert overlap_degree(2.0, 10.0, 3.0, 4) == 4
    assert overlap_degree(0.1, 10.0, 3.0, 4) == 0


def test_calibration_copies_only_where_it_pays():
    plan = ExpertPlacement(even(4, 4), torch.eye(4) > 0, node_size=2)
    hot = torch.tensor([[60_000, 10, 10, 10]] * 4)
    options = {"overlap_degree": 1, "memory_capacity": 1}
    assert calibrate(hot, plan, **options).replicas(0) == [0, 1, 2, 3]
    assert calibrate(hot, plan, **options, constants={"expert_bytes": 1e12}) is plan
    assert calibrate(hot, plan, overlap_degree=1, memory_capacity=0).replicas(0) == [0]
    late = calibrate(hot, plan, **options)
    now = simulate_step(hot, plan)["latency"]
    more = simulate_step(hot, plan, late=late)
    assert more["latency"] < now
    # its first gather is not hidden at all
    assert more["exposed_time"] >= simulate_step(hot, late)["gather_time"]


@pytest.mark.claim(
    56,
    "Plans are made for 8 to 1,024 ranks, within their bounds, without a process group",
    tolerance=0.0,
)
@pytest.mark.parametrize("ranks", [8, 128, 1024])
def test_planning_at_scale(ranks):
    torch.manual_seed(0)
    probs = torch.arange(1.0, 65) ** -1.2
    counts = torch.distributions.Multinomial(512, probs).sample((ranks,)).long()
    owner = heterogeneous_shard(
        counts.sum(0)[None], overlap_degree=8, num_devices=ranks, node_size=8
    )[0]
    held = sparse_materialize(
        owner, counts.sum(0), overlap_degree=8, memory_capacity=2, node_size=8, num_devices=ranks
    )
    assert (held & ~one_hot(owner, ranks)).sum(0).max() <= 2
    alone = simulated(counts, one_hot(owner, ranks), owner, 8)
    copied = simulated(counts, held, owner, 8)
    assert copied["straggler_ratio"] < 0.7 * alone["straggler_ratio"]
    assert copied["a2a_time"] < alone["a2a_time"]
    assert copied["balanced"] == pytest.approx(
        3 * CONSTANTS["non_moe_seconds"] + 3 * 512 * CONSTANTS["flops_per_token"] / 150e12
    )
    assert min(alone["latency"], copied["latency"]) > copied["balanced"]


settings.register_profile("plans", deadline=None)
settings.load_profile("plans")
