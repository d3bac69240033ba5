"""Expectation maximisation under soft evidence, against enumerated states and latents."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torchzoo.circuits import (
    BinomialLeaf,
    CategoricalLeaf,
    Circuit,
    DiscretizedLogisticLeaf,
    GaussianLeaf,
    edge_flows,
    em_fit,
    em_step,
    hclt,
    linear,
    poon_domingos,
    rat_spn,
)

F64 = torch.float64
STATES = torch.cartesian_prod(*[torch.arange(3)] * 3)


def chain(seed=0):
    torch.manual_seed(seed)
    return Circuit(linear(3), CategoricalLeaf(3), num_units=2, dtype=F64)


def evidence(count, dim=3, seed=0):
    """Log-weights of values, some of which are ruled out."""
    generator = torch.Generator().manual_seed(seed)
    log_w = torch.randn(count, dim, 3, dtype=F64, generator=generator)
    log_w[: count // 2] += 2 * F.one_hot(torch.arange(dim) % 3, 3)
    ruled_out = torch.rand(count, dim, 3, generator=generator) < 0.2
    ruled_out[..., 0] = False
    return log_w.masked_fill(ruled_out, -torch.inf)


def tables(circuit):
    """Transitions `(O, K)` from the root on, and emissions `(C, K)` of variables 0, 1 and 2."""
    place = [circuit.scope.tolist().index(variable) for variable in range(3)]
    table = circuit.leaf.full_table()
    moves = [layer.log_weight[0].log_softmax(-1) for layer in reversed(circuit.layers)]
    return moves, [table[p] for p in place]


def joint(circuit):
    """`(27, 8)`, log-probability of all values and all latents of the chain."""
    moves, emits = tables(circuit)
    columns = []
    for path in itertools.product(range(2), repeat=3):
        before = (0, *path[:2])
        latent = sum(moves[i][before[i], path[i]] for i in range(3))
        columns.append(latent + sum(emits[i][STATES[:, i], path[i]] for i in range(3)))
    return torch.stack(columns, 1)


@pytest.mark.claim(82, "An EM step under soft evidence is at the top of the enumerated bound", 1e-6)
def test_a_step_maximises_the_expected_complete_likelihood():
    """Derivatives by finite differences vanish at the new parameters, and there only."""
    circuit, log_w = chain(), evidence(12)
    weight = sum(log_w[:, i, STATES[:, i]] for i in range(3))  # (12, 27)
    with torch.no_grad():
        posterior = (joint(circuit) + weight[..., None]).flatten(1).softmax(1).sum(0).view(27, 8)
        likelihood = (joint(circuit) + weight[..., None]).flatten(1).logsumexp(1)
    torch.testing.assert_close(circuit(log_w=log_w)[:, 0].detach(), likelihood)

    @torch.no_grad()
    def slopes():
        found = []
        for parameter in circuit.parameters():
            flat = parameter.view(-1)
            for i in range(len(flat)):
                kept, sides = flat[i].clone(), []
                for step in (1e-5, -1e-5):
                    flat[i] = kept + step
                    sides.append((posterior * joint(circuit)).sum())
                flat[i] = kept
                found.append((sides[0] - sides[1]) / 2e-5)
        return torch.stack(found).abs().max()

    assert slopes() > 0.1
    assert em_step(circuit, log_w=log_w) == pytest.approx(likelihood.mean().item(), abs=1e-12)
    assert slopes() < 1e-6


@pytest.mark.claim(82, "EM on all data never lowers the likelihood of soft evidence", 1e-9)
@pytest.mark.parametrize(
    ("graph", "leaf", "options"),
    [
        (hclt([-1, 0, 0, 1]), CategoricalLeaf(3), {"tie": "all"}),
        (rat_spn(4, depth=1, num_repetitions=3), BinomialLeaf(2), {"num_leaf_units": 2}),
        (poon_domingos((2, 2)), DiscretizedLogisticLeaf(3), {"sum": "tucker"}),
    ],
)
def test_steps_never_lower_the_likelihood(graph, leaf, options):
    """A third of the values are hard, and the others soft."""
    torch.manual_seed(0)
    circuit = Circuit(graph, leaf, dtype=F64, **{"num_units": 3, **options})
    log_w = evidence(80, dim=4)
    x, mask = torch.randint(3, (80, 4)), torch.rand(80, 4) < 0.3
    history = em_fit(circuit, x.masked_fill(~mask, 99), mask, log_w=log_w, epochs=25)
    assert torch.tensor(history).diff().min() > -1e-9
    assert history[-1] > history[0] + 0.05
    last = circuit(x, mask, log_w=log_w).mean().item()
    assert em_step(circuit, x, mask, log_w=log_w) == pytest.approx(last, rel=1e-12)


def test_certain_evidence_is_hard_evidence():
    hard, soft = chain(), chain()
    x = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(0))
    certain = F.one_hot(x, 3).double().log()
    em_step(hard, x)
    em_step(soft, log_w=certain)
    for one, two in zip(hard.parameters(), soft.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    mask = torch.zeros(20, 3, dtype=torch.bool)
    flows = edge_flows(soft, x, mask, log_w=certain)
    torch.testing.assert_close(flows.leaf, edge_flows(soft, x).leaf)
    everything = edge_flows(soft, x, log_w=evidence(20))  # all is observed: weights aren't read
    torch.testing.assert_close(everything.leaf, flows.leaf)


def test_units_that_evidence_rules_out_get_no_flow():
    circuit = chain()
    with torch.no_grad():
        circuit.leaf.logits[:, 0, 0] = -torch.inf  # the first unit never gives 0
    only_zero = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=F64).expand(5, 3, 3)
    flows = edge_flows(circuit, log_w=only_zero)
    assert flows.leaf[..., 0].abs().max() == 0
    torch.testing.assert_close(flows.leaf.sum(), torch.tensor(15.0, dtype=F64))


def test_batches_of_soft_evidence():
    whole, parts, fitted = chain(), chain(), chain()
    log_w = evidence(30)
    em_step(whole, log_w=log_w)
    em_step(parts, log_w=log_w, batch_size=7)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.softmax(-1), two.softmax(-1))
    history = em_fit(fitted, log_w=log_w, epochs=8, batch_size=10, pseudocount=0.01)
    assert history[-1] > history[0]
    x = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(0))
    hard, soft = chain(), chain()
    for circuit, told in ((hard, {"x": x}), (soft, {"log_w": F.one_hot(x, 3).double().log()})):
        order = torch.Generator().manual_seed(1)
        em_fit(circuit, **told, epochs=2, batch_size=8, generator=order)
    for one, two in zip(hard.parameters(), soft.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "x: got None"),
        ({"log_w": evidence(5)[0]}, r"log_w: got shape \(3, 3\), expected \(N, D, C\)"),
        ({"log_w": evidence(5)[:0]}, r"log_w: got shape \(0, 3, 3\), expected \(N, D, C\)"),
        ({"log_w": evidence(5)[..., :2]}, r"log_w: got shape \(5, 3, 2\)"),
        ({"x": STATES, "log_w": evidence(30)}, r"log_w: got shape \(30, 3, 3\)"),
        ({"mask": STATES > 0, "log_w": evidence(27)}, "mask: got a mask without x"),
        ({"log_w": evidence(5).fill_(-torch.inf)}, "got log-likelihood -inf"),
    ],
)
@pytest.mark.parametrize("call", [em_step, em_fit])
def test_refusals(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(chain(), **options)


def test_gaussian_leaves_refuse_soft_evidence():
    leaf = GaussianLeaf(num_folds=2)
    with pytest.raises(ValueError, match="log_w: got soft evidence"):
        leaf.soft_statistics(torch.zeros(2, 1, 3), torch.ones(2, 1, 1))
