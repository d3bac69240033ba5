"""Expectation maximisation against counts from enumerated posteriors, and its monotone rise."""

import itertools

import pytest
import torch

from torchzoo.circuits import (
    BinomialLeaf,
    CategoricalLeaf,
    Circuit,
    DiscretizedLogisticLeaf,
    GaussianLeaf,
    balanced,
    edge_flows,
    em_fit,
    em_step,
    hclt,
    init_from_data,
    linear,
    poon_domingos,
    rat_spn,
)

F64 = torch.float64
GRAPHS = {
    "hclt": hclt([-1, 0, 0, 1]),
    "rat_spn": rat_spn(4, depth=1, num_repetitions=3),
    "poon_domingos": poon_domingos((2, 2)),
}


def make(graph, leaf=None, *, seed=0, **options):
    torch.manual_seed(seed)
    return Circuit(graph, leaf or CategoricalLeaf(3), dtype=F64, **{"num_units": 3, **options})


def data(size=200, dim=4, count=3, seed=0):
    """Two clusters of rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(count, (size, dim), generator=generator)
    x[: size // 2] = (x[: size // 2, :1] + torch.arange(dim)) % count
    return x


@pytest.mark.claim(82, "One EM step sets weights to the counts of the enumerated posterior", 1e-10)
def test_one_step_equals_brute_force_counts():
    """A chain of four latents: every path is enumerated."""
    circuit, x = make(linear(4), num_units=2), data(40)
    layers = list(reversed(circuit.layers))
    weights = [layer.weight()[0].detach() for layer in layers]
    place = [circuit.scope.tolist().index(variable) for variable in range(4)]
    emission = [circuit.leaf.full_table()[p].exp().detach() for p in place]  # (C, K)
    uses = [torch.zeros_like(w) for w in weights]
    seen = [torch.zeros_like(e) for e in emission]
    for row in x.tolist():
        paths = {}
        for path in itertools.product(range(2), repeat=4):
            probability = 1.0
            for step, state in enumerate(path):
                before = path[step - 1] if step else 0
                probability *= weights[step][before, state] * emission[step][row[step], state]
            paths[path] = probability
        total = sum(paths.values())
        for path, probability in paths.items():
            for step, state in enumerate(path):
                before = path[step - 1] if step else 0
                uses[step][before, state] += probability / total
                seen[step][row[step], state] += probability / total
    em_step(circuit, x, pseudocount=0.3, leaf_pseudocount=0.2)
    for layer, use in zip(layers, uses, strict=True):
        expected = (use + 0.3) / (use + 0.3).sum(1, keepdim=True)
        assert (layer.weight()[0] - expected).abs().max() < 1e-10
    for step, counts in enumerate(seen):
        expected = (counts + 0.2) / (counts + 0.2).sum(0)
        assert (circuit.leaf.full_table()[place[step]].exp() - expected).abs().max() < 1e-10


@pytest.mark.claim(82, "EM on all data never lowers its likelihood", 1e-9)
@pytest.mark.parametrize(
    ("graph", "leaf", "options"),
    [
        ("hclt", CategoricalLeaf(3), {}),
        ("hclt", CategoricalLeaf(3), {"tie": "all"}),
        ("rat_spn", BinomialLeaf(2), {"num_leaf_units": 2}),
        ("poon_domingos", DiscretizedLogisticLeaf(3), {}),
        ("poon_domingos", GaussianLeaf(0.3), {"sum": "tucker"}),
    ],
)
def test_full_steps_never_lower_the_likelihood(graph, leaf, options):
    circuit, x = make(GRAPHS[graph], leaf, **options), data()
    x = x if leaf.num_categories else x + torch.randn(200, 4, dtype=F64)
    history = em_fit(circuit, x, epochs=50)
    rises = torch.tensor(history).diff()
    assert rises.min() > -1e-9
    assert history[-1] > history[0] + 0.05


def test_missing_values_are_summed_out():
    circuit, x = make(GRAPHS["hclt"]), data()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    history = []
    for _ in range(20):
        history.append(em_step(circuit, x.masked_fill(~mask, 99), mask))
    assert torch.tensor(history).diff().min() > -1e-9
    expected = circuit.log_marginal(x, mask).mean().item()
    assert em_step(circuit, x, mask) == pytest.approx(expected, rel=1e-12)


def test_several_classes_learn_from_labels():
    x = data()
    labels = (torch.arange(200) >= 100).long()
    circuit = make(GRAPHS["hclt"], num_classes=2)
    em_fit(circuit, x, labels=labels, epochs=30)
    scores = circuit(x)
    assert (scores.argmax(1) == labels).double().mean() > 0.8
    with pytest.raises(ValueError, match="labels: expected for 2 classes"):
        em_step(circuit, x)


def test_batches_at_a_time_give_the_same_step():
    whole, parts = make(GRAPHS["rat_spn"]), make(GRAPHS["rat_spn"])
    x = data(50)
    em_step(whole, x)
    em_step(parts, x, batch_size=7)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.softmax(-1), two.softmax(-1))


def test_flows_are_expected_uses():
    circuit, x = make(GRAPHS["rat_spn"], tie="sums"), data(30)
    flows = edge_flows(circuit, x)
    assert flows.num_samples == 30
    root = [
        entry for entry in flows.weights if entry.parameter is circuit.layers[-1].mixing.log_weight
    ]
    torch.testing.assert_close(root[0].flow.sum(), torch.tensor(30.0, dtype=F64))
    torch.testing.assert_close(flows.leaf.sum(), torch.tensor(30.0 * 4, dtype=F64))
    parameters = {id(p) for layer in circuit.layers for p in layer.log_weights()}
    assert len(flows.weights) == len(parameters)


def test_a_step_of_part_of_the_way_blends():
    x = data(60)
    full, part = make(GRAPHS["hclt"]), make(GRAPHS["hclt"])
    old = [layer.weight().detach() for layer in part.layers]
    em_step(full, x)
    em_step(part, x, step_size=0.3)
    for before, one, two in zip(old, full.layers, part.layers, strict=True):
        torch.testing.assert_close(two.weight(), 0.7 * before + 0.3 * one.weight())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_batches_learn_and_can_be_taken_up_again(schedule):
    x = data()
    options = {"epochs": 6, "batch_size": 30, "schedule": schedule, "pseudocount": 0.05}
    through, seen = make(GRAPHS["hclt"]), []
    history = em_fit(
        through,
        x,
        generator=torch.Generator().manual_seed(3),
        progress=lambda epoch, value: seen.append((epoch, value)),
        **options,
    )
    assert history[-1] > history[0]
    assert seen == list(enumerate(history, 1))
    state = {}

    class Stop(Exception):
        pass

    broken, generator = make(GRAPHS["hclt"]), torch.Generator().manual_seed(3)

    def keep(epoch, value):
        if epoch == 3:
            state.update({k: v.clone() for k, v in broken.state_dict().items()})
            raise Stop

    with pytest.raises(Stop):
        em_fit(broken, x, generator=generator, progress=keep, **options)
    resumed, other = make(GRAPHS["hclt"], seed=9), torch.Generator()
    resumed.load_state_dict(state)
    other.set_state(generator.get_state())
    assert em_fit(resumed, x, start=3, generator=other, **options) == history[3:]


def test_step_sizes_follow_the_schedule(monkeypatch):
    from torchzoo.circuits import learning

    steps = []
    monkeypatch.setattr(
        learning, "em_step", lambda *a, step_size, **k: steps.append(step_size) or 0.0
    )
    em_fit(make(GRAPHS["hclt"]), data(10), epochs=3, batch_size=5, schedule="linear")
    assert steps == pytest.approx([0.1, 0.082, 0.064, 0.046, 0.028, 0.01])
    steps.clear()
    em_fit(make(GRAPHS["hclt"]), data(10), epochs=3, batch_size=5)
    assert steps[0] == pytest.approx(0.1)
    assert steps[-1] == pytest.approx(0.01)
    assert steps[1] == pytest.approx(0.01 + 0.09 * 0.5 * (1 + 0.80901699))
    steps.clear()
    em_fit(make(GRAPHS["hclt"]), data(10), epochs=2)
    assert steps == [1.0, 1.0]


def test_an_epoch_counts_samples_and_not_batches():
    circuit, x = make(GRAPHS["hclt"]), data()
    history = em_fit(circuit, x, epochs=1, batch_size=150, step_size=(1e-9, 1e-9))
    assert history[0] == pytest.approx(circuit.log_prob(x).mean().item(), abs=1e-6)


def test_identical_units_never_part():
    circuit, x = make(balanced(4)), data()
    with torch.no_grad():
        circuit.leaf.logits.copy_(circuit.leaf.logits[..., :1].expand(-1, -1, 3).clone())
        for layer in circuit.layers:
            layer.log_weight.zero_()
    em_fit(circuit, x, epochs=10)
    table = circuit.leaf.full_table()
    assert (table - table[..., :1]).abs().max() < 1e-10


def test_start_from_data_is_near_the_marginals_and_parts_units():
    circuit, x = make(GRAPHS["hclt"]), data(2000)
    init_from_data(circuit, x, generator=torch.Generator().manual_seed(0))
    marginals = torch.nn.functional.one_hot(x, 3).double().mean(0)
    torch.testing.assert_close(circuit.posterior_marginals(), marginals, atol=0.25, rtol=0)
    table = circuit.leaf.full_table()
    assert (table[..., 0] - table[..., 1]).abs().amax(1).min() > 0.01
    assert (circuit.layers[-1].weight() - 1 / 3).abs().max() < 1e-12
    init_from_data(circuit, x, noise=0.0)
    torch.testing.assert_close(circuit.posterior_marginals(), marginals, atol=1e-3, rtol=0)
    history = em_fit(circuit, x, epochs=2)
    assert history[0] == pytest.approx(torch.xlogy(marginals, marginals).sum().item(), abs=1e-2)


def test_gradient_ascent_on_logits_learns_too():
    circuit, x = make(GRAPHS["hclt"]), data()
    optimizer = torch.optim.Adam(circuit.parameters(), lr=0.1)
    first = None
    for _ in range(30):
        loss = -circuit.log_prob(x).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: em_step(c, x[:0]), "x: got shape"),
        (lambda c, x: em_step(c, x, step_size=0.0), "step_size: got 0.0"),
        (lambda c, x: em_step(c, x, pseudocount=-1.0), "pseudocount: got -1"),
        (
            lambda c, x: em_step(c, x, leaf_pseudocount=-torch.ones(4, 3)),
            "leaf_pseudocount: got -1",
        ),
        (lambda c, x: em_fit(c, x, schedule="none"), "schedule: got 'none'"),
        (lambda c, x: init_from_data(c, x[0]), "x: got shape"),
        (lambda c, x: em_step(c, x, labels=x[:, 0]), "labels"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(GRAPHS["hclt"]), data(10))


def test_impossible_samples_are_refused():
    circuit = make(GRAPHS["hclt"])
    with torch.no_grad():
        circuit.leaf.logits[:, 2] = -torch.inf
    with pytest.raises(ValueError, match="x: got log-likelihood -inf"):
        em_step(circuit, data(10))
