"""Knowledge circuits against sums over all assignments in float64."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.circuits import KnowledgeCircuit, KnowledgeMixture

INF = math.inf


def worlds(num_concepts):
    """All assignments, `(2^L, L)`."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_concepts))).double()


def satisfied(rule, mu):
    """Whether assignments satisfy `(u, v, w)` or `(literals, w)`, straight from the definition."""

    def holds(literal):
        return mu[:, literal] == 1 if literal >= 0 else mu[:, ~literal] == 0

    if len(rule) == 3:
        return ~holds(rule[0]) | holds(rule[1])
    return torch.stack([holds(literal) for literal in rule[0]]).any(0)


def brute(pi, rules, weights=None):
    """`sum over mu_j = 1 of F / sum of F` by the formula of the paper."""
    mu = worlds(pi.shape[-1])
    log_f = (mu * pi[..., None, :].log() + (1 - mu) * (1 - pi[..., None, :]).log()).sum(-1)
    for h, rule in enumerate(rules):
        weight = rule[-1] if weights is None else weights[h]
        held = satisfied(rule, mu)
        log_f = log_f + weight * held.double()
    return log_f.softmax(-1) @ mu


def random_rules(seed, num_concepts, count):
    """Rules and clauses with literals of both signs."""
    draw = random.Random(seed)

    def literal():
        j = draw.randrange(num_concepts)
        return j if draw.random() < 0.6 else ~j

    rules = []
    for _ in range(count):
        if draw.random() < 0.7:
            rules.append((literal(), literal(), 3 * draw.random()))
        else:
            rules.append(([literal() for _ in range(draw.randint(1, 4))], 3 * draw.random()))
    return rules


def detectors(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 + 0.96 * torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.claim(
    21,
    "Corrected probabilities are those of the sum over all 2^L assignments, for random rules",
    tolerance=1e-10,
)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 10), count=st.integers(0, 14))
def test_equals_enumeration(seed, size, count):
    rules, pi = random_rules(seed, size, count), detectors(seed, 3, size)
    found = KnowledgeCircuit(size, rules, dtype=torch.float64)(pi)
    torch.testing.assert_close(found, brute(pi, rules), rtol=0, atol=1e-10)


@pytest.mark.claim(
    21,
    "Gradients in probabilities and weights are those of the sum over all assignments",
    tolerance=1e-10,
)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_equal_enumeration(seed):
    rules, pi = random_rules(seed, 6, 9), detectors(seed, 4, 6).requires_grad_()
    way = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    circuit = KnowledgeCircuit(6, rules, learnable_weights=True, dtype=torch.float64)
    found = torch.autograd.grad((circuit(pi) * way).sum(), (pi, circuit.weight))
    weights = circuit.weight.detach().clone().requires_grad_()
    exact = torch.autograd.grad((brute(pi, rules, weights) * way).sum(), (pi, weights))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.claim(21, "Rules of weight 0 change nothing", tolerance=1e-12)
def test_no_weight_is_identity():
    rules = [(*rule[:-1], 0.0) for rule in random_rules(3, 8, 12)]
    pi = detectors(3, 5, 8)
    torch.testing.assert_close(KnowledgeCircuit(8, rules)(pi), pi, rtol=0, atol=1e-12)


@pytest.mark.claim(
    21,
    "Infinite and ever larger weights condition on the rules: violated mass is below 1e-6",
    tolerance=1e-6,
)
@pytest.mark.parametrize("weight", [30.0, 300.0, INF])
def test_large_weights_condition(weight):
    rules = [(0, 2, weight), (1, ~2, weight), (2, 3, weight), ([0, 1, 4], weight), (~4, 3, 1.0)]
    pi, mu = detectors(0, 6, 5), worlds(5)
    allowed = torch.stack([satisfied(rule, mu) for rule in rules[:4]]).all(0)
    soft = rules[4:]
    log_p = (mu * pi[:, None].log() + (1 - mu) * (1 - pi[:, None]).log()).sum(-1)
    log_p = (log_p + satisfied(soft[0], mu).double()).masked_fill(~allowed, -INF)
    conditional = log_p.softmax(-1) @ mu
    found = KnowledgeCircuit(5, rules, dtype=torch.float64)(pi)
    torch.testing.assert_close(found, conditional, rtol=0, atol=1e-6)
    # the mass of a violated rule is that of its negative, tied to a further concept
    told = [*rules, ([~5, 0], INF), ([~5, ~2], INF), ([5, ~0, 2], INF)]  # concept 5: 0 and not 2
    with_witness = torch.cat([pi, torch.full((6, 1), 0.5).double()], 1)
    assert KnowledgeCircuit(6, told, dtype=torch.float64)(with_witness)[:, 5].max() < 1e-6


@pytest.mark.parametrize("weight", [2.0, INF])
def test_sure_and_contradictory_detectors_have_a_limit(weight):
    circuit = KnowledgeCircuit(3, [(0, 1, weight), (1, ~2, weight)])
    pi = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    found = circuit(pi)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], torch.zeros(3))
    found.sum().backward()
    assert pi.grad.isfinite().all()


def test_blend_is_linear():
    rules, pi = random_rules(1, 5, 6), detectors(1, 4, 5)
    found = KnowledgeCircuit(5, rules, blend=0.3, dtype=torch.float64)(pi)
    torch.testing.assert_close(found, 0.7 * pi + 0.3 * brute(pi, rules), rtol=0, atol=1e-12)


def chain_posterior(pi, weight):
    """Forward-backward over a chain of rules j => j + 1."""
    size = len(pi)
    step = torch.tensor([[1.0, 1.0], [math.exp(-weight), 1.0]], dtype=torch.float64)
    leaf = torch.stack([1 - pi, pi], -1)
    forward, backward = [leaf[0]], [torch.ones(2).double()]
    for j in range(1, size):
        message = forward[-1] @ step * leaf[j]
        forward.append(message / message.sum())
        message = step @ (leaf[size - j] * backward[-1])
        backward.append(message / message.sum())
    both = torch.stack(forward) * torch.stack(backward[::-1])
    return both[:, 1] / both.sum(-1)


@pytest.mark.claim(
    21,
    "The circuit's size follows treewidth: a chain of 200 concepts takes at most 2 sums each, "
    "ten classes with six attributes at most 2^6, and the chain's answer is forward-backward's",
    tolerance=1e-10,
)
def test_size_follows_treewidth():
    chain = KnowledgeCircuit(200, [(j, j + 1, 1.5) for j in range(199)], dtype=torch.float64)
    assert chain.num_sums <= 400
    pi = detectors(5, 200)
    torch.testing.assert_close(chain(pi), chain_posterior(pi, 1.5), rtol=0, atol=1e-10)
    bipartite = KnowledgeCircuit(16, [(c, 10 + a, 1.0) for c in range(10) for a in range(6)])
    assert bipartite.num_sums <= 10 * 2**6 + 2**6
    assert max(len(bucket.separator) for bucket in bipartite.buckets) == 6
    assert len(bipartite.levels) == 7
    # one clause over many concepts: equal continuations share a sum, as in a decision diagram
    assert KnowledgeCircuit(14, [(list(range(14)), 1.0)]).num_sums <= 2 * 14


def test_one_decision_a_sum_over_disjoint_parts():
    """Deterministic, smooth and decomposable: buckets decide a variable over disjoint scopes."""
    circuit = KnowledgeCircuit(9, random_rules(4, 9, 14))
    scopes = []
    for bucket in circuit.buckets:
        parts = [scopes[c] for c in bucket.children]
        scope = {bucket.variable}.union(*parts)
        assert len(scope) == 1 + sum(map(len, parts))
        scopes.append(scope)
        assert bucket.child.shape[1] == 2
    assert {bucket.variable for bucket in circuit.buckets} == set(range(9))


def test_groups():
    circuit = KnowledgeCircuit(5, [(0, 2, 1.0), (2, ~4, 1.0)])
    assert set(circuit.groups()) == {frozenset({0, 2, 4}), frozenset({1}), frozenset({3})}
    assert circuit.group(2) == {0, 2, 4}
    other = KnowledgeCircuit(5, [(0, 1, 1.0)])
    assert KnowledgeMixture([circuit, other]).group(0) == {0, 1, 2, 4}


def test_mixture_averages():
    one, two = random_rules(1, 4, 5), random_rules(2, 4, 5)
    parts = [KnowledgeCircuit(4, rules, dtype=torch.float64) for rules in (one, two)]
    pi = detectors(2, 2, 3, 4)
    found = KnowledgeCircuit.mixture(parts, [0.3, 0.7])(pi)
    torch.testing.assert_close(found, 0.3 * brute(pi, one) + 0.7 * brute(pi, two))
    shape, colour = KnowledgeCircuit(4, [(0, 1, 2.0)]), KnowledgeCircuit(4, [(0, ~2, 2.0)])
    beta = KnowledgeCircuit.mixture([shape, colour]).beta
    assert beta.tolist() == [[0.5, 1.0, 0.0, 0.5], [0.5, 0.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(0, 3, 1.0)], "literal 3"),
        ([(0, ~3, 1.0)], "literal -4"),
        ([(0, 1, -1.0)], "weight -1.0"),
        ([(0, 1, math.nan)], "weight nan"),
        ([(0, 1)], r"\(u, v, weight\)"),
        ([([], 1.0)], r"\(u, v, weight\)"),
        ([(0, 1, INF), (0, ~1, INF), ([0], INF)], "no assignment satisfies"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=f"rules: .*{message}"):
        KnowledgeCircuit(3, rules)


def test_too_wide_rules_are_refused():
    with pytest.raises(ValueError, match="rules: got rules of width 21, expected at most 20"):
        KnowledgeCircuit(22, [(list(range(22)), 1.0)])


def test_bad_probabilities_are_refused():
    circuit = KnowledgeCircuit(2, [(0, 1, 1.0)])
    with pytest.raises(ValueError, match=r"pi: got values from -0.5 to 1.25"):
        circuit(torch.tensor([-0.5, 1.25]))
    with pytest.raises(ValueError, match="pi: got values from nan"):
        circuit(torch.tensor([math.nan, 0.5]))
    with pytest.raises(ValueError, match=r"pi: got torch.int64 of shape \(2,\)"):
        circuit(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="lo: got a lower end above"):
        circuit.bounds(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4]))
    with pytest.raises(ValueError, match=r"hi: got shape \(1, 2\)"):
        circuit.bounds(torch.tensor([0.5, 0.5]), torch.tensor([[0.6, 0.6]]))
    with pytest.raises(ValueError, match="method: got 'sign'"):
        circuit.bounds(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.6]), method="sign")
