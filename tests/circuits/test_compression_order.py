"""Conditionals along the codec's order against sums over all states, and what they cost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.circuits import (
    BinomialLeaf,
    CategoricalLeaf,
    Circuit,
    balanced,
    hclt,
    linear,
    prefix_conditionals,
    quad_tree,
    rat_spn,
    variable_order,
)
from torchzoo.circuits.order import SCHEDULES
from torchzoo.circuits.vtree import EdgeCounter, factors_of

STRUCTURES = {
    "hclt": (hclt([-1, 0, 0, 1, 3]), {}),
    "hclt rooted elsewhere": (hclt([2, 0, -1, 2, 2]), {}),
    "balanced": (balanced(5), {}),
    "balanced, leaf sums": (balanced(5), {"num_leaf_units": 2}),
    "linear": (linear(5), {}),
    "rat": (rat_spn(5, depth=2), {}),
    "one variable": (balanced(1), {}),
    "one hidden variable": (hclt([-1]), {}),
    "tucker": (balanced(5, [3, 1, 0, 2, 4]), {"sum": "tucker"}),
    "tucker, larger second": (linear(5), {"sum": "tucker", "num_leaf_units": 4}),
    "tucker tree": (hclt([-1, 0, 0, 0, 1]).binarized(), {"sum": "tucker"}),
    "tied": (hclt([-1, 0, 1, 2, 3]), {"tie": "all"}),
}


def build(structure, categories=3, seed=0):
    torch.manual_seed(seed)
    graph, options = STRUCTURES[structure]
    options = {"num_units": 3, "dtype": torch.float64, **options}
    return Circuit(graph, CategoricalLeaf(categories), **options)


def brute_force(circuit, x):
    """Conditionals from the joint table of all states."""
    size, categories = circuit.num_variables, circuit.leaf.num_categories
    states = torch.cartesian_prod(*[torch.arange(categories)] * size).view(-1, size)
    joint = circuit(states).exp()[:, 0].detach()
    order = variable_order(circuit.region_graph).tolist()
    rows = []
    for sample in x:
        fits = torch.ones(len(states), dtype=torch.bool)
        for variable in order:
            masses = [joint[fits & (states[:, variable] == c)].sum() for c in range(categories)]
            rows.append(torch.stack(masses) / sum(masses))
            fits &= states[:, variable] == sample[variable]
    return torch.stack(rows).view(len(x), size, categories)


@pytest.mark.claim(
    82, "Prefix conditionals equal sums over all states, in both schedules", tolerance=1e-12
)
@pytest.mark.parametrize("schedule", ["tour", "paper"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_conditionals_equal_brute_force(structure, schedule):
    made = build(structure)
    x = torch.randint(0, 3, (6, made.num_variables))
    found = prefix_conditionals(made, x, schedule=schedule)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, brute_force(made, x), rtol=0, atol=1e-12)


@pytest.mark.claim(
    82, "The product of the conditionals at a sample's values is its probability", tolerance=1e-10
)
def test_chain_rule_of_a_large_circuit():
    """A thousand variables: nothing underflows."""
    torch.manual_seed(0)
    parents = [-1, *(i // 2 for i in range(1, 600)), *range(599, 999)]
    made = Circuit(hclt(parents), CategoricalLeaf(40), num_units=4, dtype=torch.float64)
    x = torch.randint(0, 40, (3, 1000))
    order = variable_order(made.region_graph)
    found = prefix_conditionals(made, x)
    chosen = found.gather(2, x[:, order, None]).log().sum((1, 2))
    torch.testing.assert_close(chosen, made(x)[:, 0], rtol=1e-10, atol=0)


def test_gradients_are_those_of_the_likelihood():
    made = build("hclt")
    x = torch.randint(0, 3, (4, 5))
    order = variable_order(made.region_graph)
    log_p = prefix_conditionals(made, x).gather(2, x[:, order, None]).log().sum()
    ours = torch.autograd.grad(log_p, list(made.parameters()))
    oracle = torch.autograd.grad(made(x).sum(), list(made.parameters()))
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_order_is_depth_first_with_the_larger_child_first():
    assert variable_order(linear(4)).tolist() == [2, 3, 1, 0]
    assert variable_order(balanced(4)).tolist() == [0, 1, 2, 3]
    # 0 over 1 and 2, and 2 over 3: the subtree of 2 has two variables, then 0's leaf, then 1's
    assert variable_order(hclt([-1, 0, 0, 2])).tolist() == [2, 3, 0, 1]
    assert variable_order(quad_tree((3, 2))).tolist() == [0, 2, 1, 3, 4, 5]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 999))
def test_an_order_is_contiguous_in_every_region(size, seed):
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, size)]
    graph = hclt(parents)
    turn = torch.empty(size, dtype=torch.int64)
    turn[variable_order(graph)] = torch.arange(size)
    for region in range(len(graph.regions)):
        turns = turn[list(graph.scope(region))].sort().values
        assert turns.tolist() == list(range(int(turns[0]), int(turns[0]) + len(turns)))


def edges(made, schedule):
    """Edges that are evaluated for a sample, and the circuit's size."""
    factors = factors_of(made).map(torch.Tensor.detach)
    counter = EdgeCounter()
    SCHEDULES[schedule](factors, 1, lambda variable, pmf: torch.zeros(1).long(), counter)
    return counter.edges, factors.num_parameters


@pytest.mark.claim(
    82,
    "Edges evaluated for a sample: at most 3 |p| in the tour, at most 2 |p| (1 + log2 D) in the "
    "paper's schedule, on balanced trees and on chains of 256 variables",
)
@pytest.mark.parametrize("categories", [2, 16])
@pytest.mark.parametrize(
    "graph",
    [balanced(256), linear(256), hclt(list(range(-1, 255)))],
    ids=["balanced", "chain", "hmm"],
)
def test_operation_count(graph, categories):
    made = Circuit(graph, CategoricalLeaf(categories), num_units=4)
    tour, size = edges(made, "tour")
    paper, _ = edges(made, "paper")
    assert size / 2 <= tour <= 3 * size
    # the counter counts one evaluation of the path; coding takes that of x <= c and of x < c
    assert 2 * paper <= 2 * size * (1 + math.log2(256))


def test_paper_schedule_evaluates_paths_only():
    """On a balanced tree paths are long: longer than the tour, far less than D full passes."""
    made = Circuit(balanced(256), CategoricalLeaf(2), num_units=8)
    paper, size = edges(made, "paper")
    assert 4 * 0.9 * size < paper < 0.1 * 256 * size
    counted = edges(Circuit(balanced(4), CategoricalLeaf(2), num_units=1), "paper")[0]
    # sums above leaf 0 none, leaf 1 one, leaves 2 and 3 two each; top-down three; four leaf ends
    assert counted == (0 + 1 + 2 + 2) + 3 + 4


@pytest.mark.parametrize("leaf", [BinomialLeaf(2)])
def test_other_finite_leaves(leaf):
    torch.manual_seed(0)
    made = Circuit(balanced(3), leaf, num_units=2, dtype=torch.float64)
    x = torch.randint(0, 3, (4, 3))
    torch.testing.assert_close(
        prefix_conditionals(made, x), brute_force(made, x), rtol=0, atol=1e-12
    )


def test_leading_dimensions_and_values_of_probability_zero():
    made = build("hclt")
    x = torch.randint(0, 3, (2, 4, 5))
    found = prefix_conditionals(made, x)
    assert torch.equal(found.flatten(0, 1), prefix_conditionals(made, x.flatten(0, 1)))
    assert prefix_conditionals(made, x[:0]).shape == (0, 4, 5, 3)
    with torch.no_grad():
        made.leaf.logits[:, 2] = -torch.inf
    rows = prefix_conditionals(made, torch.full((1, 5), 2))[0]
    torch.testing.assert_close(rows[1:], torch.full((4, 3), 1 / 3).double())
    assert rows[0, 2] == 0


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 4).long(), {}, r"x: expected integers \(\*, 5\), got torch.int64 \(2, 4\)"),
        (torch.zeros(2, 5), {}, "x: expected integers"),
        (torch.full((2, 5), 3), {}, "x: expected values in 0 to 2"),
        (torch.zeros(2, 5).long(), {"schedule": "naive"}, "schedule: expected one of"),
    ],
)
def test_bad_input_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        prefix_conditionals(build("hclt"), x, **options)


def test_a_graph_of_several_partitions_has_no_order():
    graph = rat_spn(4, depth=1, num_repetitions=2)
    with pytest.raises(ValueError, match=f"got 2 at region {graph.root}"):
        variable_order(graph)
