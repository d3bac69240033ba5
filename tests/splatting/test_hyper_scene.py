"""Scenes that follow a code: heads, embeddings, what is rendered, and edits."""

import math

import pytest
import torch
from torch import nn

from torchzoo.splatting import (
    AnimatableScene,
    Cameras,
    GaussianScene,
    HyperGaussian,
    HyperGaussianHead,
    SplatEmbedding,
)

DOUBLE = torch.float64
N, CODE, LATENT = 7, 2, 3


def scene(*, moved=True, dtype=DOUBLE, **attributes):
    """An animatable scene; `moved` takes its head away from where it begins."""
    torch.manual_seed(0)
    base = GaussianScene(N, sh_degree=1, dtype=dtype)
    for parameter in base.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    embed = SplatEmbedding(
        N, CODE, LATENT, anchors=base.means.detach(), hidden=8, frequencies=2, dtype=dtype
    )
    head = HyperGaussianHead(N, LATENT, **attributes, dtype=dtype)
    if moved:
        for parameter in head.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return AnimatableScene(base, embed, head)


def cameras(count=2):
    return Cameras.orbit(count, radius=4.0, width=20, height=16, dtype=DOUBLE)


def codes(count):
    return torch.randn(count, CODE, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)


@pytest.mark.claim(
    63,
    "Before training an animatable scene looks like its base under every code",
    tolerance=1e-12,
)
def test_starts_as_its_base():
    model = scene(moved=False, opacity=True, color=True)
    for code in 10 * codes(2):
        image = model.render(cameras(), code).image
        assert (image - model.base.render(cameras()).image).abs().max() <= 1e-12


@pytest.mark.claim(
    63,
    "Each attribute gets the conditional mean of its own Gaussian: places and colours as they are, "
    "quaternions before normalisation, scales as logarithms, opacities as logits",
    tolerance=1e-12,
)
def test_attributes():
    model = scene(opacity=True, color=True)
    base, code = model.base, codes(3)
    z = model.embed(code)
    assert z.shape == (3, N, LATENT)
    for b, splats in enumerate(model(code)):
        offset = {name: part(z[b], per_item=True).mean for name, part in model.head.parts.items()}
        quats = base.quats + offset["rotation"]
        logit = base.opacity_logits + offset["opacity"][:, 0]
        expected = {
            "means": base.means + offset["position"],
            "quats": quats / quats.norm(dim=-1, keepdim=True),
            "scales": base.scales * offset["scale"].exp(),
            "opacities": 1 / (1 + (-logit).exp()),
            "features": torch.cat([base.sh0 + offset["color"][:, None], base.shN], 1),
        }
        assert splats.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(splats[name], value, rtol=0, atol=1e-12)


def test_a_code_for_each_camera():
    model, code = scene(), codes(2)
    both = model.render(cameras(), code, backgrounds=torch.ones(3, dtype=DOUBLE))
    for k in range(2):
        alone = model.render(cameras()[k], code[k], backgrounds=torch.ones(3, dtype=DOUBLE))
        torch.testing.assert_close(both.image[k], alone.image[0], rtol=0, atol=1e-12)
        assert torch.equal(both.info["radii"][k], alone.info["radii"][0])
    assert (both.image[0] - model.render(cameras(), code[1]).image[0]).abs().max() > 0.05
    depth = model.render(cameras(), code, render_mode="D")
    assert depth.image is None
    assert depth.depth.shape == (2, 16, 20)
    for wrong in (codes(3), codes(2)[None]):
        with pytest.raises(ValueError, match=r"cond: got .*C=2"):
            model.render(cameras(), wrong)


def test_gradients_reach_every_part():
    model = scene()
    image = model.render(cameras(1), codes(1)).image
    (image - 0.4).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert not model.embed.anchors.requires_grad


def test_embedding_is_the_encoding_behind_a_network():
    embed = SplatEmbedding(N, CODE, LATENT, hidden=8, frequencies=2, dtype=DOUBLE)
    code, seen = codes(1)[0], []
    for p in embed.anchors.tolist():
        waves = [f(2**k * math.pi * x) for k in range(2) for f in (math.sin, math.cos) for x in p]
        seen.append([*p, *waves, *code.tolist()])
    expected = embed.network(torch.tensor(seen, dtype=DOUBLE))
    torch.testing.assert_close(embed(code), expected, rtol=0, atol=1e-12)
    assert len(seen[0]) == 3 + 12 + CODE
    assert SplatEmbedding(N, 6, 8).network[0].in_features == 27 + 6


@pytest.mark.claim(
    63,
    "Removing and duplicating splats of an animatable scene leaves the others' pictures and the "
    "moments of all their parameters as they were",
    tolerance=1e-12,
)
def test_edits(tmp_path):
    model, code = scene(), codes(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model.render(cameras(1), code).image.square().sum().backward()
    optimizer.step()
    before = model(code)[0]
    l21 = model.head.parts["position"].l21
    moments = optimizer.state[l21]["exp_avg"].clone()
    keep = torch.tensor([True, False, True, True, False, True, True])
    model.keep(keep, optimizer)
    model.duplicate(torch.tensor([1]), optimizer)
    rows = torch.tensor([0, 2, 3, 5, 6, 2])
    for name, value in model(code)[0].items():
        torch.testing.assert_close(value, before[name][rows], rtol=0, atol=1e-12)
    state = optimizer.state[model.head.parts["position"].l21]
    assert torch.equal(state["exp_avg"][:5], moments[rows[:5]])
    assert not state["exp_avg"][5].any()
    assert model.head.num == 6
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}

    twin = scene(moved=False)
    twin.load_state_dict(model.state_dict())
    again = AnimatableScene.from_pretrained(twin.save_pretrained(tmp_path / "avatar"))
    assert torch.equal(again.render(cameras(1), code).image, model.render(cameras(1), code).image)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="head: got num=4, expected 7"):
        AnimatableScene(GaussianScene(N), nn.Identity(), HyperGaussianHead(4, 3))
    off = dict.fromkeys(("position", "rotation", "scale"), False)
    with pytest.raises(ValueError, match="position: got no attribute"):
        HyperGaussianHead(N, 3, **off)
    assert list(HyperGaussianHead(N, 3, **off, color=True).parts) == ["color"]
    model = scene()
    with pytest.raises(ValueError, match=r"cond: got \(2,\), expected \(B, e\)"):
        model(codes(1)[0])

    class Wrong(nn.Module):
        def __init__(self, offsets):
            super().__init__()
            self.offsets = offsets

        def forward(self, z):
            return self.offsets

    for offsets, words in (
        ({"size": torch.zeros(1, N, 3)}, "offsets of 'size'"),
        ({"position": torch.zeros(N, 3)}, r"position offsets of shape \(7, 3\)"),
    ):
        model.head = Wrong(offsets)
        with pytest.raises(ValueError, match=words):
            model(codes(1))


def test_one_latent_for_all_splats():
    """Any module may embed; here time itself, which all items share."""
    base = GaussianScene(N, dtype=DOUBLE)
    head = HyperGaussianHead(N, 1, rotation=False, scale=False, dtype=DOUBLE)
    head.parts["position"].l21.data.copy_(-torch.eye(3)[1].double())
    model = AnimatableScene(base, nn.Identity(), head)
    later = model(torch.tensor([[0.0], [2.0]], dtype=DOUBLE))
    way = later[1]["means"] - later[0]["means"]
    assert torch.allclose(way, torch.tensor([0.0, 2.0, 0.0], dtype=DOUBLE).expand(N, 3))
    assert isinstance(head.parts["position"], HyperGaussian)
