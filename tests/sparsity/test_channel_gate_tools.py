"""Whole models with masked convolutions: conversion, and multiplications counted by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchzoo.sparsity import (
    FlopCount,
    FTWTConv2d,
    estimate_flops,
    ftwt_convert,
    ftwt_loss,
    ftwt_recording,
    measured_flops,
    open_gates,
)
from torchzoo.surgery import find


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vgg(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def resnet(library):
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model("resnet10t", num_classes=4, in_chans=2).eval()
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block = {"basic": BasicBlock, "bottleneck": Bottleneck}[library]
    model = ResNet(block, [1, 1, 1, 1], num_classes=4)
    model.conv1 = nn.Conv2d(2, 64, 7, stride=2, padding=3, bias=False)
    return model.eval()


def gate(model, kind):
    for layer in find(model, FTWTConv2d).values():
        layer.gate = kind


def by_hand(model, x, tau):
    """Mean multiplications of a `vgg` whose layers are masked by the mass criterion, in NumPy."""
    total, stages = 0.0, [model[:3], model[3:5], model[5:9]]
    for stage in stages:
        conv = next(m for m in stage if isinstance(m, nn.Conv2d))
        head = stage[0](x) if isinstance(stage[0], nn.MaxPool2d) else x
        out = stage(x).detach()
        e = out.numpy().max((2, 3)).astype(float)
        mask = np.zeros_like(e)
        for row, kept in zip(e, mask, strict=True):
            order = np.argsort(-row)
            mass = np.cumsum(row[order]) / row.sum()
            kept[order[(mass <= tau + 1e-5) & (row[order] > 0)]] = 1
            kept[order[0]] = 1
        live = (head.detach().numpy() != 0).any((2, 3)).sum(1)
        total += (mask.sum(1) * live).mean() * 9 * out.shape[2] * out.shape[3]
        assert conv.out_channels == mask.shape[1]
        x = out * torch.from_numpy(mask).float()[..., None, None]
    return total


@pytest.mark.claim(
    43, "What a threshold saves, estimated before training, is what the layers' own targets save"
)
@pytest.mark.parametrize("tau", [0.5, 0.8, 0.95])
def test_estimate_is_that_of_the_targets(tau):
    model = vgg()
    x = images(7, 2, 12, 12)
    before = copy.deepcopy(model.state_dict())
    found = estimate_flops(model, [x[:4], x[4:]], (tau, 1.0))[tau]
    assert found.macs == pytest.approx(by_hand(model, x, tau), rel=1e-9)
    assert found.dense == 9 * (2 * 8 * 144 + 8 * 12 * 144 + 12 * 6 * 9)
    assert found.predictor == 2 * 8 + 8 * 12 + 12 * 6
    assert found.reduction == pytest.approx(1 - (found.macs + found.predictor) / found.dense)
    assert 0.05 < found.reduction < 0.95
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    converted = copy.deepcopy(model)
    ftwt_convert(converted, 0.3)
    assert estimate_flops(converted, [x], (tau,))[tau].macs == pytest.approx(found.macs)
    assert converted[0].threshold == 0.3
    gate(converted, "target")
    for layer in find(converted, FTWTConv2d).values():
        layer.set_threshold(tau)
    assert measured_flops(converted, [x]).macs == pytest.approx(found.macs)


@pytest.mark.claim(43, "Trained heads save what was estimated before, within 5 points")
def test_estimate_holds_after_training():
    from torchzoo.data.digits import digits

    data = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    x, y = data.train_x, data.train_y
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        part = slice(step % 10 * 128, step % 10 * 128 + 128)
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    estimate = estimate_flops(model, [x[:256]], (0.7,))[0.7].reduction
    ftwt_convert(model, 0.7)
    heads = [p for f in find(model, FTWTConv2d).values() for p in f.predictor.parameters()]
    optimizer = torch.optim.SGD(heads, 0.1, momentum=0.9)
    for step in range(80):
        part = slice(step % 10 * 128, step % 10 * 128 + 128)
        with ftwt_recording(model):
            model(x[part])
            ftwt_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    final = measured_flops(model, [data.test_x]).reduction
    assert 0.2 < estimate < 0.8
    assert abs(final - estimate) < 0.05
    with torch.no_grad(), ftwt_recording(model):
        model(data.test_x)
        masks = model[3].mask
    by_class = torch.stack([masks[data.test_y == k].double().mean(0) for k in range(10)])
    assert by_class.std(0).max() > 0.1  # which filters are computed depends on the image


@pytest.mark.claim(43, "A converted model with open gates computes what it did", tolerance=0.0)
@pytest.mark.parametrize(
    ("library", "count"), [("vgg", 3), ("timm", 10), ("basic", 9), ("bottleneck", 13)]
)
def test_conversion_keeps_the_function(library, count):
    model = vgg() if library == "vgg" else resnet(library)
    twin = copy.deepcopy(model)
    report = ftwt_convert(model, 0.6)
    assert len(report.names) == count
    gate(model, "open")
    x = images(2, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    gate(model, "predicted")
    masked = model(x)
    assert not torch.allclose(masked, twin(x))
    masked.sum().backward()
    with torch.no_grad():
        for layer in find(model, FTWTConv2d).values():
            layer.policy = "gather"
        torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.claim(43, "Multiplications of a timm ResNet are those that its convolutions do")
def test_multiplications_of_a_resnet():
    model = resnet("timm")
    ftwt_convert(model, 0.6, policy="gather")
    x = images(1, 2, 32, 32)
    counted = measured_flops(model, [x])
    assert 0 < counted.macs < counted.dense
    with torch.no_grad(), FlopCounterMode(display=False) as gathered:
        model(x)
    gate(model, "open")
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(x)
    saved = whole.get_total_flops() - gathered.get_total_flops()
    assert saved == 2 * (counted.dense - counted.macs)


def test_open_gates_change_heads_alone():
    model = vgg()
    ftwt_convert(model, 0.6)
    model[0].train()
    x = images(16, 2, 12, 12)
    with torch.no_grad(), ftwt_recording(model):
        model(x)
        assert not model[0].mask.all()
    before = copy.deepcopy(model.state_dict())
    open_gates(model, (x for _ in range(60)), lr=0.3, max_batches=50)
    for name, tensor in model.state_dict().items():
        assert ("predictor" in name) != torch.equal(tensor, before[name])
    assert model[0].training
    assert not model[3].training
    assert all(p.grad is None for p in model.parameters())
    counted = measured_flops(model, [x])
    assert counted.macs > 0.97 * estimate_flops(model, [x], (-1.0,))[-1.0].macs
    untouched = copy.deepcopy(model.state_dict())
    open_gates(model, [x], max_batches=0)
    assert all(torch.equal(t, untouched[n]) for n, t in model.state_dict().items())


def test_recording_ends():
    model = vgg()
    ftwt_convert(model)
    x = images(3, 2, 12, 12)
    with ftwt_recording(model):
        with pytest.raises(ValueError, match=r"^model: expected a call inside .* got"):
            ftwt_loss(model)
        model(x)
        inside = measured_flops(model)
    assert inside == measured_flops(model, [x])
    assert isinstance(inside, FlopCount)
    model(x)
    assert model[0].logits is None
    copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^x: "), ftwt_recording(model):
        model(x[:, :1])
    assert not model[0].recording
    assert model[0].record is None


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ftwt_convert(nn.Linear(2, 2)), "model"),
        (lambda: ftwt_convert(vgg(), 1.5), "threshold"),
        (lambda: ftwt_loss(vgg()), "model"),
        (lambda: measured_flops(vgg(), []), "model"),
        (lambda: estimate_flops(vgg(), [], (0.5,)), "batches"),
        (lambda: estimate_flops(vgg(), [images(1, 2, 12, 12)], (2.0,)), "threshold"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        call()
