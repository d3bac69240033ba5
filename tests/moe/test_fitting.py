"""Maximum likelihood: monotone steps, exact M steps, and recovery of a known mixture."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from torchzoo.moe import GaussianMoE, MoEParams, fit_em, fit_mle, voronoi_loss
from torchzoo.moe.em import update_gate, weighted_lines

KINDS = ("softmax", "dense_to_sparse", "activation", "topk")


def known(kind="softmax"):
    temperature = None if kind == "softmax" else torch.tensor(0.5)
    params = MoEParams(
        beta0=torch.tensor([0.5, -0.3, 0.0]),
        beta1=torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]),
        a=torch.tensor([[-4.0, 1.0], [3.0, 0.0], [1.0, 3.0]]),
        b=torch.tensor([1.0, -1.0, 4.0]),
        var=torch.tensor([0.1, 0.15, 0.12]),
        temperature=temperature,
    )
    return MoEParams(*(None if p is None else p.double() for p in params))


def known_data(n, kind="softmax", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 2
    return x, GaussianMoE.from_params(known(kind), gate=kind).sample(x, generator=g)


def started(kind, seed=0):
    torch.manual_seed(seed)
    top_k = 2 if kind == "topk" else None
    return GaussianMoE(2, 3, gate=kind, top_k=top_k, dtype=torch.float64)


@pytest.mark.claim(
    69, "EM never decreases the log-likelihood from one iteration to the next", tolerance=1e-9
)
@pytest.mark.parametrize("kind", KINDS)
def test_em_is_monotone(kind):
    x, y = known_data(150)
    for seed in range(2):
        model = started(kind, seed)
        trace = fit_em(model, x, y, max_iter=15, tol=0.0)
        assert trace.diff().min() >= -1e-9
        assert trace[-1] - trace[0] > 0.1
        assert trace[-1].item() == pytest.approx(model.log_prob(x, y).mean().item(), abs=1e-12)


@pytest.mark.claim(69, "fit never decreases the log-likelihood", tolerance=0.0)
@pytest.mark.parametrize("method", ["lbfgs", "em"])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_never_decreases_the_likelihood(kind, method):
    x, y = known_data(200)
    model = started(kind)
    values = [model.log_prob(x, y).mean().item()]
    for _ in range(4):
        values.append(model.fit(x, y, method=method, max_iter=3).log_prob(x, y).mean().item())
    assert min(np.diff(values)) >= 0
    assert values[-1] > values[0]


@pytest.mark.claim(69, "EM and L-BFGS reach the same stationary likelihood", tolerance=1e-6)
def test_lbfgs_and_em_meet_at_a_stationary_point():
    x, y = known_data(300)
    start = fit_mle(x, y, 3, restarts=1, max_iter=20).params()
    found = []
    for method in ("lbfgs", "em"):
        model = GaussianMoE.from_params(start)
        model.fit(x, y, method=method, max_iter=300, tol=1e-11)
        loss = -model.log_prob(x, y).mean()
        found.append(loss.item())
        loss.backward()
        assert max(p.grad.abs().max() for p in model.parameters()) < 1e-4
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_fit_reaches_scipys_maximum():
    x, y = known_data(100)
    model = fit_mle(x, y, 3, gate="softmax", restarts=1, max_iter=3)
    start = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()

    def loss(theta):
        torch.nn.utils.vector_to_parameters(torch.as_tensor(theta), model.parameters())
        return -model.log_prob(x, y).mean().item()

    peer = minimize(loss, start, method="BFGS", options={"gtol": 1e-6})
    torch.nn.utils.vector_to_parameters(torch.as_tensor(start), model.parameters())
    assert -model.fit(x, y).log_prob(x, y).mean().item() == pytest.approx(peer.fun, abs=1e-6)


def test_weighted_lines_are_numpys_least_squares():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    y = torch.randn(40, generator=g, dtype=torch.float64)
    weights = torch.rand(40, 2, generator=g, dtype=torch.float64)
    a, b, var = weighted_lines(x, y, weights)
    design = np.c_[x.numpy(), np.ones(40)]
    for i in range(2):
        w = weights[:, i].numpy()
        root = np.sqrt(w)
        exact = np.linalg.lstsq(root[:, None] * design, root * y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(np.r_[a[i].numpy(), b[i].item()], exact, atol=1e-12)
        residual = y.numpy() - design @ exact
        assert var[i].item() == pytest.approx((w * residual**2).sum() / w.sum(), rel=1e-12)


def test_the_gates_step_is_the_maximum_of_its_objective():
    """With constant responsibilities the best gate is constant and equal to them."""
    x, _ = known_data(50)
    model = started("softmax")
    r = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).expand(50, 3)
    update_gate(model, x, r)
    torch.testing.assert_close(model.log_weights(x).exp(), r, rtol=0, atol=1e-6)


def test_an_expert_without_points_stays_as_it_is():
    x, y = known_data(100)
    model = started("softmax")
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.copy_(torch.tensor([0.0, 0.0, -1e4]))
    kept = model.a[2].detach().clone(), model.log_var[2].item()
    trace = fit_em(model, x, y, max_iter=5)
    assert trace.isfinite().all()
    assert torch.equal(model.a[2], kept[0])
    assert model.log_var[2].item() == kept[1]


def test_em_survives_collinear_data():
    """Two equal columns and a response without noise: no unique line, no variance."""
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None].expand(60, 2)
    y = 2 * x[:, 0].abs()
    trace = fit_em(started("softmax"), x, y, max_iter=60)
    assert trace.isfinite().all()
    assert trace.diff().min() >= -1e-9


def test_fit_mle_recovers_a_known_mixture():
    x, y = known_data(4000)
    model = fit_mle(x, y, 3, gate="softmax", restarts=4)
    truth = GaussianMoE.from_params(known())
    assert model.log_prob(x, y).mean() > truth.log_prob(x, y).mean()
    order = [int((model.params().b - b).abs().argmin()) for b in known().b]
    assert sorted(order) == [0, 1, 2]
    fitted = MoEParams(*(None if p is None else p[order] for p in model.params()))
    loss = voronoi_loss(fitted.anchored(), known(), 1)
    assert loss < 1.0
    torch.testing.assert_close(fitted.a, known().a, rtol=0, atol=0.06)
    torch.testing.assert_close(fitted.var, known().var, rtol=0, atol=0.02)


def test_fit_mle_is_repeatable_and_keeps_the_best_start():
    x, y = known_data(200)
    likelihood = lambda model: model.log_prob(x, y).mean().item()  # noqa: E731
    torch.manual_seed(1)
    first = fit_mle(x, y, 3, gate="activation", restarts=3, max_iter=30)
    torch.manual_seed(2)
    again = fit_mle(x, y, 3, gate="activation", restarts=3, max_iter=30)
    for left, right in zip(first.params(), again.params(), strict=True):
        assert torch.equal(left, right)
    singles = [
        likelihood(fit_mle(x, y, 3, gate="activation", restarts=1, seed=s, max_iter=30))
        for s in range(3)
    ]
    assert likelihood(first) == max(singles)


def test_fit_mle_starts_from_init():
    x, y = known_data(300)
    model = fit_mle(x, y, 3, gate="softmax", init=known(), max_iter=100)
    assert model.log_prob(x, y).mean() > GaussianMoE.from_params(known()).log_prob(x, y).mean()
    assert (model.params().a - known().a).abs().max() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer at least 1"),
        ({"num_experts": 11}, "num_experts: expected at most 10"),
        ({"num_experts": 2, "restarts": 0}, "restarts: expected an integer at least 1"),
        ({"num_experts": 2, "y": torch.zeros(9)}, r"x, y: expected \(n, d\) and \(n,\)"),
    ],
)
def test_fit_mle_refuses_bad_input(options, message):
    arguments = {"x": torch.randn(10, 2), "y": torch.randn(10), **options}
    with pytest.raises(ValueError, match=message):
        fit_mle(**arguments)
