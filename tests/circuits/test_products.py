"""Products, powers, divergences and entropies against sums over all states."""

import math

import pytest
import torch

from torchzoo.circuits import (
    BinomialLeaf,
    CategoricalLeaf,
    Circuit,
    GaussianLeaf,
    balanced,
    cross_entropy,
    factorised,
    grow,
    hclt,
    is_compatible,
    is_deterministic,
    power,
    product,
    prune,
    rat_spn,
)

F64 = torch.float64
GRAPHS = {"hclt": hclt([-1, 0, 0, 1]), "balanced": balanced(4)}
graphs = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
sums = pytest.mark.parametrize("sum_", ["cp", "tucker"])


def make(graph, leaf=None, *, sum_="cp", seed=0, **options):
    torch.manual_seed(seed)
    graph = graph.binarized() if sum_ == "tucker" else graph
    options = {"num_units": 3, **options}
    return Circuit(graph, leaf or CategoricalLeaf(3), sum=sum_, dtype=F64, **options)


STATES = torch.cartesian_prod(*[torch.arange(3)] * 4)


def chow_liu(seed):
    x = torch.randint(3, (60, 4), generator=torch.Generator().manual_seed(seed))
    x[:, 1] = x[:, 0]
    x[:40, 2], x[:30, 3] = x[:40, 1], x[:30, 2]
    return Circuit.from_chow_liu(x, num_categories=3, alpha=0.2).double()


@pytest.mark.claim(82, "Inner products, divergences and products equal sums over all states", 1e-10)
@graphs
@sums
@pytest.mark.parametrize("leaf", [CategoricalLeaf(3), BinomialLeaf(2)])
def test_products_equal_brute_force(graph, sum_, leaf):
    p = make(graph, leaf, sum_=sum_, num_leaf_units=2)
    q = make(graph, leaf, sum_=sum_, seed=1, num_units=2, num_leaf_units=4)
    a, b = p.log_prob(STATES).exp(), q.log_prob(STATES).exp()
    torch.testing.assert_close(p.inner_product(q), (a * b).sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(p.renyi2_entropy(), -(a**2).sum().log(), rtol=1e-10, atol=0)
    divergence = -((a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt()).log()
    torch.testing.assert_close(p.cauchy_schwarz_divergence(q), divergence, rtol=1e-10, atol=1e-12)
    assert p.cauchy_schwarz_divergence(p).abs() < 1e-12
    both, log_z = product(p, q)
    torch.testing.assert_close(both.log_prob(STATES) + log_z, (a * b).log(), rtol=1e-10, atol=1e-10)
    assert both.log_prob(STATES).logsumexp(0).abs() < 1e-10
    third = product(both, p)
    found = third.circuit.log_prob(STATES) + third.log_z + log_z
    torch.testing.assert_close(found, (a * b * a).log(), rtol=1e-9, atol=1e-9)


def test_products_whose_leaves_and_regions_come_to_the_same_size():
    p = make(GRAPHS["hclt"], num_units=2, num_leaf_units=3)
    q = make(GRAPHS["hclt"], seed=1, num_units=3, num_leaf_units=2)
    both, log_z = product(p, q)
    expected = p.log_prob(STATES) + q.log_prob(STATES)
    torch.testing.assert_close(both.log_prob(STATES) + log_z, expected)


def test_inner_product_has_gradients_and_classes():
    p, q = make(GRAPHS["hclt"], num_classes=2), make(GRAPHS["hclt"], seed=1, num_classes=3)
    found = p.inner_product(q)
    expected = p(STATES).exp().T @ q(STATES).exp()
    torch.testing.assert_close(found, expected)
    slope = torch.autograd.grad(found.sum(), p.leaf.logits)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), p.leaf.logits)[0])


def test_gaussian_products_equal_an_integral():
    p, q = make(factorised(2), GaussianLeaf()), make(factorised(2), GaussianLeaf(), seed=1)
    axis = torch.linspace(-9, 9, 301, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    a, b = p.log_prob(grid).exp(), q.log_prob(grid).exp()
    torch.testing.assert_close(p.inner_product(q), (a * b).sum() * cell, rtol=1e-8, atol=0)
    both, log_z = product(p, q)
    torch.testing.assert_close(both.log_prob(grid).exp() * log_z.exp(), a * b)


@pytest.mark.claim(82, "Powers of circuits equal powers of the probabilities of all states", 1e-10)
def test_powers():
    p = make(GRAPHS["balanced"], num_units=2)
    a = p.log_prob(STATES).exp()
    cube = power(p, 3)
    torch.testing.assert_close(
        cube.circuit.log_prob(STATES) + cube.log_z, 3 * a.log(), rtol=1e-9, atol=1e-9
    )
    same = power(p, 1)
    assert same.circuit is p
    assert same.log_z == 0
    d = chow_liu(0)
    for exponent in (0.3, 2.5):
        root = power(d, exponent)
        found = root.circuit.log_prob(STATES) + root.log_z
        torch.testing.assert_close(found, exponent * d.log_prob(STATES), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not deterministic"):
        power(p, 0.5)
    with pytest.raises(ValueError, match="exponent: got 0"):
        power(p, 0)


@pytest.mark.claim(82, "Entropy and divergence of deterministic circuits are exact", 1e-8)
def test_entropies_of_deterministic_circuits():
    p = chow_liu(0)
    q = Circuit(p.region_graph, CategoricalLeaf(3), num_units=3, dtype=F64)
    q.load_state_dict(p.state_dict())
    with torch.no_grad():
        for layer in q.layers:
            layer.log_weight.add_(torch.randn_like(layer.log_weight))
    assert is_deterministic(q)
    a, b = p.log_prob(STATES), q.log_prob(STATES)
    torch.testing.assert_close(p.entropy(), -(a.exp() * a).sum(), rtol=1e-8, atol=0)
    torch.testing.assert_close(p.kl(q), (a.exp() * (a - b)).sum(), rtol=1e-8, atol=0)
    assert p.kl(p).abs() < 1e-12
    mixed = make(p.region_graph)  # only the second must be deterministic for a cross-entropy
    c = mixed.log_prob(STATES)
    torch.testing.assert_close(cross_entropy(mixed, q), -(c.exp() * b).sum(), rtol=1e-8, atol=0)
    with torch.no_grad():
        q.layers[-1].log_weight[0, 0, 1] = -torch.inf
    assert p.kl(q) == math.inf
    both = product(p, q)  # supports differ: pairs of units that share no value
    found = both.circuit.log_prob(STATES) + both.log_z
    torch.testing.assert_close(found, a + q.log_prob(STATES))


def test_queries_without_an_exact_answer_are_refused():
    p = make(GRAPHS["hclt"])
    with pytest.raises(ValueError, match=r"not deterministic.*entropy_mc"):
        p.entropy()
    with pytest.raises(ValueError, match=r"not deterministic.*entropy_mc"):
        p.kl(p)
    estimate, error = p.entropy_mc(4000, generator=torch.Generator().manual_seed(0))
    a = p.log_prob(STATES)
    assert (estimate + (a.exp() * a).sum()).abs() < 4 * error
    spread = ((a.exp() * a.square()).sum() - (a.exp() * a).sum().square()).sqrt()
    assert error.item() == pytest.approx(spread.item() / math.sqrt(4000), rel=0.1)
    for other, message in (
        (make(GRAPHS["balanced"]), "q: got another region graph"),
        (make(GRAPHS["hclt"].binarized(), sum_="tucker"), "q: got"),
        (make(GRAPHS["hclt"], CategoricalLeaf(4)), "q: got leaves of 4 values"),
    ):
        assert not is_compatible(p, other)
        with pytest.raises(ValueError, match=message):
            p.inner_product(other)
    several = make(rat_spn(4, depth=2, num_repetitions=2))
    with pytest.raises(ValueError, match="p: got 2 partitions of region"):
        several.inner_product(several)
    assert not is_deterministic(several)


def test_determinism_is_decided_by_supports():
    assert is_deterministic(make(GRAPHS["balanced"], num_units=1))
    p = make(GRAPHS["balanced"])
    assert not is_deterministic(p)
    with torch.no_grad():
        for layer in p.layers:
            layer.log_weight[:, :, 1:] = -torch.inf
    assert is_deterministic(p)
    disjoint = make(factorised(4))
    with torch.no_grad():
        fold = disjoint.scope.tolist().index(2)
        disjoint.leaf.logits[fold] = torch.eye(3, dtype=F64).log()
    assert is_deterministic(disjoint)
    assert disjoint.entropy() == pytest.approx(
        -(disjoint.log_prob(STATES).exp() * disjoint.log_prob(STATES)).nan_to_num().sum().item()
    )


@graphs
def test_pruning_one_edge_costs_what_flows_through_it(graph):
    """Without normalising again, `p'(x) = p(x) (1 - flow(x))`; doing so only adds mass."""
    circuit = make(graph)
    layer = circuit.layers[0]
    before = circuit.log_prob(STATES)
    weights = [(w.detach().clone().requires_grad_(), m) for w, m in circuit.weights()]
    root = circuit.propagate(circuit.leaf_values(STATES), weights)[-1][0, :, 0]
    slopes = torch.stack(
        [torch.autograd.grad(v, weights[0][0], retain_graph=True)[0][0, 1, 2] for v in root]
    )
    flow = slopes * weights[0][0][0, 1, 2]
    with torch.no_grad():
        weights[0][0][0, 1, 2] = 0
        cut = circuit.propagate(circuit.leaf_values(STATES), weights)[-1][0, :, 0]
        layer.log_weight[0, 1, 2] = -torch.inf
    torch.testing.assert_close(cut, before + torch.log1p(-flow))
    assert (circuit.log_prob(STATES) >= cut - 1e-12).all()


def test_pruning_takes_the_least_used_edges_and_growing_brings_new_ones():
    circuit = make(GRAPHS["hclt"], num_units=4)
    x = circuit.sample(200, generator=torch.Generator().manual_seed(0))
    edges = sum(layer.log_weight.numel() for layer in circuit.layers)
    before = circuit.log_prob(x).mean()
    removed = prune(circuit, x, fraction=0.3)
    assert removed == pytest.approx(0.3 * edges, abs=4)
    dead = sum(int((layer.log_weight == -torch.inf).sum()) for layer in circuit.layers)
    assert dead == removed
    assert circuit.log_prob(STATES).logsumexp(0).abs() < 1e-10
    after = circuit.log_prob(x).mean()
    other = make(GRAPHS["hclt"], num_units=4)
    with torch.no_grad():
        for layer in other.layers:  # the busiest edges in the place of the idlest
            busiest = layer.weight().argsort(-1)[..., 1:2]
            layer.log_weight.scatter_(-1, busiest, -torch.inf)
    assert after > other.log_prob(x).mean()
    assert before - after < 0.1
    pruned = [layer.log_weight == -torch.inf for layer in circuit.layers]
    from torchzoo.circuits import em_step

    em_step(circuit, x, pseudocount=0.1)
    assert all(
        torch.equal(layer.log_weight == -torch.inf, dead)
        for layer, dead in zip(circuit.layers, pruned, strict=True)
    )
    prune(circuit, x, fraction=0.99)
    assert circuit.log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"sum_": "tucker"}, {"num_leaf_units": 2, "num_classes": 2}, {"tie": "all"}]
)
def test_growing_without_noise_changes_nothing_and_with_noise_parts_copies(options):
    circuit = make(rat_spn(4, depth=2, num_repetitions=2), **options)
    larger = grow(circuit, copies=3, noise=0.0)
    assert larger.num_units == 9
    torch.testing.assert_close(larger(STATES), circuit(STATES))
    noisy = grow(circuit, noise=0.2, generator=torch.Generator().manual_seed(0))
    assert (noisy(STATES) - circuit(STATES)).abs().max() > 1e-3
    assert noisy(STATES).logsumexp(0).abs().max() < 1e-10
    table = noisy.leaf.log_table()
    assert (table[..., 0] - table[..., 1]).abs().max() > 1e-3
    for call in (lambda: grow(circuit, copies=0), lambda: grow(circuit, noise=-1.0)):
        with pytest.raises(ValueError, match=r"copies: got 0|noise: got -1"):
            call()
    with pytest.raises(ValueError, match="fraction: got 1"):
        prune(circuit, STATES, fraction=1.0)


def test_a_sum_without_flow_keeps_its_largest_weight():
    circuit = make(GRAPHS["hclt"])
    with torch.no_grad():  # the root's second state is never used: sums given it have no flow
        circuit.layers[-1].log_weight[..., 1] = -torch.inf
        for layer in circuit.layers[:-1]:
            layer.log_weight[:, :, 2] += 9.0
    prune(circuit, STATES[:50], fraction=0.95)
    for layer in circuit.layers[:-1]:
        assert (layer.log_weight[:, 1, 2] > -torch.inf).all()


@torch.no_grad()
def test_noise_of_growing_multiplies_weights():
    circuit = make(GRAPHS["hclt"], num_units=8)
    larger = grow(circuit, noise=0.2, generator=torch.Generator().manual_seed(0))
    for layer, new in zip(circuit.layers[:-1], larger.layers, strict=False):
        old = layer.log_weight.repeat_interleave(2, 1).repeat_interleave(2, 2)
        factor = (new.log_weight - old).exp()
        assert factor.mean().item() == pytest.approx(1, abs=0.05)
        assert factor.std().item() == pytest.approx(0.2, abs=0.04)
