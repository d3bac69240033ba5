"""Colours of all splats from one hash grid and one small network, in place of harmonics each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo import ops
from torchzoo.common.encodings import HashGridEncoding
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register
from torchzoo.splatting.scene import SH_C0

__all__ = ["HashGridColor", "box_of", "contract", "fitted_harmonics", "harmonics"]

_DIRECTIONS = 256
"""Directions in which harmonics are fitted."""


def contract(points: Tensor, aabb: Tensor) -> Tensor:
    """All of space in the unit cube, a box in its middle half.

    The box becomes [-1, 1]^3; what is then outside the unit ball goes to
    `(2 - 1/norm(x)) x/norm(x)`; `x / 4 + 1 / 2` follows.

    Args:
        points: In the world.
        aabb: Lower and upper corner of the box.

    Shape:
        - points: `(..., 3)`
        - aabb: `(2, 3)`
        - output: `(..., 3)`, from 0 to 1

    Source:
        Barron et al., "Mip-NeRF 360", 2022, equation 10.

    Example:
        >>> points = torch.tensor([[0.5, 0.0, 0.0], [4.0, 0.0, 0.0]])
        >>> contract(points, torch.tensor([[-1.0] * 3, [1.0] * 3]))[:, 0]
        tensor([0.6250, 0.9375])
    """
    x = 2 * (points - aabb[0]) / (aabb[1] - aabb[0]) - 1
    length = x.norm(dim=-1, keepdim=True).clamp_min(1)
    return (2 - 1 / length) * x / length / 4 + 0.5


def _color_example() -> Example:
    means = torch.tensor([[0, 1, 0], [2, 0, -1], [1, 1, 3], [-2, 5, 0]])  # integers: no gradient
    return Example(
        kwargs={
            "aabb": [[-3.0, -2.5, -4.0], [3.5, 3.0, 4.5]],
            "levels": 3,
            "log2_table": 6,
            "hidden": 8,
            "base": 4,
        },
        inputs=(means, torch.randn(4, 3)),
        bad_options={"aabb": [[0.0] * 3] * 2, "levels": 0, "hidden": 0, "log2_table": -1},
    )


@register(paper=26, example=_color_example, compare="a part of Compact3DGS, which has a peer")
class HashGridColor(ZooModel):
    """The colours of all splats, in any direction, in one hash grid and one small network.

    `max(0, 0.5 + 0.2821 · MLP(concat(grid(contract(mean)), Y(d))))` with the nine spherical
    harmonics Y of degree 0 to 2. No gradient goes through the grid to the means.

    Args:
        aabb: Lower and upper corner of the scene's box, `(2, 3)`.
        levels: Grids.
        features: Features an entry.
        log2_table: Entries of a grid's table at most, as a power of 2.
        base: Cells a side of the coarsest grid.
        growth: What each grid is finer by.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - means: `(..., 3)`
        - dirs: `(..., 3)`, of any length; leading dimensions broadcast
        - output: `(..., 3)`

    Returns:
        Colours, not below 0.

    Raises:
        ValueError: A box without volume, a size below 1, inputs of shapes that don't fit.

    Source:
        Lee et al., "Compact 3D Gaussian Representation for Radiance Field", 2024, equation 5.

    Example:
        >>> color = HashGridColor([[-1.0] * 3, [1.0] * 3], levels=4, log2_table=10)
        >>> color(torch.rand(5, 3), torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """

    aabb: Tensor

    def __init__(
        self,
        aabb: Tensor | Sequence[Sequence[float]],
        *,
        levels: int = 16,
        features: int = 2,
        log2_table: int = 19,
        base: int = 16,
        growth: float = 1.447,
        hidden: int = 64,
        layers: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.box = box_of(aabb)
        self.hidden, self.layers = hidden, layers
        for name, value in (("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if "aabb" in self._zoo_config:  # a tensor has no place there
            self._zoo_config["aabb"] = self.box
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("aabb", torch.tensor(self.box, **factory))
        self.grid = HashGridEncoding(
            3,
            levels=levels,
            features=features,
            log2_table=log2_table,
            base=base,
            growth=growth,
            **factory,
        )
        sizes = [levels * features + 9, *[hidden] * layers]
        modules: list[nn.Module] = []
        for before, after in pairwise(sizes):
            modules += [nn.Linear(before, after, **factory), nn.ReLU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(hidden, 3, **factory))

    def reset_parameters(self) -> None:
        """Table from U(-1e-4, 1e-4), linear layers as torch does."""
        self.grid.reset_parameters()
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def coefficients(self, means: Tensor, dirs: Tensor) -> Tensor:
        """What the network gives: coefficients of degree 0 of the colours, `(..., 3)`."""
        for name, value in (("means", means), ("dirs", dirs)):
            if value.dim() < 1 or value.shape[-1] != 3:
                raise ValueError(f"{name}: got {tuple(value.shape)}, expected (..., 3)")
        try:
            lead = torch.broadcast_shapes(means.shape[:-1], dirs.shape[:-1])
        except RuntimeError:
            got = f"{tuple(dirs.shape)}, expected leading dimensions of means {tuple(means.shape)}"
            raise ValueError(f"dirs: got {got}") from None
        dtype = self.aabb.dtype
        place = self.grid(contract(means.detach().to(dtype), self.aabb))
        sight = harmonics(2, dirs.to(dtype))
        both = [part.expand(*lead, part.shape[-1]) for part in (place, sight.to(place.dtype))]
        return self.mlp(torch.cat(both, -1))

    def forward(self, means: Tensor, dirs: Tensor) -> Tensor:
        """Colours of splats seen in directions; see the class."""
        return ops.sh_to_rgb(SH_C0 * self.coefficients(means, dirs))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"aabb={self.box}"


def box_of(aabb: Tensor | Sequence[Sequence[float]]) -> list[list[float]]:
    """A box as a list of its lower and its upper corner.

    Raises:
        ValueError: It is not `(2, 3)`, or has no volume.
    """
    corners = aabb.tolist() if isinstance(aabb, Tensor) else aabb
    box = [[float(number) for number in corner] for corner in corners]
    if [len(corner) for corner in box] != [3, 3] or not all(
        -math.inf < low < high < math.inf for low, high in zip(*box, strict=True)
    ):
        raise ValueError(f"aabb: got {box}, expected a lower and a higher corner (2, 3)")
    return box


def harmonics(degree: int, dirs: Tensor) -> Tensor:
    """The `(degree + 1)^2` spherical harmonics in directions `(..., 3)`, `(..., K)`."""
    count = (degree + 1) ** 2
    chosen = F.pad(torch.eye(count, device=dirs.device, dtype=dirs.dtype), (0, -count % 3))
    triples = rearrange(chosen, "k (g c) -> g k c", c=3)  # the operator sums three at a time
    return ops.spherical_harmonics(degree, dirs[..., None, :], triples).flatten(-2)[..., :count]


@torch.no_grad()
def fitted_harmonics(color: HashGridColor, means: Tensor) -> Tensor:
    """Harmonics of degree 3 that come nearest to a field's coefficients, `(N, 16, 3)`.

    By least squares over directions that are spread evenly over the sphere.
    """
    steps = torch.arange(_DIRECTIONS, device=means.device, dtype=torch.float64)
    z = 1 - (2 * steps + 1) / _DIRECTIONS
    angle = steps * (math.pi * (3 - math.sqrt(5)))
    flat = (1 - z.square()).sqrt()
    dirs = torch.stack([flat * angle.cos(), flat * angle.sin(), z], -1)
    solve = torch.linalg.pinv(harmonics(3, dirs)).to(means.dtype)
    found = means.new_zeros(len(means), 16, 3)
    for weights, direction in zip(solve.T, dirs.to(means.dtype), strict=True):
        found += weights[:, None] * color.coefficients(means, direction)[:, None]
    return found
