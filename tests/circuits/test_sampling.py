"""Samples against exact marginals, and the decode against the best of all states."""

import pytest
import torch
from scipy import stats

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    GaussianLeaf,
    balanced,
    hclt,
    is_deterministic,
    poon_domingos,
    rat_spn,
)

F64 = torch.float64
GRAPHS = {
    "hclt": hclt([-1, 0, 0, 1, 1]),
    "rat_spn": rat_spn(5, depth=2, num_repetitions=3),
    "poon_domingos": poon_domingos((2, 3)),
    "balanced": balanced(5),
}


def make(graph, leaf=None, *, sum_="cp", **options):
    torch.manual_seed(0)
    graph = graph.binarized() if sum_ == "tucker" else graph
    options = {"num_units": 3, **options}
    return Circuit(graph, leaf or CategoricalLeaf(3), sum=sum_, dtype=F64, **options)


def all_states(num_variables):
    return torch.cartesian_prod(*[torch.arange(3)] * num_variables)


def chance(states, probs, drawn):
    """P-value of the samples under the probabilities of all states."""
    place = 3 ** torch.arange(states.shape[1] - 1, -1, -1)
    counts = torch.bincount((drawn * place).sum(1), minlength=len(states)).double()
    return stats.chisquare(counts, probs / probs.sum() * len(drawn)).pvalue


@pytest.mark.claim(82, "Samples follow the circuit's law: chi-square over all states and all pairs")
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("sum_", ["cp", "tucker"])
def test_samples_follow_the_law(graph, sum_):
    circuit = make(graph, sum_=sum_, num_leaf_units=2)
    states = all_states(circuit.num_variables)
    probs = circuit.log_prob(states).exp().detach()
    drawn = circuit.sample(20000, generator=torch.Generator().manual_seed(1))
    assert chance(states, probs, drawn) > 1e-3
    for i in range(circuit.num_variables):
        for j in range(i):
            pair = states[:, [i, j]] @ torch.tensor([3, 1])
            exact = torch.zeros(9, dtype=F64).index_add_(0, pair, probs)
            counts = torch.bincount(drawn[:, [i, j]] @ torch.tensor([3, 1]), minlength=9)
            assert stats.chisquare(counts, exact * 20000 / exact.sum()).pvalue > 1e-4


@pytest.mark.claim(82, "Conditional samples follow the conditional law and keep what is observed")
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_conditional_samples(graph):
    circuit = make(graph)
    dim = circuit.num_variables
    states = all_states(dim)
    probs = circuit.log_prob(states).exp().detach()
    x = states[[3, 77, 150]]
    mask = torch.rand(3, dim, generator=torch.Generator().manual_seed(4)) < 0.4
    drawn = circuit.sample(
        5000, x.masked_fill(~mask, 50), mask, generator=torch.Generator().manual_seed(1)
    )
    assert drawn.shape == (5000, 3, dim)
    assert torch.equal(drawn[:, mask], x[mask].expand(5000, -1))
    for row in range(3):
        agree = ((states == x[row]) | ~mask[row]).all(1)
        place = torch.full((len(states),), -1)
        place[agree] = torch.arange(int(agree.sum()))
        index = place[drawn[:, row] @ (3 ** torch.arange(dim - 1, -1, -1))]
        counts = torch.bincount(index, minlength=int(agree.sum())).double()
        exact = probs[agree] / probs[agree].sum()
        assert stats.chisquare(counts, exact * 5000).pvalue > 1e-3


def test_fully_observed_samples_and_seeds():
    circuit = make(GRAPHS["hclt"])
    x = all_states(5)[:4]
    assert torch.equal(circuit.sample(2, x), x.expand(2, -1, -1))
    one, two = (circuit.sample(9, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(one, two)
    assert circuit.sample(0).shape == (0, 5)
    assert circuit.sample(2, x[:0], x[:0] > 0).shape == (2, 0, 5)


def test_classes_have_their_own_samples():
    circuit = make(GRAPHS["rat_spn"], num_classes=2)
    states = all_states(5)
    for label in range(2):
        drawn = circuit.sample(20000, generator=torch.Generator().manual_seed(2), class_index=label)
        assert chance(states, circuit(states)[:, label].exp().detach(), drawn) > 1e-3
        assert chance(states, circuit(states)[:, 1 - label].exp().detach(), drawn) < 1e-3
    with pytest.raises(ValueError, match="class_index: got None"):
        circuit.sample(2)


def test_gaussian_samples_have_the_circuits_moments():
    circuit = make(balanced(3), GaussianLeaf())
    drawn = circuit.sample(40000, generator=torch.Generator().manual_seed(0))
    se = (circuit.variance() / 40000).sqrt()
    assert ((drawn.mean(0) - circuit.mean()) / se).abs().max() < 4
    torch.testing.assert_close(drawn.var(0), circuit.variance(), rtol=0.05, atol=0)


def test_chow_liu_circuit_is_the_tree_and_deterministic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (500, 4), generator=generator)
    x[:, 2] = (x[:, 0] + (torch.rand(500, generator=generator) < 0.2)) % 3
    circuit = Circuit.from_chow_liu(x, num_categories=3, alpha=0.5)
    assert is_deterministic(circuit)
    states = all_states(4)
    assert circuit.log_prob(states).logsumexp(0).abs() < 1e-5
    joint = torch.zeros(3, 3).index_put_((x[:, 0], x[:, 2]), torch.ones(500), accumulate=True)
    pair = states[:, [0, 2]] @ torch.tensor([3, 1])
    found = torch.zeros(9).index_add_(0, pair, circuit.log_prob(states).exp())
    torch.testing.assert_close(found, ((joint + 0.5) / (500 + 4.5)).flatten())


@pytest.mark.claim(82, "A deterministic circuit decodes the most probable completion, and says so")
def test_decode_of_a_deterministic_circuit_is_the_best_state():
    x = torch.randint(3, (300, 5), generator=torch.Generator().manual_seed(1))
    circuit = Circuit.from_chow_liu(x, num_categories=3).double()
    states = all_states(5)
    scores = circuit.log_prob(states)
    found = circuit.max_product_decode()
    assert found.exact
    assert torch.equal(found.values, states[scores.argmax()])
    mask = torch.rand(30, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    decoded = circuit.max_product_decode(x[:30].masked_fill(~mask, 9), mask)
    agree = ((x[:30, None] == states) | ~mask[:, None]).all(-1)
    best = torch.where(agree, scores, -torch.inf).amax(1)
    torch.testing.assert_close(circuit.log_prob(decoded.values), best)
    assert torch.equal(decoded.values[mask], x[:30][mask])


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("sum_", ["cp", "tucker"])
def test_decode_of_other_circuits_never_claims_to_be_exact(graph, sum_):
    circuit = make(graph, sum_=sum_)
    x = all_states(circuit.num_variables)[5:9]
    mask = x == 0
    found = circuit.max_product_decode(x, mask)
    assert not found.exact
    assert torch.equal(found.values[mask], x[mask])
    point = make(graph, sum_=sum_)  # nearly all mass on one unit and value: nothing to get wrong
    with torch.no_grad():
        point.leaf.logits.mul_(40)
        for layer in point.layers:
            for parameter in layer.log_weights():
                parameter.mul_(40)
    states = all_states(point.num_variables)
    best = states[point.log_prob(states).argmax()]
    assert torch.equal(point.max_product_decode().values, best)


def test_refusals():
    circuit = make(GRAPHS["hclt"])
    with pytest.raises(ValueError, match="n: got -1"):
        circuit.sample(-1)
    with torch.no_grad():
        circuit.leaf.logits[:, 2] = -torch.inf
    with pytest.raises(ValueError, match="x: got evidence of probability 0"):
        circuit.sample(1, torch.full((5,), 2), torch.ones(5, dtype=torch.bool))
