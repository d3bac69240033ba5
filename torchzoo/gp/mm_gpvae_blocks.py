"""Blocks of latents, private to a modality or shared by all, and how encoders agree on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHARED = ""  # the name of the shared block; modalities have longer ones


class Expert(NamedTuple):
    """What one modality says of one block of latents.

    Attributes:
        mean: Means of the coefficients, `(..., N_f, K)`.
        logstd: Their log standard deviations, likewise.
        weight: 1, or 0 where the modality was not seen, `(..., 1, 1)`.
    """

    mean: Tensor
    logstd: Tensor
    weight: Tensor


class LatentBlocks:
    """Which latents are whose: the first modality's own, the shared ones, the others' own.

    Args:
        num_private: Latents of one modality alone, by name.
        num_shared: Latents of all.
        names: The modalities, in order.

    Attributes:
        sizes: Latents of each block, in order; the shared one is called `SHARED`.
        columns: Where they are among all latents.

    Raises:
        ValueError: Names that do not agree, a number below 0, or a modality without latents.

    Example:
        >>> blocks = LatentBlocks({"a": 2, "b": 1}, 1, ["a", "b"])
        >>> blocks.of("b", torch.arange(4))
        tensor([2, 3])
    """

    def __init__(self, num_private: Mapping[str, int], num_shared: int, names: Sequence[str]):
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(f"modalities: expected one or more, by name, got {list(names)}")
        if set(num_private) != set(names) or min(num_private.values()) < 0:
            raise ValueError(
                f"num_private: expected at least 0 for each of {list(names)}, got {num_private}"
            )
        if num_shared < 0 or any(num_shared + count < 1 for count in num_private.values()):
            raise ValueError(
                f"num_shared: expected at least 0, and a latent for each modality, got {num_shared}"
            )
        order = [names[0], SHARED, *names[1:]]
        self.sizes = {name: {SHARED: num_shared, **num_private}[name] for name in order}
        ends = torch.tensor([*self.sizes.values()], device="cpu").cumsum(0).tolist()
        self.columns = {
            name: slice(end - size, end)
            for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }

    def seen_by(self, name: str) -> dict[str, int]:
        """The blocks that a modality has to do with, in order, and their sizes."""
        return {block: size for block, size in self.sizes.items() if block in (name, SHARED)}

    def of(self, name: str, latents: Tensor) -> Tensor:
        """The latents of a modality, shared ones included, from the last axis of all."""
        return torch.cat([latents[..., self.columns[block]] for block in self.seen_by(name)], -1)


def fuse(experts: Sequence[Expert], alone: Tensor, fusion: str) -> tuple[Tensor, Tensor]:
    """What experts agree on; a prior around 0 where none was seen.

    Args:
        experts: What modalities say of a block.
        alone: The prior's log standard deviations.
        fusion: `"mean"`: average means and log standard deviations; `"poe"`: multiply densities.

    Shape:
        - alone: `(..., N_f, K)`
        - output: mean and log standard deviation, `(..., N_f, K)`

    Example:
        >>> one = torch.ones(1, 1)
        >>> experts = [Expert(one, 0 * one, one), Expert(3 * one, 0 * one, one)]
        >>> mean, logstd = fuse(experts, one, "poe")
        >>> mean.item(), round(2 * logstd.exp().square().item(), 4)
        (2.0, 1.0)
    """
    seen = sum((expert.weight for expert in experts), alone.new_zeros(*alone.shape[:-2], 1, 1))
    everybody = [*experts, Expert(torch.zeros_like(alone), alone, (seen == 0).to(alone))]
    mean, logstd, weight = (torch.stack(parts) for parts in zip(*everybody, strict=True))
    if fusion == "mean":
        share = weight / weight.sum(0)
        return (share * mean).sum(0), (share * logstd).sum(0)
    log_precision = weight.log() - 2 * logstd
    total = log_precision.logsumexp(0)
    return ((log_precision - total).exp() * mean).sum(0), -total / 2
