"""Delta forms: equal to the dense layer at threshold 0, and to what was sent above it."""

import pytest
import torch
from torch import nn

from torchzoo.surgery import restore
from torchzoo.swaps import FrameDeltaConv2d, swap_delta


@pytest.fixture
def network():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()


def test_threshold_zero_is_the_dense_network_on_the_same_weights(network):
    x = torch.randn(5, 2, 6, 6)
    expected, weight = network(x), network[0].weight
    report = swap_delta(network)
    assert report.names == ("0", "4")
    assert report.parameters[0] == report.parameters[1]
    torch.testing.assert_close(network(x), expected)
    assert network[0].weight is weight
    restore(network)
    assert torch.equal(network(x), expected)


def sent(frames, threshold):
    """What a stream sends: each element when it has moved by more than the threshold."""
    last, out = torch.zeros_like(frames[0]), []
    for frame in frames:
        delta = frame - last
        last = last + torch.where(delta.abs() > threshold, delta, 0.0)
        out.append(last)
    return torch.stack(out)


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_a_batch_of_images_is_one_film(threshold):
    conv = nn.Conv2d(2, 3, 3, padding=1)
    layer = FrameDeltaConv2d.from_module(conv, threshold=threshold)
    film = torch.randn(7, 2, 5, 4).cumsum(0)
    torch.testing.assert_close(layer(film), conv(sent(film, threshold)))
    films = torch.stack([film, film.flip(0)])
    expected = torch.stack([conv(sent(one, threshold)) for one in films])
    torch.testing.assert_close(layer(films), expected)


def test_sequences_go_through_linear_layers():
    linear = nn.Linear(3, 2)
    model = nn.Sequential(linear)
    swap_delta(model, threshold=0.5)
    x = torch.randn(2, 6, 3).cumsum(1)
    expected = torch.stack([linear(sent(one, 0.5)) for one in x])
    torch.testing.assert_close(model(x), expected)


def test_other_layers_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU())
    with pytest.raises(ValueError, match="one group"):
        swap_delta(model)
    with pytest.raises(ValueError, match="expected Linear and Conv2d layers, got ReLU"):
        swap_delta(model, nn.ReLU)
