"""The delta meter against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.ops import delta_linear_step
from torchzoo.ops.delta_conv2d import delta_conv2d_step
from torchzoo.sparsity import DeltaActivation, DeltaMeter, L1Activation


@pytest.mark.claim(
    157, "The meter's shares of non-zeros and of changes are those counted by hand", tolerance=1e-6
)
def test_fractions_over_layers_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(
        DeltaActivation(4, activation="none", delta="full", step_init=0.5),
        DeltaActivation(4, sigma=True, step_init=1.0),
        L1Activation(),
        nn.Linear(4, 3),
        nn.ReLU(),
    )
    batches = [torch.randn(b, 5, 2, 4).cumsum(1) for b in (2, 3)]
    with DeltaMeter(model) as meter:
        for x in batches:
            model(x)
    model(batches[0])  # outside: not counted
    first = torch.cat([0.5 * torch.round(x / 0.5) for x in batches])
    second = torch.cat([torch.round((0.5 * torch.round(x / 0.5)).relu()) for x in batches])
    last = torch.cat([torch.relu(model[3](model[:3](x))) for x in batches])
    spatial, temporal, sizes, changes = [], [], [], []
    for name, level in (("0", first), ("1", second), ("2", second), ("4", last)):
        spatial.append((level != 0).double().sum())
        temporal.append((level[:, 1:] != level[:, :-1]).double().sum())
        sizes.append(level.numel())
        changes.append(level[:, 1:].numel())
        assert meter.layers[name].spatial == pytest.approx(float(spatial[-1] / sizes[-1]))
        assert meter.layers[name].temporal == pytest.approx(float(temporal[-1] / changes[-1]))
    assert set(meter.layers) == {"0", "1", "2", "4"}
    assert meter.spatial == pytest.approx(float(sum(spatial) / sum(sizes)))
    assert meter.temporal == pytest.approx(float(sum(temporal) / sum(changes)))
    assert 0 < meter.layers["0"].temporal < 1


@pytest.mark.claim(
    157, "The meter counts nnz(delta) * outputs multiplications a step", tolerance=0.0
)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_multiplications_of_steps(leading):
    torch.manual_seed(0)
    x_ref = torch.randn(*leading, 10)
    x = torch.where(torch.rand(*leading, 10) < 0.5, x_ref, torch.randn(*leading, 10))
    acc, weight_t = torch.zeros(*leading, 7), torch.randn(10, 7)
    with DeltaMeter() as meter:
        delta_linear_step(x, x_ref, acc, weight_t)
        delta_linear_step(x, x_ref, acc, weight_t, threshold=0.5)
    expected = sum(int(((x - x_ref).abs() > threshold).sum()) * 7 for threshold in (0.0, 0.5))
    assert meter.macs == expected
    assert meter.dense_macs == 2 * x.numel() * 7
    delta_linear_step(x, x_ref, acc, weight_t)
    assert meter.macs == expected


@pytest.mark.claim(
    157,
    "For a convolution the meter counts, for each changed input, the outputs that its kernel "
    "carries it to, times the output channels",
    tolerance=0.0,
)
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)}),
        ((2, 2), {"stride": 3}),
    ],
)
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_multiplications_of_convolutions(kernel, options, leading):
    torch.manual_seed(0)
    x_ref = torch.randn(*leading, 2, 7, 6)
    x = torch.where(torch.rand(x_ref.shape) < 0.5, x_ref, torch.randn(x_ref.shape))
    weight = torch.randn(5, 2, *kernel)

    def multiplications(changed):
        """As a convolution with ones counts: how many changed inputs each output sees."""
        frames = changed.double().reshape(-1, 2, 7, 6)
        return int(F.conv2d(frames, torch.ones(5, 2, *kernel).double(), **options).sum())

    acc = torch.zeros(*leading, *F.conv2d(torch.zeros(1, 2, 7, 6), weight, **options).shape[1:])
    with DeltaMeter() as meter:
        delta_conv2d_step(x, x_ref, acc, weight, **options)
    assert meter.macs == multiplications(x != x_ref)
    assert meter.dense_macs == multiplications(torch.ones_like(x))
    assert 0 < meter.macs < meter.dense_macs


def test_nothing_seen_is_zero():
    with DeltaMeter(nn.ReLU()) as meter:
        pass
    assert (meter.macs, meter.dense_macs, meter.spatial, meter.temporal) == (0, 0, 0.0, 0.0)


def test_hooks_go_after_an_error():
    model = nn.ReLU()
    with (
        pytest.raises(ValueError, match=r"expected \(B, T, ..., C\), got \(2, 3\)"),
        DeltaMeter(model),
    ):
        model(torch.ones(2, 3))
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="model: expected DeltaActivation"):
        DeltaMeter(nn.Linear(2, 2))
