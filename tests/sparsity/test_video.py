"""Networks for video: clips against streams, image networks against their conversion."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.data.photographs import camera_films
from torchzoo.sparsity import (
    DeltaActivation,
    DeltaConv2d,
    DeltaLinear,
    DeltaMeter,
    VideoNet,
    fold_to_streaming,
    to_video_layers,
)
from torchzoo.trainer import fit

DOUBLE = torch.float64


def net(**options):
    torch.manual_seed(0)
    return VideoNet(3, 2, frame_size=(16, 16), channels=(6, 8), hidden=(20,), **options)


def films(n=4, **options):
    return camera_films(n, **{"frames": 6, "size": 16, "hold": 2, **options})


@pytest.mark.claim(
    157, "A video network's stream equals its forward on a real stream", tolerance=1e-9
)
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_stream_equals_clip(threshold):
    model = net(threshold=threshold, dtype=DOUBLE)
    clips = films().frames.double()
    stream = model.to_stream()
    torch.testing.assert_close(stream(clips), model(clips), rtol=0, atol=1e-9)
    state = stream.init_state((4, 16, 16))
    for frame, expected in zip(clips.unbind(1), model(clips).unbind(1), strict=True):
        y, state = stream.step(frame, state)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    if threshold:
        assert not torch.allclose(model(clips), net(dtype=DOUBLE)(clips))


def test_forward_is_the_plain_network_at_fine_steps():
    """The same weights in torch's own layers, on channels-first frames."""
    model = net(step_init=1e-9, dtype=DOUBLE)
    conv1, conv2, linear, head = (
        m for m in model.layers if isinstance(m, (DeltaConv2d, DeltaLinear))
    )
    clips = films(2).frames.double()
    x = clips.flatten(0, 1).permute(0, 3, 1, 2)
    for conv in (conv1, conv2):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).relu()
    x = F.linear(x.flatten(1), linear.weight, linear.bias).relu()
    plain = F.linear(x, head.weight, head.bias)
    torch.testing.assert_close(model(clips).flatten(0, 1), plain, rtol=0, atol=1e-6)


@pytest.mark.claim(
    157, "The loss adds rate times the changes, weighted by the multiplications they cost"
)
def test_loss_is_its_formula():
    model = net(rate=0.7, dtype=DOUBLE)
    clips, labels = films()
    clips = clips.double()
    x, levels = clips, []
    for layer in model.layers:
        x = layer(x)
        if isinstance(layer, DeltaActivation):
            levels.append(x)
    # multiplications a frame: of each layer its outputs times what one reads
    work = [8 * 8 * 6 * 27, 4 * 4 * 8 * 54, 128 * 20, 20 * 2]
    expected = F.cross_entropy(model(clips).mean(1), labels)
    for level, cost in zip(levels, work[1:], strict=True):
        expected = expected + 0.7 * cost / sum(work) * (level[:, 1:] - level[:, :-1]).abs().mean()
    torch.testing.assert_close(model.loss(clips, labels), expected, rtol=1e-12, atol=0)
    silent = copy.deepcopy(model)
    for layer in silent.layers:
        if isinstance(layer, DeltaActivation):
            layer.rate = 0.0
    gap = model.loss(clips, labels) - silent.loss(clips, labels)
    assert gap > 1e-3


@pytest.mark.claim(
    157, "A still video costs a stream no multiplication, noise below the threshold neither"
)
def test_stream_skips_what_stays():
    model = net(threshold=0.2)
    still = films(2, hold=6, noise=0.02).frames + 1  # the first frame passes the threshold whole
    stream = model.to_stream()
    with torch.no_grad():
        _, state = stream.step(still[:, 0], stream.init_state((2, 16, 16)))
        with DeltaMeter() as meter:
            for frame in still[:, 1:].unbind(1):
                _, state = stream.step(frame, state)
    assert meter.macs == 0
    assert meter.dense_macs > 0
    with torch.no_grad(), DeltaMeter() as meter:
        net().to_stream()(still)
    assert meter.macs > 0.3 * meter.dense_macs  # every noisy pixel counts at threshold 0


@pytest.mark.claim(157, "Training on the loss leaves a stream fewer multiplications")
def test_training_saves_multiplications():
    clips, labels = films(16, scale=8.0, noise=0.02, seed=1)
    macs = {}
    for rate in (0.0, 30.0):
        model = net(rate=rate)
        fit(
            model,
            VideoNet.loss,
            (clips, labels),
            epochs=60,
            batch_size=8,
            lr=3e-3,
            generator=torch.Generator().manual_seed(0),
        )
        with torch.no_grad(), DeltaMeter() as meter:
            model.to_stream()(clips)
        macs[rate] = meter.macs
        assert (model(clips).mean(1).argmax(-1) == labels).double().mean() > 0.8
    assert macs[30.0] < 0.9 * macs[0.0]


def image_net():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, (3, 2), stride=(1, 2)),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(20, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 3),
    ).double()
    for layer in layers.modules():  # as if trained
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return layers


@pytest.mark.claim(
    157, "An image network turned into delta layers gives the same and streams", tolerance=1e-7
)
def test_conversion_equals_the_image_network():
    model = image_net()
    before = copy.deepcopy(model.state_dict())
    layers = to_video_layers(model, frame_shape=(8, 12, 3), step_init=1e-9, rate=2.0)
    clip = torch.rand(2, 3, 8, 12, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    expected = model.eval()(clip.flatten(0, 1).permute(0, 3, 1, 2))
    torch.testing.assert_close(layers(clip).flatten(0, 1), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(fold_to_streaming(layers)(clip), layers(clip), rtol=0, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    work = [8 * 12 * 4 * 27, 2 * 3 * 5 * 24, 20 * 7, 7 * 3]
    activations = [m for m in layers if isinstance(m, DeltaActivation)]
    found = [m.fan_out for m in activations]
    assert found == pytest.approx([w / sum(work) for w in work[1:]])
    assert [m.rate for m in activations] == [2.0] * 3
    # pooled deltas of levels are levels: a constant clip costs nothing after its first frame
    stream = fold_to_streaming(layers)
    _, state = stream.step(clip[:, 0], stream.init_state((2, 8, 12)))
    with torch.no_grad(), DeltaMeter() as meter:
        stream.step(clip[:, 0], state)
    assert meter.macs == 0


def test_conversion_starts_with_the_threshold():
    layers = to_video_layers(image_net(), frame_shape=(8, 12, 3), threshold=0.1)
    found = [m.threshold for m in layers if isinstance(m, (DeltaConv2d, DeltaLinear))]
    assert found == [0.1, 0.0, 0.0, 0.0]
    assert not layers.training


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([nn.Conv2d(3, 4, 3), nn.GELU()], r"model.1: GELU has no counterpart"),
        ([nn.Sequential(nn.LSTM(3, 3))], r"model.0.0: LSTM"),
        ([nn.BatchNorm2d(3)], r"model.0: expected a convolution or linear layer in front"),
        ([nn.ReLU()], r"model.0: expected a convolution or linear layer before"),
        ([nn.Conv2d(4, 4, 3, groups=2)], "conv: expected one group"),
    ],
)
def test_layers_without_a_counterpart_are_named(layers, named):
    with pytest.raises(ValueError, match=named):
        to_video_layers(nn.Sequential(*layers), frame_shape=(8, 8, 3))


def test_other_frames_are_refused():
    with pytest.raises(ValueError, match=r"x: expected \(B, T, \*\(16, 16, 3\)\)"):
        net()(torch.rand(1, 2, 16, 12, 3))
    with pytest.raises(ValueError, match="step_init"):
        to_video_layers(image_net(), frame_shape=(8, 12, 3), step_init=0.0)


@pytest.mark.claim(157, "Every policy of the linear stream gives the same", tolerance=1e-12)
@pytest.mark.parametrize(("threshold", "quantum"), [(0.0, None), (0.3, None), (0.0, 0.2)])
@pytest.mark.parametrize("resync_every", [None, 2])
def test_policies_agree(threshold, quantum, resync_every):
    options = {"threshold": threshold, "quantum": quantum, "dtype": DOUBLE}
    torch.manual_seed(0)
    sparse = DeltaLinear(6, 5, resync_every=resync_every, **options)
    auto = DeltaLinear(6, 5, resync_every=resync_every, policy="auto", **options)
    auto.load_state_dict(sparse.state_dict())
    x = torch.randn(7, 3, 6, dtype=DOUBLE) * 0.5
    x[4, :, 1:] = x[3, :, 1:]  # little changes
    states = sparse.init_state((3,)), auto.init_state((3,))
    for frame in x:
        (y, first), (z, second) = (
            layer.step(frame, state) for layer, state in zip((sparse, auto), states, strict=True)
        )
        states = first, second
        torch.testing.assert_close(z, y, rtol=0, atol=1e-12)
        for a, b in zip(first, second, strict=True):
            assert a == b if isinstance(a, int) else torch.allclose(a, b, rtol=0, atol=1e-12)


def test_auto_goes_dense_where_as_much_changed_as_there_is():
    layer = DeltaLinear(4, 2, policy="auto")
    x = torch.zeros(2, 4)
    with torch.no_grad():
        _, state = layer.step(x + 1, layer.init_state((2,)))
        for changes, dense in (
            ([(0, 0)], False),
            ([(0, 0), (0, 1), (1, 3)], False),
            ([(0, 0), (0, 1), (1, 3), (1, 2)], True),
        ):
            moved = x + 1
            for place in changes:
                moved[place] = 5.0
            with DeltaMeter() as meter:
                layer.step(moved, state)
            assert meter.dense_macs == (0 if dense else 16)  # a dense product is no step
            assert meter.macs == (0 if dense else 2 * len(changes))


def test_auto_passes_gradients():
    sparse, auto = (DeltaLinear(3, 2, policy=p, dtype=DOUBLE) for p in ("sparse", "auto"))
    auto.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 3, dtype=DOUBLE)
    grads = []
    for layer in (sparse, auto):
        leaf = x.clone().requires_grad_()
        y, state = layer.step(leaf, layer.init_state((2,)))
        y, _ = layer.step(leaf * 2, state)
        grads.append(torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()]))
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
