"""Expert choice against a loop over experts, and what follows from it."""

import math

import pytest
import torch
from torch import nn

from torchzoo.moe import ExpertChoiceGate, GroupedExperts, MoELayer


def layer(tokens=11, experts=4, factor=1.5):
    torch.manual_seed(0)
    gate = ExpertChoiceGate(6, experts, capacity_factor=factor, bias=True, dtype=torch.float64)
    made = MoELayer(gate, GroupedExperts(6, 8, experts, activation="gelu", dtype=torch.float64))
    return made, torch.randn(tokens, 6, dtype=torch.float64)


def by_loop(made: MoELayer, x):
    """Each expert in turn sorts the tokens by its share and adds what it makes of the first."""
    gate = made.gate
    shares = (x @ gate.weight.T + gate.bias).softmax(-1)
    capacity = min(len(x), math.ceil(gate.capacity_factor * len(x) / gate.num_experts))
    out = torch.zeros_like(x)
    for expert in range(gate.num_experts):
        order = sorted(range(len(x)), key=lambda t: (-shares[t, expert].item(), t))
        for t in order[:capacity]:
            hidden = nn.functional.gelu(x[t] @ made.experts.w_in[expert])
            out[t] = out[t] + shares[t, expert] * (hidden @ made.experts.w_out[expert])
    return out


@pytest.mark.parametrize(("tokens", "factor"), [(11, 1.5), (8, 1.0), (3, 4.0), (1, 0.5)])
def test_layer_equals_the_loop_with_all_gradients(tokens, factor):
    made, x = layer(tokens, factor=factor)
    x.requires_grad_()
    leaves = [x, *made.parameters()]
    found, wanted = made(x), by_loop(made, x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("tokens", "factor", "each"), [(16, 2.0, 8), (10, 1.0, 3), (5, 9.0, 5)])
def test_loads_are_equal(tokens, factor, each):
    made, x = layer(tokens, factor=factor)
    assert made.gate(x).load.tolist() == [each] * 4


def test_no_tokens():
    made, _ = layer()
    assert made.gate(torch.zeros(0, 6, dtype=torch.float64)).load.tolist() == [0] * 4


def test_ties_go_to_the_earliest_tokens():
    gate = ExpertChoiceGate(2, 2, capacity_factor=1.0)
    routing = gate(torch.ones(6, 2))
    assert routing.mask[:, 0].tolist() == [True] * 3 + [False] * 3
