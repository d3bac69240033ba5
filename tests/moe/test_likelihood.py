"""Slopes in closed form against automatic differentiation, and the search that uses them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.moe import GaussianMoE
from torchzoo.moe.likelihood import (
    gate_cross_entropy,
    mean_log_likelihood,
    minimize_known,
    negative_log_likelihood,
)
from torchzoo.moe.routing import FEW, top_k_experts, top_k_mask

GATES = [
    {"gate": "softmax"},
    {"gate": "topk", "top_k": 4},
    {"gate": "topk", "top_k": 2},
    {"gate": "topk", "top_k": 2, "select_with_bias": True},
    {"gate": "dense_to_sparse"},
    {"gate": "activation"},
]


def case(gate, n=40):
    generator = torch.Generator().manual_seed(0)
    model = GaussianMoE(2, 4, dtype=torch.float64, **gate)
    for p in model.parameters():
        torch.nn.init.normal_(p, generator=generator)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return model, x, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.claim(
    146,
    "The value and the slopes that L-BFGS climbs by are those of log_prob",
    tolerance=1e-13,
)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_slopes_of_the_likelihood(gate):
    model, x, y = case(gate)
    value, slopes = negative_log_likelihood(model, x, y)
    wanted = -model.log_prob(x, y).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-13)
    mean = mean_log_likelihood(model, x, y)
    assert mean.item() == pytest.approx(-wanted.item(), rel=1e-13)
    assert not mean.requires_grad
    params = list(model.parameters())
    for p, slope in zip(params, torch.autograd.grad(wanted, params), strict=True):
        torch.testing.assert_close(slopes[p], slope, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_slopes_of_the_gates_cross_entropy(gate):
    model, x, y = case(gate)
    with torch.no_grad():
        targets, selected = model.responsibilities(x, y), model.selected(x)
    value, slopes = gate_cross_entropy(model.gate, x, targets.mT, ~selected.mT)
    terms = targets * model.log_weights(x, selected=selected)
    wanted = -terms.where(selected, 0).sum(-1).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-13)
    params = list(model.gate.parameters())
    for p, slope in zip(params, torch.autograd.grad(wanted, params), strict=True):
        torch.testing.assert_close(slopes[p], slope, rtol=0, atol=1e-13)


def test_autocast_changes_nothing():
    model, x, y = case(GATES[2])
    model, x, y = model.float(), x.float(), y.float()
    value, slopes = negative_log_likelihood(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, others = negative_log_likelihood(model, x, y)
    assert torch.equal(value, same)
    assert all(torch.equal(slopes[p], others[p]) for p in slopes)


def test_overflow_is_an_infinite_loss():
    model, x, y = case(GATES[0])
    with torch.no_grad():
        model.log_var.fill_(-2000.0)
    assert negative_log_likelihood(model, x, y)[0] == torch.inf


def test_a_known_gradient_moves_what_is_free():
    a, b = (torch.tensor([v, -v], requires_grad=True) for v in (3.0, 5.0))
    b.requires_grad_(False)

    def objective():
        gap = (a - b).detach()
        return gap.square().sum(), {a: 2 * gap}

    minimize_known(objective, [a, b], max_iter=20)
    torch.testing.assert_close(a.detach(), torch.tensor([5.0, -5.0]))
    assert b.tolist() == [5.0, -5.0]
    with pytest.raises(ValueError, match="params"):
        minimize_known(lambda: (b.sum(), {}), [b], max_iter=1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_mask_is_of_the_experts_chosen_ties_included(data):
    num_experts = data.draw(st.sampled_from([1, 2, 3, FEW, FEW + 1]))
    k = data.draw(st.integers(1, num_experts))
    rows = st.lists(st.integers(0, 3), min_size=num_experts, max_size=num_experts)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=6))).double()
    mask = top_k_mask(scores, k)
    chosen = top_k_experts(scores, k)
    assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, chosen, True))
    assert torch.equal(top_k_mask(scores.mT, k, dim=0), mask.mT)
