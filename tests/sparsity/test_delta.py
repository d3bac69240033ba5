"""Delta activations: closed forms in float64 for values, penalties and the step's gradient."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchzoo.sparsity import (
    DeltaActivation,
    DeltaConv2d,
    DeltaLinear,
    DeltaMeter,
    L1Activation,
    delta_penalty,
)

DOUBLE = torch.float64
EXACT = {"atol": 1e-12, "rtol": 0}


def video(*shape, seed=0, scale=0.5):
    """A random walk over the second dimension."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=DOUBLE).cumsum(1)


def layer(num_features, **options):
    return DeltaActivation(num_features, **{"dtype": DOUBLE, **options})


def levels_by_hand(x, q, activation):
    """Quantised activations q round(act(x) / q), an element at a time (half to even)."""
    a = {"relu": x.clamp_min(0), "none": x, "softmax": x.exp() / x.exp().sum(-1, keepdim=True)}
    q = q.expand_as(x)
    values = zip(a[activation].flatten().tolist(), q.flatten().tolist(), strict=True)
    return torch.tensor([b * round(v / b) for v, b in values], dtype=DOUBLE).view_as(x)


@pytest.mark.claim(
    157,
    "Levels are |threshold| * round(act / |threshold|), half to even; the penalty is "
    "rate * fan_out * mean|change| without the first frame",
    tolerance=1e-12,
)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(2, 5),
    space=st.sampled_from([(), (2,), (2, 3)]),
    channels=st.integers(1, 4),
    granularity=st.sampled_from(["channel", "neuron", "layer"]),
    activation=st.sampled_from(["relu", "none", "softmax"]),
    seed=st.integers(0, 99),
)
def test_levels_and_penalty(batch, frames, space, channels, granularity, activation, seed):
    x = video(batch, frames, *space, channels, seed=seed)
    act = layer(
        channels,
        granularity=granularity,
        frame_shape=(*space, channels),
        activation=activation,
        rate=0.7,
        fan_out=3.0,
    )
    with torch.no_grad():
        act.threshold.copy_(0.05 + torch.rand(act.threshold.shape, dtype=DOUBLE))
        act.threshold.view(-1)[0] *= -1  # the step is |threshold|
    expected = levels_by_hand(x, act.threshold.detach().abs(), activation)
    torch.testing.assert_close(act(x).detach(), expected, **EXACT)
    total = sum((expected[:, t] - expected[:, t - 1]).abs().sum() for t in range(1, frames))
    penalty = 0.7 * 3.0 * total / (expected.numel() / frames * (frames - 1))
    torch.testing.assert_close(act.penalty.detach(), penalty, **EXACT)
    torch.testing.assert_close(act.penalty_term(x).detach(), penalty, **EXACT)


@pytest.mark.claim(
    157,
    "The running sum of the full deltas is the level output: within 1e-5 in float32, exact in "
    "float64 where the step is a power of two",
    tolerance=1e-5,
)
@pytest.mark.parametrize("activation", ["relu", "none", "softmax"])
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 0.1), (DOUBLE, 2.0**-6)])
def test_sum_of_deltas_is_the_level(activation, dtype, step):
    x = video(3, 12, 4, 5).to(dtype)
    options = {"activation": activation, "step_init": step, "dtype": dtype}
    level = DeltaActivation(5, **options)(x)
    deltas = DeltaActivation(5, delta="full", **options)(x)
    summed = torch.cumsum(deltas, 1)
    assert torch.equal(deltas[:, 0], level[:, 0])
    if dtype == DOUBLE:
        assert torch.equal(summed, level)
    torch.testing.assert_close(summed, level, atol=1e-5, rtol=0)
    # sigma undoes delta: activation "none" of a sum of levels is those levels
    options["activation"] = "none"
    again = DeltaActivation(5, sigma=True, **options)(deltas)
    torch.testing.assert_close(again, level, atol=1e-5, rtol=0)


@pytest.mark.claim(
    157, "Without background the first change stands for the first frame too", tolerance=0.0
)
def test_no_background_repeats_the_first_change():
    x = video(2, 6, 3)
    level = layer(3)(x)
    change = level[:, 1:] - level[:, :-1]
    y = layer(3, delta="no_background")(x)
    assert torch.equal(y[:, 1:], change)
    assert torch.equal(y[:, 0], change[:, 0])
    with pytest.raises(ValueError, match="at least 2 frames"):
        layer(3, delta="no_background")(x[:, :1])


@pytest.mark.claim(
    157, "The sum over time comes first, then the bias, then the activation", tolerance=1e-8
)
def test_sigma_then_bias_then_activation():
    z = video(2, 5, 3)
    act = layer(3, sigma=True, bias=True, step_init=1e-9)
    with torch.no_grad():
        act.bias.copy_(torch.tensor([-0.5, 0.0, 0.5]))
    expected = torch.relu(z.cumsum(1) + act.bias)
    torch.testing.assert_close(act(z), expected, atol=1e-8, rtol=0)


@pytest.mark.claim(
    157,
    "The penalty's gradient is (sign d_t - sign d_{t+1}) / N at the input, the first frame only "
    "with its second term and the last only with its first, and -sum(g r) sign(threshold) at the "
    "step",
    tolerance=1e-12,
)
@pytest.mark.parametrize("granularity", ["channel", "neuron", "layer"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_of_the_penalty(granularity, sign):
    x = video(3, 6, 2, 4).requires_grad_()
    act = layer(4, activation="none", granularity=granularity, frame_shape=(2, 4), step_init=0.3)
    with torch.no_grad():
        act.threshold.mul_(sign)
    act(x)
    dx, dstep = torch.autograd.grad(act.penalty, (x, act.threshold))
    r = torch.round(x.detach() / 0.3)
    d = 0.3 * (r[:, 1:] - r[:, :-1])
    n = d.numel()
    g = torch.zeros_like(r)
    for t in range(6):
        if t > 0:
            g[:, t] += d[:, t - 1].sign() / n
        if t < 5:
            g[:, t] -= d[:, t].sign() / n
    torch.testing.assert_close(dx, g, **EXACT)
    expected = -(g * r).flatten(0, 1).sum(0) * sign
    if granularity == "channel":
        expected = expected.sum(0)
    elif granularity == "layer":
        expected = expected.sum()
    torch.testing.assert_close(dstep, expected, **EXACT)


@pytest.mark.claim(
    157,
    "One SGD step on the penalty alone grows the step by lr * rate * mean|r_t - r_{t-1}| under "
    "the paper's rule, whose gradient is minus the honest one; the lsq gradient is "
    "sum g (r - a/q)",
    tolerance=1e-12,
)
def test_sgd_step_on_the_penalty():
    x, rate, lr = video(3, 8, 4), 0.8, 0.05
    act = layer(4, activation="none", granularity="layer", rate=rate)
    q = act.threshold.item()
    act(x)
    act.penalty.backward()
    torch.optim.SGD([act.threshold], lr=lr).step()
    r = torch.round(x / q)
    growth = (r[:, 1:] - r[:, :-1]).abs().mean().item()
    assert growth > 0
    assert act.threshold.item() - q == pytest.approx(lr * rate * growth, abs=1e-12)

    honest = torch.tensor(q, dtype=DOUBLE, requires_grad=True)
    (rate * (honest * r).diff(dim=1).abs().mean()).backward()
    assert honest.grad.item() == pytest.approx(-act.threshold.grad.item(), abs=1e-12)

    act = layer(4, activation="none", granularity="layer", step_grad="lsq")
    g = torch.randn_like(x)
    act(x).backward(g)
    assert act.threshold.grad.item() == pytest.approx((g * (r - x / q)).sum().item(), abs=1e-12)


@pytest.mark.claim(
    157,
    "The flipped gradient of the step holds for the task's loss as for the penalty: -sum(g r)",
    tolerance=1e-12,
)
def test_gradient_of_a_task_loss():
    x = video(2, 5, 3).requires_grad_()
    act = layer(3, activation="relu", step_init=0.2)
    g = torch.randn_like(x)
    dx, dstep = torch.autograd.grad(act(x), (x, act.threshold), g)
    r = torch.round(x.detach().relu() / 0.2)
    torch.testing.assert_close(dx, g * (x > 0), **EXACT)
    torch.testing.assert_close(dstep, -(g * r).sum((0, 1)), **EXACT)


@pytest.mark.claim(
    157,
    "A constant video costs nothing after its first frame: deltas and penalty are 0 and the "
    "streaming step does 0 multiplications",
    tolerance=0.0,
)
def test_constant_video():
    x = torch.randn(2, 1, 8).expand(2, 6, 8)
    act = DeltaActivation(8, activation="none", delta="full")
    assert act(x)[:, 1:].abs().max() == 0
    assert act(x)[:, 0].abs().max() > 0
    assert act.penalty == 0
    levels = DeltaActivation(8, activation="none")(x)
    linear = DeltaLinear(8, 5)
    state = linear.init_state((2,))
    for t in range(6):
        with DeltaMeter() as meter:
            _, state = linear.step(levels[:, t], state)
        assert meter.dense_macs == 2 * 8 * 5
        assert meter.macs == (int((levels[:, 0] != 0).sum()) * 5 if t == 0 else 0)
    conv = DeltaConv2d(2, 3, 3)
    frame = torch.randn(1, 4, 5, 2)
    state = conv.init_state((1, 4, 5))
    for t in range(3):
        with DeltaMeter() as meter:
            _, state = conv.step(frame, state)
        assert meter.macs == (0 if t else meter.dense_macs) == (0 if t else 6 * 9 * 2 * 3)


@pytest.mark.claim(
    157,
    "As the step goes to 0 the output becomes the plain activation, and the deltas that are not "
    "zero are those of the pixels that changed",
    tolerance=1e-5,
)
def test_tiny_step():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 4, dtype=DOUBLE).expand(2, 5, 6, 4).clone()
    moved = torch.rand(2, 5, 6, 4) < 0.3
    x += torch.where(moved, torch.randn_like(x), 0.0)
    act = layer(4, step_init=1e-6)
    torch.testing.assert_close(act(x), x.relu(), atol=1e-5, rtol=0)
    plain = x.relu()
    changed = int((plain[:, 1:] != plain[:, :-1]).sum())
    deltas = layer(4, step_init=1e-6, delta="full")(x)
    assert int(deltas[:, 1:].count_nonzero()) == changed > 0


def test_a_step_of_zero_is_no_quantisation():
    x = video(2, 4, 3).requires_grad_()
    act = layer(3, activation="none")
    with torch.no_grad():
        act.threshold.zero_()
    y = act(x)
    torch.testing.assert_close(y, x, atol=1e-9, rtol=0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.claim(
    157,
    "A state dict holds the steps and the bias and nothing of a stream, and loads back exactly",
)
def test_state_dict_has_no_stream():
    act = DeltaActivation(4, sigma=True, delta="full", bias=True)
    x = torch.randn(2, 5, 4)
    before = {name: id(value) for name, value in vars(act).items()}
    state = act.init_state((2,))
    for t in range(5):
        _, state = act.step(x[:, t], state)
    assert {name: id(value) for name, value in vars(act).items()} == before
    assert set(act.state_dict()) == {"threshold", "bias"}
    assert not list(act.buffers())
    with torch.no_grad():
        act.threshold.uniform_(0.1, 1.0)
        act.bias.normal_()
    act(x)
    other = DeltaActivation(4, sigma=True, delta="full", bias=True)
    other.load_state_dict(act.state_dict())
    assert torch.equal(other(x), act(x))
    assert set(DeltaLinear(4, 3).state_dict()) == set(nn.Linear(4, 3).state_dict())


@pytest.mark.claim(157, "The L1 baseline's penalty is rate * fan_out * mean|a|", tolerance=1e-12)
def test_l1_penalty():
    x = video(2, 4, 3).requires_grad_()
    act = L1Activation(rate=2.0, fan_out=3.0)
    assert torch.equal(act(x), x.relu())
    expected = 6.0 * x.relu().mean()
    torch.testing.assert_close(act.penalty, expected, **EXACT)
    torch.testing.assert_close(act.penalty_term(x), expected, **EXACT)
    (dx,) = torch.autograd.grad(act.penalty, x)
    torch.testing.assert_close(dx, 6.0 * (x > 0).double() / x.numel(), **EXACT)
    signed = L1Activation(activation="none")
    torch.testing.assert_close(signed.penalty_term(x), x.abs().mean(), **EXACT)


def net():
    return nn.Sequential(
        DeltaConv2d(1, 4, 3, padding=1),
        DeltaActivation(4, delta="full", rate=0.5),
        DeltaConv2d(4, 5, 3, stride=2, padding=1, bias=False),
        DeltaActivation(5, sigma=True, bias=True, granularity="layer"),
        DeltaLinear(5, 3),
        L1Activation(),
    )


def test_delta_penalty_sums_the_layers():
    torch.manual_seed(0)
    model = net()
    x = torch.randn(2, 4, 6, 6, 1)
    model(x)
    terms = []
    for module in model:
        if hasattr(module, "penalty_term"):
            terms.append(module.penalty_term(x))
        x = module(x)
    assert len(terms) == 3
    torch.testing.assert_close(delta_penalty(model), sum(terms))
    assert delta_penalty(nn.Linear(2, 2)) == 0


def test_penalty_under_compile():
    torch.manual_seed(0)
    model = net()
    x = torch.randn(2, 4, 6, 6, 1)
    model(x)
    expected = delta_penalty(model)
    parameters = list(model.parameters())[:6]
    grads = torch.autograd.grad(expected, parameters)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    found = delta_penalty(model)
    assert found is not expected
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), grads)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_carry_no_graph(duplicate):
    act = DeltaActivation(3)
    x = torch.randn(2, 4, 3)
    y = act(x)
    twin = duplicate(act)
    if duplicate is not copy.copy:  # which shares everything
        with pytest.raises(ValueError, match="penalty: none yet"):
            _ = twin.penalty
    assert torch.equal(twin(x), y)
    assert act.penalty.grad_fn is not None


def test_graph_is_held_by_the_last_forward_only():
    act = DeltaActivation(3)
    x = torch.randn(2, 4, 3, requires_grad=True)
    act(x)
    first = weakref.ref(act.penalty)
    with torch.no_grad():
        act(x)
    gc.collect()
    assert first() is None
    assert act.penalty.grad_fn is None


@pytest.mark.parametrize("strict", [True, False])
def test_export_leaves_nothing_behind(strict):
    act = DeltaActivation(3)
    x = torch.randn(2, 4, 3)
    program = torch.export.export(act, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), act(x))
    fresh = DeltaActivation(3)
    torch.export.export(fresh, (x,), strict=strict)
    with pytest.raises(ValueError, match="penalty: none yet"):
        _ = fresh.penalty


def test_penalty_needs_two_frames():
    act = DeltaActivation(3)
    act(torch.randn(2, 4, 3))
    act(torch.randn(2, 1, 3))
    with pytest.raises(ValueError, match="x of at least 2 frames"):
        _ = act.penalty
    with pytest.raises(
        ValueError, match=r"x: a penalty needs at least 2 frames, got shape \(2, 1, 3\)"
    ):
        act.penalty_term(torch.randn(2, 1, 3))


def test_empty_batch():
    act = DeltaActivation(3)
    assert act(torch.randn(0, 4, 3)).shape == (0, 4, 3)
    act.penalty.backward()
    assert act.penalty == 0
    assert act.threshold.grad.abs().max() == 0


def test_half_precision_quantises_in_float32():
    x = torch.randn(2, 6, 4).bfloat16()
    act = DeltaActivation(4)
    y = act(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, act(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(act(x), y)


def test_frozen_step():
    act = DeltaActivation(4, train_step=False)
    x = torch.randn(2, 5, 4, requires_grad=True)
    act(x)
    act.penalty.backward()
    assert act.threshold.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features: expected a number > 0, got 0"),
        ({"activation": "tanh"}, "activation: expected one of .*, got 'tanh'"),
        ({"step_init": 0.0}, "step_init: expected a number > 0"),
        ({"granularity": "pixel"}, "granularity: expected one of"),
        ({"granularity": "neuron"}, "frame_shape: expected the shape of a frame .*, got None"),
        ({"granularity": "neuron", "frame_shape": (2, 5)}, "frame_shape: .* got .2, 5."),
        ({"rate": -1.0}, "rate: expected a number ≥ 0, got -1.0"),
        ({"fan_out": -1.0}, "fan_out: expected a number ≥ 0"),
        ({"delta": "half"}, "delta: expected one of"),
        ({"step_grad": "ste"}, "step_grad: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DeltaActivation(**({"num_features": 3} | options))


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, T, ..., 3\), got \(2, 3\)"):
        DeltaActivation(3)(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, T, ..., 3\), got \(2, 5, 4\)"):
        DeltaActivation(3)(torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"x: expected frames \(2, 3\)"):
        DeltaActivation(3, granularity="neuron", frame_shape=(2, 3))(torch.ones(2, 5, 4, 3))
    with pytest.raises(ValueError, match="one frame ahead"):
        DeltaActivation(3, delta="no_background").init_state((2,))
