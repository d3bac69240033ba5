"""What the fused operators of EvoNorm share: checks, and vectors over channels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_channels(x: Tensor, vectors: Mapping[str, Tensor], spatial: int = 0) -> None:
    """Check for floating-point x `(N, C, *spatial)` of so many axes at least and vectors `(C,)`.

    Raises:
        ValueError: They are not.
    """
    if not x.is_floating_point() or x.ndim < 2 + spatial:
        least = f" with at least {spatial} axis of space" if spatial else ""
        raise ValueError(
            f"x: expected floating point of shape (N, C, *spatial){least}, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    channels = x.shape[1]
    for name, vector in vectors.items():
        if vector.shape != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), got {tuple(vector.shape)}")


def column(vector: Tensor, x: Tensor) -> Tensor:
    """`(C,)` or `(N, C)`, shaped to act on x."""
    return vector.view(*vector.shape, *[1] * (x.ndim - 2))
