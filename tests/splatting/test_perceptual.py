"""LPIPS is measured where a package and a network's weights are there, and never downloaded."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torchvision import models

from tests.splatting.runs import trainer, views
from torchzoo.splatting import find_lpips

URLS = {
    "vgg": models.VGG16_Weights.IMAGENET1K_V1.url,
    "alex": models.AlexNet_Weights.IMAGENET1K_V1.url,
}


class StandIn(torch.nn.Module):
    """Both packages' network: pictures `(C, 3, H, W)` in [-1, 1]; gives a value for each."""

    made = ()

    def __init__(self, **options):
        super().__init__()
        StandIn.made += (options,)
        assert self.training
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def forward(self, one, two):
        assert not self.training
        assert not self.weight.requires_grad
        assert one.dtype == two.dtype == torch.float32
        assert min(one.min(), two.min()) < -0.1
        return ((one - 2 * two) * self.weight[:, None, None]).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Puts packages and weights on the machine, which has neither; no weights are loaded."""
    monkeypatch.setattr(StandIn, "made", ())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in ("lpips", "torchmetrics", "torchmetrics.image", "torchmetrics.image.lpip"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "checkpoints").mkdir()

    def put(package=None, networks=(), made=StandIn):
        for network in networks:
            (tmp_path / "checkpoints" / URLS[network].split("/")[-1]).touch()
        if package == "lpips":
            monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=made))
        if package == "torchmetrics":
            for name in ("torchmetrics", "torchmetrics.image"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            found = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=made)
            monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", found)

    return put


def test_nothing_is_measured_where_nothing_is(machine):
    assert find_lpips(64, 64) == {}
    machine(networks=["vgg", "alex"])
    assert find_lpips(64, 64) == {}
    machine("lpips")
    assert list(find_lpips(64, 64)) == ["lpips_vgg"]


def test_nothing_is_downloaded(machine):
    for package in ("lpips", "torchmetrics"):
        machine(package)
        assert find_lpips(64, 64) == {}
    assert StandIn.made == ()


@pytest.mark.parametrize(
    ("networks", "expected"), [(["alex"], "alex"), (["vgg"], "vgg"), (["alex", "vgg"], "vgg")]
)
@pytest.mark.parametrize(
    ("package", "options"),
    [("lpips", {"net": None, "verbose": False}), ("torchmetrics", {"net_type": None})],
)
def test_a_package_and_a_network(machine, package, options, networks, expected):
    machine(package, networks)
    found = find_lpips(32, 40)
    assert list(found) == [f"lpips_{expected}"]
    assert StandIn.made == ({name: expected if v is None else v for name, v in options.items()},)
    one, two = torch.rand(2, 3, 32, 40, 3, dtype=torch.float64)
    value = found[f"lpips_{expected}"](one, two)
    signed = [(2 * x - 1).mean((0, 1, 2)) for x in (one, two)]
    wanted = ((signed[0] - 2 * signed[1]) * torch.tensor([1.0, 2, 4])).mean()
    assert value.shape == ()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_small_pictures_are_left_out(machine):
    machine("lpips", ["vgg"])
    assert find_lpips(31, 400) == find_lpips(400, 31) == {}


def test_a_package_that_does_not_work_gives_way(machine):
    def broken(**options):
        raise RuntimeError("torn weights")

    machine("lpips", ["vgg"], broken)
    with pytest.warns(UserWarning, match="LPIPS is left out: torn weights"):
        assert find_lpips(64, 64) == {}
    machine("torchmetrics")
    with pytest.warns(UserWarning, match="torn weights"):
        assert list(find_lpips(64, 64)) == ["lpips_vgg"]


def test_evaluation_takes_further_measures():
    cameras, images = views()
    run = trainer("none", steps=1)
    given = []

    def measure(found, truth):
        given.append((found, truth))
        return (found - truth).abs().max()

    scores = run.evaluate(cameras, (images * 255).round().byte(), more={"worst": measure})
    assert list(scores) == ["psnr", "ssim", "worst"]
    assert [tuple(x.shape) for x in given[0]] == [(1, 12, 12, 3)] * 2
    rendered = run.scene.render(cameras).image.detach().clamp(0, 1)
    truth = (images * 255).round() / 255
    expected = (rendered - truth).abs().amax((1, 2, 3)).mean().item()
    assert scores["worst"] == pytest.approx(expected, abs=1e-6)
    assert {name: scores[name] for name in ("psnr", "ssim")} == run.evaluate(
        cameras, (images * 255).round().byte()
    )
