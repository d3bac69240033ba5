"""What the parts and the series of an autoencoder of several modalities must look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.gp.mm_gpvae_blocks import LatentBlocks
from torchzoo.ops.calling import values_readable

Series = Mapping[str, Tensor]
"""Series by modality."""


def check_parts(blocks: LatentBlocks, name: str, encoder: nn.Module, decoder: nn.Module) -> None:
    """Raise where an encoder or decoder states a width that does not fit its latents."""
    latents = sum(blocks.seen_by(name).values())
    pairs = {"outputs of the encoder": (encoder, "out_features", 2 * latents)}
    pairs["inputs of the decoder"] = (decoder, "in_features", latents)
    for what, (part, attribute, expected) in pairs.items():
        width = getattr(part, attribute, expected)
        if width != expected:
            raise ValueError(f"modalities: expected {expected} {what} of {name!r}, got {width}")


def check_series(
    encoders: nn.ModuleDict, num_steps: int, data: Series, mask: Series | None
) -> None:
    """Raise for series whose names or shapes do not fit."""
    unknown = [name for name in (*data, *(mask or {})) if name not in encoders]
    if not data or unknown:
        got = unknown[0] if unknown else "none"
        raise ValueError(f"data: expected some of {list(encoders)}, got {got!r}")
    batch = next(iter(data.values())).shape[:-2]
    for name, x in data.items():
        width = getattr(encoders[name], "in_features", x.shape[-1] if x.ndim else 0)
        if x.ndim < 2 or x.shape != (*batch, num_steps, width):
            raise ValueError(
                f"data: expected {name!r} of shape {(*batch, num_steps, width)}, "
                f"got {tuple(x.shape)}"
            )
    for name, seen in (mask or {}).items():
        if seen.dtype != torch.bool or seen.shape != (*batch, num_steps):
            raise ValueError(
                f"mask: expected booleans {(*batch, num_steps)} for {name!r}, "
                f"got {seen.dtype} {tuple(seen.shape)}"
            )


def check_values(likelihoods: nn.ModuleDict, data: Series, mask: Series | None) -> None:
    """Raise for values that a likelihood does not allow, where they can be read."""
    for name, x in data.items():
        if not values_readable(x):
            continue
        likelihood: Any = likelihoods[name]
        valid = likelihood.valid(x)
        if mask and name in mask:
            valid = valid | ~mask[name][..., None]
        if not valid.all():
            kind, got = type(likelihood).__name__, x[~valid][0].item()
            raise ValueError(f"data: expected {name!r} that {kind} allows, got {got}")
