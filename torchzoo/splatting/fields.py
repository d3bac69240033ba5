"""A small radiance field on dense grids, as a test bed for losses on random rays.

As in C. Sun, M. Sun and H.-T. Chen, "Direct Voxel Grid Optimization", 2022, density and features
are trilinear on grids over a cube, and a small network turns features and the direction of view
into colour. Along a ray with steps of length s

    a_i = 1 - exp(-softplus(d_i + shift) s),   C = sum_i a_i prod_(j<i) (1 - a_j) c_i,

over black.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

_FREQUENCIES = 4
_DIRECTION = 3 * (1 + 2 * _FREQUENCIES)


@register(
    example=lambda: Example(
        {"resolution": 4, "features": 2, "hidden": 5, "samples": 6},
        (torch.tensor([[0.1, 0.2, -3.0], [3.0, -0.1, 0.3]]), torch.eye(3)[[2, 0]] * -1.0 + 0.05),
        bad_options={
            "resolution": 1,
            "features": 0,
            "hidden": 0,
            "samples": 0,
            "bound": 0.0,
            "initial_alpha": 1.0,
        },
    ),
    compare="a test bed for losses on rays, not a rival of scenes made of splats",
)
class DenseGridField(ZooModel):
    """Colours of rays through a cube of density and features.

    Args:
        resolution: Grid points along a side of the cube.
        features: Features F of a grid point.
        hidden: Hidden units of the network.
        samples: Steps of a ray S, of equal length within the cube.
        bound: Half of the cube's side; its middle is the origin.
        initial_alpha: Opacity of a step through the whole cube, before training.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - origins: `(..., 3)`
        - directions: `(..., 3)`, of any length
        - offset: `(...)`
        - output: `(..., 3)`

    Returns:
        Colours over black, in [0, 1].

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        C. Sun, M. Sun and H.-T. Chen, "Direct Voxel Grid Optimization: Super-fast Convergence for
        Radiance Fields Reconstruction", 2022, equations 1, 2 and 7.

    Example:
        >>> field = DenseGridField(resolution=8)
        >>> origins = torch.tensor([[0.0, 0.0, -4.0]])
        >>> field(origins, torch.tensor([[0.0, 0.0, 1.0]])).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        resolution: int = 32,
        *,
        features: int = 6,
        hidden: int = 32,
        samples: int = 24,
        bound: float = 1.6,
        initial_alpha: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("resolution", resolution, 2),
            ("features", features, 1),
            ("hidden", hidden, 1),
            ("samples", samples, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected a number ≥ {least}, got {value}")
        if not bound > 0:
            raise ValueError(f"bound: expected a number > 0, got {bound}")
        if not 0 < initial_alpha < 1:
            raise ValueError(f"initial_alpha: expected between 0 and 1, got {initial_alpha}")
        self.samples, self.bound = samples, bound
        step = 2 * bound / samples
        self.shift = math.log(math.expm1(-math.log1p(-initial_alpha) / step))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.density = nn.Parameter(torch.empty((1, 1, *(resolution,) * 3), **factory))
        self.features = nn.Parameter(torch.empty((1, features, *(resolution,) * 3), **factory))
        self.color = nn.Sequential(
            nn.Linear(features + _DIRECTION, hidden, **factory),
            nn.ReLU(),
            nn.Linear(hidden, 3, **factory),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Even, almost clear density; no features; torch's own network, its last bias 0."""
        nn.init.zeros_(self.density)
        nn.init.zeros_(self.features)
        for layer in self.color:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.zeros_(self.color[-1].bias)  # type: ignore[arg-type]

    def forward(self, origins: Tensor, directions: Tensor, offset: Tensor | None = None) -> Tensor:
        """Colours of rays.

        Args:
            origins: Where the rays start.
            directions: Where they go.
            offset: Where in its step each ray is sampled, from 0 to 1; None: the middle.
        """
        for name, value in (("origins", origins), ("directions", directions)):
            if value.ndim == 0 or value.shape[-1] != 3 or value.shape != origins.shape:
                raise ValueError(f"{name}: expected (..., 3), got {tuple(value.shape)}")
        if offset is not None and offset.shape != origins.shape[:-1]:
            expected = tuple(origins.shape[:-1])
            raise ValueError(f"offset: expected {expected}, got {tuple(offset.shape)}")
        speed = directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        unit = directions / speed
        near, far = self._within(origins, unit)
        step = (far - near) / self.samples
        place = torch.arange(self.samples, dtype=step.dtype, device=step.device)
        place = place + (0.5 if offset is None else offset[..., None])
        points = origins[..., None, :] + (near + step * place)[..., None] * unit[..., None, :]

        density = self._interpolated(self.density, points).squeeze(-1)
        alpha = -torch.expm1(-F.softplus(density + self.shift) * step)
        clear = F.pad(1 - alpha[..., :-1], (1, 0), value=1.0).cumprod(-1)
        color = self._colors(points, unit)
        return ((alpha * clear)[..., None] * color).sum(-2)

    def _within(self, origins: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays enter and leave the cube, `(..., 1)`; both the same where they miss it."""
        unit = torch.where(unit.abs() < 1e-9, 1e-9, unit)
        ends = torch.stack([(-self.bound - origins) / unit, (self.bound - origins) / unit])
        near = ends.amin(0).amax(-1, keepdim=True).clamp(min=0)
        return near, torch.maximum(ends.amax(0).amin(-1, keepdim=True), near)

    def _interpolated(self, grid: Tensor, points: Tensor) -> Tensor:
        """Trilinear values `(..., F)` of a grid; its corners are those of the cube."""
        place = (points / self.bound).reshape(1, -1, 1, 1, 3).to(grid.dtype)
        values = F.grid_sample(grid, place, padding_mode="border", align_corners=True)
        return rearrange(values, "1 f n 1 1 -> n f").reshape(*points.shape[:-1], grid.shape[1])

    def _colors(self, points: Tensor, unit: Tensor) -> Tensor:
        features = self._interpolated(self.features, points)
        waves = [f(2.0**k * unit) for k in range(_FREQUENCIES) for f in (torch.sin, torch.cos)]
        direction = torch.cat([unit, *waves], -1)[..., None, :].expand(*points.shape[:-1], -1)
        return self.color(torch.cat([features, direction.to(features.dtype)], -1)).sigmoid()

    def extra_repr(self) -> str:
        return f"resolution={self.density.shape[-1]}, samples={self.samples}, bound={self.bound}"
