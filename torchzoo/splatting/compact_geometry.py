"""Geometry of compact scenes: scales and rotations from codebooks, under a mask.

J. C. Lee, D. Rho, X. Sun, J. H. Ko and E. Park, "Compact 3D Gaussian Representation for Radiance
Field", 2024. While a scene is trained, scales and unit quaternions pass through residual codebooks
with straight-through gradients, and the mask multiplies scales and opacities. In a frozen scene
all that is left of them are codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.common.quantize import ResidualVQ
from torchzoo.splatting.compact_mask import hard_mask
from torchzoo.splatting.rotations import quat_to_matrix

__all__ = ["CompactGeometry"]


class CompactGeometry:
    """What a `Compact3DGS` makes of its parameters before anything is drawn."""

    log_scales: nn.Parameter
    quats: nn.Parameter
    opacity_logits: nn.Parameter
    mask_logits: nn.Parameter
    scale_codes: nn.Parameter
    rotation_codes: nn.Parameter
    scale_vq: ResidualVQ
    rotation_vq: ResidualVQ
    mask_threshold: float
    frozen = False
    _use_vq: bool
    _zoo_config: dict[str, Any]

    @property
    def use_vq(self) -> bool:
        """Whether scales and rotations are those of the codebooks."""
        return self._use_vq or self.frozen

    @use_vq.setter
    def use_vq(self, active: bool) -> None:
        self._use_vq = active
        if "use_vq" in self._zoo_config:
            self._zoo_config["use_vq"] = active

    @property
    def mask(self) -> Tensor:
        """Zeros and ones with the gradient of the sigmoid, `(N,)`; ones if frozen."""
        if self.frozen:
            return torch.ones_like(self.opacity_logits)
        return hard_mask(self.mask_logits, self.mask_threshold)

    @property
    def kept(self) -> Tensor:
        """Which splats' masks are open, `(N,)` bool."""
        return self.mask.detach() > 0

    @property
    def scales(self) -> Tensor:
        """Standard deviations along the axes `(N, 3)`, 0 where the mask is."""
        return self._scales(self.use_vq)

    @property
    def opacities(self) -> Tensor:
        """Opacities between 0 and 1, `(N,)`, 0 where the mask is."""
        return self.opacity_logits.sigmoid() * self.mask

    @property
    def unit_quats(self) -> Tensor:
        """Rotations as quaternions of length one, `(N, 4)`."""
        return self._unit_quats(self.use_vq)

    def _scales(self, use_vq: bool) -> Tensor:
        if self.frozen:
            return self.scale_vq.decode(self.scale_codes).abs()
        scales = self.log_scales.exp()
        if use_vq:
            scales = self.scale_vq(scales)[0].abs()
        return scales * self.mask[:, None]

    def _unit_quats(self, use_vq: bool) -> Tensor:
        if self.frozen:
            return F.normalize(self.rotation_vq.decode(self.rotation_codes), dim=-1)
        if not use_vq:
            return F.normalize(self.quats, dim=-1)
        return F.normalize(self.rotation_vq(_upper(self.quats))[0], dim=-1)

    def covariances(self) -> Tensor:
        """`R diag(s^2) R^T`, `(N, 3, 3)`."""
        half = quat_to_matrix(self.unit_quats) * self.scales[:, None]
        return half @ half.mT

    @torch.no_grad()
    def start_vq(self, *, generator: torch.Generator | None = None) -> None:
        """Fit the codebooks to the splats that are kept, and quantise from now on.

        Raises:
            ValueError: No splat is kept.
        """
        for codebooks, values in self._geometry():
            codebooks.init_kmeans(values, generator=generator)
        self.use_vq = True

    def codebook_loss(self) -> Tensor:
        """The loss that the codebooks learn from, over the splats that are kept."""
        losses = [codebooks(values)[2] for codebooks, values in self._geometry()]
        return losses[0] + losses[1]

    def _geometry(self) -> list[tuple[ResidualVQ, Tensor]]:
        """Codebooks and what they stand for, without gradient and without masked rows."""
        kept = self.kept
        scales, quats = self.log_scales.detach().exp(), _upper(self.quats.detach())
        return [(self.scale_vq, scales[kept]), (self.rotation_vq, quats[kept])]


def _upper(quats: Tensor) -> Tensor:
    """Unit quaternions of the same rotations with w from 0."""
    quats = F.normalize(quats, dim=-1)
    return torch.where(quats[:, :1] < 0, -quats, quats)
