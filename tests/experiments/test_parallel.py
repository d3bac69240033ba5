"""The experiment on fully sharded experts runs, and its criteria tell good figures from bad."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo.experiment import Measurement, reproduce
from torchzoo.experiments.moe import parallel as unit
from torchzoo.experiments.moe import parallel_cluster as cluster
from torchzoo.experiments.moe.parallel_ranks import gathered_bytes
from torchzoo.moe import ExpertPlacement, parallel


@pytest.mark.parametrize("jobs", [1, 2])
def test_smoke_run(jobs):
    result = reproduce(unit.EXPERIMENT, budget="smoke", jobs=jobs)
    assert len(result.criteria) == 9
    measured = result.measured()
    assert len(measured) == len(good())
    assert all("(simulated)" in c["text"] for c in result.criteria if "loads" in c["text"])
    unit.plot(measured, Figure())


def good(**changed):
    """Figures that meet every criterion, of two seeds."""
    latency = {"EP": 200, "permuted": 180, "replicated": 150, unit.BOUND: 20}
    latency |= dict.fromkeys(unit.FSSDP, 90.0) | {"FSSDP": 100}
    figures = {unit.DIFFERENCE: 1e-7, unit.BYTES: 0.3}
    figures |= {unit.MEMORY["FSSDP"]: 3.0, unit.MEMORY["replicated"]: 4.0}
    for name in unit.SYSTEMS:
        figures[unit.figure_name(name, unit.STRAGGLER)] = 2.0
        figures[unit.figure_name(name, unit.COPIES)] = unit.CAPACITY
    for name, value in latency.items():
        figures[unit.figure_name(name, unit.LATENCY)] = value
    for name in ("EP", *unit.FSSDP):
        figures[unit.figure_name(name, unit.LATENCY, "uniform")] = 80.0
    assert changed.keys() <= figures.keys()
    values = {name: (value, value) for name, value in figures.items()}
    values |= {name: (values[name][0], value) for name, value in changed.items()}
    return {name: Measurement(name, value) for name, value in values.items()}


def latency(name, loads="skewed"):
    return unit.figure_name(name, unit.LATENCY, loads)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, None),
        ({latency("EP"): 149.0}, 0),
        ({latency("FSSDP, calibrated", "uniform"): 84.1}, 1),
        ({latency("permuted"): 99.0}, 2),
        ({latency(unit.BOUND): 91.0}, 3),
        ({latency("FSSDP, sharded"): 101.0}, 4),
        ({unit.figure_name("FSSDP", unit.COPIES): unit.CAPACITY + 1}, 5),
        ({unit.DIFFERENCE: 2e-5}, 6),
        ({unit.BYTES: 1.0}, 7),
        ({unit.MEMORY["FSSDP"]: 4.0}, 8),
    ],
)
def test_criteria_fail_on_one_bad_seed(changed, failing):
    outcomes = [criterion.test(good(**changed))[0] for criterion in unit.EXPERIMENT.criteria]
    assert outcomes == [index != failing for index in range(9)]


def test_loads_are_zipf_and_drift():
    steps = list(cluster.drifting_loads(3, 0, skewed=True))
    total = cluster.DEVICES * cluster.TOKENS * cluster.TOP_K
    assert all((counts.sum((1, 2)) == total).all() for counts in steps)
    shares = [counts.sum(1) / total for counts in steps]
    assert (shares[0] - shares[1]).abs().max() > 0.005
    assert shares[0].max(1).values.min() > 0.1
    (even,) = cluster.drifting_loads(1, 0, skewed=False)
    torch.testing.assert_close(even.sum(1) / total, torch.full((4, 64), 1 / 64), rtol=0.05, atol=0)


def test_plans_know_the_past_only():
    loads = list(cluster.drifting_loads(2, 0, skewed=True))
    system = cluster.System("FSSDP")
    assert system.plans()[0].sparsity == 0
    system.step(0, loads[0])
    expected = loads[0][0].sum(0).topk(cluster.OVERLAP).indices
    plan = system.plans()[0]
    copied = (plan.materialized.sum(1) > 1).nonzero().flatten()
    assert set(copied.tolist()) == set(expected.tolist())


def test_moving_experts_takes_time():
    loads = next(iter(cluster.drifting_loads(1, 0, skewed=True)))
    byte_time = cluster.STATE * cluster.CONSTANTS["expert_bytes"]
    for name in (*cluster.REARRANGED, "FSSDP, sharded"):
        system = cluster.System(name, history=[loads.sum(1)])
        assert system._move(1) == 0
        assert system._move(cluster.REARRANGE_EVERY) > byte_time / cluster.CONSTANTS["bw_intra"]
    one = cluster.System("permuted")
    moved = one.owners.clone()
    moved[0, 0] = 31  # expert 0 of a layer from device 0 to another node, its partner stays
    assert one._moved(moved) == pytest.approx(byte_time / cluster.CONSTANTS["bw_inter"])


def test_gathered_bytes_are_counted_until_freed():
    with gathered_bytes() as count:
        held = torch.ones(2, 1, dtype=torch.bool)
        plan = ExpertPlacement(torch.zeros(2).long(), held, node_size=1)
        out = parallel.sparse_all_gather(torch.ones(2, 3) * 2, plan)
        assert count == {"now": 24, "peak": 24}
        del out
        assert count == {"now": 0, "peak": 24}
