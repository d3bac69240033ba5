"""Bounds over boxes against enumerated vertices and random points."""

import itertools
import math
import random

import pytest
import torch

from torchzoo.circuits import KnowledgeCircuit, reachable
from torchzoo.circuits.knowledge import KnowledgeMixture

SHARED = [(0, 2, 2.0), (1, ~2, 2.0), (2, 3, 1.0), (1, 3, 1.5)]
"""An attribute, concept 2, that one class implies and another one excludes."""


def brute(pi, rules):
    """Sums over all assignments, in float64."""
    mu = torch.tensor(list(itertools.product([0.0, 1.0], repeat=pi.shape[-1]))).double()
    log_f = torch.einsum("ml,...l->...m", mu, pi.log())
    log_f = log_f + torch.einsum("ml,...l->...m", 1 - mu, (1 - pi).log())
    for *head, weight in rules:
        literals = head[0] if len(head) == 1 else (~head[0], head[1])
        held = torch.stack([mu[:, j] == 1 if j >= 0 else mu[:, ~j] == 0 for j in literals]).any(0)
        log_f = log_f + weight * held.double()
    return log_f.softmax(-1) @ mu


def random_rules(seed, num_concepts, count):
    """Rules between literals of both signs."""
    draw = random.Random(seed)

    def literal():
        j = draw.randrange(num_concepts)
        return j if draw.random() < 0.6 else ~j

    return [(literal(), literal(), 3 * draw.random()) for _ in range(count)]


def detectors(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 + 0.96 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def box(seed, rows, size, width=0.3):
    centre = detectors(seed, rows, size)
    spread = width * torch.rand(rows, size, generator=torch.Generator().manual_seed(seed + 1))
    return (centre - spread).clamp(0.001, 0.999), (centre + spread).clamp(0.001, 0.999)


def vertices(lo, hi):
    ends = itertools.product([False, True], repeat=lo.shape[-1])
    return torch.stack([torch.where(torch.tensor(which), hi, lo) for which in ends])


def inside(lo, hi, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, *lo.shape, generator=generator, dtype=lo.dtype)
    return lo + draw * (hi - lo)


@pytest.mark.claim(21, "10^4 random points of a box never leave the bounds", tolerance=1e-12)
@pytest.mark.parametrize("rules", [SHARED, *(random_rules(s, 4, 8) for s in range(3))])
@pytest.mark.parametrize("method", ["vertex", "interval"])
def test_bounds_are_sound(rules, method):
    lo, hi = box(0, 2, 4)
    low, high = KnowledgeCircuit(4, rules, dtype=torch.float64).bounds(lo, hi, method=method)
    found = brute(inside(lo, hi, 10**4), rules)
    assert (found >= low - 1e-12).all()
    assert (found <= high + 1e-12).all()


@pytest.mark.claim(21, "Vertex bounds are attained at vertices of the box", tolerance=1e-9)
@pytest.mark.parametrize("blend", [1.0, 0.4])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_vertex_bounds_are_attained(size, blend):
    rules = random_rules(size, size, 2 * size)
    lo, hi = box(size, 3, size)
    circuit = KnowledgeCircuit(size, rules, blend=blend, dtype=torch.float64)
    low, high = circuit.bounds(lo, hi)
    corners = vertices(lo, hi)
    found = (1 - blend) * corners + blend * brute(corners, rules)
    torch.testing.assert_close(low, found.amin(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(high, found.amax(0), rtol=0, atol=1e-9)
    some = circuit.bounds(lo, hi, concepts=[size - 1, 0])
    torch.testing.assert_close(some[0], low[:, [size - 1, 0]])
    torch.testing.assert_close(some[1], high[:, [size - 1, 0]])


@pytest.mark.claim(21, "Hard rules and ends at 0 and 1 keep vertex bounds exact", tolerance=1e-9)
def test_hard_rules_and_certain_ends():
    rules = [(0, 1, math.inf), (2, ~1, math.inf), (1, 3, 2.0)]
    circuit = KnowledgeCircuit(4, rules, dtype=torch.float64)
    tiny = torch.tensor([1e-200, 0.0, 0.3, 0.5]).double()
    wide = torch.tensor([0.4, 1.0, 1.0, 0.9]).double()
    low, high = circuit.bounds(tiny, wide)
    found = circuit(vertices(tiny, wide))
    torch.testing.assert_close(low, found.amin(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(high, found.amax(0), rtol=0, atol=1e-9)


@pytest.mark.claim(
    21, "Bounds survive odds whose parts are below the smallest float", tolerance=1e-12
)
@pytest.mark.parametrize("method", ["vertex", "interval"])
def test_logarithms_take_over(method):
    rules = [([0], math.inf), ([1], math.inf), (0, 1, 1.0), (1, 2, 2.0)]
    circuit = KnowledgeCircuit(3, rules, dtype=torch.float64)
    lo = torch.tensor([1e-200, 1e-200, 0.3], dtype=torch.float64)
    hi = torch.tensor([1e-190, 1e-190, 0.4], dtype=torch.float64)
    # 0 and 1 hold for certain, so that only the rule from 1 to 2 is left
    for found, end in zip(
        circuit.bounds(lo, hi, method=method, concepts=[2]), (0.3, 0.4), strict=True
    ):
        assert method == "interval" or found.item() == pytest.approx(
            end / (end + (1 - end) * math.exp(-2)), abs=1e-12
        )
        assert found.isfinite().all()


def test_plain_numbers_and_logarithms_agree(monkeypatch):
    circuit = KnowledgeCircuit(6, random_rules(9, 6, 10), dtype=torch.float64)
    lo, hi = box(9, 5, 6)
    for method in ("vertex", "interval"):
        plain = circuit.bounds(lo, hi, method=method)
        with monkeypatch.context() as patch:
            patch.setattr(
                reachable,
                "_evaluate",
                lambda *args: reachable._climb(
                    *args[:4], *(args[4:] or (None,)), reachable.LOGARITHMS
                ),
            )
            careful = circuit.bounds(lo, hi, method=method)
        torch.testing.assert_close(plain, careful, rtol=0, atol=1e-12)


@pytest.mark.claim(21, "A box of no width gives the probabilities themselves", tolerance=1e-12)
@pytest.mark.parametrize("method", ["vertex", "interval"])
def test_a_point_is_its_own_bound(method):
    rules, pi = random_rules(2, 6, 9), detectors(2, 3, 6)
    circuit = KnowledgeCircuit(6, rules, dtype=torch.float64)
    for end in circuit.bounds(pi, pi, method=method):
        torch.testing.assert_close(end, brute(pi, rules), rtol=0, atol=1e-12)


@pytest.mark.claim(
    21, "Vertex bounds lie inside interval bounds, which are looser", tolerance=1e-12
)
def test_vertex_inside_interval():
    lo, hi = box(3, 4, 6)
    looser = 0
    for seed in range(8):
        circuit = KnowledgeCircuit(6, random_rules(seed, 6, 9), dtype=torch.float64)
        low, high = circuit.bounds(lo, hi)
        least, most = circuit.bounds(lo, hi, method="interval")
        assert (least <= low + 1e-12).all()
        assert (most >= high - 1e-12).all()
        looser += int(((most - high) > 1e-3).any())
    assert looser >= 4


def sign_heuristic(circuit, lo, hi, concept, attributes):
    """All other classes at one end, all attributes at the other, whatever the rules' signs."""
    best, worst = lo.clone(), hi.clone()
    best[attributes], worst[attributes] = hi[attributes], lo[attributes]
    best[concept], worst[concept] = hi[concept], lo[concept]
    return circuit(worst)[concept], circuit(best)[concept]


@pytest.mark.claim(
    21, "Where rules of both signs share an attribute the sign heuristic is unsound, vertices not"
)
def test_sign_heuristic_is_caught():
    circuit = KnowledgeCircuit(4, SHARED, dtype=torch.float64)
    lo, hi = torch.full((4,), 0.2).double(), torch.full((4,), 0.8).double()
    _, claimed = sign_heuristic(circuit, lo, hi, 1, [2, 3])
    found = circuit(inside(lo, hi, 4000))[:, 1].max()
    assert found > claimed + 0.01
    assert found <= circuit.bounds(lo, hi)[1][1] + 1e-12


@pytest.mark.claim(
    21,
    "A mixture of circuits that move in opposite directions has its extreme inside the box, beyond "
    "all vertices and within the bounds",
    tolerance=1e-12,
)
def test_mixture_extreme_is_interior():
    opposite = [KnowledgeCircuit(2, [(0, v, 4.0)], dtype=torch.float64) for v in (1, ~1)]
    mixture = KnowledgeMixture(opposite, beta=[0.5, 0.5])
    lo, hi = torch.tensor([0.5, 0.01]).double(), torch.tensor([0.5, 0.99]).double()
    path = torch.stack([lo + t * (hi - lo) for t in torch.linspace(0, 1, 401).double()])
    found = mixture(path)[:, 0]
    corners = mixture(vertices(lo, hi))[:, 0]
    interior = found.max() if found.max() > corners.max() + 0.01 else found.min()
    assert interior > corners.max() + 0.01 or interior < corners.min() - 0.01
    low, high = mixture.bounds(lo, hi)
    assert low[0] <= found.min() + 1e-12
    assert high[0] >= found.max() - 1e-12
    own = [circuit.bounds(lo, hi) for circuit in opposite]
    torch.testing.assert_close(low, (own[0][0] + own[1][0]) / 2)
    torch.testing.assert_close(high, (own[0][1] + own[1][1]) / 2)
    some = mixture.bounds(lo, hi, concepts=[1], method="interval")
    assert some[0].shape == (1,)


def test_large_groups_fall_back_to_intervals():
    rules = [(j, 17, 1.0) for j in range(17)] + [(17, ~18, 2.0)]
    circuit = KnowledgeCircuit(19, rules, dtype=torch.float64)
    lo, hi = box(1, 2, 19, 0.1)
    exact, loose = (circuit.bounds(lo, hi, method=m, concepts=[0]) for m in ("vertex", "interval"))
    assert all(map(torch.equal, exact, loose))
    lo[:, 5:17] = hi[:, 5:17]  # fixed leaves are not counted
    narrow = circuit.bounds(lo, hi, concepts=[0])
    assert (narrow[1] < circuit.bounds(lo, hi, method="interval", concepts=[0])[1]).all()


def test_empty_batch_and_pieces(monkeypatch):
    circuit = KnowledgeCircuit(4, SHARED)
    low, high = circuit.bounds(torch.zeros(0, 2, 4), torch.ones(0, 2, 4))
    assert low.shape == high.shape == (0, 2, 4)
    lo, hi = box(4, 11, 4)
    whole = circuit.bounds(lo, hi)
    monkeypatch.setattr(reachable, "PIECE", 32)
    assert all(map(torch.equal, whole, circuit.bounds(lo, hi)))
