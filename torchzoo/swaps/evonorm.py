"""EvoNorm in the place of a batch norm and the activation that follows it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from torchzoo.activations import EvoNormS0, convert_norm_act
from torchzoo.surgery import Swapped, convert

_NOTE = "EvoNorm computes something else than a norm and an activation: fine-tune the model"


def swap_evonorm(
    model: nn.Module, norm: type[nn.Module] = EvoNormS0, *, inputs: Any = None, **options: Any
) -> Swapped:
    """Fuse pairs of BatchNorm and activation into EvoNorms, in place, and warn to fine-tune.

    Args:
        model: The model to change.
        norm: `EvoNormS0` or another.
        inputs: As for `torchzoo.surgery.swap`.
        **options: Options of the norm, for example `group_size=4`.

    Returns:
        What changed.

    Raises:
        ValueError: No BatchNorm, none that an activation follows, or channels that the norm
            refuses.

    Example:
        >>> import warnings
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> with warnings.catch_warnings(action="ignore"):
        ...     swap_evonorm(block, group_size=4).names
        ('1',)
    """
    report = convert(
        model, lambda m: convert_norm_act(m, norm, **options), inputs=inputs, notes=(_NOTE,)
    )
    if not report.names:
        raise ValueError("model: expected a BatchNorm that an activation follows, got none")
    warnings.warn(_NOTE, stacklevel=2)
    return report
