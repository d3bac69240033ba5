"""Fits of a Gaussian mixture with a top-K gate: monotone steps, exact M steps, and starts."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from tests.moe.topk_mixtures import random_data, random_params, topk_model
from torchzoo.moe import GaussianMoE, MoEParams, fit_em, fit_mle
from torchzoo.moe import em as em_module
from torchzoo.moe.em import update_experts, update_gate
from torchzoo.moe.fitting import initialize_from_clusters


def known():
    columns = {
        "beta0": [0.5, -0.3, 0.0],
        "beta1": [[4.0], [2.0], [0.0]],
        "a": [[-4.0], [3.0], [1.0]],
        "b": [1.0, -1.0, 3.0],
        "var": [0.1, 0.15, 0.12],
    }
    return MoEParams(**{k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()})


def known_data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 1
    return x, topk_model(known(), 2).sample(x, generator=g)


@pytest.mark.claim(
    146,
    "EM with the sparse gate never decreases the likelihood, though its steps change regions",
    tolerance=1e-12,
)
def test_em_is_monotone_across_regions():
    x, y = random_data(150)
    y = y + 4 * x[:, 0].abs()
    moved = 0
    for seed in range(8):
        model = topk_model(random_params(4, seed=seed), 2, with_bias=bool(seed % 2))
        before = model.selected(x)
        trace = fit_em(model, x, y, max_iter=12, tol=0.0)
        assert trace.diff().min() >= -1e-12
        assert trace[-1].item() == pytest.approx(model.log_prob(x, y).mean().item(), abs=1e-12)
        moved += int((model.selected(x) != before).any())
    assert moved >= 4


@pytest.mark.claim(
    146,
    "A gate's step that lowers the likelihood is halved until it doesn't, and undone if no half "
    "does",
    tolerance=0.0,
)
@pytest.mark.parametrize("halves", [0, 1, 3, None])
def test_a_step_that_lowers_the_likelihood_is_cut_back(monkeypatch, halves):
    """The step moves the gate's bias, and the likelihood falls beyond a wanted length of it."""
    x, y = known_data(50)
    model = topk_model(known(), 2)
    start = model.gate.bias.detach().clone()
    step = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    longest = -1.0 if halves is None else 0.5**halves

    def take_step(model, x, responsibilities):
        with torch.no_grad():
            model.gate.bias.add_(step)

    def likelihood(model, x, y):
        moved = (model.gate.bias - start)[0].detach()
        return torch.where((moved > 0) & (moved > 1.01 * longest), -1.0, moved)

    monkeypatch.setattr(em_module, "update_gate", take_step)
    monkeypatch.setattr(em_module, "mean_log_likelihood", likelihood)
    with torch.no_grad():
        responsibilities = model.responsibilities(x, y)
    after = em_module._climb_gate(model, x, y, responsibilities)
    wanted = 0.0 if halves is None else longest
    assert after == wanted
    assert torch.equal(model.gate.bias, start + wanted * step)


@pytest.mark.claim(
    146,
    "The experts' M step is numpy's least squares with the responsibilities as weights",
    tolerance=1e-10,
)
def test_the_experts_step_is_weighted_least_squares():
    model, (x, y) = topk_model(random_params(4), 2), random_data(120)
    with torch.no_grad():
        r = model.responsibilities(x, y)
    assert (r[~model.selected(x)] == 0).all()
    torch.testing.assert_close(r.sum(-1), torch.ones(120, dtype=torch.float64))
    update_experts(model, x, y, r)
    fitted, design = model.params(), np.c_[x.numpy(), np.ones(120)]
    for i in range(4):
        w = r[:, i].numpy()
        root = np.sqrt(w)
        exact = np.linalg.lstsq(root[:, None] * design, root * y.numpy(), rcond=None)[0]
        got = torch.cat([fitted.a[i], fitted.b[i : i + 1]]).detach().numpy()
        np.testing.assert_allclose(got, exact, atol=1e-10)
        mean_square = (w * (y.numpy() - design @ exact) ** 2).sum() / w.sum()
        assert fitted.var[i].item() == pytest.approx(mean_square, rel=1e-10)


def test_the_gates_step_holds_the_experts_chosen():
    """Equal responsibilities within each chosen set call for a bias and weights of 0."""
    model, (x, _) = topk_model(random_params(3), 2), random_data(100)
    selected = model.selected(x)
    r = selected.double() / 2
    update_gate(model, x, r)
    weights = model.log_weights(x, selected=selected).exp()
    torch.testing.assert_close(weights, r, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lbfgs", "em"])
def test_fit_from_nearby_is_as_far_from_the_truth_as_fisher_information_says(method):
    """Wilks: twice the gain in likelihood over the truth is chi-square of 15 - 2 degrees."""
    n = 3000
    x, y = known_data(n)
    g = torch.Generator().manual_seed(5)
    noise = lambda p: p + 0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype)  # noqa: E731
    model = topk_model(MoEParams(*(noise(p) for p in known()[:5])), 2)
    model.fit(x, y, method=method, max_iter=100)
    with torch.no_grad():
        gain = (model.log_prob(x, y) - topk_model(known(), 2).log_prob(x, y)).sum().item()
    assert 0.001 < chi2(13).cdf(2 * gain) < 0.999
    fitted = model.params().anchored()
    torch.testing.assert_close(fitted.a, known().a, rtol=0, atol=0.12)
    torch.testing.assert_close(fitted.var, known().var, rtol=0, atol=0.03)


def test_fit_mle_finds_the_experts_from_clusters():
    x, y = known_data(1500)
    model = fit_mle(x, y, 3, gate="topk", top_k=2, restarts=4)
    assert model.gate.k == 2
    assert not model.gate.select_with_bias
    assert model.log_prob(x, y).mean() > topk_model(known(), 2).log_prob(x, y).mean() - 0.05
    rule = fit_mle(x, y, 3, gate="topk", top_k=2, select_with_bias=True, restarts=1, max_iter=2)
    assert rule.gate.select_with_bias


def test_a_start_from_clusters_chooses_by_weights_that_tell_them_apart():
    x, _ = random_data(600)
    labels = (x @ torch.tensor([[3.0, 0.0, -3.0], [0.0, 3.0, -3.0]]).double()).argmax(-1)
    y = labels * 20.0
    model = GaussianMoE(2, 3, gate="topk", top_k=1, dtype=torch.float64)
    initialize_from_clusters(model, x, y, seed=0)
    assert (model.gate.bias == 0).all()
    chosen = model.selected(x).int().argmax(-1)
    pairs = {(int(i), int(j)) for i, j in zip(chosen, labels, strict=True)}
    agree = max(
        (chosen == torch.tensor(p)[labels]).double().mean().item()
        for p in itertools.permutations(range(3))
    )
    assert len(pairs) >= 3
    assert agree > 0.95


def test_restarts_keep_the_best_fit():
    x, y = known_data(300)
    poor = topk_model(random_params(3, 1), 2)
    singles = [copy.deepcopy(poor)]
    for seed in range(2):
        singles.append(copy.deepcopy(poor))
        initialize_from_clusters(singles[-1], x, y, seed=seed)
    values = [one.fit(x, y, max_iter=40).log_prob(x, y).mean().item() for one in singles]
    for restarts in (1, 2, 3):
        found = copy.deepcopy(poor).fit(x, y, max_iter=40, restarts=restarts)
        assert found.log_prob(x, y).mean().item() == max(values[:restarts])
    assert max(values) > values[0] + 0.01
