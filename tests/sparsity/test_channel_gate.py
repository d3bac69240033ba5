"""Masked convolutions against hand examples, loops over filters, and counts of real products."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchzoo.sparsity import (
    FTWTConv2d,
    MaskPredictor,
    ftwt_loss,
    ftwt_recording,
    heatmap_mass_mask,
    uniform_mask,
)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def heat(*values):
    """One image of 2x2 whose filters have these largest activations, of either sign."""
    out = torch.zeros(1, len(values), 2, 2)
    out[0, :, 1, 0] = torch.tensor(values)
    out[0, ::2] *= -1
    return out


def layer(cin=3, cout=6, *, bn=True, seed=0, groups=1, stride=1, **options):
    """A layer in evaluation mode whose batch norm is not the identity."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, groups=groups)
    norm = nn.BatchNorm2d(cout) if bn else None
    if norm:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.data = torch.randn(cout)
        norm.running_var = torch.rand(cout) + 0.5
    return FTWTConv2d(conv, norm, **options).eval()


@pytest.mark.claim(43, "The mass criterion keeps filters while their mass is at most tau")
def test_mass_by_hand():
    e = heat(3.0, 1.0, 5.0, 1.0)

    def kept(tau, out=e, **options):
        return heatmap_mass_mask(out, tau, **options)[0].nonzero().flatten().tolist()

    assert kept(0.8) == [0, 2]
    assert kept(0.79) == [2]
    assert kept(0.9) == [0, 1, 2]  # of equals the first
    assert kept(1.0) == [0, 1, 2, 3]
    assert kept(0.4) == [2]  # exceeds tau alone
    assert kept(0.4, min_keep=0) == []
    assert kept(0.4, min_keep=3) == [0, 1, 2]
    assert kept(1.0, heat(3.0, 0.0, 5.0, 1.0)) == [0, 2, 3]
    assert kept(1.0, heat(3.0, 7e-5, 5.0, 1.0)) == [0, 2, 3]  # at most 1e-5 of the mass
    assert kept(1.0, heat(3.0, 2e-4, 5.0, 1.0)) == [0, 1, 2, 3]
    assert kept(0.8 - 0.9e-5) == [0, 2]  # tau may be exceeded by 1e-5
    assert kept(0.8 - 1.1e-5) == [2]
    assert kept(-1.0, torch.zeros(1, 3, 2, 2)) == [0, 1, 2]
    assert kept(0.9, torch.zeros(1, 3, 2, 2)) == [0]


@pytest.mark.claim(43, "Masks are those of a loop over filters, image by image")
@given(seed=st.integers(0, 1000), tau=st.floats(0, 0.999))
@settings(max_examples=40, deadline=None)
def test_mass_by_loop(seed, tau):
    out = images(3, 7, 4, 5, seed=seed)
    found = heatmap_mass_mask(out, tau)
    for image, mask in zip(out.double().numpy(), found, strict=True):
        e = np.abs(image).max((1, 2))
        expected, mass = set(), 0.0
        for c in np.argsort(-e):
            mass += e[c] / e.sum()
            if mass <= tau + 1e-5 or not expected:
                expected.add(int(c))
            else:
                break
        assert set(mask.nonzero().flatten().tolist()) == expected


@pytest.mark.claim(43, "More filters are kept at a larger tau; a positive scale changes no mask")
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 0.25, 8.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_mass_is_monotone_and_scale_free(seed, scale):
    out = images(4, 9, 3, 3, seed=seed).relu()
    masks = [heatmap_mass_mask(out, tau) for tau in (0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999)]
    for less, more in pairwise(masks):
        assert (more | ~less).all()
    assert masks[0].sum() < masks[-1].sum()
    for tau in (0.33, 0.71, 0.93):
        assert torch.equal(heatmap_mass_mask(out * scale, tau), heatmap_mass_mask(out, tau))


@pytest.mark.claim(43, "The uniform criterion drops floor(ratio C) filters, and dead ones")
def test_uniform():
    e = heat(3.0, 1.0, 0.0, 5.0, 2.0)

    def kept(ratio, out=e):
        return uniform_mask(out, ratio)[0].nonzero().flatten().tolist()

    assert kept(0.0) == [0, 1, 3, 4]
    assert kept(0.39) == [0, 1, 3, 4]
    assert kept(0.4) == [0, 3, 4]
    assert kept(0.79) == [0, 3]
    assert kept(0.8) == [3]
    many = torch.arange(1.0, 101).reshape(1, 100, 1, 1)
    assert uniform_mask(many, 0.29).sum() == 71
    assert kept(0.0, torch.tensor([1e-5, 1.1e-5]).reshape(1, 2, 1, 1)) == [1]


@pytest.mark.claim(
    43, "Logits are a linear map of averages over dim² squares, dim = round(√(target / C_in))"
)
@pytest.mark.parametrize(("target", "side"), [(-1, 1), (48, 4), (20, 3), (1, 1)])
def test_predictor(target, side):
    head = MaskPredictor(3, 5, pool_target=target)
    x = images(2, 3, 12, 12)
    cells = x.reshape(2, 3, side, 12 // side, side, 12 // side).mean((3, 5))
    expected = cells.flatten(1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected)
    assert head.macs == 3 * side**2 * 5
    soft = MaskPredictor(3, 5, pool_target=target, softmax=True)
    soft.load_state_dict(head.state_dict())
    expected = cells.flatten(1).softmax(-1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(soft(x), expected)


@pytest.mark.claim(43, "A filter is let through exactly where its logit is above 0")
def test_output_is_masked():
    unit = layer(bn=True)
    x, residual = images(5, 3, 6, 6), images(5, 6, 6, 6, seed=1)
    plain = F.relu(unit.bn(unit.conv(x)) + residual)
    mask = unit.predictor(x) > 0
    assert 0.2 < mask.double().mean() < 0.8
    assert torch.equal(unit(x, residual), plain * mask[..., None, None])
    unit.predictor.linear.weight.data.zero_()
    unit.predictor.linear.bias.data.copy_(torch.tensor([0.0, 1e-6, -1e-6, 1.0, -1.0, 0.0]))
    passed = unit(x, residual).amax((0, 2, 3)) > 0
    assert passed.tolist() == [False, True, False, True, False, False]


@pytest.mark.claim(43, "With all masks 1 it is convolution, norm and activation, bitwise")
@pytest.mark.parametrize("training", [False, True])
def test_open_is_the_original(training):
    unit, twin = layer().train(training), layer().train(training)
    x, residual = images(4, 3, 6, 6), images(4, 6, 6, 6, seed=1)
    nn.init.constant_(unit.predictor.linear.bias, 50.0)
    assert torch.equal(unit(x), F.relu(twin.bn(twin.conv(x))))
    assert torch.equal(unit(x, residual), F.relu(twin.bn(twin.conv(x)) + residual))
    closed = layer().train(training)
    nn.init.constant_(closed.predictor.linear.bias, -50.0)
    closed.gate = "open"
    assert torch.equal(closed(x), F.relu(layer().train(training).dense(x).relu()))
    linear = layer(bn=False, act=None)
    linear.gate = "open"
    assert torch.equal(linear(x), linear.conv(x))


@pytest.mark.claim(
    43, "The task's gradient of a logit is dL/dmask sigma(g) (1 - sigma(g))", tolerance=1e-6
)
def test_straight_through():
    unit = layer().double()
    x, weight = images(5, 3, 6, 6).double(), images(5, 6, 6, 6, seed=1).double()
    with ftwt_recording(unit):
        loss = (unit(x) * weight).sum()
        (found,) = torch.autograd.grad(loss, unit.logits)
        sigma = unit.logits.sigmoid()
    by_mask = (unit.dense(x) * weight).sum((2, 3))
    torch.testing.assert_close(found, by_mask * sigma * (1 - sigma), rtol=1e-6, atol=1e-12)


@pytest.mark.claim(43, "Decoupled, the heads' loss reaches nothing but the heads; joint, it does")
@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_what_the_loss_reaches(mode):
    model = nn.Sequential(layer(mode=mode), layer(6, 4, seed=1, mode=mode)).train()
    x = images(5, 3, 6, 6).requires_grad_()
    with ftwt_recording(model):
        model(x)
        ftwt_loss(model).backward()
    heads = {id(p) for unit in model for p in unit.predictor.parameters()}
    others = [x, *(p for p in model.parameters() if id(p) not in heads)]
    reached = [p.grad is not None and bool(p.grad.any()) for p in others]
    first = [x, *model[0].conv.parameters(), *model[0].bn.parameters()]
    assert all(p.grad.any() for p in model.parameters() if id(p) in heads)
    if mode == "decoupled":
        assert not any(reached)
    else:
        assert all(reached[: len(first) - 3])  # bias before a batch norm in training: none
        assert x.grad.any()


@pytest.mark.claim(
    43, "The loss is the sum of cross-entropies over filters, its mean over images and layers"
)
def test_loss():
    unit = layer()
    x = images(5, 3, 6, 6)
    with ftwt_recording(unit):
        unit(x)
        g, t = unit.logits.double(), unit.target.double()
        assert torch.equal(unit.target, heatmap_mass_mask(unit.dense(x), 0.9))
        assert torch.equal(unit.mask, unit.logits > 0)
        one = ftwt_loss(unit)
    expected = -(t * g.sigmoid().log() + (1 - t) * (-g).sigmoid().log()).sum() / 5
    torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=0)
    pair = nn.ModuleList([layer(), layer()])
    with ftwt_recording(pair):
        pair[0](x), pair[1](x)
        torch.testing.assert_close(ftwt_loss(pair), one)
    assert unit.logits is unit.target is unit.mask is None


def test_targets_follow_the_criterion():
    unit = layer(criterion="uniform", threshold=0.5)
    x = images(5, 3, 6, 6)
    unit.gate = "target"
    kept = uniform_mask(unit.dense(x), 0.5)
    assert torch.equal(unit(x), unit.dense(x) * kept[..., None, None])


@pytest.mark.claim(
    43, "Gathering filters equals masking them, with batch norm and residual", tolerance=1e-5
)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_gather_equals_mask(groups, bn, batch):
    unit = layer(6, 12, bn=bn, groups=groups, stride=2)
    x, residual = images(batch, 6, 7, 9), images(batch, 12, 4, 5, seed=1)
    x[:, 1::3] = 0.0  # channels that a layer before has masked
    x[-1] = 0.0
    with torch.no_grad():
        expected = unit(x), unit(x, residual)
        unit.policy = "gather"
        for found, y in zip((unit(x), unit(x, residual)), expected, strict=True):
            torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
        nn.init.constant_(unit.predictor.linear.bias, -50.0)
        assert not unit(x).any()


@pytest.mark.claim(43, "Filters that are masked are not computed: their weights are not read")
def test_masked_filters_are_not_read():
    unit = layer(6, 12, policy="gather")
    x = images(1, 6, 6, 6)
    x[:, 2] = 0.0
    with torch.no_grad():
        expected = unit(x)
        closed = ~(unit.predictor(x)[0] > 0)
        assert 0 < closed.sum() < 12
        for tensor in (unit.conv.weight, unit.conv.bias, unit.bn.weight, unit.bn.running_mean):
            tensor[closed] = torch.nan
        unit.conv.weight[:, 2] = torch.nan
        assert torch.equal(unit(x), expected)
        unit.policy = "mask"
        assert unit(x).isnan().any()


@pytest.mark.claim(43, "Multiplications of the gather path are the closed form of kept filters")
@pytest.mark.parametrize("groups", [1, 2])
def test_multiplications(groups):
    unit = layer(6, 12, bn=False, groups=groups, policy="gather")
    x = images(3, 6, 8, 8)
    x[:, 0] = x[:, 5] = x[1, 1] = 0.0
    with torch.no_grad(), ftwt_recording(unit):
        unit(x)
        mask, counted = unit.mask, unit.record.macs
        assert unit.record.dense == 12 * (6 // groups) * 9 * 64
    live = (x != 0).any((2, 3))
    for image in range(3):
        kept = mask[image].reshape(groups, -1).sum(-1)
        seen = live[image].reshape(groups, -1).sum(-1)
        assert counted[image] == (kept * seen).sum() * 9 * 64
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unit(x[image : image + 1])
        assert counter.get_total_flops() == 2 * (int(counted[image]) + unit.predictor.macs)


@pytest.mark.claim(43, "A head on a fixed layer learns a linear rule to over 99 % of its masks")
def test_head_learns_a_linear_rule():
    torch.manual_seed(0)
    rule, head = nn.Linear(6, 10), MaskPredictor(6, 10)
    x = images(4000, 6, 4, 4, seed=3) + 2 * images(4000, 6, 1, 1, seed=4)
    with torch.no_grad():
        target = rule(x.mean((2, 3))) > 0
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for _ in range(800):
        logits = head(x[:3000])
        loss = F.binary_cross_entropy_with_logits(logits, target[:3000].float(), reduction="none")
        loss.sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    agreement = ((head(x[3000:]) > 0) == target[3000:]).double().mean()
    assert agreement > 0.99


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: heatmap_mass_mask(images(1, 2, 3, 3), 1.1), "tau"),
        (lambda: heatmap_mass_mask(images(2, 3, 3), 0.9), "out"),
        (lambda: uniform_mask(images(1, 2, 3, 3), 1.0), "ratio"),
        (lambda: uniform_mask(images(1, 2, 3, 3), -0.1), "ratio"),
        (lambda: layer(criterion="uniform", threshold=1.0), "threshold"),
        (lambda: layer().set_threshold(1.5), "threshold"),
        (lambda: FTWTConv2d(nn.Conv2d(3, 4, 3, padding_mode="circular")), "conv"),
        (
            lambda: FTWTConv2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "bn",
        ),
        (lambda: layer()(images(1, 3, 6, 6), images(1, 6, 6, 5)), "residual"),
        (lambda: layer()(images(1, 4, 6, 6)), "x"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got"):
        call()


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups"):
        FTWTConv2d({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2})


@pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 1)])
def test_sizes(padding):
    unit = FTWTConv2d(nn.Conv2d(2, 3, (3, 2), padding=padding, dilation=2)).eval()
    x = images(2, 2, 9, 8)
    assert unit.out_size(x) == tuple(unit.conv(x).shape[2:])
    with torch.no_grad():
        expected = unit(x)
        unit.policy = "gather"
        torch.testing.assert_close(unit(x), expected)
        assert unit(x[:0]).shape == expected[:0].shape
