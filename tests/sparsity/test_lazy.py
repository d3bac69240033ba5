"""Top-k activation against sorting by hand, and the theorems on why neurons become lazy."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchzoo.sparsity import (
    ActivationMeter,
    SparseFFN,
    TopKActivation,
    TopKFFN,
    activation_gradient_at_init,
    convert_topk,
    find_ffns,
    topk_activation,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x, k):
    """Each token by itself: the k largest of relu(x), the lowest index first among equals."""
    kept = torch.zeros_like(x)
    for token, out in zip(x.flatten(0, -2), kept.flatten(0, -2), strict=True):
        order = sorted(range(len(token)), key=lambda i: (-max(token[i].item(), 0.0), i))
        for i in order[:k]:
            out[i] = max(token[i].item(), 0.0)
    return kept


@pytest.mark.claim(
    149, "The k largest of relu(x) are kept, ties going to the lowest index", tolerance=0.0
)
@given(f=st.integers(1, 12), k=st.integers(1, 12), tied=st.booleans(), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_against_sorting(f, k, tied, seed):
    k = min(k, f)
    x = draw(2, 3, f, seed=seed)
    x = x.round() if tied else x
    expected = by_hand(x, k)
    assert torch.equal(topk_activation(x, k), expected)
    assert torch.equal(TopKActivation(k)(x), expected)
    values, indices = topk_activation(x, k, return_indices=True)
    assert (values.diff() <= 0).all()
    assert torch.equal(torch.zeros_like(x).scatter(-1, indices, values), expected)
    loose = topk_activation(x, k, sorted_ties=False)
    assert torch.equal(loose.sort(-1).values, expected.sort(-1).values)
    values, indices = topk_activation(x, k, sorted_ties=False, return_indices=True)
    assert torch.equal(torch.zeros_like(x).scatter(-1, indices, values).sum(-1), expected.sum(-1))


@pytest.mark.claim(149, "At most k entries are left, k = f is relu, k = 1 the maximum alone")
@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_extremes(seed):
    x = draw(5, 9, seed=seed)
    assert torch.equal(topk_activation(x, 9), x.relu())
    largest = x.max(-1)
    one_hot = F.one_hot(largest.indices, 9) * largest.values.relu()[:, None]
    assert torch.equal(topk_activation(x, 1), one_hot)
    positive = (x > 0).sum(-1)
    for k in range(1, 10):
        assert torch.equal((topk_activation(x, k) > 0).sum(-1), positive.clamp_max(k))


@pytest.mark.claim(
    149, "The gradient is the upstream one at kept positive entries and 0 elsewhere", tolerance=0.0
)
@pytest.mark.parametrize("return_indices", [False, True])
def test_gradient(return_indices):
    x, upstream = draw(6, 10).requires_grad_(), draw(6, 10, seed=1)
    kept = by_hand(x.detach(), 4) > 0
    if return_indices:
        values, indices = topk_activation(x, 4, return_indices=True)
        (values * upstream.gather(-1, indices)).sum().backward()
    else:
        (topk_activation(x, 4) * upstream).sum().backward()
    assert torch.equal(x.grad, torch.where(kept, upstream, 0.0))
    assert 0 < kept.sum() < 24
    assert torch.autograd.gradcheck(lambda x: topk_activation(x, 4), x)


def test_other_activations_and_nan():
    x = draw(4, 8)
    for name, function in (
        ("relu2", lambda z: z.relu() ** 2),
        ("silu", F.silu),
        ("gelu", F.gelu),
        (torch.tanh, torch.tanh),
    ):
        a = function(x)
        found = topk_activation(x, 6, activation=name)  # some of the six are negative
        limit = a.sort(descending=True).values[:, 5:6]
        torch.testing.assert_close(found, torch.where(a >= limit, a, 0.0))
        assert torch.equal(TopKActivation(6, activation=name)(x), found)
        values, indices = topk_activation(x, 6, activation=name, return_indices=True)
        assert torch.equal(torch.zeros_like(x).scatter(-1, indices, values), found)
    x[1, 2] = torch.nan
    assert topk_activation(x, 2, activation="silu")[1, 2].isnan()
    assert topk_activation(x, 2, activation="silu").isnan().sum() == 1


@pytest.mark.claim(
    149, "Reading k rows gives the values and gradients of the masked dense layer", tolerance=1e-5
)
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_compact_layer(tokens):
    torch.manual_seed(0)
    layer = TopKFFN(12, 48, 5, policy="sparse").double()
    dense = copy.deepcopy(layer)
    x = draw(tokens, 12).requires_grad_()
    y, upstream = layer(x), draw(tokens, 12, seed=1)
    h = by_hand(F.linear(x, dense.up_proj.weight, dense.up_proj.bias).detach(), 5) > 0
    twin = x.detach().clone().requires_grad_()
    expected = dense.down_proj(torch.where(h, dense.up_proj(twin), 0.0))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-5)
    for (name, mine), other in zip(layer.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert not layer.gated
    assert layer.up_proj.bias is not None
    assert ((layer.hidden(x) > 0).sum(-1) <= 5).all()


@pytest.mark.claim(149, "Order of the hidden units does not matter", tolerance=1e-6)
@pytest.mark.parametrize("policy", ["sparse", "dense"])
def test_permuted_neurons(policy):
    torch.manual_seed(0)
    layer = TopKFFN(6, 20, 4, policy=policy)
    x, order = torch.randn(9, 6), torch.randperm(20)
    before = layer(x)
    with torch.no_grad():
        layer.up_proj.weight.copy_(layer.up_proj.weight[order])
        layer.up_proj.bias.copy_(layer.up_proj.bias[order])
        layer.down_proj.weight.copy_(layer.down_proj.weight[:, order])
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.claim(
    149, "In bfloat16 the choice is made by the rounded values, compiled or not", tolerance=0.0
)
def test_bfloat16_and_compiled():
    # 1 + 2^-9 and 1 are one number in bfloat16: the tie goes to the lower index
    x = torch.tensor([[1.0, 1 + 2**-9, 0.5, 0.25]])
    assert topk_activation(x, 1).nonzero().tolist() == [[0, 1]]
    assert topk_activation(x.bfloat16(), 1).nonzero().tolist() == [[0, 0]]
    model = nn.Sequential(nn.Linear(4, 4, bias=False), TopKActivation(1))
    nn.init.eye_(model[0].weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        assert y.nonzero().tolist() == [[0, 0]]
    assert torch.equal(compiled(x), model(x))


def mlp(hidden, outputs, h):
    """An MLP whose hidden units are `h`, for any input of ones."""
    model = nn.Sequential(
        nn.Linear(1, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, outputs, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(h[:, None])
    return model


def mse(y, target):
    return 0.5 * (y - target).square().sum()


@pytest.mark.claim(
    149,
    "Under a mean squared error the expected slope in unit i is C s² h_i, whatever the target: "
    "4 standard errors over 20,000 draws",
)
def test_mse_theorem():
    c, s, h = 10, 0.7, draw(6).abs() + 0.1
    v = s * draw(20_000, c, 6, seed=1)
    for target in (torch.zeros(c), 5 * draw(c, seed=2)):
        y = (v @ h).requires_grad_()
        (slope,) = torch.autograd.grad(mse(y, target), y)
        by_unit = torch.einsum("nci,nc->ni", v, slope)
        error = by_unit.std(0) / 20_000**0.5
        assert ((by_unit.mean(0) - c * s**2 * h).abs() < 4 * error).all()
    signed = torch.cat([h, -h])
    model = mlp(12, c, signed)
    size = model[2].weight.square().mean()
    found = [
        activation_gradient_at_init(
            *(model, torch.ones(1, 1).double(), t, mse, 1000),
            generator=torch.Generator().manual_seed(0),
        )[""]
        for t in (torch.zeros(c), 5 * draw(c, seed=2))
    ]
    assert found[0].mean == pytest.approx(found[1].mean, rel=1e-10)
    expected = c * size.item() * h.mean().item()  # units below 0 don't count
    assert abs(found[0].mean - expected) < 4 * found[0].std_error
    assert found[0].std_error < 0.1 * expected


@pytest.mark.claim(
    149,
    "Under cross-entropy the expected slope in active units is above 0 by 5 standard errors, for "
    "true, shuffled and constant labels",
)
@pytest.mark.parametrize("c", [2, 10, 100])
def test_cross_entropy_theorem(c):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, c)).double()
    x = draw(32, 5)
    labels = model(x).argmax(-1)
    means = []
    for y in (labels, labels[torch.randperm(32)], torch.zeros_like(labels)):
        generator = torch.Generator().manual_seed(0)
        found = activation_gradient_at_init(model, x, y, F.cross_entropy, 100, generator=generator)[
            ""
        ]
        assert found.mean > 5 * found.std_error > 0
        means.append(found.mean)
    assert means == pytest.approx(means[:1] * 3, rel=1e-9)


@pytest.mark.claim(149, "For small h the expected slope is s² h_i (C - 1) / C", tolerance=0.05)
@pytest.mark.parametrize("c", [2, 10, 100])
def test_cross_entropy_to_first_order(c):
    s, n = 0.5, 200_000 // c
    h = torch.tensor([0.02, 0.05, 0.08], dtype=torch.float64)
    h *= 0.05 / s / h.norm()
    v = s * draw(n, c, 3, seed=3)
    slopes = [torch.einsum("nci,nc->ni", w, (w @ h).softmax(-1)).mean(0) for w in (v, -v)]
    torch.testing.assert_close(sum(slopes) / 2, s**2 * h * (c - 1) / c, rtol=0.05, atol=0)
    model = mlp(3, c, h)
    size = model[2].weight.square().mean().item()
    found = activation_gradient_at_init(
        *(model, torch.ones(1, 1).double(), torch.tensor([0]), F.cross_entropy, 1000),
        generator=torch.Generator().manual_seed(1),
    )[""]
    expected = size * h.mean().item() * (c - 1) / c
    assert found.mean == pytest.approx(expected, abs=4 * found.std_error + 0.01 * expected)


def test_gradient_at_init_of_any_model(host):
    """Every layer has a slope, positive or not; weights and outputs are as before."""
    first = lambda out: out if isinstance(out, torch.Tensor) else out[0]  # noqa: E731
    before = copy.deepcopy(host.model.state_dict())

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = host.model

        def forward(self, inputs):
            return first(self.model(*inputs))

    found = activation_gradient_at_init(
        Called(), host.inputs, 0.0, lambda out, _: out.square().mean(), 2
    )
    assert tuple(name.removeprefix("model.") for name in found) == host.ffns
    assert all(slope.std_error >= 0 and slope.mean != 0 for slope in found.values())
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradient_at_init_of_frozen_and_sparse_layers():
    torch.manual_seed(0)
    layer = SparseFFN(4, 16, gated=False, policy="sparse").requires_grad_(False)
    x, generator = torch.randn(8, 4), torch.Generator().manual_seed(0)
    found = activation_gradient_at_init(layer, x, 0.0, mse, 50, generator=generator)[""]
    size = layer.down_proj.weight.square().mean().item()
    h = layer.hidden(x)
    assert abs(found.mean - 4 * size * h[h > 0].mean().item()) < 4 * found.std_error
    assert layer.policy == "sparse"
    with pytest.raises(ValueError, match="n_draws: expected at least 2, got 1"):
        activation_gradient_at_init(layer, x, 0.0, mse, 1)


@pytest.mark.claim(149, "A converted model has at most k active neurons a token in every layer")
def test_conversion(host):
    k, before = 3, host.model(*host.inputs)[0]
    report = convert_topk(host.model, k)
    acts = [f"{name}.{ffn.activation}" for name, ffn in find_ffns(host.model).items()]
    assert report.names == tuple(acts)
    with torch.no_grad(), ActivationMeter(host.model) as meter:
        host.model(*host.inputs)
    assert (meter.shares <= k / host.hidden + 1e-12).all()
    with torch.no_grad():  # without hooks, where torch's own layers take a path of their own
        watched = host.model(*host.inputs)[0]
        for ffn in find_ffns(host.model).values():
            owner, _, name = ffn.activation.rpartition(".")
            wrapper = getattr(ffn.module.get_submodule(owner), name)
            assert isinstance(wrapper, TopKActivation)
            wrapper.k = host.hidden
        torch.testing.assert_close(host.model(*host.inputs)[0], before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(watched, before)


def test_conversion_of_own_layers_and_errors(tmp_path):
    model = nn.Sequential(SparseFFN(4, 16), TopKFFN(4, 16, 9))
    assert convert_topk(model, 5).names == ("0", "1")
    assert [layer.top_k for layer in model] == [5, 5]
    again = TopKFFN.from_pretrained(model[1].save_pretrained(tmp_path / "ffn"))
    assert again.top_k == 5
    with pytest.raises(ValueError, match="k: expected 1 to f = 16, the neurons of 0, got 17"):
        convert_topk(model, 17)
    assert [layer.top_k for layer in model] == [5, 5]
    for call, message in (
        (lambda: topk_activation(torch.ones(3), 4), "k: expected 1 to f = 3.*got 4"),
        (lambda: topk_activation(torch.ones(3), 0), "k: expected 1 to f = 3"),
        (lambda: topk_activation(torch.ones(3, dtype=torch.int64), 1), "x: expected a floating"),
        (lambda: topk_activation(torch.tensor(1.0), 1), "x: expected shape"),
        (lambda: topk_activation(torch.ones(3), 1, activation="tanh"), "activation: expected"),
        (lambda: TopKFFN(4, 8), "k: expected 1 to f = 8, hidden_dim, got 128"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
