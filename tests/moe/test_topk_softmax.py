"""The top-K sparse gate of a Gaussian mixture against SciPy: its density, routing and bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp, softmax
from scipy.stats import norm

from tests.moe.topk_mixtures import both_rules, random_data, random_params, topk_model
from torchzoo.moe import (
    GaussianMoE,
    MoEParams,
    TopKGate,
    minimum_top_k,
    minimum_top_k_bound,
    overfit_exponents,
    region_experts,
    topk_regions,
    voronoi_loss,
)
from torchzoo.testing import check_module

# The density


def scipy_log_prob(params, x, y, top_k, with_bias):
    """The density by its definition, one pair at a time."""
    p = [field.numpy() for field in params[:5]]
    values = []
    for point, response in zip(x.numpy(), y.numpy(), strict=True):
        scores = p[1] @ point
        order = np.argsort(-(scores + p[0] if with_bias else scores), kind="stable")
        chosen = np.sort(order[:top_k])
        logits = (scores + p[0])[chosen]
        parts = norm.logpdf(response, p[2][chosen] @ point + p[3][chosen], np.sqrt(p[4][chosen]))
        values.append(logsumexp(logits - logsumexp(logits) + parts))
    return np.array(values)


@pytest.mark.claim(
    146, "With K = k the density is that of the dense softmax mixture", tolerance=1e-12
)
@both_rules
def test_all_experts_give_the_dense_density(with_bias):
    params, (x, y) = random_params(4), random_data(200)
    with torch.no_grad():
        sparse = topk_model(params, 4, with_bias=with_bias).log_prob(x, y)
        dense = GaussianMoE.from_params(params, gate="softmax").log_prob(x, y)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    p = [field.numpy() for field in params[:5]]
    densities = norm.pdf(y.numpy()[:, None], x.numpy() @ p[2].T + p[3], np.sqrt(p[4]))
    exact = np.log((softmax(x.numpy() @ p[1].T + p[0], axis=-1) * densities).sum(-1))
    np.testing.assert_allclose(sparse.numpy(), exact, atol=1e-12)


@pytest.mark.claim(
    146,
    "With K = 1 the model is hard-routed linear regression: the density is the chosen expert's, "
    "and EM finds each region's least-squares line and mean square",
    tolerance=1e-9,
)
@both_rules
def test_one_expert_is_hard_routed_regression(with_bias):
    params, (x, y) = random_params(3, seed=7), random_data(200)
    model = topk_model(params, 1, with_bias=with_bias)
    scores = x @ params.beta1.T + (params.beta0 if with_bias else 0)
    chosen = scores.argmax(-1)
    assert len(chosen.unique()) == 3
    mean = (x * params.a[chosen]).sum(-1) + params.b[chosen]
    exact = norm.logpdf(y.numpy(), mean.numpy(), params.var[chosen].sqrt().numpy())
    with torch.no_grad():
        np.testing.assert_allclose(model.log_prob(x, y).numpy(), exact, atol=1e-12)
    torch.testing.assert_close(model.mean(x), mean)
    torch.testing.assert_close(model.variance(x), params.var[chosen], rtol=0, atol=1e-9)

    model.fit(x, y, method="em", max_iter=3)
    fitted = model.params()
    assert torch.equal(fitted.beta1, params.beta1)
    for i in range(3):
        design = np.c_[x[chosen == i].numpy(), np.ones(int((chosen == i).sum()))]
        line, squares, *_ = np.linalg.lstsq(design, y[chosen == i].numpy(), rcond=None)
        got = torch.cat([fitted.a[i], fitted.b[i : i + 1]]).detach().numpy()
        np.testing.assert_allclose(got, line, atol=1e-9)
        assert fitted.var[i].item() == pytest.approx(squares[0] / len(design), rel=1e-9)


@pytest.mark.claim(146, "The weights add up to 1, with exactly K that are not 0", tolerance=1e-12)
@both_rules
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_weights_are_a_distribution_over_k_experts(top_k, with_bias):
    model = topk_model(random_params(5), top_k, with_bias=with_bias)
    x, _ = random_data(300)
    weights = model.log_weights(x).exp()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(300, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert ((weights > 0).sum(-1) == top_k).all()


@pytest.mark.claim(146, "Ties of the scores go to the experts of lowest index", tolerance=0.0)
def test_ties_go_to_the_lowest_experts():
    params = random_params(4)._replace(beta1=torch.ones(4, 2, dtype=torch.float64))
    x, _ = random_data(20)
    assert torch.equal(topk_model(params, 2).selected(x)[0], torch.tensor([1, 1, 0, 0]).bool())
    assert (topk_model(params, 2).log_weights(x)[:, 2:] == -math.inf).all()
    assert (topk_regions(x, params.beta1, 2) == 0).all()
    largest = set(params.beta0.topk(2).indices.tolist())
    selected = topk_model(params, 2, with_bias=True).selected(x)[0]
    assert set(selected.nonzero().flatten().tolist()) == largest != {0, 1}


@pytest.mark.claim(
    146,
    "The biases enter the weights after the choice of experts, and before it only on request",
    tolerance=1e-12,
)
def test_where_the_bias_enters():
    params, (x, _) = random_params(4), random_data(300)
    scores = x @ params.beta1.T
    for with_bias, chosen_by in ((False, scores), (True, scores + params.beta0)):
        top = chosen_by.topk(2).indices
        weights = (scores + params.beta0).gather(-1, top).softmax(-1)
        exact = torch.zeros_like(scores).scatter(-1, top, weights)
        got = topk_model(params, 2, with_bias=with_bias).log_weights(x).exp()
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    different = topk_model(params, 2).selected(x) != topk_model(params, 2, with_bias=True).selected(
        x
    )
    assert different.any(-1).float().mean() > 0.2


@pytest.mark.claim(
    146,
    "log_prob equals the sum over the selected experts with scipy's logsumexp",
    tolerance=1e-10,
)
@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 5),
    d=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_log_prob_is_brute_force_over_the_selected_experts(k, d, seed, with_bias, data):
    top_k = data.draw(st.integers(1, k))
    params, (x, y) = random_params(k, d, seed), random_data(30, d, seed + 1)
    model = topk_model(params, top_k, with_bias=with_bias)
    exact = scipy_log_prob(params, x, y, top_k, with_bias)
    with torch.no_grad():
        np.testing.assert_allclose(model.log_prob(x, y).numpy(), exact, atol=1e-10)
        np.testing.assert_allclose(model(x).log_prob(y).numpy(), exact, atol=1e-10)


@pytest.mark.claim(146, "The conditional density integrates to 1 over y", tolerance=1e-6)
@both_rules
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_density_integrates_to_one(top_k, with_bias):
    model = topk_model(random_params(3), top_k, with_bias=with_bias)
    for point in torch.tensor([[0.3, -1.0], [-1.2, 0.5]], dtype=torch.float64):

        def density(y, point=point):
            with torch.no_grad():
                return model.log_prob(point, torch.tensor(y, dtype=torch.float64)).exp().item()

        means = model.expert_means(point).tolist()
        assert quad(density, -30, 30, points=means, limit=200)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.claim(
    146,
    "Log-weights of -inf give finite first and second derivatives, however far the scores are "
    "apart",
    tolerance=None,
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_are_finite(scale):
    params, (x, y) = random_params(4), random_data(20)
    params = params._replace(beta1=scale * params.beta1, beta0=-scale * params.beta0)
    model = topk_model(params, 2)
    inputs = x.requires_grad_()
    loss = -model.log_prob(inputs, y).sum()
    wanted = [inputs, *model.parameters()]
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert all(p.isfinite().all() for p in (model.mean(x), model.variance(x)))


@pytest.mark.claim(
    146,
    "Experts that are not selected get a gradient of exactly 0 from that pair",
    tolerance=0.0,
)
@both_rules
def test_unselected_experts_get_no_gradient(with_bias):
    model = topk_model(random_params(5), 2, with_bias=with_bias)
    x, y = random_data(40)
    selected = model.selected(x)
    for t in range(40):
        model.zero_grad()
        model.log_prob(x[t], y[t]).backward()
        for p in (model.a, model.b, model.log_var, model.gate.weight, model.gate.bias):
            rows = p.grad.reshape(5, -1)
            assert (rows[~selected[t]] == 0).all()
            assert (rows[selected[t]] != 0).all()


@pytest.mark.claim(
    146, "Away from boundaries the gradients are central differences", tolerance=1e-6
)
def test_gradients_are_finite_differences():
    model = topk_model(random_params(4), 2)
    x, y = random_data(60)
    scores = (x @ model.gate.weight.T).sort(-1, descending=True).values
    inside = (scores[:, 1] - scores[:, 2]) > 1e-2  # farther from a boundary than the steps go
    x, y = x[inside], y[inside]
    assert len(x) > 40
    loss = model.log_prob(x, y).mean()
    loss.backward()
    for p in model.parameters():
        for index in np.ndindex(*p.shape):
            kept, step, sides = p[index].item(), 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    p[index] = kept + sign * step
                    sides.append(model.log_prob(x, y).mean().item())
            with torch.no_grad():
                p[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert p.grad[index].item() == pytest.approx(slope, abs=1e-6)


# The router


@pytest.mark.claim(
    146,
    "A renormalising TopKGate routes as softmax, then top-k, then division by the sum",
    tolerance=1e-7,
)
def test_routing_is_softmax_topk_normalise():
    gate = TopKGate(6, 5, 2, renormalize=True)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    routing = gate(x)
    probs = (x.double() @ gate.weight.double().T + gate.bias.double()).softmax(-1)
    best = probs.topk(2)
    assert torch.equal(routing.experts, best.indices)
    exact = best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), exact, rtol=0, atol=1e-7)


def test_the_density_weighs_as_the_gate_routes():
    model = topk_model(random_params(5), 2)
    x, _ = random_data(50)
    routing = model.gate(x)
    weights = model.log_weights(x).exp()
    torch.testing.assert_close(weights.gather(-1, routing.experts), routing.weights)
    raw = TopKGate(2, 5, 2, renormalize=False, dtype=torch.float64)
    total = GaussianMoE(2, 5, gate=raw, dtype=torch.float64).log_weights(x).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_sample_never_takes_an_unselected_expert(monkeypatch):
    params = random_params(3)._replace(b=torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64))
    model, (x, _) = topk_model(params, 1), random_data(500)
    regions = model.selected(x).int().argmax(-1)
    for extreme in (0.0, 1 - 2**-53):
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda t, extreme=extreme, **_: t.fill_(extreme)
        )
        y = model.sample(x, generator=torch.Generator().manual_seed(0))
        assert torch.equal((y / 1e6).round().long() + 1, regions)


def test_the_topk_model_keeps_the_contract():
    check_module(
        lambda **kw: GaussianMoE(3, 4, gate="topk", **{"top_k": 2, **kw}),
        (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),),
        bad_options={"top_k": 5},
    )


# Bad input


P = random_params(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMoE(2, 3, gate="topk", top_k=5), "top_k: .*from 1 to 3, got 5"),
        (lambda: GaussianMoE(2, 3, select_with_bias=True), "select_with_bias: expected False"),
        (
            lambda: GaussianMoE(
                2, 3, gate=TopKGate(2, 3, 1, select_with_bias=False), select_with_bias=True
            ),
            "select_with_bias: expected False",
        ),
        (lambda: topk_model(P._replace(var=-P.var), 2), "params.var: expected values above 0"),
        (lambda: topk_model(P, 2).log_prob(torch.zeros(4, 3), torch.zeros(4)), r"x: expected .*2"),
        (lambda: topk_model(P, 2).log_prob(torch.zeros(4, 2), torch.zeros(3)), r"y: expected"),
        (
            lambda: topk_model(P, 2).fit(torch.zeros(4, 2), torch.zeros(4), restarts=0),
            "restarts: expected an integer at least 1",
        ),
        (
            lambda: topk_model(P, 2).fit(torch.zeros(2, 2), torch.zeros(2), restarts=2),
            "num_experts: expected at most 2",
        ),
        (lambda: topk_regions(torch.zeros(4, 3), P.beta1, 2), r"x: expected \(\.\.\., 2\)"),
        (lambda: topk_regions(torch.zeros(4, 2), P.beta0, 2), r"beta1: expected \(E, d\)"),
        (lambda: topk_regions(torch.zeros(4, 2), P.beta1, 4), "k: .*from 1 to 3, got 4"),
        (
            lambda: topk_regions(torch.zeros(4, 2), P.beta1, 2, beta0=torch.zeros(2)),
            r"beta0: expected \(3,\), got \(2,\)",
        ),
        (lambda: region_experts(torch.tensor([3]), 3, 2), r"regions: expected 0\.\.2, got 3"),
        (lambda: region_experts(torch.tensor([-1]), 3, 2), r"regions: expected 0\.\.2, got -1"),
        (lambda: region_experts(torch.tensor([0]), 0, 1), "num_experts: expected"),
        (lambda: minimum_top_k(P, P, 4), "top_k: .*from 1 to 3, got 4"),
        (
            lambda: minimum_top_k(MoEParams(*(p[None] for p in P[:5])), P, 1),
            r"fitted.beta1: expected \(k, d\) without batch dimensions",
        ),
        (lambda: minimum_top_k(random_params(3, 3), P, 1), "params.beta1: expected 2 features"),
        (lambda: minimum_top_k_bound(2, 3, 1), "num_fitted: expected an integer at least 3"),
        (lambda: minimum_top_k_bound(3, 3, 4), "top_k: expected an integer from 1 to 3"),
        (lambda: minimum_top_k_bound(3, 0, 1), "num_true: expected an integer at least 1"),
        (lambda: overfit_exponents(1), "num_atoms: expected an integer at least 2"),
        (lambda: voronoi_loss(P, P, lambda size: (1.0, size)), "order: expected a number above 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
