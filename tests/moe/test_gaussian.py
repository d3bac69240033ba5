"""The density of the Gaussian mixture of experts against SciPy, quadrature and exact identities."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp, softmax
from scipy.stats import kstest, norm
from torch.func import functional_call, grad, hessian

from torchzoo.moe import (
    ActivationDenseToSparseGate,
    DenseToSparseGate,
    GaussianMoE,
    MoEParams,
    NoisyTopKGate,
    SoftmaxGate,
)

SCORES = {
    "softmax": lambda z: z,
    "dense_to_sparse": lambda z: z,
    "activation": lambda z: 1 / (1 + np.exp(-z)),
}


def random_params(k, d, seed=0, *, temperature=0.7):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    return MoEParams(
        beta0=torch.randn(k, **draw),
        beta1=torch.randn(k, d, **draw),
        a=torch.randn(k, d, **draw),
        b=torch.randn(k, **draw),
        var=torch.rand(k, **draw) + 0.2,
        temperature=None if temperature is None else torch.tensor(temperature, dtype=torch.float64),
    )


def random_data(n, d, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, torch.randn(n, generator=g, dtype=torch.float64)


def make(kind, k=3, d=2, seed=0):
    temperature = None if kind in ("softmax", "topk") else 0.7
    params = random_params(k, d, seed, temperature=temperature)
    return GaussianMoE.from_params(params, gate=kind), params


def scipy_log_prob(kind, params, x, y):
    p = [value if value is None else value.numpy() for value in params]
    scores = SCORES[kind](x.numpy() @ p[1].T) + p[0]
    weights = softmax(scores / (1.0 if p[5] is None else p[5]), axis=-1)
    densities = norm.pdf(y.numpy()[:, None], x.numpy() @ p[2].T + p[3], np.sqrt(p[4]))
    return np.log((weights * densities).sum(-1))


# u = exp((beta1^T x + beta0) / tau) N(y | a^T x + b, var), read off a model of two experts whose
# second gate is 0: the joint density of the first, divided by the gate's weight of the second.
def atom(theta, model, x, y):
    zero = torch.zeros(1, dtype=torch.float64)
    values = {
        "gate.weight": torch.stack([theta["beta1"], torch.zeros_like(theta["beta1"])]),
        "gate.bias": torch.cat([theta["beta0"].reshape(1), zero]),
        "gate.log_tau": theta["tau"].log(),
        "a": torch.stack([theta["a"], theta["a"]]),
        "b": theta["b"].repeat(2),
        "log_var": theta["var"].log().repeat(2),
    }
    names = ("log_joint", "log_weights")
    joint, weights = (
        functional_call(Calls(model, name), prefixed(values), (x, y)) for name in names
    )
    return (joint[0] - weights[1]).exp()


def prefixed(values):
    return {f"model.{name}": value for name, value in values.items()}


class Calls(torch.nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x, y):
        return self.model.log_joint(x, y) if self.name == "log_joint" else self.model.log_weights(x)


def random_atom(seed):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    theta = {
        "beta1": torch.randn(3, **draw),
        "beta0": torch.zeros((), dtype=torch.float64),
        "tau": torch.rand((), **draw) + 0.5,
        "a": torch.randn(3, **draw),
        "b": torch.randn((), **draw),
        "var": torch.rand((), **draw) + 0.5,
    }
    return theta, torch.randn(3, **draw), torch.randn((), **draw)


@pytest.mark.claim(
    69,
    "u = exp(beta1 x / tau) N(y | a x + b, var) satisfies du/dtau = -(1/tau) beta1 du/dbeta1, "
    "d2u/dbeta1 db = (1/tau) du/da and du/dvar = (1/2) d2u/db2",
    tolerance=1e-8,
)
@pytest.mark.parametrize("seed", range(5))
def test_pde_identities_behind_the_slow_rates(seed):
    theta, x, y = random_atom(seed)
    model = GaussianMoE(3, 2, gate="dense_to_sparse", dtype=torch.float64)
    u = lambda t: atom(t, model, x, y)  # noqa: E731
    first, second = grad(u)(theta), hessian(u)(theta)
    pairs = (
        (first["tau"], -(theta["beta1"] @ first["beta1"]) / theta["tau"]),
        (second["beta1"]["b"], first["a"] / theta["tau"]),
        (first["var"], second["b"]["b"] / 2),
    )
    for left, right in pairs:
        assert left.norm() > 1e-6
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_atom_is_the_exponential_times_the_normal_density():
    theta, x, y = random_atom(0)
    theta["beta0"] = torch.tensor(0.4, dtype=torch.float64)
    model = GaussianMoE(3, 2, gate="dense_to_sparse", dtype=torch.float64)
    t = {name: value.numpy() for name, value in theta.items()}
    weight = np.exp((t["beta1"] @ x.numpy() + t["beta0"]) / t["tau"])
    exact = weight * norm.pdf(y, t["a"] @ x.numpy() + t["b"], np.sqrt(t["var"]))
    assert atom(theta, model, x, y).item() == pytest.approx(exact, rel=1e-12)


def scaled(params, c):
    return params._replace(
        beta0=c * params.beta0, beta1=c * params.beta1, temperature=c * params.temperature
    )


@pytest.mark.claim(
    69,
    "Multiplying (beta1, beta0, tau) by 0.1 or 10 leaves the log-density of the linear and the "
    "ReLU gate unchanged and changes that of the sigmoid gate by more than 1e-3",
    tolerance=1e-10,
)
@pytest.mark.parametrize("c", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["linear", "relu", "sigmoid"])
def test_scale_invariance(kind, c):
    if kind == "linear":
        gate = DenseToSparseGate(2, 3, temperature="learned", noise=None, bias=True)
    elif kind == "relu":
        with pytest.warns(UserWarning, match="homogeneous"):
            gate = ActivationDenseToSparseGate(2, 3, activation="relu", learn_temperature=True)
    else:
        gate = ActivationDenseToSparseGate(2, 3, activation="sigmoid", learn_temperature=True)
    params, (x, y) = random_params(3, 2), random_data(200, 2)
    with torch.no_grad():
        before = GaussianMoE.from_params(params, gate=gate.double()).log_prob(x, y)
        after = GaussianMoE.from_params(scaled(params, c), gate=gate).log_prob(x, y)
    difference = (before - after).abs().max().item()
    assert difference > 1e-3 if kind == "sigmoid" else difference < 1e-10


@pytest.mark.claim(69, "log_prob equals the mixture sum with scipy.stats.norm", tolerance=1e-10)
@pytest.mark.parametrize("kind", SCORES)
def test_log_prob_is_scipys_mixture(kind):
    model, params = make(kind)
    x, y = random_data(100, 2)
    exact = scipy_log_prob(kind, params, x, y)
    with torch.no_grad():
        np.testing.assert_allclose(model.log_prob(x, y).numpy(), exact, atol=1e-10)
        np.testing.assert_allclose(model(x).log_prob(y).numpy(), exact, atol=1e-10)


@pytest.mark.claim(69, "The conditional density integrates to 1 over y", tolerance=1e-6)
@pytest.mark.parametrize("kind", [*SCORES, "topk"])
def test_density_integrates_to_one(kind):
    if kind == "topk":
        params = random_params(3, 2, temperature=None)
        model = GaussianMoE.from_params(params, gate="topk", top_k=2)
    else:
        model, _ = make(kind)
    for point in torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64):

        def density(y, point=point):
            with torch.no_grad():
                return model.log_prob(point, torch.tensor(y, dtype=torch.float64)).exp().item()

        assert quad(density, -30, 30, points=[-3, 0, 3], limit=200)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.claim(
    69,
    "With tau = 1 the dense gate is the standard softmax-gated mixture, which is also the top-K "
    "gate with K = E",
    tolerance=1e-12,
)
def test_tau_one_is_the_softmax_gated_mixture():
    params, (x, y) = random_params(4, 2, temperature=None), random_data(200, 2)
    linear = DenseToSparseGate(2, 4, temperature=1.0, noise=None, bias=True).double()
    with torch.no_grad():
        models = [
            GaussianMoE.from_params(params, gate=linear),
            GaussianMoE.from_params(params, gate="softmax"),
            GaussianMoE.from_params(params, gate="topk", top_k=4),
        ]
        dense, softmax_gated, top_all = (model.log_prob(x, y) for model in models)
    torch.testing.assert_close(dense, softmax_gated, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense, top_all, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dense, scipy_log_prob("softmax", params, x, y), atol=1e-12)


def test_top_k_density_is_brute_force_over_the_selected_experts():
    params, (x, y) = random_params(4, 2, temperature=None), random_data(50, 2)
    model = GaussianMoE.from_params(params, gate="topk", top_k=2)
    p = [value.numpy() for value in params[:5]]
    exact = []
    for point, response in zip(x.numpy(), y.numpy(), strict=True):
        scores = p[1] @ point
        chosen = np.argsort(-scores)[:2]  # by the scores without bias
        logits = scores[chosen] + p[0][chosen]
        parts = norm.logpdf(response, p[2][chosen] @ point + p[3][chosen], np.sqrt(p[4][chosen]))
        exact.append(logsumexp(logits - logsumexp(logits) + parts))
    log_prob = model.log_prob(x, y)
    np.testing.assert_allclose(log_prob.detach().numpy(), exact, atol=1e-12)
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_tiny_temperature_leaves_the_gradient_finite():
    params = random_params(3, 2)._replace(temperature=torch.tensor(1e-4, dtype=torch.float64))
    model = GaussianMoE.from_params(params, gate="dense_to_sparse")
    x, y = random_data(20, 2)
    model.log_prob(x, y).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [*SCORES, "topk"])
def test_gradients_are_finite_differences(kind):
    if kind == "topk":
        model = GaussianMoE(2, 3, gate="topk", top_k=2, dtype=torch.float64)
    else:
        model, _ = make(kind)
    x, y = random_data(4, 2)
    names = [name for name, _ in model.named_parameters()]
    call = Calls(model, "log_joint")

    def log_prob(*values):
        values = prefixed(dict(zip(names, values, strict=True)))
        return functional_call(call, values, (x, y)).logsumexp(-1)

    assert torch.autograd.gradcheck(log_prob, tuple(model.parameters()))


@pytest.mark.parametrize("kind", SCORES)
def test_responsibilities_are_bayes_rule(kind):
    model, _ = make(kind)
    x, y = random_data(50, 2)
    with torch.no_grad():
        joint = model.log_joint(x, y).exp()
        r = model.responsibilities(x, y)
    torch.testing.assert_close(r, joint / joint.sum(-1, keepdim=True))
    torch.testing.assert_close(r.sum(-1), torch.ones(50, dtype=torch.float64))


def test_sample_follows_the_density():
    model, params = make("activation")
    point = torch.tensor([0.4, -0.8], dtype=torch.float64)
    draws = model.sample(point.expand(4000, 2), generator=torch.Generator().manual_seed(3))
    scores = SCORES["activation"]((params.beta1 @ point).numpy())
    weights = softmax((scores + params.beta0.numpy()) / 0.7)
    means, stds = (params.a @ point + params.b).numpy(), params.var.sqrt().numpy()
    distribution = lambda y: norm.cdf(y[:, None], means, stds) @ weights  # noqa: E731
    assert kstest(draws.numpy(), distribution).pvalue > 0.01
    again = model.sample(point.expand(4000, 2), generator=torch.Generator().manual_seed(3))
    assert torch.equal(draws, again)


def test_moments_of_the_distribution():
    model, _ = make("dense_to_sparse")
    x = torch.tensor([[0.4, -0.8]], dtype=torch.float64)
    with torch.no_grad():
        weights, means = model.log_weights(x).exp(), model.expert_means(x)
        mean = (weights * means).sum(-1)
        second = (weights * (means.square() + model.params().var)).sum(-1)
        torch.testing.assert_close(model(x).mean, mean)
        torch.testing.assert_close(model(x).variance, second - mean.square())


@settings(max_examples=20, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    kind=st.sampled_from(sorted(SCORES)),
    k=st.integers(1, 4),
)
def test_any_batch_dimensions(batch, kind, k):
    model, _ = make(kind, k=k)
    n = math.prod(batch)
    x, y = random_data(n, 2)
    with torch.no_grad():
        flat = model.log_prob(x, y)
        shaped = model.log_prob(x.reshape(*batch, 2), y.reshape(batch))
        assert torch.equal(shaped.flatten(), flat)
        assert model.sample(x.reshape(*batch, 2)).shape == tuple(batch)
        assert model(x.reshape(*batch, 2)).mean.shape == tuple(batch)


@pytest.mark.parametrize("kind", SCORES)
def test_params_round_trip(kind):
    model, params = make(kind)
    for got, wanted in zip(model.params(), params, strict=True):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", SCORES)
def test_anchoring_keeps_the_density(kind):
    model, params = make(kind)
    anchored = params.anchored(linear=kind != "activation")
    assert anchored.beta0[-1] == 0
    assert (anchored.beta1[-1] == 0).all() == (kind != "activation")
    x, y = random_data(50, 2)
    again = GaussianMoE.from_params(anchored, gate=kind)
    torch.testing.assert_close(again.log_prob(x, y), model.log_prob(x, y), rtol=0, atol=1e-12)


def test_a_gate_object_is_used_as_it_is():
    gate = SoftmaxGate(2, 3, bias=False, dtype=torch.float64)
    weight = gate.weight.detach().clone()
    model = GaussianMoE(2, 3, gate=gate, dtype=torch.float64)
    assert model.gate is gate
    assert torch.equal(gate.weight, weight)
    assert torch.equal(model.params().beta0, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", SCORES)
def test_compiles_to_one_graph(kind):
    model, _ = make(kind)
    x, y = random_data(5, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).log_prob(y), model.log_prob(x, y))


def test_copies_and_state():
    model, _ = make("activation")
    x, y = random_data(5, 2)
    assert "gate.log_tau" in model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.log_prob(x, y), model.log_prob(x, y))


def test_bfloat16_autocast_leaves_the_density_in_float32():
    model = GaussianMoE(3, 4, gate="activation")
    x, y = torch.randn(10, 3), torch.randn(10)
    exact = model.log_prob(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.log_prob(x, y), exact)


P = random_params(3, 2)
BAD = [
    (lambda: GaussianMoE(2, 0), r"num_experts: expected an integer at least 1, got 0"),
    (lambda: GaussianMoE(0, 2), r"dim: expected an integer at least 1, got 0"),
    (lambda: GaussianMoE(2, 2, gate="hard"), r"gate: expected 'softmax'.*got 'hard'"),
    (lambda: GaussianMoE(2, 2, gate=3), r"gate: expected a name or a Gate, got int"),
    (lambda: GaussianMoE(2, 2, gate=SoftmaxGate(3, 2)), r"gate: expected one of dim 2"),
    (lambda: GaussianMoE(2, 4, gate=NoisyTopKGate(2, 4, 2)), r"gate: expected one without noise"),
    (lambda: GaussianMoE(2, 4, gate=DenseToSparseGate(2, 4)), r"gate: expected one without noise"),
    (lambda: GaussianMoE(2, 2, top_k=1), r"top_k: expected None with this gate, got 1"),
    (lambda: GaussianMoE(2, 3, gate="topk", top_k=5), r"top_k: .*got 5"),
    (lambda: GaussianMoE(2, 3, gate="topk"), r"top_k: expected 1..3 .* got None"),
    (lambda: GaussianMoE(3, 2)(torch.zeros(10, 4)), r"x: expected \(\.\.\., 3\), got \(10, 4\)"),
    (
        lambda: GaussianMoE(3, 2).log_prob(torch.zeros(10, 3), torch.zeros(9)),
        r"y: expected \(10,\) as x is \(10, 3\), got \(9,\)",
    ),
    (lambda: GaussianMoE(3, 2).fit(torch.zeros(0, 3), torch.zeros(0)), r"y: expected at least one"),
    (
        lambda: GaussianMoE(3, 2).fit(torch.zeros(4, 3), torch.zeros(4), method="sgd"),
        r"method: expected 'lbfgs' or 'em', got 'sgd'",
    ),
    (lambda: GaussianMoE.from_params(P), r"params.temperature: expected None"),
    (
        lambda: GaussianMoE.from_params(P._replace(var=-P.var), gate="dense_to_sparse"),
        r"params.var: expected values above 0",
    ),
    (
        lambda: GaussianMoE.from_params(
            P._replace(temperature=-P.temperature), gate="dense_to_sparse"
        ),
        r"params.temperature: expected above 0",
    ),
    (
        lambda: GaussianMoE.from_params(P._replace(b=P.b[:2]), gate="dense_to_sparse"),
        r"params.b: expected \(3,\) as beta1 is \(3, 2\), got \(2,\)",
    ),
    (
        lambda: GaussianMoE.from_params(P._replace(temperature=None), gate=SoftmaxGate(2, 3)),
        r"params.beta0: expected zeros, the gate has no bias",
    ),
    (
        lambda: GaussianMoE.from_params(MoEParams(*(p[None] for p in P))),
        r"params.beta1: expected \(k, d\) without batch dimensions, got \(1, 3, 2\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
