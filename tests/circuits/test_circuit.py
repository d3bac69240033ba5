"""Circuits against sums over all states, a hidden Markov model's recursion, and scikit-learn."""

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch.utils._python_dispatch import TorchDispatchMode

from torchzoo.circuits import (
    BernoulliLeaf,
    BinomialLeaf,
    CategoricalLeaf,
    Circuit,
    DiscretizedLogisticLeaf,
    GaussianLeaf,
    balanced,
    factorised,
    hclt,
    linear,
    poon_domingos,
    quad_tree,
    rat_spn,
)

F64 = torch.float64
GRAPHS = {
    "hclt": hclt([-1, 0, 0, 1, 1, 3]),
    "balanced": balanced(5, order=[3, 1, 0, 2, 4]),
    "linear": linear(5, order=[2, 0, 1, 4, 3]),
    "factorised": factorised(4),
    "rat_spn": rat_spn(5, depth=2, num_repetitions=3),
    "poon_domingos": poon_domingos((2, 3)),
    "quad_tree": quad_tree((2, 3)),
}
LEAVES = {
    "categorical": CategoricalLeaf(3),
    "bernoulli": BernoulliLeaf(),
    "binomial": BinomialLeaf(2),
    "logistic": DiscretizedLogisticLeaf(3),
}
graphs = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
sums = pytest.mark.parametrize("sum_", ["cp", "tucker"])


def all_states(num_variables, num_categories):
    """Every state, the first variable slowest."""
    values = torch.arange(num_categories)
    return torch.cartesian_prod(*[values] * num_variables).view(-1, num_variables)


def make(graph, leaf=None, *, sum_="cp", seed=0, dtype=F64, **options):
    """A random circuit; Tucker sums get the binary form of the graph."""
    torch.manual_seed(seed)
    graph = graph.binarized() if sum_ == "tucker" else graph
    leaf = CategoricalLeaf(3) if leaf is None else leaf
    return Circuit(graph, leaf, sum=sum_, dtype=dtype, **{"num_units": 3, **options})


@pytest.mark.claim(
    82, "Probabilities of all states sum to 1 for every builder, leaf and kind of sum", 1e-10
)
@graphs
@sums
@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
def test_all_states_sum_to_one(graph, sum_, leaf, dtype, tolerance):
    circuit = make(graph, leaf, sum_=sum_, dtype=dtype, num_leaf_units=2, num_classes=2)
    states = all_states(circuit.num_variables, circuit.leaf.num_categories)
    total = circuit(states).logsumexp(0)
    assert total.dtype == dtype
    assert total.shape == (2,)
    assert total.abs().max() < tolerance


@pytest.mark.claim(82, "A marginal equals the sum over the states of what is not observed", 1e-10)
@graphs
@sums
def test_marginals_equal_brute_force_with_a_mask_for_each_sample(graph, sum_):
    circuit = make(graph, sum_=sum_)
    states = all_states(circuit.num_variables, 3)
    probs = circuit.log_prob(states).exp()
    generator = torch.Generator().manual_seed(1)
    x = states[torch.randint(len(states), (12,), generator=generator)]
    mask = torch.rand(x.shape, generator=generator) < 0.5
    agree = ((x[:, None] == states) | ~mask[:, None]).all(-1)
    expected = (agree * probs).sum(1)
    hidden = x.masked_fill(~mask, 77)  # what is not observed is not read
    torch.testing.assert_close(
        circuit.log_marginal(hidden, mask).exp(), expected, rtol=1e-10, atol=0
    )


@pytest.mark.claim(82, "p(a, b) = p(a | b) p(b) for any two disjoint sets of variables", 1e-10)
@graphs
def test_product_rule(graph):
    circuit = make(graph)
    x = torch.randint(3, (20, circuit.num_variables), generator=torch.Generator().manual_seed(2))
    part = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    a, b = part < 0.4, (part >= 0.4) & (part < 0.8)
    both = circuit.log_marginal(x, a | b)
    found = circuit.log_conditional(x, a, b) + circuit.log_marginal(x, b)
    assert (both - found).abs().max() < 1e-10
    states = all_states(circuit.num_variables, 3)
    probs = circuit.log_prob(states).exp()
    agree = (x[:, None] == states) | ~b[:, None]
    given = (agree.all(-1) * probs).sum(1)
    agree = (x[:, None] == states) | ~(a | b)[:, None]
    expected = (agree.all(-1) * probs).sum(1) / given
    torch.testing.assert_close(circuit.log_conditional(x, a, b).exp(), expected)


def hmm_forward(x, initial, transition, emission):
    """The textbook recursion over time."""
    alpha = initial * emission[:, x[0]]
    for value in x[1:]:
        alpha = (alpha @ transition) * emission[:, value]
    return alpha.sum().log()


def random_hmm(states=3, categories=4):
    generator = torch.Generator().manual_seed(0)
    sizes = [(states,), (states, states), (states, categories)]
    return [torch.rand(size, generator=generator, dtype=F64).softmax(-1) for size in sizes]


@pytest.mark.claim(
    82, "A chain with CP sums equals the forward recursion of a hidden Markov model", 1e-10
)
def test_linear_circuit_is_a_hidden_markov_model():
    initial, transition, emission = random_hmm()
    circuit = Circuit.from_hmm(initial, transition, emission, length=7)
    assert sum(p.numel() for p in circuit.parameters()) == 3 + 9 + 12
    x = torch.randint(4, (9, 7), generator=torch.Generator().manual_seed(4))
    expected = torch.stack([hmm_forward(row, initial, transition, emission) for row in x])
    assert (circuit.log_prob(x) - expected).abs().max() < 1e-10


def test_linear_circuit_is_an_inhomogeneous_markov_model_in_the_given_order():
    order = [2, 0, 3, 1]
    circuit = make(linear(4, order=order))
    tables = circuit.leaf.log_table().exp()
    places = [circuit.scope.tolist().index(variable) for variable in order]
    x = all_states(4, 3)[::5]
    weights = [layer.weight()[0] for layer in reversed(circuit.layers)]
    for row in x:
        alpha = weights[0][0]
        for step, (variable, place) in enumerate(zip(order, places, strict=True)):
            alpha = alpha if step == 0 else alpha @ weights[step]
            alpha = alpha * tables[place, row[variable]]
        torch.testing.assert_close(circuit.log_prob(row), alpha.sum().log())


@pytest.mark.claim(82, "One region of Gaussian leaves equals scikit-learn's mixture", 1e-10)
def test_one_region_is_a_gaussian_mixture():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(300, 5, generator=generator, dtype=F64).numpy()
    data[:100] += 3
    mixture = GaussianMixture(4, covariance_type="diag", random_state=0).fit(data)
    circuit = Circuit.from_gmm(mixture)
    x = torch.from_numpy(data)
    assert (circuit.log_prob(x) - torch.from_numpy(mixture.score_samples(data))).abs().max() < 1e-10
    mean = torch.from_numpy(mixture.weights_ @ mixture.means_)
    torch.testing.assert_close(circuit.mean(), mean)
    second = torch.from_numpy(mixture.weights_ @ (mixture.covariances_ + mixture.means_**2))
    torch.testing.assert_close(circuit.variance(), second - mean**2)
    with pytest.raises(ValueError, match="mixture: got full"):
        Circuit.from_gmm(GaussianMixture(2))


@pytest.mark.claim(64, "Posterior marginals under soft evidence equal sums over all states", 1e-10)
@pytest.mark.parametrize("name", ["hclt", "poon_domingos", "rat_spn", "balanced"])
@sums
def test_posterior_marginals_equal_brute_force(name, sum_):
    circuit = make(GRAPHS[name], sum_=sum_, num_leaf_units=2)
    dim = circuit.num_variables
    states = all_states(dim, 3)
    prior = circuit.log_prob(states).exp()
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(3, (6, dim), generator=generator)
    mask = torch.rand(x.shape, generator=generator) < 0.3
    log_w = torch.randn(6, dim, 3, generator=generator, dtype=F64) * 3
    log_w[:, 0, 1] = -torch.inf  # a value ruled out
    log_w[0, 1, :2] = -torch.inf
    for evidence in (
        {},
        {"x": x, "mask": mask},
        {"log_w": log_w},
        {"x": x, "mask": mask, "log_w": log_w},
    ):
        weight = prior.expand(6, -1)
        seen = evidence.get("mask", torch.zeros_like(mask))
        if "x" in evidence:
            weight = weight * ((x[:, None] == states) | ~seen[:, None]).all(-1)
        if "log_w" in evidence:
            soft = log_w.gather(2, states.T.expand(6, -1, -1)).masked_fill(seen[..., None], 0)
            weight = weight * soft.sum(1).exp()
        onehot = torch.nn.functional.one_hot(states, 3).to(F64)
        expected = torch.einsum("bs,sdc->bdc", weight, onehot) / weight.sum(1)[:, None, None]
        found = circuit.posterior_marginals(**evidence)
        if not evidence:
            expected = expected[0]
        else:
            torch.testing.assert_close(circuit(**evidence)[:, 0].exp(), weight.sum(1))
        assert (found - expected).abs().max() < 1e-10
    all_observed = circuit.posterior_marginals(x)
    torch.testing.assert_close(all_observed, torch.nn.functional.one_hot(x, 3).to(F64))


def test_one_hot_soft_evidence_is_hard_and_flat_evidence_is_none():
    circuit = make(GRAPHS["hclt"], num_classes=2)
    x = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(0))
    hard = torch.where(torch.nn.functional.one_hot(x, 3) > 0, 0.0, -torch.inf)
    torch.testing.assert_close(circuit(log_w=hard), circuit(x))
    assert circuit(log_w=torch.zeros(4, 6, 3)).abs().max() < 1e-12


def test_conditional_moments_equal_brute_force():
    circuit = make(GRAPHS["poon_domingos"])
    states = all_states(6, 3)
    x, mask = states[[5, 100]], torch.tensor([[True, False, False, True, False, False]] * 2)
    probs = circuit.log_prob(states).exp() * ((x[:, None] == states) | ~mask[:, None]).all(-1)
    probs = probs / probs.sum(1, keepdim=True)
    mean = probs @ states.to(F64)
    torch.testing.assert_close(circuit.mean(x, mask), mean)
    torch.testing.assert_close(circuit.variance(x, mask), probs @ states.to(F64) ** 2 - mean**2)
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    values = table.gather(1, states.T).T
    torch.testing.assert_close(circuit.expect(table, x, mask), probs @ values)


@pytest.mark.parametrize("sum_", ["cp", "tucker"])
def test_gradients_of_log_probability_sum_to_flows(sum_):
    """The root is used once in each sample, so that flows into the root's edges sum to 1."""
    circuit = make(GRAPHS["balanced"], sum_=sum_)
    weights = [(w.detach().requires_grad_(), m) for w, m in circuit.weights()]
    x = all_states(5, 3)[:7]
    root = circuit.propagate(circuit.leaf_values(x), weights)[-1]
    for weight, _ in weights:
        (slope,) = torch.autograd.grad(root.sum(), weight, retain_graph=True)
        torch.testing.assert_close(
            (slope * weight).flatten(1).sum(1), torch.full((len(weight),), 7.0, dtype=F64)
        )


class CountCalls(TorchDispatchMode):
    """Counts operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.claim(82, "The number of calls depends on the depth of a circuit, not on its width")
@pytest.mark.parametrize(
    ("small", "large"),
    [
        (
            hclt([-1] + [(i - 1) // 2 for i in range(1, 15)]),
            hclt([-1] + [(i - 1) // 8 for i in range(1, 585)]),
        ),
        (rat_spn(64, depth=4), rat_spn(256, depth=4)),
        (rat_spn(64, depth=4, num_repetitions=2), rat_spn(64, depth=4, num_repetitions=8)),
    ],
)
def test_calls_depend_on_depth_only(small, large):
    counts = []
    for graph in (small, large):
        circuit = make(graph)
        x = torch.zeros(2, circuit.num_variables, dtype=torch.long)
        with CountCalls() as count, torch.no_grad():
            circuit(x)
        counts.append((len(circuit.layers), count.calls))
    assert counts[0] == counts[1]


def test_ties_share_parameters():
    graph = balanced(8)
    free, tied = make(graph), make(graph, tie="all")
    assert tied.leaf.logits.shape == (1, 3, 3)
    assert tied.layers[0].log_weight is tied.layers[1].log_weight
    assert sum(p.numel() for p in tied.parameters()) == 9 + 9 + 3
    assert sum(p.numel() for p in free.parameters()) == 8 * 9 + 6 * 9 + 3
    states = all_states(8, 3)
    assert tied.log_prob(states).logsumexp(0).abs() < 1e-10
    swapped = states.flip(1)  # halves are alike, but the order of parts is kept by units only
    torch.testing.assert_close(tied.log_prob(states), tied.log_prob(swapped))
    assert (free.log_prob(states) - free.log_prob(swapped)).abs().max() > 0.1


def test_save_and_load_keep_graph_leaves_and_weights(tmp_path):
    for options in ({"tie": "all"}, {"num_leaf_units": 2, "num_classes": 2}):
        circuit = make(GRAPHS["rat_spn"], BinomialLeaf(4), **options)
        twin = Circuit.load(circuit.save(tmp_path / "circuit"))
        x = torch.randint(5, (4, 5))
        assert torch.equal(twin(x), circuit(x))
        assert twin.region_graph == circuit.region_graph
        assert not list((tmp_path / "circuit").glob("*.pkl"))


def test_leading_dimensions_and_classes():
    circuit = make(GRAPHS["hclt"], num_classes=4)
    x = torch.randint(3, (2, 5, 6))
    assert circuit(x).shape == circuit.log_prob(x).shape == (2, 5, 4)
    single = make(GRAPHS["hclt"])
    assert single(x).shape == (2, 5, 1)
    assert single.log_prob(x).shape == (2, 5)
    assert single.log_prob(x[0, 0]).shape == ()
    assert single.posterior_marginals(x, x > 0).shape == (2, 5, 6, 3)
    assert single.mean(x, x > 0).shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: c(x[:, :5]), r"x: got shape \(4, 5\), expected \(\*, 6\)"),
        (lambda c, x: c(), "x: got None"),
        (lambda c, x: c(x.float()), "x: got dtype torch.float32, expected integers"),
        (
            lambda c, x: c(x.index_fill(1, torch.tensor(4), 3)),
            "x: got 3 for variable 4, expected 0 to 2",
        ),
        (lambda c, x: c(x - 9), "x: got -[0-9] for variable"),
        (lambda c, x: c(x, x[:, :1] > 0), "mask: got torch.bool of shape"),
        (lambda c, x: c(x, x), "mask: got torch.int64"),
        (lambda c, x: c(x, log_w=torch.zeros(4, 6, 2)), "log_w: got shape"),
        (lambda c, x: c(log_w=torch.zeros(4, 6, 2)), "log_w: got shape"),
        (lambda c, x: c(mask=x > 0, log_w=torch.zeros(4, 6, 3)), "mask: got a mask without x"),
        (lambda c, x: c.mean(mask=x > 0), "mask: got a mask without x"),
        (lambda c, x: c.expect(torch.zeros(3, 6)), "f_table: got shape"),
        (lambda c, x: make(GRAPHS["hclt"], num_classes=2).mean(), "num_classes: got 2"),
        (
            lambda c, x: Circuit(GRAPHS["hclt"], CategoricalLeaf(3), sum="tucker"),
            "not into 2 parts",
        ),
        (lambda c, x: Circuit(GRAPHS["hclt"], CategoricalLeaf(3), tie="x"), "tie: got 'x'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(GRAPHS["hclt"]), torch.randint(3, (4, 6)))


def test_gaussian_circuits_refuse_nan_only_where_observed():
    circuit = make(balanced(3), GaussianLeaf())
    x = torch.randn(4, 3)
    x[2, 1] = torch.nan
    mask = ~x.isnan()
    assert circuit(x, mask).isfinite().all()
    with pytest.raises(ValueError, match="x: got nan for variable 1"):
        circuit(x)
    with pytest.raises(ValueError, match="log_w: got soft evidence"):
        circuit(log_w=torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="leaf: got"):
        circuit.posterior_marginals(x, mask)
    grid = torch.linspace(-9, 9, 721, dtype=F64)
    first = torch.stack([grid, torch.zeros(721), torch.zeros(721)], 1)
    density = circuit.log_marginal(first, torch.tensor([True, False, False]).expand(721, 3))
    assert abs(torch.trapezoid(density.exp(), grid).item() - 1) < 1e-4
