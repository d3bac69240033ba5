"""Router losses against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchzoo.moe import (
    DenseToSparseGate,
    Routing,
    TopKGate,
    importance_loss,
    load_balance_loss,
    router_entropy,
    z_loss,
)
from torchzoo.moe.losses import cv_squared


def routing_of(experts, probs, logits=None, mask=None):
    experts, probs = torch.as_tensor(experts), torch.as_tensor(probs, dtype=torch.float64)
    mask = torch.ones_like(experts, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    weights = probs.gather(-1, experts) * mask
    return Routing(weights, experts, probs.log() if logits is None else logits, probs, mask)


def random_routing(tokens=12, num_experts=5, k=2, seed=0):
    torch.manual_seed(seed)
    gate = TopKGate(3, num_experts, k, dtype=torch.float64)
    return gate, gate(torch.randn(tokens, 3, dtype=torch.float64))


@pytest.mark.claim(69, "The load balance loss is 1 for uniform routing", tolerance=1e-12)
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (4, 2), (6, 6)])
def test_uniform_routing(num_experts, k):
    experts = torch.arange(num_experts * k).reshape(num_experts, k) % num_experts
    skewed = torch.rand(num_experts, num_experts, dtype=torch.float64).softmax(-1)
    uniform = torch.full_like(skewed, 1 / num_experts)
    for probs in (uniform, skewed):
        loss = load_balance_loss(routing_of(experts, probs))
        assert loss.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.claim(69, "It is E / k when all tokens go to the same k experts", tolerance=1e-12)
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (6, 2), (6, 3)])
def test_collapse(num_experts, k):
    probs = torch.zeros(10, num_experts, dtype=torch.float64)
    probs[:, 1 : k + 1] = 1 / k
    experts = torch.arange(1, k + 1).expand(10, k)
    loss = load_balance_loss(routing_of(experts, probs))
    assert loss.item() == pytest.approx(num_experts / k, abs=1e-12)


@pytest.mark.claim(
    69,
    "The load balance loss reaches the router through P only: gradient E f_e / T",
    tolerance=1e-12,
)
def test_load_balance_gradient():
    _, routing = random_routing()
    f = routing.load.double() / routing.load.sum()
    expected = 5 * (f * routing.probs.mean(0)).sum()
    loss = load_balance_loss(routing)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(
        loss, (routing.probs, routing.weights), allow_unused=True, retain_graph=True
    )
    torch.testing.assert_close(gradients[0], (5 * f / 12).expand(12, 5), rtol=0, atol=1e-12)
    assert gradients[1] is None
    gate, routing = random_routing()
    load_balance_loss(routing).backward()
    assert gate.weight.grad.abs().max() > 1e-3


def test_load_balance_counts_used_slots_only():
    mask = [[True, False], [True, True], [True, False]]
    probs = torch.full((3, 3), 1 / 3)
    probs[:, 0], probs[:, 2] = 0.5, 1 / 6
    loss = load_balance_loss(routing_of([[0, 1], [0, 2], [0, 1]], probs, mask=mask))
    assert loss.item() == pytest.approx(3 * (3 / 4 * 0.5 + 1 / 4 / 6), rel=1e-6)


@pytest.mark.claim(69, "The z loss is the mean of logsumexp squared", tolerance=1e-12)
def test_z_loss():
    _, routing = random_routing()
    rows = routing.logits.tolist()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows) / len(rows)
    assert z_loss(routing).item() == pytest.approx(expected, abs=1e-12)
    lse = routing.logits.logsumexp(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(z_loss(routing), routing.logits)
    torch.testing.assert_close(gradient, 2 / 12 * lse * routing.logits.softmax(-1))


def test_importance_loss():
    _, routing = random_routing()
    importance = routing.probs.detach().numpy().sum(0)
    expected = (np.std(importance) / np.mean(importance)) ** 2
    assert importance_loss(routing).item() == pytest.approx(expected, rel=1e-12)
    one = routing_of([[0], [0]], [[1.0], [1.0]])
    assert importance_loss(one).item() == 0
    assert cv_squared(torch.zeros(3)).item() == 0


def test_router_entropy():
    _, routing = random_routing()
    expected = torch.distributions.Categorical(probs=routing.probs).entropy().mean()
    torch.testing.assert_close(router_entropy(routing), expected)
    flat = routing_of([[0]], [[0.25] * 4])
    assert router_entropy(flat).item() == pytest.approx(math.log(4))
    sharp = routing_of([[0]], [[1.0, 0.0]])
    assert router_entropy(sharp).item() == 0


def test_entropy_gradient_is_finite_where_probabilities_vanish():
    gate = DenseToSparseGate(3, 4, temperature=1e-4, noise=None)
    routing = gate(torch.randn(8, 3))
    assert (routing.probs == 0).any()
    router_entropy(routing).backward()
    assert gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("loss", [load_balance_loss, z_loss, importance_loss, router_entropy])
def test_no_tokens_and_precision(loss):
    gate = TopKGate(3, 4, 2)
    assert loss(gate(torch.zeros(0, 3))).item() == 0
    assert loss(gate(torch.randn(5, 3).bfloat16())).dtype == torch.float32


def _rank(rank, folder, x, gate):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = x[:3] if rank == 0 else x[3:]
    loss = load_balance_loss(gate(part), group=dist.group.WORLD)
    loss.backward()
    dist.all_reduce(gate.weight.grad)
    torch.save((loss.detach(), gate.weight.grad / 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_group_gives_the_loss_of_the_whole_batch(tmp_path):
    """Two ranks with 3 and 5 tokens; gradients averaged over ranks as in data parallel training."""
    torch.manual_seed(0)
    gate, x = TopKGate(3, 4, 2, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    mp.spawn(_rank, (str(tmp_path), x, gate), nprocs=2)
    loss = load_balance_loss(gate(x))
    loss.backward()
    for rank in range(2):
        found, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(gradient, gate.weight.grad)
