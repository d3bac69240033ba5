"""EvoNorm against NumPy in float64, against timm, and over two processes against one."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from timm.layers import evo_norm as timm_layers
from torch import nn

from torchzoo.activations import (
    EvoNormB0,
    EvoNormB1,
    EvoNormB2,
    EvoNormS0,
    EvoNormS1,
    EvoNormS2,
    convert_norm_act,
    evonorm_b0,
    evonorm_s0,
)
from torchzoo.testing.ranks import run_ranks

BATCH, SAMPLE = [EvoNormB0, EvoNormB1, EvoNormB2], [EvoNormS0, EvoNormS1, EvoNormS2]
ALL = BATCH + SAMPLE


def drawn(*shape, seed=0, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(*shape, generator=g, dtype=torch.float64)


def trained(layer, seed=1):
    """The layer with other parameters than those it starts with."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed + i, shift=0.5).to(parameter.dtype)
    return layer


def numpy_evonorm(layer, x, running_var=None):
    """The definitions, a sample, channel and group at a time."""
    kind, eps = type(layer).__name__[-2:], layer.eps
    gamma, beta, v = (
        None if p is None else p.detach().double().numpy()
        for p in (layer.weight, layer.bias, layer.v)
    )
    out = np.empty_like(x)
    n, channels = x.shape[:2]
    for s in range(n):
        for c in range(channels):
            t = x[s, c]
            if kind[0] == "S":
                size = channels // layer.groups
                group = x[s, c // size * size : (c // size + 1) * size]
                moment = (group**2).mean() if kind == "S2" else group.var()
                slope = v[c] if kind == "S0" else 1.0
                y = t / (1 + np.exp(-slope * t)) / np.sqrt(moment + eps)
            else:
                var = x[:, c].var() if running_var is None else running_var[c]
                other = {
                    "B0": lambda t=t, c=c: v[c] * t + np.sqrt(t.var() + eps),
                    "B1": lambda t=t: (t + 1) * np.sqrt((t**2).mean() + eps),
                    "B2": lambda t=t: np.sqrt((t**2).mean() + eps) - t,
                }[kind]()
                y = t / np.maximum(np.sqrt(var + eps), other)
            out[s, c] = y * gamma[c] + beta[c]
    return out


@pytest.mark.claim(
    40, "All six layers equal their definitions in NumPy, in both modes", tolerance=1e-6
)
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 3, 4), (3, 6, 2, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_numpy(kind, training, shape):
    x = drawn(*shape, shift=0.3, scale=1.5)
    for groups in (1, 2, 6) if kind in SAMPLE else (None,):
        options = {"groups": groups} if groups else {}
        layer = trained(kind(6, dtype=torch.float64, eps=1e-3, **options)).train(training)
        running = None
        if kind in BATCH:
            layer.running_var.copy_(drawn(6, seed=9).abs() + 0.1)
            running = None if training else layer.running_var.numpy().copy()
        expected = numpy_evonorm(layer, x.numpy(), running)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.claim(40, "The running variance is that of the unbiased variances", tolerance=1e-12)
@pytest.mark.parametrize("kind", BATCH)
def test_running_variance(kind):
    layer = kind(3, momentum=0.2, dtype=torch.float64)
    expected = np.ones(3)
    for step in range(3):
        x = drawn(4, 3, 2, 3, seed=step, scale=1 + step)
        layer(x)
        expected = 0.8 * expected + 0.2 * x.numpy().var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(layer.running_var.numpy(), expected, rtol=1e-12)
    assert sorted(layer.state_dict()) == sorted(
        ["weight", "bias", "running_var"] + ["v"] * (kind is EvoNormB0)
    )
    layer.eval()(drawn(4, 3, 2, 3))
    np.testing.assert_allclose(layer.running_var.numpy(), expected, rtol=1e-12)


def peer(kind):
    return getattr(timm_layers, f"EvoNorm2d{kind.__name__[-2:]}")


@pytest.mark.claim(
    40,
    "timm's layers load strictly and give the same outputs, gradients and running variance",
    tolerance=1e-6,
)
@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_timm(kind, apply_act):
    theirs = trained(peer(kind)(64, apply_act=apply_act))
    ours = kind(64, eps=theirs.eps, nonlinear=apply_act)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for step in range(4):
        if step == 3:
            ours.eval(), theirs.eval()
        x = drawn(2, 64, 5, 7, seed=step, scale=2.0).float()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = drawn(2, 64, 5, 7, seed=20 + step).float()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
        ours.zero_grad(), theirs.zero_grad()
        y.backward(out), z.backward(out)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        for name, parameter in theirs.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    ours.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-5
                )
    if kind in BATCH:
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.claim(
    40, "A sample's output in the S series depends on no other sample, nor on the mode", tolerance=0
)
@pytest.mark.parametrize("kind", SAMPLE)
def test_samples_are_independent(kind):
    layer = trained(kind(8, groups=2))
    x = drawn(5, 8, 4, 4).float()
    y = layer(x)
    assert torch.equal(layer(torch.cat([x[:1], 100 * x[1:]]))[0], y[0])
    assert torch.equal(layer(x[:1])[0], y[0])
    assert torch.equal(layer.eval()(x), y)
    assert not list(layer.buffers())


@pytest.mark.claim(40, "S0 is x / (2 std) at v = 0 and relu(x) / std for large v", tolerance=1e-4)
def test_limits_of_s0():
    x = drawn(3, 8, 4, 4)
    group = x.unflatten(1, (2, 4))
    std = (group.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
    one, zero = torch.ones(8).double(), torch.zeros(8).double()
    half = (group / 2 / std).flatten(1, 2)
    relu = (group.relu() / std).flatten(1, 2)
    torch.testing.assert_close(evonorm_s0(x, one, zero, zero, groups=2), half, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        evonorm_s0(x, one, zero, 1e6 * one, groups=2), relu, rtol=0, atol=1e-4
    )


@pytest.mark.claim(40, "B0 and B2 do not see the scale of x; B1 and S2 do", tolerance=1e-4)
@pytest.mark.parametrize(
    ("kind", "invariant"),
    [(EvoNormB0, True), (EvoNormB1, False), (EvoNormB2, True), (EvoNormS2, False)],
)
def test_scale(kind, invariant):
    layer = trained(
        kind(4, eps=1e-12, dtype=torch.float64, **({"groups": 2} if kind in SAMPLE else {}))
    )
    x = drawn(3, 4, 4, 4)
    change = (layer(7.0 * x) - layer(x)).abs().max()
    assert change < 1e-4 if invariant else change > 0.1


@pytest.mark.claim(
    40, "A constant added to x changes S0's output but not what it divides by", tolerance=1e-6
)
def test_no_centring():
    layer = trained(EvoNormS0(4, groups=2, dtype=torch.float64))
    x, gamma, beta, v = drawn(3, 4, 4, 4), layer.weight, layer.bias, layer.v
    for moved in (x, x + 3):
        column = [p.detach().view(-1, 1, 1) for p in (gamma, beta, v)]
        gated = moved * torch.sigmoid(column[2] * moved)
        divisor = gated * column[0] / (layer(moved).detach() - column[1])
        std = (x.unflatten(1, (2, 2)).var((2, 3, 4), correction=0) + 1e-5).sqrt()
        expected = std.repeat_interleave(2, 1)[..., None, None].expand_as(x)
        torch.testing.assert_close(divisor, expected, rtol=1e-6, atol=1e-6)
    assert (layer(x + 3) - layer(x)).abs().max() > 0.5
    assert layer(x + 3).mean().abs() > 0.1


@pytest.mark.claim(
    40, "Gradients equal finite differences, and are finite for a constant input", tolerance=1e-6
)
@pytest.mark.parametrize("kind", ALL)
def test_gradients(kind):
    layer = trained(kind(4, dtype=torch.float64, **({"groups": 2} if kind in SAMPLE else {})))
    x = drawn(3, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    for value in (0.0, 2.5):
        for training in (True, False):
            flat = torch.full((2, 4, 3, 3), value, dtype=torch.float64, requires_grad=True)
            y = layer.train(training)(flat)
            y.sum().backward()
            assert y.isfinite().all()
            assert flat.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.claim(
    40, "In bfloat16 a layer is near float32, as statistics are in float32", tolerance=1e-2
)
@pytest.mark.parametrize("kind", ALL)
def test_bfloat16(kind):
    layer = trained(kind(8, **({"groups": 2} if kind in SAMPLE else {})))
    x = drawn(4, 8, 16, 16, scale=0.01).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = layer(x.float())
    assert ((y.float() - exact).norm() / exact.norm()).item() < 1e-2
    # 5000 of +-0.01 around 10: a mean square in bfloat16, or E[x²] - E[x]², has nothing left
    x = 10 + drawn(2, 8, 50, 50, scale=0.01).float()
    wide = trained(kind(8, dtype=torch.float64, **({"groups": 2} if kind in SAMPLE else {})))
    torch.testing.assert_close(layer(x), wide(x.double()).float(), rtol=2e-3, atol=2e-3)


def test_formats_and_functions():
    x = drawn(2, 8, 3, 5).float()
    for kind in ALL:
        options = {"groups": 2} if kind in SAMPLE else {}
        layer = trained(kind(8, **options))
        last = kind(8, channels_last=True, **options)
        last.load_state_dict(layer.state_dict())
        y = layer(x)
        torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), y)
        strided = layer(x.to(memory_format=torch.channels_last))
        assert strided.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(strided, y)
    b0 = trained(EvoNormB0(8))
    torch.testing.assert_close(evonorm_b0(x, b0.weight, b0.bias, b0.v), b0(x))
    s0 = trained(EvoNormS0(8, group_size=4))
    assert s0.groups == 2
    torch.testing.assert_close(evonorm_s0(x, s0.weight, s0.bias, s0.v, groups=2), s0(x))


def test_defaults():
    assert (EvoNormS0(64).groups, EvoNormB0(4).momentum) == (32, 0.1)
    assert {kind(32).eps for kind in ALL} == {1e-5}
    for kind in ALL:
        values = {name: p.unique().tolist() for name, p in kind(32).named_parameters()}
        assert values == {"weight": [1.0], "bias": [0.0]} | ({"v": [1.0]} if "v" in values else {})
    assert EvoNormS1(64, nonlinear=False).v is None


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"x: a batch variance needs .* got \(1, 4, 1, 1\)"):
        EvoNormB0(4)(torch.randn(1, 4, 1, 1))
    EvoNormB0(4).eval()(torch.randn(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"x: expected 1 to 3 spatial axes .* got \(5, 4\)"):
        EvoNormS0(4, 2)(torch.randn(5, 4))
    with pytest.raises(ValueError, match="x: expected 4 channels"):
        EvoNormS0(4, 2, channels_last=True)(torch.randn(5, 4, 3))
    with pytest.raises(ValueError, match="groups: expected a divisor of 48 channels, got 32"):
        EvoNormS0(48)


def test_backward_of_an_evaluation_after_an_update():
    layer = trained(EvoNormB0(4, dtype=torch.float64))
    x = drawn(3, 4, 2, 2).requires_grad_()
    y = layer.eval()(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer.train()(drawn(3, 4, 2, 2, seed=5, scale=9.0))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_without_running_statistics_evaluation_uses_the_batch():
    layer = EvoNormB0(4, track_running_stats=False)
    x = drawn(3, 4, 2, 2).float()
    assert torch.equal(layer(x), layer.eval()(x))
    assert "running_var" not in layer.state_dict()


# Two processes as one


CASES = [("EvoNormB0", (3, 2)), ("EvoNormB0", (5, 0)), ("EvoNormB1", (1, 4))]


def on_a_rank():
    return [one_case(*case) for case in CASES]


def one_case(kind_name, sizes):
    import torchzoo.activations as activations

    rank = dist.get_rank()
    x = drawn(sum(sizes), 4, 3, 2, shift=0.5)
    part = x.split(sizes)[rank].clone().requires_grad_()
    group = "world" if rank == 0 else dist.group.WORLD
    layer = trained(getattr(activations, kind_name)(4, process_group=group, dtype=torch.float64))
    y = layer(part)
    (y * drawn(*x.shape, seed=3).split(sizes)[rank]).sum().backward()
    grads = [p.grad for p in layer.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    return y.detach(), part.grad, layer.running_var, grads


@pytest.mark.claim(40, "Two processes equal one that has both batches", tolerance=1e-12)
def test_ranks():
    first, second = run_ranks(on_a_rank, 2)
    close = {"rtol": 0, "atol": 1e-12}
    for (name, sizes), one, two in zip(CASES, first, second, strict=True):
        x = drawn(sum(sizes), 4, 3, 2, shift=0.5).requires_grad_()
        kind = {"EvoNormB0": EvoNormB0, "EvoNormB1": EvoNormB1}[name]
        layer = trained(kind(4, dtype=torch.float64))
        y = layer(x)
        (y * drawn(*x.shape, seed=3)).sum().backward()
        torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([one[1], two[1]]), x.grad, **close)
        for got in (one, two):
            torch.testing.assert_close(got[2], layer.running_var, **close)
            for grad, parameter in zip(got[3], layer.parameters(), strict=True):
                torch.testing.assert_close(grad, parameter.grad, **close)


# Converting models


def test_convert_sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).double()
    model[1].running_var.fill_(2.0)
    model.eval()
    report = convert_norm_act(model, EvoNormB0)
    assert (report.count, report.names) == (1, ("1",))
    assert report.left == {"4": "no activation of its own follows in the same forward"}
    assert isinstance(model[1], EvoNormB0)
    assert isinstance(model[2], nn.Identity)
    assert model[1].weight.dtype == torch.float64
    assert not model[1].training
    assert (model[1].running_var == 2).all()


class Shared(nn.Module):
    """A residual block in torchvision's manner: one ReLU, called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv(self.relu(self.bn1(x)))) + x)


class ModeDependent(Shared):
    def forward(self, x):
        y = self.relu(self.bn1(x))
        return self.relu(y + x) if self.training else y


def test_a_shared_relu_keeps_its_other_calls():
    model = nn.Sequential(Shared()).eval()
    bn2, conv = model[0].bn2, model[0].conv
    bn2.running_mean.uniform_(-1, 1)
    report = convert_norm_act(model, groups=2)
    assert report.names == ("0.bn1",)
    assert list(report.left) == ["0.bn2"]
    x = drawn(2, 4, 3, 3).float()
    norm = EvoNormS0(4, groups=2)
    torch.testing.assert_close(model(x), torch.relu(bn2(conv(norm(x))) + x))
    assert (norm(x) < 0).any(), "a ReLU after the norm would not be seen"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
    assert sorted(model.state_dict()) == sorted(
        {f"0.conv.{n}" for n in conv.state_dict()}
        | {f"0.bn1.{n}" for n in norm.state_dict()}
        | {f"0.bn2.{n}" for n in bn2.state_dict()}
    )


def test_what_is_left():
    report = convert_norm_act(Shared(), groups=2)
    assert report.count == 0
    assert "in the model's own forward" in report.left["bn1"]
    report = convert_norm_act(nn.Sequential(ModeDependent()), groups=2)
    assert "depends on the mode" in report.left["0.bn1"]
    with pytest.raises(ValueError, match="model: expected one with BatchNorm layers, got none"):
        convert_norm_act(nn.Linear(2, 2))
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    with pytest.raises(ValueError, match="groups"):
        convert_norm_act(model)
    assert isinstance(model[0], nn.BatchNorm2d)


def test_convert_a_resnet():
    model = torchvision.models.resnet18(num_classes=10)
    report = convert_norm_act(model)
    assert report.count == 9
    assert set(report.names) == {"bn1"} | {
        f"layer{i}.{j}.bn1" for i in (1, 2, 3, 4) for j in (0, 1)
    }
    assert len(report.left) == 11
    assert isinstance(model.relu, nn.Identity)
    calls = []
    for block in (model.layer1[0], model.layer2[1]):
        block.relu.register_forward_hook(lambda *_: calls.append(1))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert len(calls) == 2, "once a block, after the addition"
