"""The network of directions: factors by hand, and the sizes of the authors' code."""

import math

import pytest
import torch
from torch import nn

from torchzoo.splatting import Cameras, VDGSScene, ViewDirectionField

DOUBLE = torch.float64
BOX = [[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]]


@pytest.mark.claim(
    50,
    "F(mu, d) is a sigmoid of an MLP with leaky rectifiers of d and of a grid on the scene's box",
    tolerance=1e-10,
)
def test_factors_by_hand():
    box = torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 6.0]], dtype=DOUBLE)
    sizes = {"levels": 1, "features": 3, "base": 1, "log2_table": 3, "hidden": 5}
    field = ViewDirectionField(box, target="both", sh_degree=1, **sizes, dtype=DOUBLE)
    nn.init.normal_(field.grid.table)
    means = box[0] + (box[1] - box[0]) * torch.rand(7, 3, dtype=DOUBLE)
    dirs = nn.functional.normalize(torch.randn(4, 7, 3, dtype=DOUBLE), dim=-1)
    factors = field(means, dirs)
    for c, n in ((0, 0), (1, 5), (3, 6)):
        x, y, z = (
            (means[n] + torch.tensor([1.0, 2.0, 0.0])) / torch.tensor([2.0, 4.0, 6.0])
        ).tolist()
        corners = [
            (x if i else 1 - x) * (y if j else 1 - y) * (z if k else 1 - z)
            * field.grid.table[i + 2 * j + 4 * k]
            for i in (0, 1) for j in (0, 1) for k in (0, 1)
        ]  # fmt: skip
        hidden = torch.cat([dirs[c, n], sum(corners)])
        for layer in (field.mlp[0], field.mlp[2]):
            hidden = layer.weight @ hidden
            hidden = torch.where(hidden < 0, 0.01 * hidden, hidden)
        out = 1 / (1 + torch.exp(-field.mlp[4].weight @ hidden))
        assert len(out) == 1 + 4 * 3
        torch.testing.assert_close(factors["opacity"][c, n], out[0], atol=1e-10, rtol=0)
        for k in range(4):
            expected = out[1 + 3 * k : 4 + 3 * k]
            torch.testing.assert_close(factors["sh"][c, n, k], expected, atol=1e-10, rtol=0)


def test_the_authors_sizes():
    field = ViewDirectionField(BOX)
    assert (field.target, field.output, field.grid.features) == ("opacity", "sigmoid", 4)
    assert field.grid.resolutions == (16, 24, 36, 54)
    assert field.grid.sizes == (17**3, 25**3, 2**15, 2**15)
    layers = [layer for layer in field.mlp if isinstance(layer, nn.Linear)]
    assert [(a.in_features, a.out_features) for a in layers] == [(19, 32), (32, 32), (32, 1)]
    assert ViewDirectionField(BOX, target="color").mlp[-1].out_features == 48
    assert ViewDirectionField(BOX, target="both").mlp[-1].out_features == 49
    small = ViewDirectionField(BOX, log2_table=10)
    assert sum(p.numel() for p in small.parameters()) == 16_384 + 19 * 32 + 32 * 32 + 32
    field.mlp[-1].weight.data.zero_()
    field.reset_parameters()
    assert 0.9e-4 < field.grid.table.abs().max() <= 1e-4
    for layer in layers[:2]:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert layers[2].weight.any()
    scene = VDGSScene(3, field=field)
    assert (scene.operator, scene.detach_means) == ("mul", False)
    assert scene.factors(Cameras.orbit(3, radius=3.0, width=14, height=14))[
        "opacity"
    ].mean().item() == pytest.approx(0.5, abs=0.15)
