"""Scenes that store some points alone, and make splats between them when they are drawn.

E. Ververas, R. A. Potamias, J. Song, J. Deng and S. Zafeiriou, "SAGS: Structure-Aware 3D Gaussian
Splatting", 2024. With c the codes of the points that are stored and (i, j) the parents of a
midpoint, its place and code are

    p' = (p_i + p_j) / 2,   c' = (c_i + c_j) / 2,

which the networks of a `SAGSScene` decode as they do other points.

Deviations: log scales of midpoints, on which the paper is silent, are means as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchzoo.registry import register
from torchzoo.splatting.sags import SAGSScene, _comparison, _example
from torchzoo.splatting.sags_points import curvature_densify

__all__ = ["SAGSLite"]


@register(paper=134, example=_example, compare=_comparison)
class SAGSLite(SAGSScene):
    """A `SAGSScene` that stores key points alone, and makes the midpoints when it is drawn.

    Key points are encoded; a midpoint has the mean code of its two parents, which are those of
    `curvature_densify`.

    Args:
        num_gaussians: Number N of key points at first, 10 at least.
        encoder: Makes the codes; hidden layers are as wide as its features. None: the default.
        feature_std: Standard deviation of the features at first.
        image_size: Height and width of the pictures that `forward` makes.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        parents: `(N', 2)`, the key points that each splat is in the middle of.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size out of its range, too few points, or inputs of the wrong shape.

    Source:
        Ververas et al., "SAGS: Structure-Aware 3D Gaussian Splatting", 2024, the lite model, which
        is not in the authors' code.

    Example:
        >>> scene = SAGSLite.from_points(torch.randn(50, 3))
        >>> scene.num_gaussians <= 50 < len(scene.parents)
        True
    """

    parents: Tensor

    @classmethod
    def from_points(cls, points: Tensor, **options: Any) -> SAGSScene:  # type: ignore[override]
        """A scene that begins at points; options are those of `SAGSScene.from_points`."""
        return super().from_points(points, **{"lite": True} | options)

    @torch.no_grad()
    def connect(self) -> None:
        """Make the graph of the key points, and find the midpoints."""
        super().connect()
        if self.means.is_meta:  # how many midpoints there are has no value there
            parents = self.edges.new_empty(self.num_gaussians, 2)
        else:
            _, parents = curvature_densify(self.means)
        self.register_buffer("parents", parents, persistent=False)

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        keys = super()._nodes()
        points, codes, log_scales = (rows[self.parents].mean(1) for rows in keys)
        return points, codes, log_scales
