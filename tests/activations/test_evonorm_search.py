"""The search of EvoNorm: its graphs against the layers, and its screening against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchzoo.activations import (
    Candidate,
    EvoNormB0,
    EvoNormS0,
    GraphNorm,
    mutate,
    pareto_frontier,
    random_graph,
    search,
    worst_gradient_norm,
)
from torchzoo.activations.evonorm_graph import B0, OPERATIONS, S0, alive, describe


def drawn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.claim(40, "The graphs of B0 and S0 are the layers B0 and S0", tolerance=1e-12)
@pytest.mark.parametrize(("graph", "kind"), [(B0, EvoNormB0), (S0, EvoNormS0)])
def test_known_graphs(graph, kind):
    layer = kind(6, dtype=torch.float64, **({"groups": 3} if kind is EvoNormS0 else {}))
    twin = GraphNorm(6, graph, groups=3, dtype=torch.float64)
    with torch.no_grad():
        for row, parameter in ((1, layer.v), (2, layer.weight), (3, layer.bias)):
            parameter.copy_(drawn(6, seed=row))
            twin.vectors[row] = parameter
    x = drawn(4, 6, 3, 5)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=1e-12)


REFERENCE = {
    "neg": lambda a: -a,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": np.tanh,
    "exp": np.exp,
    "log": lambda a: np.sign(a) * np.log(abs(a)),
    "abs": abs,
    "square": lambda a: a * a,
    "sqrt": lambda a: np.sign(a) * np.sqrt(abs(a)),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": np.maximum,
}


def reference(name, x):
    if name in REFERENCE:
        inputs = (x, np.broadcast_to(np.array([0.5, -1, 2, 3])[:, None, None], x.shape))
        return REFERENCE[name](*inputs[: 2 if name in ("add", "mul", "div", "max") else 1])
    kind, over = name.split("_")
    values = x.reshape(len(x), 2, 2, *x.shape[2:]) if over == "whg" else x
    axes = {"bwh": (0, 2, 3), "wh": (2, 3), "whc": (1, 2, 3), "whg": (2, 3, 4)}[over]
    moment = {
        "mean": lambda: values.mean(axes, keepdims=True),
        "std": lambda: np.sqrt(values.var(axes, keepdims=True) + 1e-5),
        "rms": lambda: np.sqrt((values**2).mean(axes, keepdims=True) + 1e-5),
    }[kind]()
    return np.broadcast_to(moment, values.shape).reshape(x.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    x = drawn(3, 4, 2, 3)
    node = (name, 0, 2) if name in ("add", "mul", "div", "max") else (name, 0)
    layer = GraphNorm(4, (node,), groups=2, dtype=torch.float64)
    with torch.no_grad():
        layer.vectors[0] = torch.tensor([0.5, -1.0, 2.0, 3.0])
    np.testing.assert_allclose(layer(x).detach().numpy(), reference(name, x.numpy()), rtol=1e-9)


def test_inputs_of_a_graph():
    x = drawn(2, 4, 2, 2)
    for place, value in ((1, 0.0), (2, 0.0), (3, 1.0)):
        graph = (("mul", 0, 1), ("add", 4, place))
        assert (GraphNorm(4, graph, dtype=torch.float64)(x) == value).all()
    dead = (("log", 1), ("neg", 0))
    assert torch.equal(GraphNorm(4, dead, dtype=torch.float64)(x), -x)
    assert alive(dead) == {0, 5}
    assert describe(B0) == "div(x, max(add(mul(v1, x), std_wh(x)), std_bwh(x)))"


def test_random_graphs_and_mutations():
    g = torch.Generator().manual_seed(0)
    seen, changed = set(), []
    for _ in range(300):
        graph = random_graph(generator=g)
        child = mutate(graph, generator=g)
        assert len(graph) == 10
        for one in (graph, child):
            assert 0 in alive(one)
            GraphNorm(4, one)  # checks that nodes read earlier ones
        changed.append([a != b for a, b in zip(graph, child, strict=True)])
        seen |= {node[0] for node in graph}
    assert seen == set(OPERATIONS)
    changed = np.array(changed)
    assert (changed.sum(1) <= 1).all()
    assert (changed.sum(0) > 10).all(), "every node can change"


@pytest.mark.claim(
    40, "The adversary reaches a gradient that explodes, and leaves one that can't", tolerance=1e-3
)
def test_worst_gradient_norm():
    # one kernel w, logits (w x, 0), label 1: the gradient is x sigmoid(w x), at most abs(x)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten()).double()
    with torch.no_grad():
        model[0].weight.zero_()
    x, y = torch.full((1, 1, 1, 1), 3.0).double(), torch.tensor([1])
    before = model[0].weight.clone()
    start = worst_gradient_norm(model, x, y, steps=1)
    assert start == pytest.approx(3 / math.sqrt(2), rel=1e-9)  # x sigmoid(0), for both kernels
    worst = worst_gradient_norm(model, x, y, steps=60)
    assert worst == pytest.approx(3 * math.sqrt(2), rel=1e-3)
    assert torch.equal(model[0].weight, before)
    # an exponential on the way blows up
    explosive = nn.Sequential(
        nn.Conv2d(1, 2, 1), GraphNorm(2, (("exp", 0), ("exp", 4))), nn.Flatten()
    ).double()
    with torch.no_grad():
        for parameter in explosive[0].parameters():
            parameter.zero_()
    assert worst_gradient_norm(explosive, x, y, steps=60) > 1e8
    with pytest.raises(ValueError, match="model: expected one with convolutions"):
        worst_gradient_norm(nn.Linear(1, 1), x, y)


def test_pareto_frontier():
    g = torch.Generator().manual_seed(0)
    points = torch.randint(5, (40, 3), generator=g).tolist()
    candidates = [Candidate(S0, tuple(map(float, p))) for p in points]
    frontier = [c.scores for c in pareto_frontier([*candidates, Candidate(S0, None)])]
    for point in points:
        beaten = any(
            all(a >= b for a, b in zip(other, point, strict=True)) and other != point
            for other in points
        )
        assert (tuple(point) in frontier) != beaten


def test_search_improves_on_random_graphs():
    """Two objectives that a random graph misses: many nodes alive, and many of them sums."""

    def score(graph):
        if graph[-1][0] == "exp":
            return None
        used = alive(graph)
        return len(used), sum(node[0] == "add" for i, node in enumerate(graph, 4) if i in used)

    found = search(score, rounds=300, tournament=0.2, generator=torch.Generator().manual_seed(1))
    assert len(found) == 64 + 300
    assert all((c.scores is None) == (c.graph[-1][0] == "exp") for c in found)

    def best(some):
        return np.array([c.scores for c in some if c.scores is not None]).max(0)

    assert (best(found[-64:]) >= 2 + best(found[:64])).all()
    again = search(score, rounds=300, tournament=0.2, generator=torch.Generator().manual_seed(1))
    assert again == found
    with_start = search(score, population=2, rounds=0, start=[S0])
    assert (with_start[0].graph, len(with_start)) == (S0, 2)


def test_what_is_refused():
    for graph in ((), (("relu", 0),), (("add", 0),), (("neg", 4),), (("neg", -1),)):
        with pytest.raises(ValueError, match="graph: expected"):
            GraphNorm(4, graph)
    with pytest.raises(ValueError, match="num_nodes"):
        random_graph(4)
    with pytest.raises(ValueError, match="tournament"):
        search(lambda g: None, tournament=0.0)
    with pytest.raises(ValueError, match="population"):
        search(lambda g: None, population=0)
