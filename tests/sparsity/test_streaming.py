"""Streams against the whole sequence, for single layers and for folded models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from torchzoo.sparsity import (
    DeltaActivation,
    DeltaConv2d,
    DeltaLinear,
    DeltaMeter,
    StreamingModel,
    fold_to_streaming,
)

DOUBLE = torch.float64
TIGHT = {"atol": 1e-12, "rtol": 1e-12}


def run(layer, x, batch_shape):
    """Step a layer through the frames: outputs (B, T, ...) and the last state."""
    state, outputs = layer.init_state(batch_shape), []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, 1), state


def video(*shape, still=0.6):
    """A random walk over the second dimension in which most values stay."""
    moves = torch.randn(*shape, dtype=DOUBLE)
    keep = torch.rand(*shape) < still
    keep[:, 0] = False
    return torch.where(keep, 0.0, moves).cumsum(1)


@pytest.mark.claim(
    157, "A linear stream equals its sequence form for every threshold and quantum", tolerance=1e-12
)
@pytest.mark.parametrize(
    ("threshold", "quantum"), [(0.0, None), (0.0, 0.2), (0.5, None), (0.5, 0.2)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_stream_equals_sequence(threshold, quantum, bias):
    torch.manual_seed(0)
    options = {"threshold": threshold, "quantum": quantum, "bias": bias, "dtype": DOUBLE}
    layer = DeltaLinear(6, 4, **options)
    x = video(2, 9, 3, 6)
    y, (x_ref, acc) = run(layer, x, (2, 3))
    torch.testing.assert_close(y, layer(x), **TIGHT)
    torch.testing.assert_close(acc, F.linear(x_ref, layer.weight, layer.bias), **TIGHT)
    if threshold == 0:
        levels = x if quantum is None else quantum * torch.round(x / quantum)
        torch.testing.assert_close(y, F.linear(levels, layer.weight, layer.bias), **TIGHT)


@pytest.mark.claim(
    157, "The channels-last convolution and its stream equal torch's convolution", tolerance=1e-12
)
@settings(max_examples=20, deadline=None)
@given(
    kernel=st.sampled_from([1, 3, (2, 3)]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, (0, 2)]),
    dilation=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_conv_equals_torch(kernel, stride, padding, dilation, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(
        2, 3, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias, dtype=DOUBLE
    )
    layer = DeltaConv2d.from_module(conv)
    x = video(2, 4, 6, 7, 2)
    expected = conv(rearrange(x, "b t h w c -> (b t) c h w"))
    expected = rearrange(expected, "(b t) c h w -> b t h w c", b=2)
    torch.testing.assert_close(layer(x), expected, **TIGHT)
    y, _ = run(layer, x, (2, 6, 7))
    torch.testing.assert_close(y, expected, **TIGHT)


def test_conv_stream_with_threshold_and_its_multiplications():
    torch.manual_seed(0)
    layer = DeltaConv2d(2, 3, 3, threshold=0.4, quantum=0.1, dtype=DOUBLE)
    x = video(1, 5, 5, 5, 2)
    y, (x_ref, _) = run(layer, x, (1, 5, 5))
    torch.testing.assert_close(y, layer(x), **TIGHT)
    torch.testing.assert_close(y[:, -1], layer._dense(x_ref, layer.weight, layer.bias), **TIGHT)
    # one changed value in the middle is in reach of 9 outputs, one in a corner of 1
    for row, column, reach in ((2, 2, 9), (0, 0, 1), (0, 2, 3)):
        frame = x_ref.clone()
        frame[0, row, column, 1] += 1.0
        with DeltaMeter() as meter:
            layer.step(frame, (x_ref, y[:, -1]))
        assert meter.macs == reach * 3


@pytest.mark.claim(
    157, "A stream of activations equals the whole sequence, with sums and deltas", tolerance=1e-12
)
@pytest.mark.parametrize("delta", [False, "full"])
@pytest.mark.parametrize("sigma", [False, True])
def test_activation_stream_equals_sequence(delta, sigma):
    layer = DeltaActivation(3, delta=delta, sigma=sigma, bias=True, step_init=0.25, dtype=DOUBLE)
    nn.init.normal_(layer.bias)
    x = video(2, 7, 4, 3)
    y, _ = run(layer, x, (2, 4))
    torch.testing.assert_close(y, layer(x), **TIGHT)


def chain():
    """The paper's form: deltas through layers without bias, summed up by the next activation."""
    return nn.Sequential(
        DeltaConv2d(1, 4, 3, padding=1),
        DeltaActivation(4, delta="full"),
        DeltaConv2d(4, 5, 3, stride=2, padding=1, bias=False),
        DeltaActivation(5, sigma=True, bias=True, delta="full"),
        nn.Sequential(nn.Linear(5, 6, bias=False), DeltaActivation(6, sigma=True, bias=True)),
        nn.Dropout(0.5),
    )


def plain():
    """Levels all along; biases where they usually are."""
    return nn.Sequential(
        DeltaConv2d(1, 4, 3), DeltaActivation(4), nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU()
    )


@pytest.mark.claim(
    157,
    "Stepping frames through a folded net gives what the whole sequence gives, the state after it "
    "as well; reset starts over",
    tolerance=1e-4,
)
@pytest.mark.parametrize("make", [chain, plain])
def test_folded_model_equals_sequence(make):
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, DeltaActivation) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    before = copy.deepcopy(model.state_dict())
    x = video(2, 10, 6, 6, 1).float()
    expected = model(x)
    stream = fold_to_streaming(model)
    y, state = run(stream, x, (2, 6, 6))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert y[:, 1:].diff(dim=1).abs().max() > 1e-3

    # the state: what was sent is the input of each linear layer, accumulated is its dense output
    whole = x
    for layer, old in zip(stream.layers, state.layers, strict=True):
        if isinstance(layer, (DeltaLinear, DeltaConv2d)):
            torch.testing.assert_close(old[0], whole[:, -1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(old[1], layer(whole)[:, -1], atol=1e-5, rtol=1e-4)
        whole = layer(whole)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)

    again, _ = stream.step(x[:, 0], stream.reset(state))
    assert torch.equal(again, y[:, 0])
    carried, _ = stream.step(x[:, 0], state)
    assert carried.shape == again.shape
    assert torch.equal(stream(x), y)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [layer.delta for layer in model.modules() if isinstance(layer, DeltaActivation)] == (
        ["full", "full", False] if make is chain else [False]
    )


@pytest.mark.claim(
    157,
    "A folded model does nnz(delta) * outputs multiplications a frame, and its state is an "
    "explicit object: a step changes neither the model nor the state that it was given",
    tolerance=0.0,
)
def test_folded_model_counts_and_keeps_its_state_outside():
    torch.manual_seed(0)
    model = nn.Sequential(
        DeltaActivation(8, activation="none", delta="full"),
        nn.Linear(8, 6, bias=False),
        DeltaActivation(6, sigma=True, bias=True),
        nn.Linear(6, 4),
    )
    x = video(2, 6, 8).float()
    first = model[0].levels(x)
    second = model[2].levels(model[1](model[0](x)))
    stream = fold_to_streaming(model)
    names = set(stream.state_dict())
    state = stream.init_state((2,))
    assert state.layers is None
    for t in range(6):
        with DeltaMeter() as meter:
            _, new = stream.step(x[:, t], state)
        changes = [
            (o[:, t] != (o[:, t - 1] if t else torch.zeros_like(o[:, 0]))).sum() * outputs
            for o, outputs in ((first, 6), (second, 4))
        ]
        assert meter.macs == int(sum(changes))
        repeated, _ = stream.step(x[:, t], state)
        torch.testing.assert_close(repeated, stream.step(x[:, t], state)[0], atol=0, rtol=0)
        state = new
    assert set(stream.state_dict()) == names
    assert not list(stream.buffers())


def test_weights_are_stored_as_they_are_read():
    stream = fold_to_streaming(chain())
    for layer in stream.layers:
        if isinstance(layer, (DeltaLinear, DeltaConv2d)):
            assert layer.weight.flatten(1).mT.is_contiguous()


def test_open_deltas_at_the_end_stay_deltas():
    model = nn.Sequential(nn.Linear(3, 4), DeltaActivation(4, delta="full"))
    x = video(2, 5, 3).float()
    torch.testing.assert_close(fold_to_streaming(model)(x), model(x))
    single = DeltaActivation(3, sigma=True)
    torch.testing.assert_close(fold_to_streaming(single)(x), single(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(DeltaActivation(3, delta="no_background")),
            "model.0: delta='no_background'",
        ),
        (
            nn.Sequential(
                DeltaActivation(3, delta="full"), nn.Linear(3, 3), DeltaActivation(3, sigma=True)
            ),
            "model.1: deltas reach this DeltaLinear",
        ),
        (
            nn.Sequential(DeltaActivation(3, delta="full"), nn.ReLU()),
            "model.1: deltas reach this ReLU",
        ),
        (
            nn.Sequential(DeltaActivation(3, delta="full"), nn.Linear(3, 3, bias=False)),
            "model.1: deltas are never summed up",
        ),
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), "layers: Softmax can't be streamed"),
        (nn.Sequential(), "layers: expected at least one"),
    ],
)
def test_what_does_not_fold(model, message):
    with pytest.raises(ValueError, match=message):
        fold_to_streaming(model)


def test_own_layers_stream():
    class RunningMean(nn.Module):
        def init_state(self, batch_shape):
            return 0, torch.zeros(*batch_shape, 1)

        def step(self, x_t, state):
            count, total = state[0] + 1, state[1] + x_t
            return total / count, (count, total)

    x = torch.randn(2, 5, 3)
    stream = StreamingModel([DeltaLinear(3, 4), RunningMean()])
    y, _ = run(stream, x, (2,))
    expected = stream.layers[0](x).cumsum(1) / torch.arange(1, 6).view(1, 5, 1)
    torch.testing.assert_close(y, expected)


@pytest.mark.claim(157, "A resync computes the accumulator anew", tolerance=1e-6)
def test_resync_drops_what_piled_up():
    torch.manual_seed(0)
    layer = DeltaLinear(5, 3, resync_every=3)
    x = torch.randn(2, 7, 5)
    state = layer.init_state((2,))
    for t in range(7):
        y, state = layer.step(x[:, t], state)
        expected = layer(x[:, t])
        off = (y - expected).abs().max()
        if t in (2, 5):
            assert state[2] == 0
            assert off < 1e-6
        else:
            assert state[2] == (t + 1) % 3
            assert off > 0.5 or t < 2
        if t == 1:
            x_ref, acc, age = state  # an error that only a resync can mend
            state = (x_ref, acc + 1.0, age)
        if t in (2, 5):
            state = (state[0], state[1] + 1.0, state[2])
    plain = DeltaLinear(5, 3)
    x_ref = torch.randn(2, 5)
    mended = plain.resync((x_ref, torch.full((2, 3), 9.0)))
    torch.testing.assert_close(mended[1], plain(x_ref))


@pytest.mark.claim(157, "A stream has the gradients of its sequence form", tolerance=1e-12)
def test_gradients_of_the_stream_equal_those_of_the_sequence():
    torch.manual_seed(0)
    layer = DeltaConv2d(2, 3, 3, padding=1, threshold=0.3, dtype=DOUBLE)
    x = video(1, 4, 4, 4, 2).requires_grad_()
    grad = torch.randn(1, 4, 4, 4, 3, dtype=DOUBLE)
    inputs = (x, layer.weight, layer.bias)
    a = torch.autograd.grad(layer(x), inputs, grad)
    b = torch.autograd.grad(run(layer, x, (1, 4, 4))[0], inputs, grad)
    torch.testing.assert_close(a, b, **TIGHT)


def test_gradcheck_of_the_steps():
    linear = DeltaLinear(4, 3, dtype=DOUBLE)
    conv = DeltaConv2d(1, 2, 2, dtype=DOUBLE)
    x = torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=True)
    frames = torch.randn(1, 2, 3, 3, 1, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda x: run(linear, x, (2,))[0], (x,))
    assert gradcheck(lambda x: run(conv, x, (1, 3, 3))[0], (frames,))


def test_steps_compile():
    torch.manual_seed(0)
    model = nn.Sequential(
        DeltaActivation(3, delta="full"),
        nn.Linear(3, 4, bias=False),
        DeltaActivation(4, sigma=True, bias=True),
    )
    x = video(2, 4, 3).float()
    stream = fold_to_streaming(model)
    expected = model(x)
    compiled = torch.compile(stream.step, fullgraph=True, backend="aot_eager")
    state = stream.init_state((2,))
    for t in range(4):
        y, state = compiled(x[:, t], state)
        torch.testing.assert_close(y, expected[:, t], atol=1e-5, rtol=1e-4)


def test_half_precision_stream():
    layer = DeltaLinear(16, 4, dtype=torch.bfloat16)
    x = torch.randn(2, 8, 16).bfloat16()
    y, (x_ref, acc) = run(layer, x, (2,))
    assert y.dtype == torch.bfloat16
    assert x_ref.dtype == acc.dtype == torch.float32
    expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    torch.testing.assert_close(acc, expected[:, -1], atol=1e-5, rtol=1e-5)


def test_from_module_copies():
    linear = nn.Linear(3, 2)
    layer = DeltaLinear.from_module(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    with pytest.raises(ValueError, match="conv: expected one group"):
        DeltaConv2d.from_module(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="conv: expected one group"):
        DeltaConv2d.from_module(nn.Conv2d(4, 4, 3, padding="same"))


def test_initialisation_is_that_of_torch():
    torch.manual_seed(0)
    for layer, fan_in in ((DeltaLinear(50, 400), 50), (DeltaConv2d(4, 400, 3), 36)):
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= fan_in**-0.5
            assert values.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_bad_input():
    layer = DeltaLinear(3, 2, threshold=0.1)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 3\), got \(2, 4\)"):
        layer(torch.ones(2, 4))
    with pytest.raises(
        ValueError, match=r"x: expected shape \(B, T, ..., features\), got \(2, 3\)"
    ):
        layer(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, ..., H, W, 2\), got \(4, 4, 2\)"):
        DeltaConv2d(2, 3, 3)(torch.ones(4, 4, 2))
    stream = StreamingModel([DeltaLinear(3, 2)])
    with pytest.raises(ValueError, match=r"x_t: expected leading dimensions \(2,\)"):
        stream.step(torch.ones(4, 3), stream.init_state((2,)))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, T, ..., C\) with T ≥ 1"):
        stream(torch.ones(2, 0, 3))
    for name, options in {
        "in_channels": {"in_channels": 0},
        "kernel_size": {"kernel_size": (3, 0)},
        "stride": {"stride": 0},
        "padding": {"padding": -1},
        "dilation": {"dilation": (1, 1, 1)},
        "resync_every": {"resync_every": 0},
        "threshold": {"threshold": -1.0},
        "quantum": {"quantum": -1.0},
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            DeltaConv2d(**({"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options))
