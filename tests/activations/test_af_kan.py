"""AF-KAN equals its formulas in numpy, scaled by sample or by batch, and counts its parameters."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from torchzoo.activations import AFKAN, AFKANLayer, KANLinear, PairBasis, ReLUProductBasis
from torchzoo.activations.af_kan import REDUCTIONS, combine_branches
from torchzoo.activations.basis import ACTIVATIONS
from torchzoo.activations.pair_basis import COMBINATIONS

SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

ACT = {
    "softplus": lambda x: np.log1p(np.exp(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "selu": lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(x)),
    "tanh": np.tanh,
}
COMBINE = {
    "quad1": lambda p, n: p**2 * n**2,
    "quad2": lambda p, n: p * n + p**2 + n**2,
    "sum": lambda p, n: p + n,
    "prod": lambda p, n: p * n,
    "sum_prod": lambda p, n: p + n + p * n,
    "cubic1": lambda p, n: (p + n) * (p**2 + n**2),
    "cubic2": lambda p, n: p**3 * n**3,
}


def inputs(*shape, seed=0, low=-0.5, high=1.5):
    return np.random.default_rng(seed).uniform(low, high, shape)


def moved(layer, seed=0):
    """The layer with every parameter off its start, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return layer


def array(tensor):
    return tensor.detach().numpy()


def pairs(basis, x):
    p = ACT[basis.activation](x[..., None] - array(basis.low))
    n = ACT[basis.activation](array(basis.high) - x[..., None])
    return COMBINE[basis.combine](p, n)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def reduce(layer, phi, reduction):
    tau = max(layer.temperature.item(), 1) if layer.temperature is not None else 1
    if reduction == "spatial_attn":
        kernel, bias = array(layer.conv.weight)[:, 0], array(layer.conv.bias)
        padded = np.pad(phi, ((0, 0), (1, 1), (0, 0)))  # over the inputs
        d = phi.shape[1]
        scores = sum(padded[:, t : t + d] * kernel[:, t] for t in range(3)) + bias
        return (softmax(scores / tau, -1) * phi).sum(-1)
    score = phi @ array(layer.score.weight)[0] + layer.score.bias.item()
    if reduction == "multistep":
        return score
    return softmax(score / tau, 1) * phi.sum(-1)


def outputs(layer, r):
    mean, var = r.mean(-1, keepdims=True), r.var(-1, keepdims=True)
    h = (r - mean) / np.sqrt(var + 1e-5) * array(layer.norm.weight) + array(layer.norm.bias)
    return ACT[layer.basis.activation](h) @ array(layer.weight).T


def scaled(phi, axes):
    low, high = phi.min(axes, keepdims=True), phi.max(axes, keepdims=True)
    return (phi - low) / (high - low)


@pytest.mark.claim(
    8, "Every combination of every activation equals its formula in numpy", tolerance=1e-6
)
@pytest.mark.parametrize("combine", list(COMBINATIONS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_pairs_are_the_formulas(combine, activation):
    basis = PairBasis(5, 3, activation, combine, dtype=torch.float64)
    low = (np.arange(8) - 3) / 5
    np.testing.assert_allclose(array(basis.low), low, rtol=0, atol=1e-15)
    np.testing.assert_allclose(array(basis.high), low + 4 / 5, rtol=0, atol=1e-15)
    x = inputs(4, 6)
    for one in (basis, moved(basis)):
        got = array(one(torch.as_tensor(x)))
        np.testing.assert_allclose(got, pairs(one, x), rtol=1e-12, atol=1e-12)


@pytest.mark.claim(
    8, "Each reduction's layer, scaled per sample, equals its formula in numpy", tolerance=1e-6
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("combine", ["quad1", "sum"])
def test_layers_are_the_formulas(reduction, combine):
    torch.manual_seed(0)
    layer = moved(AFKANLayer(6, 3, reduction=reduction, combine=combine, dtype=torch.float64))
    x = inputs(4, 6)
    phi = scaled(pairs(layer.basis, x), (1, 2))
    r = reduce(layer, phi, reduction)
    np.testing.assert_allclose(array(layer.reduce(torch.as_tensor(x))), r, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        array(layer(torch.as_tensor(x))), outputs(layer, r), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("tau", "used"), [(0.2, 1.0), (3.0, 3.0)])
def test_the_temperature_counts_from_one_on(tau, used):
    layer = AFKANLayer(6, 3, func_norm="none", dtype=torch.float64)
    assert layer.temperature.item() == pytest.approx(math.sqrt(6))
    with torch.no_grad():
        layer.temperature.fill_(tau)
    phi = pairs(layer.basis, inputs(4, 6))
    score = phi @ array(layer.score.weight)[0] + layer.score.bias.item()
    expected = softmax(score / used, 1) * phi.sum(-1)
    np.testing.assert_allclose(array(layer.reduce(torch.as_tensor(inputs(4, 6)))), expected, 1e-12)


@pytest.mark.claim(
    8,
    "ReLU pairs under quad1 are ReLU-KAN's basis over 16 g^4 / (k + 1)^4, with support (l_j, u_j)",
    tolerance=1e-6,
)
@pytest.mark.parametrize(("g", "k"), [(5, 3), (3, 0), (4, 2)])
def test_relu_quad1_is_relu_kan(g, k):
    basis = PairBasis(g, k, "relu", "quad1", train_grid=False, dtype=torch.float64)
    assert not basis.low.requires_grad
    assert not basis.high.requires_grad
    x = torch.linspace(-1.5, 2.5, 801, dtype=torch.float64)[:, None]
    constant = 16 * g**4 / (k + 1) ** 4
    phi = basis(x)
    torch.testing.assert_close(constant * phi, ReLUProductBasis(g, k)(x), rtol=0, atol=1e-6)
    inside = (x > basis.low) & (x < basis.high)
    edge = ((x - basis.low).abs() < 1e-9) | ((x - basis.high).abs() < 1e-9)
    assert torch.equal((phi[:, 0] > 0)[~edge], inside[~edge])
    layer = AFKANLayer(
        4, 2, grid_size=g, order=k, activation="relu", func_norm="none", train_grid=False
    )
    part = torch.rand(5, 4)
    expected = ReLUProductBasis(g, k)(part).mT
    torch.testing.assert_close(constant * layer._functions(part), expected, rtol=0, atol=1e-6)


@pytest.mark.claim(
    8, "A global_attn layer has D O + 2 D + (K + 1) + 2 K + 1 parameters", tolerance=0
)
@pytest.mark.parametrize(("d", "out", "g", "k"), [(784, 64, 5, 3), (5, 7, 4, 1)])
def test_parameter_count(d, out, g, k):
    layer = AFKANLayer(d, out, grid_size=g, order=k)
    functions = g + k
    count = sum(p.numel() for p in layer.parameters())
    assert count == d * out + 2 * d + (functions + 1) + 2 * functions + 1
    if d == 784:
        assert count == 784 * 64 + 2 * 784 + 9 + 16 + 1
    assert sum(p.numel() for p in AFKAN((64, 32, 10)).parameters()) == 2612
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.claim(
    8,
    "func_norm='batch' equals the authors' order of steps in numpy, and couples the batch",
    tolerance=1e-6,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scaling_over_the_batch(reduction):
    torch.manual_seed(1)
    layer = moved(AFKANLayer(6, 3, reduction=reduction, func_norm="batch", dtype=torch.float64))
    x = inputs(4, 6)
    phi = pairs(layer.basis, x)
    phi = phi / np.sqrt((phi**2).sum())  # of no effect, as what follows undoes it
    r = reduce(layer, scaled(phi, (0, 1, 2)), reduction)
    got = layer(torch.as_tensor(x))
    np.testing.assert_allclose(array(got), outputs(layer, r), rtol=0, atol=1e-10)
    change = layer.reduce(torch.as_tensor(x[2:])) - layer.reduce(torch.as_tensor(x))[2:]
    assert change.abs().max() > 1e-4
    if reduction != "multistep":  # of which LayerNorm undoes the scaling again
        assert (layer(torch.as_tensor(x[2:])) - got[2:]).abs().max() > 1e-4


@pytest.mark.claim(
    8, "func_norm='sample' leaves a sample's output alone when the others change", tolerance=1e-6
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scaling_per_sample(reduction):
    layer = AFKANLayer(6, 3, reduction=reduction, dtype=torch.float64)
    x = torch.as_tensor(inputs(5, 6))
    torch.testing.assert_close(layer(x[:2]), layer(x)[:2], rtol=0, atol=1e-12)
    phi = layer._functions(x)
    assert torch.equal(phi.amin((1, 2)), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(phi.amax((1, 2)), torch.ones(5, dtype=torch.float64))


@pytest.mark.claim(
    8, "Functions that are all equal give finite outputs and gradients", tolerance=None
)
@pytest.mark.parametrize("func_norm", ["sample", "batch"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_constant_functions(func_norm, reduction):
    layer = AFKANLayer(3, 2, activation="relu", func_norm=func_norm, reduction=reduction)
    x = torch.full((4, 3), 50.0, requires_grad=True)  # beyond every pair's support: all 0
    assert torch.equal(layer._functions(x), torch.zeros(4, 8, 3))
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.claim(8, "Gradients of x, l, u and tau pass gradcheck in float64", tolerance=1e-6)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("func_norm", ["sample", "none"])
def test_gradients(reduction, func_norm):
    torch.manual_seed(0)
    layer = AFKANLayer(3, 2, grid_size=2, order=1, reduction=reduction, func_norm=func_norm)
    layer.double()
    x = torch.as_tensor(inputs(2, 3)).requires_grad_()
    names = ["basis.low", "basis.high", "weight"]
    names += ["temperature"] if reduction != "multistep" else []
    start = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *start))


@pytest.mark.claim(8, "The weights of global_attn sum to 1 over the inputs", tolerance=1e-6)
def test_attention_is_over_the_inputs():
    layer = AFKANLayer(6, 3, func_norm="none", dtype=torch.float64)
    x = torch.as_tensor(inputs(4, 6))
    weights = layer.reduce(x) / layer._functions(x).sum(-2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))
    assert weights.std() > 0


@pytest.mark.claim(
    8,
    "Sequences, bfloat16 autocast and torch.compile give what flat float32 batches give",
    tolerance=0.05,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sequences_autocast_compile(reduction):
    torch.manual_seed(0)
    layer = AFKANLayer(6, 3, reduction=reduction)
    x = torch.rand(2, 5, 6)
    y = layer(x)
    torch.testing.assert_close(y, layer(x.reshape(10, 6)).reshape(2, 5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert (half.float() - y).norm() < 0.05 * y.norm()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


def test_streams_share_weights_and_only_outputs_meet():
    torch.manual_seed(0)
    model = AFKAN((6, 4, 3), branches=REDUCTIONS, branch_combine="quadratic", grid_size=3)
    x = torch.rand(5, 6)
    alone = []
    for name in REDUCTIONS:
        h = x
        for layer in model.layers:
            h = layer(h, name)
        alone.append(h)
    a, b, c = alone
    expected = (a + b + c) + a * b * c + (a * a + b * b + c * c)
    torch.testing.assert_close(model(x), expected)
    stack = torch.stack(alone)
    torch.testing.assert_close(combine_branches(stack, "sum"), a + b + c)
    torch.testing.assert_close(combine_branches(stack, "product"), a * b * c)
    torch.testing.assert_close(combine_branches(stack, "sum_product"), a + b + c + a * b * c)
    one = AFKAN((6, 4, 3), branches=("multistep",))
    torch.testing.assert_close(one(x), one.layers[1](one.layers[0](x)))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_other_norms(norm):
    layer = AFKANLayer(6, 3, norm=norm, dtype=torch.float64)
    x = torch.as_tensor(inputs(2, 4, 6))
    r = layer.reduce(x)
    if norm == "batch":
        flat = r.reshape(8, 6)
        r = (r - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    expected = torch.nn.functional.silu(r) @ layer.weight.T
    torch.testing.assert_close(layer(x), expected)


def upstream_state(layer):
    """A state as the published code saves it, weights of unused reductions included."""
    names = {
        "phase_low": layer.basis.low,
        "phase_high": layer.basis.high,
        "temperature": layer.temperature,
        "base_weight": layer.weight,
        "base_weight_bias": torch.zeros(1, layer.out_features),
        "norm.weight": layer.norm.weight,
        "norm.bias": layer.norm.bias,
        "query_self.weight": torch.zeros(8, 8),
        "gk_linear.weight": layer.score.weight,
        "gk_linear.bias": layer.score.bias,
        "conv1d.weight": torch.zeros(8, 1, 3),
        "conv1d.bias": torch.zeros(8),
    }
    return {name: tensor.detach().clone() for name, tensor in names.items()}


def test_published_weights_load():
    old, new = moved(AFKAN((6, 4, 3))), AFKAN((6, 4, 3))
    state = {
        f"rk_layers.{i}.{name}": tensor
        for i, layer in enumerate(old.layers)
        for name, tensor in upstream_state(layer).items()
    }
    new.load_all_kan_state_dict(state)
    x = torch.rand(5, 6)
    assert torch.equal(new(x), old(x))
    del state["rk_layers.1.gk_linear.bias"]
    with pytest.raises(ValueError, match=r"state: expected gk_linear.bias .* got nothing"):
        new.load_all_kan_state_dict(state)
    bad = upstream_state(old.layers[0]) | {"phase_low": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"state: expected phase_low .*\(8,\), got \(9,\)"):
        new.layers[0].load_all_kan_state_dict(bad)


def test_pairs_as_the_basis_of_a_full_layer():
    layer = KANLinear(6, 3, PairBasis(4, 2), base_weight=False)
    x = torch.rand(5, 6)
    expected = torch.einsum("nik,oik->no", layer.basis(x), layer.coef)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AFKANLayer(4, 2, activation="sine"), "activation: expected one of softplus, sig"),
        (lambda: AFKANLayer(4, 2, combine="quad3"), "combine: expected one of quad1, quad2, sum"),
        (lambda: AFKANLayer(4, 2, reduction="max"), "reduction: expected one of global_attn, mul"),
        (lambda: AFKANLayer(4, 2, reduction=()), "reduction: expected at least one"),
        (lambda: AFKANLayer(4, 2, grid_size=0), "grid_size: expected an integer of at least 1"),
        (lambda: AFKANLayer(4, 2)(torch.zeros(3, 5)), r"x: expected .*4\), got .*5\)"),
        (lambda: AFKANLayer(4, 2)(torch.zeros(3, 4), "multistep"), "reduction: expected one of"),
        (lambda: AFKAN((4,)), "widths: expected at least two"),
        (lambda: AFKAN((4, 2), branches=()), "branches: expected names"),
        (lambda: AFKAN((4, 2), branch_combine="mean"), "branch_combine: expected one of sum"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
