"""Which norms `convert_norm_act` fuses, in forwards of every manner of writing them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.activations import EvoNormS0, convert_norm_act


class Calls(nn.Module):
    """A norm and an activation, `times` times in a row, and a layer that is not called."""

    def __init__(self, activation, times=1):
        super().__init__()
        self.bn, self.idle = nn.BatchNorm2d(4), nn.Linear(2, 3)
        self.act, self.times = activation, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.act(self.bn(x))
        return x


def images():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.ReLU(), nn.ReLU6(), nn.SiLU()),
        *(torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.silu),
        *(lambda x: x.relu(), lambda x: x.relu_()),
    ],
)
def test_every_activation_gives_way(activation):
    model = nn.Sequential(Calls(activation)).eval()
    idle = model[0].idle
    assert convert_norm_act(model, groups=2).names == ("0.bn",)
    torch.testing.assert_close(model(images()), EvoNormS0(4, groups=2)(images()))
    assert model[0].idle is idle
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("activation", [nn.Tanh(), torch.sigmoid, lambda x: x.tanh()])
def test_other_activations_stay(activation):
    report = convert_norm_act(nn.Sequential(Calls(activation)), groups=2)
    assert (report.names, list(report.left)) == ((), ["0.bn"])


def test_a_norm_that_is_called_twice_stays():
    report = convert_norm_act(nn.Sequential(Calls(F.relu, times=2)), groups=2)
    assert report.left == {"0.bn": "it is called several times"}


def test_an_identity_between_them_is_passed_by():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU()).eval()
    assert convert_norm_act(model, groups=2).names == ("0",)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(images()), EvoNormS0(4, groups=2)(images()))


def test_an_activation_with_a_second_place_goes_on_acting_there():
    relu, conv = nn.ReLU(), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), relu), nn.Sequential(conv, relu))
    assert convert_norm_act(model, groups=2).names == ("0.0",)
    expected = conv(EvoNormS0(4, groups=2)(images())).relu()
    torch.testing.assert_close(model(images()), expected)
