"""Softmax, top-k and noisy top-k gates, and what all gates share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.moe import (
    ActivationDenseToSparseGate,
    DenseToSparseGate,
    Gate,
    NoisyTopKGate,
    Routing,
    SoftmaxGate,
    TopKGate,
)
from torchzoo.moe.gates import probability_in_top_k

GATES = {
    "softmax": lambda **kw: SoftmaxGate(6, 4, bias=True, **kw),
    "topk": lambda **kw: TopKGate(6, 4, 2, **kw),
    "switch": lambda **kw: TopKGate(6, 4, 1, renormalize=False, **kw),
    "noisy": lambda **kw: NoisyTopKGate(6, 4, 2, bias=True, **kw).eval(),
    "evo": lambda **kw: DenseToSparseGate(6, 4, threshold=0.2, **kw).eval(),
    "dense_to_sparse": lambda **kw: DenseToSparseGate(
        6, 4, temperature="learned", noise=None, **kw
    ),
    "activation": lambda **kw: ActivationDenseToSparseGate(6, 4, temperature=0.3, **kw),
}
every_gate = pytest.mark.parametrize("name", GATES)


def made(name, **kw) -> Gate:
    gate = GATES[name](**kw)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gate.parameters():
            if parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What all gates share


@every_gate
def test_contract(name):
    gate = made(name)
    routing = gate(tokens(3, 5, 6))
    k = routing.weights.shape[1]
    assert routing.weights.shape == routing.experts.shape == routing.mask.shape == (15, k)
    assert routing.logits.shape == routing.probs.shape == (15, 4)
    assert routing.experts.dtype == torch.int64
    assert routing.mask.dtype == torch.bool
    assert (routing.weights[~routing.mask] == 0).all()
    tau = 1.0 if gate.temperature is None else gate.temperature
    expected = (routing.logits / tau).exp()
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.probs, expected)
    flat = gate(tokens(3, 5, 6).reshape(15, 6))
    for a, b in zip(routing, flat, strict=True):
        assert torch.equal(a, b)
    log_probs = gate.log_probs(tokens(3, 5, 6))
    torch.testing.assert_close(log_probs.exp().reshape(15, 4), routing.probs)
    one = gate(tokens(3, 5, 6)[0, 0])
    torch.testing.assert_close(one.weights, routing.weights[:1])
    assert gate(tokens(0, 6)).weights.shape == (0, k)


@every_gate
def test_load_and_dropped_fraction_count_slots(name):
    routing = made(name)(tokens(20, 6))
    load = [0] * 4
    for experts, mask in zip(routing.experts.tolist(), routing.mask.tolist(), strict=True):
        for expert, used in zip(experts, mask, strict=True):
            load[expert] += used
    assert routing.load.tolist() == load
    slots = routing.mask.numel()
    assert float(routing.dropped_fraction) == pytest.approx(1 - sum(load) / slots)


def test_dropped_fraction_without_tokens_is_zero():
    assert float(SoftmaxGate(6, 4)(tokens(0, 6)).dropped_fraction) == 0


@pytest.mark.claim(69, "Under bfloat16 autocast every gate chooses as in float32", tolerance=0.0)
@every_gate
def test_router_stays_in_float32_under_autocast(name):
    gate, x = made(name), tokens(64, 6)
    expected = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(x)
        half = gate(x.bfloat16())
    for a, b in zip(routing, expected, strict=True):
        assert torch.equal(a, b)
    assert half.logits.dtype == half.probs.dtype == torch.float32
    assert half.weights.dtype == torch.bfloat16
    rounded = gate(x.bfloat16().float())
    assert torch.equal(half.experts, rounded.experts)
    assert torch.equal(half.weights, rounded.weights.bfloat16())


@every_gate
def test_half_precision_parameters(name):
    gate = made(name).bfloat16()
    routing = gate(tokens(8, 6, dtype=torch.bfloat16))
    reference = gate.float()(tokens(8, 6, dtype=torch.bfloat16).float())
    assert torch.equal(routing.experts, reference.experts)
    torch.testing.assert_close(routing.probs, reference.probs)


@every_gate
def test_gradcheck(name):
    gate = made(name, dtype=torch.float64)
    x = tokens(5, 6, dtype=torch.float64).requires_grad_()
    names = [n for n, _ in gate.named_parameters()]

    def forward(x, *values):
        parameters = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(gate, parameters, (x,))
        return routing.weights, routing.logits, routing.probs

    assert torch.autograd.gradcheck(forward, (x, *gate.parameters()))


@every_gate
def test_starts_like_linear(name):
    torch.manual_seed(0)
    gate = GATES[name]()
    if name == "noisy":
        assert all((p == 0).all() for p in gate.parameters())
        return
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4, bias=gate.bias is not None)
    assert gate.weight.abs().max() <= 6**-0.5
    torch.testing.assert_close(gate.weight, linear.weight)
    if gate.bias is not None:
        torch.testing.assert_close(gate.bias, linear.bias)


@every_gate
def test_meta_then_reset(name):
    gate = GATES[name](device="meta")
    assert gate(torch.empty(3, 6, device="meta")).weights.shape[0] == 3
    gate = gate.to_empty(device="cpu")
    for tensor in gate.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(0)
    gate.reset_parameters()
    torch.manual_seed(0)
    fresh = GATES[name]()
    for key, value in fresh.state_dict().items():
        assert torch.equal(gate.state_dict()[key], value), key


@every_gate
def test_compiles_in_one_graph_and_does_not_recompile(name):
    gate = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = tokens(9, 6, seed=seed)
            for a, b in zip(compiled(x), gate(x), strict=True):
                torch.testing.assert_close(a, b)


def test_gate_without_a_rule_says_so():
    with pytest.raises(NotImplementedError, match="Gate does not say how it routes"):
        Gate(3, 2)(tokens(4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxGate(0, 4), "dim: expected an integer at least 1, got 0"),
        (lambda: SoftmaxGate(3, 0), "num_experts: expected an integer at least 1, got 0"),
        (lambda: SoftmaxGate(3, 2.0), "num_experts: expected an integer at least 1, got 2.0"),
        (lambda: TopKGate(3, 4, 5), "k: expected an integer from 1 to 4, got 5"),
        (lambda: TopKGate(3, 4, 0), "k: expected"),
        (lambda: NoisyTopKGate(3, 4, 5), "k: expected"),
        (lambda: SoftmaxGate(3, 4)(tokens(10, 4)), r"x: expected \(\.\.\., 3\), got \(10, 4\)"),
        (lambda: SoftmaxGate(3, 4)(torch.tensor(1.0)), r"x: expected \(\.\.\., 3\), got \(\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# SoftmaxGate and TopKGate


def test_softmax_gate_is_linear_and_softmax():
    gate, x = made("softmax"), tokens(7, 6)
    linear = torch.nn.Linear(6, 4)
    linear.load_state_dict(gate.state_dict())
    routing = gate(x)
    torch.testing.assert_close(routing.logits, linear(x))
    torch.testing.assert_close(routing.weights, linear(x).softmax(-1))
    assert torch.equal(routing.experts, torch.arange(4).expand(7, 4))
    assert routing.mask.all()


@settings(max_examples=50, deadline=None)
@given(
    num_experts=st.integers(1, 6),
    data=st.data(),
    renormalize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_top_k_by_hand(num_experts, data, renormalize, seed):
    k = data.draw(st.integers(1, num_experts))
    gate = TopKGate(3, num_experts, k, renormalize=renormalize)
    x = tokens(4, 3, seed=seed)
    routing = gate(x)
    for t in range(4):
        logits = [(gate.weight[e] @ x[t] + gate.bias[e]).item() for e in range(num_experts)]
        chosen = sorted(range(num_experts), key=lambda e: (-logits[e], e))[:k]
        total = sum(math.exp(logits[e]) for e in (chosen if renormalize else range(num_experts)))
        assert routing.experts[t].tolist() == chosen
        expected = [math.exp(logits[e]) / total for e in chosen]
        assert routing.weights[t].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_experts", [3, 40])
def test_ties_go_to_the_lowest_expert(num_experts):
    gate = TopKGate(2, num_experts, 2)
    torch.nn.init.zeros_(gate.weight), torch.nn.init.zeros_(gate.bias)
    assert gate(tokens(50, 2)).experts.unique(dim=0).tolist() == [[0, 1]]


def test_top_1_renormalised_has_weight_one_and_no_router_gradient():
    for renormalize in (True, False):
        gate = TopKGate(6, 4, 1, renormalize=renormalize)
        weights = gate(tokens(5, 6)).weights
        weights.square().sum().backward()
        if renormalize:
            assert (weights == 1).all()
            assert (gate.weight.grad == 0).all()
        else:
            assert (weights < 1).all()
            assert (gate.weight.grad != 0).any()


def test_choice_without_bias():
    x = torch.tensor([[1.0]])
    for select_with_bias, chosen in ((True, [1, 2]), (False, [0, 1])):
        gate = TopKGate(1, 3, 2, select_with_bias=select_with_bias)
        with torch.no_grad():
            gate.weight.copy_(torch.tensor([[3.0], [2.0], [1.0]]))
            gate.bias.copy_(torch.tensor([0.0, 4.0, 9.0]))
        routing = gate(x)
        assert sorted(routing.experts[0].tolist()) == chosen
        logits = torch.tensor([3.0, 6.0, 10.0])[routing.experts[0]]
        torch.testing.assert_close(routing.weights[0], logits.softmax(0))


# NoisyTopKGate


def noisy_gate(num_experts=4, k=2):
    gate = NoisyTopKGate(3, num_experts, k)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def test_noise_is_gaussian_with_softplus_scale():
    """For two experts, expert 0 wins with chance Phi((l0 - l1) / sqrt(s0^2 + s1^2))."""
    gate, x = noisy_gate(2, 1), torch.tensor([0.3, -0.7, 0.4])
    l0, l1 = gate.score(x).tolist()
    s0, s1 = (math.log1p(math.exp((w @ x).item())) for w in gate.noise_weight)
    chance = 0.5 * math.erfc(-(l0 - l1) / math.hypot(s0, s1) / math.sqrt(2))
    torch.manual_seed(0)
    draws = 40_000
    share = float((gate(x.expand(draws, 3)).experts == 0).double().mean())
    assert share == pytest.approx(chance, abs=3 * math.sqrt(chance * (1 - chance) / draws))
    assert 0.1 < chance < 0.9


def test_noise_only_in_training():
    gate, x = noisy_gate(), tokens(10, 3)
    torch.manual_seed(0)
    assert not torch.equal(gate(x).weights, gate(x).weights)
    gate.eval()
    plain = TopKGate(3, 4, 2, bias=False)
    with torch.no_grad():
        plain.weight.copy_(gate.weight)
    for a, b in zip(gate(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_estimate_matches_monte_carlo(k):
    """Both are unbiased for the expected load: they agree within 3 standard errors."""
    gate, x = noisy_gate(4, k), torch.tensor([0.3, -0.7, 0.4])
    draws = 20_000
    torch.manual_seed(0)
    chosen = gate(x.expand(draws, 3)).experts
    counts = torch.stack([(chosen == e).any(-1) for e in range(4)], -1).double()
    logits, scale = gate.score(x).expand(draws, 4), gate.noise_scale(x).expand(draws, 4)
    noisy = logits + torch.randn_like(logits) * scale
    smooth = probability_in_top_k(logits, noisy, scale, k).double()
    error = ((counts.var(0) + smooth.var(0)) / draws).sqrt()
    assert ((counts.mean(0) - smooth.mean(0)).abs() < 3 * error).all()
    torch.manual_seed(1)
    load = gate.expected_load(x.expand(draws, 3))
    assert ((load / draws - counts.mean(0)).abs() < 4 * error).all()


def test_probability_in_top_k_by_hand():
    """Each expert against the k-th largest of the other noisy logits."""
    clean, scale = tokens(4, seed=1).double(), tokens(4, seed=2).double().exp()
    noisy = tokens(4, seed=3).double()
    for k in (1, 2, 3, 4):
        chances = probability_in_top_k(clean, noisy, scale, k)
        for i in range(4):
            others = sorted((float(noisy[j]) for j in range(4) if j != i), reverse=True)
            z = math.inf if k == 4 else float((clean[i] - others[k - 1]) / scale[i])
            assert float(chances[i]) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)))


def test_load_loss_has_a_gradient_and_vanishes_when_all_are_used():
    gate, x = noisy_gate(), tokens(30, 3)
    gate.load_loss(x).backward()
    assert (gate.weight.grad != 0).any()
    assert (gate.noise_weight.grad != 0).any()
    assert noisy_gate(4, 4).load_loss(x).item() == 0


def test_routing_is_a_tuple_of_tensors():
    assert Routing._fields == ("weights", "experts", "logits", "probs", "mask")
    assert all(isinstance(t, torch.Tensor) for t in SoftmaxGate(6, 4)(tokens(2, 6)))


class TestBalancedChoice:
    def gate(self, **options):
        torch.manual_seed(0)
        return TopKGate(5, 4, 2, balanced=True, dtype=torch.float64, **options)

    def test_bias_moves_by_the_sign_of_what_is_missing(self):
        gate = self.gate()
        gate.balance(torch.tensor([5, 1, 3, 3]), rate=0.25)
        assert gate.choice_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
        gate.balance(torch.tensor([5.0, 5.0, 0.0, 2.0]), rate=0.5)
        assert gate.choice_bias.tolist() == [-0.75, -0.25, 0.5, 0.5]

    @pytest.mark.parametrize("renormalize", [True, False])
    def test_bias_changes_the_choice_and_nothing_else(self, renormalize):
        gate, x = self.gate(renormalize=renormalize), torch.randn(40, 5, dtype=torch.float64)
        gate.choice_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
        routing = gate(x)
        for t, logits in enumerate(x @ gate.weight.T + gate.bias):
            shares = logits.softmax(-1)
            chosen = sorted(range(4), key=lambda e: -(shares + gate.choice_bias)[e].item())[:2]
            assert routing.experts[t].tolist() == chosen
            weights = logits[chosen].softmax(-1) if renormalize else shares[chosen]
            torch.testing.assert_close(routing.weights[t], weights)
            torch.testing.assert_close(routing.probs[t], shares)

    def test_updates_even_out_skewed_loads(self):
        gate = self.gate()
        with torch.no_grad():
            gate.bias.copy_(torch.tensor([2.0, 0.0, -1.0, -1.0]))
        x = torch.randn(2000, 5, dtype=torch.float64)
        before = gate(x).load
        for rate in [2e-3] * 250 + [2e-4] * 50:  # in the end loads swing by what a step moves
            gate.balance(gate(x).load, rate=rate)
        after = gate(x).load
        assert before.max() > 1.8 * before.double().mean()
        assert after.max() < 1.03 * after.double().mean()

    def test_bias_is_in_the_state_and_has_no_gradient(self):
        gate = self.gate()
        gate.balance(torch.tensor([5, 1, 3, 3]))
        other = self.gate()
        other.load_state_dict(gate.state_dict())
        assert other.choice_bias.equal(gate.choice_bias)
        assert "choice_bias" not in dict(gate.named_parameters())
        assert "choice_bias" not in TopKGate(5, 4, 2).state_dict()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="balanced=True"):
            TopKGate(5, 4, 2).balance(torch.zeros(4))
        with pytest.raises(ValueError, match=r"load: expected \(4,\), got \(3,\)"):
            self.gate().balance(torch.zeros(3))
        with pytest.raises(ValueError, match="select_with_bias"):
            self.gate(select_with_bias=False)
