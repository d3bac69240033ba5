"""Steered posteriors against sums over all states, and what makes them cheap."""

import pytest
import torch

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    GaussianLeaf,
    TractableSteering,
    factorised,
    hclt,
    poon_domingos,
    soft_evidence_from_gaussian,
    steered_posterior,
)
from torchzoo.testing.work import CountElements

F64 = torch.float64
MIXES = (0.0, 0.2, 0.5, 0.9, 1.0)


def make(graph, categories=3, *, units=3, seed=0, dtype=F64):
    torch.manual_seed(seed)
    return Circuit(graph, CategoricalLeaf(categories), num_units=units, dtype=dtype)


def law(circuit):
    """All states and their probabilities."""
    values = [torch.arange(circuit.leaf.num_categories)] * circuit.num_variables
    x = torch.cartesian_prod(*values)
    return x, circuit.log_prob(x).detach().exp()


def brute_force(x, weight, log_w, known, value):
    """Posterior marginals `(D, C)` of one sample, from the weight of every state."""
    for i, column in enumerate(x.T):
        own = (column == value[i]).double() if known[i] else log_w[i].exp()[column]
        weight = weight * own
    rows = [[weight[column == c].sum() for c in range(log_w.shape[-1])] for column in x.T]
    found = torch.tensor(rows, dtype=F64)
    return found / found.sum(-1, keepdim=True)


def from_table(table):
    """A circuit of exactly the distribution in a table with an axis a variable: a unit a state."""
    size, categories = table.dim(), len(table)
    leaf = CategoricalLeaf(categories)
    circuit = Circuit(factorised(size), leaf, num_units=table.numel(), dtype=F64)
    points = torch.cartesian_prod(*[torch.arange(categories)] * size).view(-1, size)
    with torch.no_grad():
        circuit.layers[-1].log_weight.copy_(table.flatten().log().view(1, 1, -1))
        own = points.T[circuit.scope]  # (D, K)
        certain = own[:, None] == torch.arange(categories)[:, None]
        circuit.leaf.set_probs(certain.double())
    return circuit


def inputs(circuit, batch=2, seed=1):
    """Denoiser's log-probabilities, soft evidence, known variables (the first two) and values."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, circuit.num_variables, circuit.leaf.num_categories)
    log_p, log_w = torch.randn(2, *size, dtype=F64, generator=generator)
    value = torch.randint(0, size[2], size[:2], generator=generator)
    known = torch.zeros(size[:2], dtype=torch.bool)
    known[:, :2] = True
    return log_p.log_softmax(-1), log_w, known, value


@pytest.mark.claim(
    64, "Posterior marginals under soft evidence equal sums over all 4^8 states", tolerance=1e-10
)
@pytest.mark.parametrize(
    "graph", [hclt([-1, 0, 0, 1, 1, 2, 5, 5]), poon_domingos((2, 4))], ids=["hclt", "pd"]
)
def test_posterior_marginals_equal_brute_force(graph):
    circuit = make(graph, 4)
    log_p, log_w, known, value = inputs(circuit)
    log_w[1, 4, 2] = -torch.inf
    everything = law(circuit)
    found = steered_posterior(circuit, log_p, log_w, known, value, mix=0.0).exp()
    free = circuit.posterior_marginals(log_w=log_w)
    for row in range(2):
        expected = brute_force(*everything, log_w[row], known[row], value[row])
        assert (found[row] - expected).abs().max() < 1e-10
        nothing = torch.zeros_like(known[row])
        expected = brute_force(*everything, log_w[row], nothing, value[row])
        assert (free[row] - expected).abs().max() < 1e-10


@pytest.mark.claim(
    64,
    "mix = 1 gives the denoiser's factor and mix = 0 the circuit's; known variables are exact "
    "point masses for every mix",
    tolerance=1e-12,
)
def test_ends_of_the_mixture_and_known_variables():
    circuit = make(hclt([-1, 0, 1, 1]))
    log_p, log_w, known, value = inputs(circuit)
    point = torch.nn.functional.one_hot(value, 3).double()
    everything = law(circuit)
    for mix in MIXES:
        found = steered_posterior(circuit, log_p, log_w, known, value, mix=mix).exp()
        assert torch.equal(found[known], point[known])
        assert (found.sum(-1) - 1).abs().max() < 1e-12
        if mix == 1:
            assert (found - log_p.exp())[~known].abs().max() < 1e-12
        if mix == 0:
            for row in range(2):
                expected = brute_force(*everything, log_w[row], known[row], value[row])
                assert (found[row] - expected).abs().max() < 1e-12
    each = torch.tensor([0.0, 1.0], dtype=F64).view(2, 1, 1)
    both = steered_posterior(circuit, log_p, log_w, known, value, mix=each)
    for row, mix in enumerate((0.0, 1.0)):
        alone = steered_posterior(circuit, log_p, log_w, known, value, mix=mix)
        assert torch.equal(both[row], alone[row])
    shifted = log_p + torch.randn(2, 4, 1, dtype=F64)
    again = steered_posterior(circuit, shifted, log_w, known, value, mix=0.5)
    same = steered_posterior(circuit, log_p, log_w, known, value, mix=0.5)
    assert (again.exp() - same.exp()).abs().max() < 1e-12


@pytest.mark.claim(
    64, "Soft evidence at known variables is ignored, whatever it is, and so are other values"
)
def test_what_is_not_read():
    circuit = make(hclt([-1, 0, 1, 1]))
    log_p, log_w, known, value = inputs(circuit)
    expected = steered_posterior(circuit, log_p, log_w, known, value, mix=0.4)
    log_w[known], value[~known] = torch.nan, 99
    found = steered_posterior(circuit, log_p, log_w, known, value, mix=0.4)
    assert torch.equal(found, expected)


@pytest.mark.claim(
    64,
    "Evidence that is constant, or without signal, leaves p(x | known); that without noise is a "
    "point mass at the nearest level",
    tolerance=1e-10,
)
def test_limits_of_the_evidence():
    circuit = make(hclt([-1, 0, 1, 1]))
    log_p, _, known, value = inputs(circuit)
    levels = torch.tensor([-1.0, 0.1, 1.0], dtype=F64)
    x_t = torch.tensor([[0.0, 0.5, -0.4, 0.7], [2.0, -3.0, 0.6, -0.46]], dtype=F64)
    nearest = torch.tensor([[1, 1, 1, 2], [2, 0, 2, 0]])
    flat = torch.randn(2, 4, 1, dtype=F64).expand(2, 4, 3)
    everything = law(circuit)
    for row in range(2):
        expected = brute_force(*everything, torch.zeros(4, 3, dtype=F64), known[row], value[row])
        for evidence in (
            flat,
            soft_evidence_from_gaussian(x_t, 0.0, levels),
            soft_evidence_from_gaussian(x_t, 1e-24, levels),
        ):
            found = steered_posterior(circuit, log_p, evidence, known, value, mix=0.0).exp()
            assert (found[row] - expected).abs().max() < 1e-10
    assert torch.equal(
        soft_evidence_from_gaussian(x_t, 0.0, levels), torch.zeros(2, 4, 3, dtype=F64)
    )
    certain = soft_evidence_from_gaussian(x_t, 1.0, levels)
    assert torch.equal(certain.exp(), torch.nn.functional.one_hot(nearest, 3).double())
    for share in (1.0, 1 - 1e-9):
        evidence = soft_evidence_from_gaussian(x_t, share, levels)
        found = steered_posterior(circuit, log_p, evidence, known, value, mix=0.0).exp()
        point = torch.nn.functional.one_hot(torch.where(known, value, nearest), 3).double()
        assert (found - point).abs().max() < 1e-10


@pytest.mark.claim(
    64,
    "With independent pixels, the circuit their law and an exact denoiser, steering changes "
    "nothing at any mix",
    tolerance=1e-8,
)
def test_nothing_to_steer_where_pixels_are_independent():
    circuit = make(factorised(5), units=1)
    marginals = circuit.posterior_marginals()
    levels = torch.linspace(-1, 1, 3, dtype=F64)
    _, _, known, value = inputs(circuit)
    for share in (0.01, 0.3, 0.9):
        log_w = soft_evidence_from_gaussian(torch.randn(2, 5, dtype=F64), share, levels)
        denoised = (marginals.log() + log_w).log_softmax(-1)
        for mix in MIXES:
            found = steered_posterior(circuit, denoised, log_w, known, value, mix=mix)
            assert (found - denoised).exp().sub(1)[~known].abs().max() < 1e-8


@pytest.mark.claim(
    64, "No NaN with evidence of -inf on all values but one, and with a denoiser in bfloat16"
)
def test_extreme_evidence_and_low_precision():
    circuit = make(hclt([-1, 0, 1, 1]), dtype=torch.float32)
    log_p, log_w, known, value = (
        t.float() if t.is_floating_point() else t for t in inputs(circuit)
    )
    only = torch.randint(0, 3, (2, 4))
    hard = torch.zeros(2, 4, 3).masked_fill(torch.arange(3) != only[..., None], -torch.inf)
    point = torch.nn.functional.one_hot(torch.where(known, value, only), 3).float()
    for mix in MIXES:
        for dtype in (torch.float32, torch.bfloat16):
            found = steered_posterior(circuit, log_p.to(dtype), hard, known, value, mix=mix).exp()
            assert found.dtype == torch.float32
            assert found.isfinite().all()
            if mix < 1:
                assert torch.equal(found, point)
    excluded = log_p.masked_fill(point.bool(), -torch.inf)  # the two rule each other out
    found = steered_posterior(circuit, excluded, hard, known, value, mix=0.5).exp()
    assert torch.equal(found, point)
    low = steered_posterior(circuit, log_p.bfloat16(), log_w, known, value, mix=0.5).exp()
    full = steered_posterior(circuit, log_p, log_w, known, value, mix=0.5).exp()
    assert (low - full).abs().max() < 0.02


@pytest.mark.slow
def test_compiled():
    circuit = make(hclt([-1, 0, 1]))
    log_p, log_w, known, value = inputs(circuit)

    def call(log_p, log_w):
        return steered_posterior(circuit, log_p, log_w, known, value, mix=0.3)

    found = torch.compile(call, backend="aot_eager")(log_p, log_w)
    assert (found.exp() - call(log_p, log_w).exp()).abs().max() < 1e-12


def tree_of(size, units, categories=3):
    parents = [-1, *((i - 1) // 2 for i in range(1, size))]
    return make(hclt(parents), categories, units=units, dtype=torch.float32)


def steer_once(circuit, batch):
    shape = (batch, circuit.num_variables)
    x = torch.zeros(shape)
    mask = torch.arange(shape[1]).expand(shape) < shape[1] // 2
    steering = TractableSteering(circuit)
    return lambda: steering.steer(x, torch.ones(shape), x, 95, 100, x_known=x, mask=mask)


@pytest.mark.claim(
    64, "A call takes one pass up and one pass down, and work linear in the number of variables"
)
def test_one_pass_up_and_one_down(monkeypatch):
    calls = []
    for owner, name in ((Circuit, "propagate"), (torch.autograd, "grad")):
        plain = getattr(owner, name)

        def counted(*args, plain=plain, name=name, **kwargs):
            calls.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    numbers = []
    for size in (32, 128, 256):
        calls.clear()
        with CountElements() as work:
            steer_once(tree_of(size, 4), 2)()
        assert calls == ["propagate", "grad"]
        numbers.append(work.elements)
    assert 1.6 < numbers[2] / numbers[1] < 2.2


@pytest.mark.claim(
    64,
    "At mix 0.5 the mixture is the normalised geometric mean of the factors, not the arithmetic "
    "one",
    tolerance=1e-10,
)
def test_geometric_mean_by_hand():
    table = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=F64)
    circuit = from_table(table)
    likelihood = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=F64)
    denoised = torch.tensor([[0.9, 0.1], [0.35, 0.65]], dtype=F64)
    unknown, value = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    # weights of the states 00, 01, 10, 11: .4*.5*1, .1*.5*3, .2*2*1, .3*2*3
    weights = torch.tensor([[0.2, 0.15], [0.4, 1.8]], dtype=F64)
    exact = torch.stack([weights.sum(1), weights.sum(0)]) / 2.55
    mean = (exact * denoised).sqrt()
    expected = mean / mean.sum(-1, keepdim=True)
    args = (circuit, denoised.log(), likelihood.log(), unknown, value)
    found = steered_posterior(*args, mix=0.5).exp()
    assert (found - expected).abs().max() < 1e-10
    assert (found - (exact + denoised) / 2).abs().max() > 0.01
    skewed = denoised**0.8 * exact**0.2
    found = steered_posterior(*args, mix=0.8).exp()
    assert (found - skewed / skewed.sum(-1, keepdim=True)).abs().max() < 1e-10


@pytest.mark.claim(
    64,
    "Where two variables are always equal and one is known, the other is known at any x_t, and "
    "stays so in the mixture",
    tolerance=1e-12,
)
def test_evidence_reaches_unknown_pixels():
    circuit = from_table(torch.eye(3, dtype=F64) / 3)
    known, value = torch.tensor([True, False]), torch.tensor([2, 0])
    levels = torch.linspace(-1, 1, 3, dtype=F64)
    point = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    for x in (-3.0, 0.0, 2.0):
        log_w = soft_evidence_from_gaussian(torch.tensor([x, x], dtype=F64), 0.4, levels)
        for mix in (0.0, 0.5, 0.99):
            found = steered_posterior(circuit, log_w, log_w, known, value, mix=mix).exp()
            assert (found[1] - point).abs().max() < 1e-12


@pytest.mark.claim(
    64, "x_t at one unknown pixel moves the circuit's posterior of another as Bayes' rule says"
)
def test_soft_evidence_is_used_jointly():
    table = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=F64)
    circuit = from_table(table)
    levels = torch.tensor([-1.0, 1.0], dtype=F64)
    unknown, value = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    found = []
    for x in (-1.0, 1.0):
        x_t = torch.tensor([0.3, x], dtype=F64)
        log_w = soft_evidence_from_gaussian(x_t, 0.5, levels)
        posterior = steered_posterior(circuit, log_w, log_w, unknown, value, mix=0.0).exp()
        joint = table * log_w[0].exp()[:, None] * log_w[1].exp()
        assert (posterior[0] - joint.sum(1) / joint.sum()).abs().max() < 1e-12
        found.append(posterior[0, 1].item())
    assert found[1] - found[0] > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_p_dm": torch.zeros(2, 4, 2)}, "log_p_dm: got shape"),
        ({"log_p_dm": torch.zeros(2, 3, 3)}, "log_p_dm: got shape"),
        ({"log_w": torch.zeros(2, 4, 2)}, "log_w: got shape"),
        ({"known": torch.zeros(2, 3, dtype=torch.bool)}, "known: got shape"),
        ({"known": torch.zeros(2, 4)}, "known: got dtype"),
        ({"value": torch.zeros(4, dtype=torch.long)}, "value: got shape"),
        ({"mix": 1.1}, "mix: got 1.1"),
        ({"mix": torch.tensor([0.5, -0.1]).view(2, 1, 1)}, "mix: got"),
    ],
)
def test_errors_of_steered_posterior(change, message):
    circuit = make(hclt([-1, 0, 1, 1]), dtype=torch.float32)
    given = {
        "log_p_dm": torch.zeros(2, 4, 3),
        "log_w": torch.zeros(2, 4, 3),
        "known": torch.zeros(2, 4, dtype=torch.bool),
        "value": torch.zeros(2, 4, dtype=torch.long),
        "mix": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        steered_posterior(circuit, **{**given, **change})


def test_continuous_leaves_are_refused():
    continuous = Circuit(hclt([-1, 0]), GaussianLeaf(), num_units=2)
    with pytest.raises(ValueError, match="circuit: got"):
        TractableSteering(continuous)
