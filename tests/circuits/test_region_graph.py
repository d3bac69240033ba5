"""Region graphs: what builders give, the JSON form, and what `check` refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchzoo.circuits import (
    RegionGraph,
    balanced,
    factorised,
    hclt,
    linear,
    poon_domingos,
    quad_tree,
    rat_spn,
)
from torchzoo.circuits.schedule import schedule

GRAPHS = {
    "hclt": hclt([-1, 0, 0, 1, 1, 3]),
    "balanced": balanced(7, order=[3, 1, 0, 2, 6, 5, 4]),
    "linear": linear(5, order=[2, 0, 1, 4, 3]),
    "factorised": factorised(4),
    "rat_spn": rat_spn(9, depth=2, num_repetitions=3, seed=1),
    "poon_domingos": poon_domingos((3, 4), delta=1),
    "coarse poon_domingos": poon_domingos((4, 5), delta=2),
    "quad_tree": quad_tree((4, 3)),
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_builders_give_checked_graphs_that_survive_json(graph):
    assert graph.check() is graph
    assert graph.scope(graph.root) == tuple(range(graph.num_variables))
    assert RegionGraph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_binarized_splits_the_same_variables_in_two(graph):
    binary = graph.binarized().check()
    assert binary.num_variables == graph.num_variables
    parts = [p for region in range(len(binary.regions)) for p in binary.partitions(region)]
    assert {len(p) for p in parts} == {2}
    assert binary.structured == graph.structured
    old = {graph.scope(region) for region in range(len(graph.regions))}
    assert old <= {binary.scope(region) for region in range(len(binary.regions))}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("leaf_sums", [False, True])
def test_schedule_evaluates_children_first(graph, leaf_sums):
    if leaf_sums:
        graph = graph.with_leaf_sums()
        assert graph.with_leaf_sums() is graph
    order = schedule(graph, leaf_sums=leaf_sums)
    slots = [*order.chunks, *(layer.regions for layer in order.layers)]
    assert sorted(region for slot in slots for region in slot) == list(range(len(graph.regions)))
    for region in range(len(graph.regions)):
        slot, row = order.place[region]
        assert slots[slot][row] == region
        for partition in graph.partitions(region):
            assert all(order.place[child][0] < slot for child in partition)
    if leaf_sums:
        (width,) = {len(fold.parts) for fold in order.layers[0].folds}
        assert width == 1
        assert len(order.layers[0].regions) == sum(isinstance(r, int) for r in graph.regions)


def test_structured_says_whether_there_is_one_partition_a_region():
    found = {name for name, graph in GRAPHS.items() if graph.structured}
    assert found == {"hclt", "balanced", "linear", "factorised", "quad_tree"}
    assert rat_spn(9, depth=2).structured


def test_hclt_has_a_region_for_each_node_with_its_leaf_first():
    parent = [2, 2, -1, 0, 0]
    graph = hclt(parent, num_latents=7)
    assert graph.num_units == 7
    regions = {graph.scope(r): graph.partitions(r) for r in range(len(graph.regions))}
    assert set(regions) == {(0, 1, 2, 3, 4), (0, 3, 4), (0,), (1,), (2,), (3,), (4,)}
    (root,) = graph.partitions(graph.root)
    assert [graph.scope(part) for part in root] == [(2,), (0, 3, 4), (1,)]
    assert sum(isinstance(region, int) for region in graph.regions) == 5
    assert len(graph.regions) == 10


def test_linear_splits_off_one_variable_after_the_other():
    graph = linear(4, order=[2, 0, 3, 1])
    region, found = graph.root, []
    while True:
        ((first, *rest),) = graph.partitions(region)
        found.append(graph.scope(first)[0])
        if not rest:
            break
        (region,) = rest
    assert found == [2, 0, 3, 1]


def test_balanced_has_logarithmic_depth_and_keeps_the_order():
    graph = balanced(64)
    assert max(graph.depths()) == 6
    (root,) = graph.partitions(graph.root)
    assert [graph.scope(part) for part in root] == [tuple(range(32)), tuple(range(32, 64))]


def test_rat_spn_halves_at_random_and_shares_nothing():
    graph = rat_spn(10, depth=2, num_repetitions=4, seed=0)
    parts = graph.partitions(graph.root)
    assert len(parts) == 4
    halves = {graph.scope(part[0]) for part in parts}
    assert len(halves) > 1
    assert all(len(half) == 5 for half in halves)
    assert sum(isinstance(region, int) for region in graph.regions) == 40
    assert graph != rat_spn(10, depth=2, num_repetitions=4, seed=1)
    assert graph == rat_spn(10, depth=2, num_repetitions=4, seed=0)


def test_poon_domingos_has_every_rectangle_once_with_every_cut():
    height, width = 3, 4
    graph = poon_domingos((height, width))
    scopes = [graph.scope(region) for region in range(len(graph.regions))]
    assert len(scopes) == len(set(scopes)) == 6 * 10  # intervals of 3 times intervals of 4
    assert len(graph.partitions(graph.root)) == 2 + 3
    rows_only = poon_domingos((height, width), axes=[0])
    assert len(rows_only.partitions(rows_only.root)) == 2


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_grids_of_any_size_are_covered(height, width, delta):
    for graph in (poon_domingos((height, width), delta=delta), quad_tree((height, width))):
        assert graph.check().num_variables == height * width


def test_quad_tree_splits_into_quadrants():
    graph = quad_tree((4, 4))
    (root,) = graph.partitions(graph.root)
    assert [graph.scope(part) for part in root] == [
        (0, 1, 4, 5),
        (2, 3, 6, 7),
        (8, 9, 12, 13),
        (10, 11, 14, 15),
    ]


@pytest.mark.claim(82, "A region graph that is not smooth or not decomposable is refused by region")
@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ((0, 1, ((0, 1),), ((2, 1),)), "region 3 is not decomposable, got variable 1"),
        ((0, 1, 2, ((0, 1),), ((2, 3), (0, 1))), "region 4 is not smooth, got variable 2"),
        ((0, 2, ((0, 1),)), "root .region 2. lacks variable 1"),
        ((0, 1, 0, ((0, 1),)), "region 2 is not reached"),
        ((0, ((1,),)), "region 1 got a child that is not before it"),
        ((0, ()), "region 1 got no partition"),
        ((-1, ((0,),)), "region 0 got variable -1"),
        ((), "got no regions"),
    ],
)
def test_check_names_the_region(regions, message):
    with pytest.raises(ValueError, match=message):
        RegionGraph(regions).check()


@pytest.mark.parametrize("text", ["[", "[1]", "{}", json.dumps({"regions": [0, [[0, 0]]]})])
def test_from_json_refuses_what_is_no_graph(text):
    with pytest.raises(ValueError):
        RegionGraph.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hclt([-1, -1]), "parent: got 2 roots"),
        (lambda: hclt([-1, 2, 1]), "parent: got a cycle"),
        (lambda: hclt([-1, 5]), "parent"),
        (lambda: hclt([-1], num_latents=0), "num_latents: got 0"),
        (lambda: balanced(0), "num_variables: got 0"),
        (lambda: linear(3, order=[0, 1, 1]), "order: got"),
        (lambda: rat_spn(4, depth=0), "depth: got 0"),
        (lambda: rat_spn(4, depth=1, num_repetitions=0), "num_repetitions: got 0"),
        (lambda: poon_domingos((2, 0)), "shape: got"),
        (lambda: poon_domingos((2, 2), delta=0), "delta: got 0"),
        (lambda: poon_domingos((2, 2), axes=[2]), "axes: got"),
        (lambda: RegionGraph((0, 0, ((0,), (1,)), 1, ((2, 3),))).binarized(), "only mixes"),
    ],
)
def test_builders_refuse_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
