"""Renderings put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchzoo.ops import RasterOutput

COUNT = "n_isects"
"""What is counted over all cameras, and not for each."""


def joined(outputs: Sequence[RasterOutput]) -> RasterOutput:
    """Outputs of one camera each as one of all."""

    def cat(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there) if there else None

    images, alphas, depths, infos = zip(*outputs, strict=True)
    info = {name: torch.cat([one[name] for one in infos]) for name in infos[0] if name != COUNT}
    info[COUNT] = torch.stack([one[COUNT] for one in infos]).sum()
    return RasterOutput(cat(images), torch.cat(alphas), cat(depths), info)
