"""The dense-to-sparse gates: placement of bias and temperature, annealing, noise, pruning."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from torchzoo.moe import ActivationDenseToSparseGate, DenseToSparseGate


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_weights(gate, weight, bias=None):
    with torch.no_grad():
        gate.weight.copy_(torch.as_tensor(weight, dtype=torch.float64))
        if bias is not None:
            gate.bias.copy_(torch.as_tensor(bias, dtype=torch.float64))
    return gate


def softmax(values):
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# Placement of bias, activation and temperature

W, B, TAU, X = [[1.0, 2.0], [-1.0, 0.5], [0.3, -1.5]], [0.5, -0.3, 1.0], 0.5, [0.4, -1.2]
Z = [w[0] * X[0] + w[1] * X[1] for w in W]


@pytest.mark.claim(
    69, "Gate logits are (sigma(W x) + b) / tau, bias and tau outside sigma", tolerance=1e-12
)
@pytest.mark.parametrize(
    ("activation", "sigma"),
    [
        ("sigmoid", sigmoid),
        ("tanh", math.tanh),
        ("gelu", lambda z: 0.5 * z * math.erfc(-z / math.sqrt(2))),
        ("silu", lambda z: z * sigmoid(z)),
        (torch.sin, math.sin),
    ],
)
def test_placement(activation, sigma):
    gate = ActivationDenseToSparseGate(
        2, 3, activation=activation, temperature=TAU, dtype=torch.float64
    )
    with_weights(gate, W, B)
    routing = gate(torch.tensor([X], dtype=torch.float64))
    raw = [sigma(z) + b for z, b in zip(Z, B, strict=True)]
    expected = [r / TAU for r in raw]
    assert routing.logits[0].tolist() == pytest.approx(raw, abs=1e-12)
    assert routing.probs[0].tolist() == pytest.approx(softmax(expected), abs=1e-12)
    assert routing.weights[0].tolist() == pytest.approx(softmax(expected), abs=1e-12)
    bias_inside = [sigma(z + b) / TAU for z, b in zip(Z, B, strict=True)]
    tau_inside = [sigma(z / TAU) + b for z, b in zip(Z, B, strict=True)]
    for other in (bias_inside, tau_inside):
        assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 0.1


@pytest.mark.claim(69, "The dense-to-sparse gate is softmax((W x + b) / tau)", tolerance=1e-12)
@pytest.mark.parametrize("train", [True, False])
def test_linear_placement(train):
    gate = DenseToSparseGate(
        2, 3, temperature=TAU, noise=None, bias=True, dtype=torch.float64
    ).train(train)
    routing = with_weights(gate, W, B)(torch.tensor([X], dtype=torch.float64))
    raw = [z + b for z, b in zip(Z, B, strict=True)]
    assert routing.logits[0].tolist() == pytest.approx(raw, abs=1e-12)
    expected = softmax([r / TAU for r in raw])
    assert routing.weights[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert routing.probs[0].tolist() == pytest.approx(expected, abs=1e-12)


def learned(kind):
    if kind == "linear":
        gate = DenseToSparseGate(
            2, 3, temperature="learned", noise=None, bias=True, dtype=torch.float64
        )
    else:
        gate = ActivationDenseToSparseGate(
            2, 3, temperature=TAU, learn_temperature=True, dtype=torch.float64
        )
    return with_weights(gate, W, B)


@pytest.mark.claim(
    69, "A learned tau is in state_dict; its gradient is that of softmax(z / tau)", tolerance=1e-12
)
@pytest.mark.parametrize("kind", ["linear", "activation"])
def test_learned_temperature(kind):
    gate = learned(kind)
    assert "log_tau" in gate.state_dict()
    assert "log_tau" in dict(gate.named_parameters())
    start = 1.0 if kind == "linear" else TAU
    assert float(gate.temperature.detach()) == pytest.approx(start)
    routing = gate(torch.tensor([X], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(routing.weights[0, 0], gate.log_tau)
    # d g_i / d log tau = -g_i (u_i - sum_j g_j u_j) with u = logits / tau
    u = [z / start for z in routing.logits[0].tolist()]
    g = softmax(u)
    mean = sum(a * b for a, b in zip(g, u, strict=True))
    assert float(gradient) == pytest.approx(-g[0] * (u[0] - mean), abs=1e-12)
    assert abs(float(gradient)) > 0.01


@pytest.mark.claim(69, "tau to 0 gives the one-hot argmax, tau to infinity 1/E", tolerance=1e-6)
@pytest.mark.parametrize("kind", ["linear", "activation"])
def test_temperature_limits(kind):
    x = tokens(50, 3)

    def weights(tau):
        if kind == "linear":
            gate = DenseToSparseGate(3, 4, temperature=tau, noise=None)
        else:
            gate = ActivationDenseToSparseGate(3, 4, temperature=tau)
        routing = with_weights(gate, tokens(4, 3, seed=1))(x)
        top = routing.logits.topk(2).values
        return routing, (top[:, 0] - top[:, 1]) > 0.01

    cold, clear = weights(1e-4)
    assert clear.sum() > 30
    one_hot = F.one_hot(cold.logits.argmax(-1), 4).float()
    torch.testing.assert_close(cold.weights[clear], one_hot[clear], rtol=0, atol=1e-6)
    assert torch.equal(cold.mask[clear], one_hot[clear].bool())
    hot, _ = weights(1e8)
    torch.testing.assert_close(hot.weights, torch.full((50, 4), 0.25), rtol=0, atol=1e-6)


def test_homogeneous_activations_warn():
    for activation in ("identity", "relu", "leaky_relu", torch.relu, F.relu, torch.nn.ReLU()):
        with pytest.warns(UserWarning, match="temperature is not determined by data"):
            ActivationDenseToSparseGate(3, 2, activation=activation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for activation in ("sigmoid", "tanh", "gelu", "silu", torch.sigmoid):
            ActivationDenseToSparseGate(3, 2, activation=activation)


# Annealing


@pytest.mark.claim(
    69, "After `steps` calls of step tau is final_temperature, and stays", tolerance=1e-6
)
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_annealing(schedule):
    gate = DenseToSparseGate(
        3, 4, temperature=4.0, final_temperature=0.25, steps=8, schedule=schedule
    )
    for n in range(12):
        progress = min(n / 8, 1)
        if schedule == "exponential":
            expected = 4.0 ** (1 - progress) * 0.25**progress
        else:
            expected = 4.0 * (1 - progress) + 0.25 * progress
        assert float(gate.temperature) == pytest.approx(expected, rel=1e-6)
        gate.step()
    gate.reset_parameters()
    assert float(gate.temperature) == pytest.approx(4.0)


@pytest.mark.claim(69, "The annealing goes on where it was after load_state_dict", tolerance=0.0)
def test_schedule_is_in_the_state_dict():
    def gate():
        return DenseToSparseGate(3, 4, temperature=4.0, final_temperature=0.25, steps=8)

    first, second = gate(), gate()
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    x = tokens(5, 3)
    for _ in range(3):
        assert torch.equal(first.temperature, second.temperature)
        assert torch.equal(first.eval()(x).probs, second.eval()(x).probs)
        first.step(), second.step()


def test_step_without_schedule_leaves_the_temperature():
    for gate in (DenseToSparseGate(3, 4, temperature=0.7), learned("linear")):
        before = gate.temperature.clone()
        gate.step()
        assert torch.equal(gate.temperature, before)


def test_step_does_not_recompile():
    gate = DenseToSparseGate(3, 4, temperature=4.0, final_temperature=0.25, steps=8, noise=None)
    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(tokens(5, 3)).probs, gate(tokens(5, 3)).probs)
            gate.step()


# Noise and pruning


@pytest.mark.claim(
    69, "Gumbel noise: the largest weight is expert i with probability softmax(logits)_i"
)
def test_gumbel_max():
    """The Gumbel-max identity; it fails for noise of another sign, scale or law."""
    gate = with_weights(DenseToSparseGate(1, 3, temperature=0.7), [[1.0], [-0.5], [0.2]])
    draws = 60_000
    torch.manual_seed(0)
    top = gate(torch.ones(draws, 1)).weights.argmax(-1)
    expected = torch.tensor(softmax([1.0, -0.5, 0.2]))
    share = top.bincount(minlength=3) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() < 3.5 * error).all()


@pytest.mark.claim(
    69, "Training weights have the law of softmax((log softmax + Gumbel) / tau), by its CDF"
)
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_law_of_the_weights(tau):
    """For two experts g_0 = sigmoid((l0 - l1 + L) / tau) with L logistic."""
    gate = DenseToSparseGate(1, 2, temperature=tau, threshold=0.0)
    with_weights(gate, [[0.8], [0.1]])
    draws = 40_000
    torch.manual_seed(0)
    first = gate(torch.ones(draws, 1)).weights[:, 0]
    for level in (0.1, 0.4, 0.8):
        below = sigmoid(tau * math.log(level / (1 - level)) - 0.7)
        error = math.sqrt(below * (1 - below) / draws)
        assert float((first <= level).double().mean()) == pytest.approx(below, abs=3.5 * error)


@pytest.mark.claim(
    69, "Pruned weights are zero and kept ones unchanged, without renormalisation", tolerance=0.0
)
@pytest.mark.parametrize("noise", ["gumbel", None])
def test_pruning(noise):
    def weights(threshold):
        gate = DenseToSparseGate(3, 4, threshold=threshold, noise=noise)
        torch.manual_seed(0)
        return with_weights(gate, 2 * tokens(4, 3, seed=1))(tokens(40, 3))

    whole, pruned = weights(0.0), weights(0.2)
    torch.testing.assert_close(whole.weights.sum(-1), torch.ones(40))
    kept = whole.weights > 0.2
    assert torch.equal(pruned.mask, kept)
    assert torch.equal(pruned.weights, torch.where(kept, whole.weights, 0))
    assert torch.equal(pruned.probs, whole.probs)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(whole.experts, torch.arange(4).expand(40, 4))


@pytest.mark.claim(69, "The mean number of active experts falls with tau")
def test_active_experts_fall_with_temperature():
    active = []
    for tau in (4.0, 2.0, 1.0, 0.5, 0.25, 0.1):
        gate = with_weights(DenseToSparseGate(3, 8, temperature=tau), tokens(8, 3, seed=1))
        torch.manual_seed(0)
        active.append(float(gate(tokens(200, 3)).load.sum()) / 200)
    assert active == sorted(active, reverse=True)
    assert active[0] > 7
    assert active[-1] < 2


@pytest.mark.claim(
    69, "Evaluation uses the best expert with its softmax probability", tolerance=1e-6
)
def test_evaluation():
    x, weight = tokens(40, 3), tokens(4, 3, seed=1)
    gate = with_weights(DenseToSparseGate(3, 4, temperature=0.5), weight).eval()
    routing = gate(x)
    expected = (2 * x @ weight.T).softmax(-1).max(-1)
    assert torch.equal(routing.experts[:, 0], expected.indices)
    torch.testing.assert_close(routing.weights[:, 0], expected.values)
    assert routing.weights.shape == (40, 1)
    two = with_weights(DenseToSparseGate(3, 4, temperature=0.5, eval_top_k=2), weight).eval()(x)
    torch.testing.assert_close(two.weights, (2 * x @ weight.T).softmax(-1).topk(2).values)
    plain = with_weights(DenseToSparseGate(3, 4, noise=None, temperature=0.5), weight)
    assert torch.equal(plain.train()(x).weights, plain.eval()(x).weights)


def test_hard_mode_keeps_only_the_largest_noisy_weight():
    def routing(soft):
        gate = DenseToSparseGate(3, 4, soft=soft, threshold=0.0)
        torch.manual_seed(0)
        return with_weights(gate, tokens(4, 3, seed=1))(tokens(40, 3))

    best = routing(True).weights.max(-1)
    hard = routing(False)
    assert torch.equal(hard.experts[:, 0], best.indices)
    assert torch.equal(hard.weights[:, 0], best.values)
    assert hard.load.sum() == 40


def test_top_expert_is_kept_below_the_threshold():
    x = tokens(6, 3)
    gate = with_weights(DenseToSparseGate(3, 4, threshold=0.9, noise=None), torch.zeros(4, 3))
    routing = gate(x)
    assert torch.equal(routing.mask, torch.tensor([[True, False, False, False]]).expand(6, 4))
    assert routing.weights[:, 0].tolist() == [0.25] * 6
    loose = DenseToSparseGate(3, 4, threshold=0.24, noise=None, keep_top=False)
    assert with_weights(loose, torch.zeros(4, 3))(x).mask.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"temperature": "cold"}, "temperature: expected a number or 'learned', got 'cold'"),
        ({"final_temperature": 0.1}, "final_temperature, steps: expected both or neither"),
        ({"steps": 10}, "final_temperature, steps: expected both or neither"),
        ({"final_temperature": -0.1, "steps": 10}, "final_temperature: expected"),
        ({"final_temperature": 0.1, "steps": 0}, "steps: expected an integer at least 1"),
        (
            {"temperature": "learned", "final_temperature": 0.1, "steps": 3},
            "final_temperature: expected None with temperature='learned'",
        ),
        ({"schedule": "cosine"}, "schedule: expected 'exponential' or 'linear', got 'cosine'"),
        ({"noise": "normal"}, "noise: expected 'gumbel' or None, got 'normal'"),
        ({"threshold": 1.0}, r"threshold: expected a number in \[0, 1\), got 1.0"),
        ({"threshold": -0.1}, "threshold: expected"),
        ({"threshold": 0.25, "keep_top": False}, "1 / num_experts = 0.25 without keep_top"),
        ({"eval_top_k": 5}, "eval_top_k: expected an integer from 1 to 4, got 5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DenseToSparseGate(3, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "cubic"}, "activation: expected a function or sigmoid, .*, got 'cubic'"),
        ({"temperature": -1.0}, "temperature: expected a finite number above 0, got -1.0"),
        ({"num_experts": 0}, "num_experts: expected"),
    ],
)
def test_bad_options_of_the_activation_gate(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationDenseToSparseGate(**{"dim": 3, "num_experts": 4} | options)
