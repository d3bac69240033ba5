""".splat files: 32 bytes a Gaussian, for viewers; colours do not depend on the direction.

A record is 3 floats of position, 3 of scale, then as bytes red, green, blue and opacity, 255 for 1,
and the unit quaternion wxyz as 128 + 128 q.
"""

from __future__ import annotations

import numpy as np
import torch

from torchzoo.splatting.scene import SH_C0, GaussianScene

__all__ = ["read_splat", "records", "write_splat"]

_RECORD = np.dtype(
    [("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)]
)


def read_splat(data: bytes) -> GaussianScene:
    """A scene of degree 0 from the bytes of a .splat file.

    Raises:
        ValueError: They are no whole number of records.
    """
    if len(data) % _RECORD.itemsize:
        size = _RECORD.itemsize
        raise ValueError(f"truncated .splat: {len(data)} bytes are no multiple of {size}")
    rows = np.frombuffer(data, _RECORD)
    rgba = torch.from_numpy(rows["rgba"] / np.float32(255))
    scales = torch.from_numpy(rows["scales"].astype(np.float32))
    return GaussianScene.from_tensors(
        torch.from_numpy(rows["means"].astype(np.float32)),
        torch.from_numpy(rows["quats"].astype(np.float32) / 128 - 1),
        scales.clamp_min(torch.finfo(torch.float32).tiny).log(),
        byte_logit(rgba[:, 3]),
        ((rgba[:, :3] - 0.5) / SH_C0)[:, None],
    )


def write_splat(scene: GaussianScene) -> bytes:
    """A scene as a .splat file, those Gaussians first that cover most, as viewers expect.

    What the format can't hold is cut: colours outside 0 to 1, and degrees of the spherical
    harmonics above 0.
    """
    return records(scene).tobytes()


@torch.no_grad()
def records(scene: GaussianScene) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The records of a .splat file, in its order."""
    importance = scene.log_scales.sum(-1).exp() * scene.opacities
    order = importance.argsort(descending=True, stable=True)
    rows = np.empty(len(order), _RECORD)
    rgb = 0.5 + SH_C0 * scene.sh0.squeeze(1)
    rgba = torch.cat([rgb, scene.opacities[:, None]], -1).clamp(0, 1).nan_to_num(0)
    quats = (scene.unit_quats * 128 + 128).round().clamp(0, 255).nan_to_num(128)
    for name, value in (
        ("means", scene.means),
        ("scales", scene.scales),
        ("rgba", (rgba * 255).round()),
        ("quats", quats),
    ):
        rows[name] = value[order].cpu().float().numpy()
    return rows


def byte_logit(opacities: torch.Tensor) -> torch.Tensor:
    """Logits of opacities k / 255; 0 and 255 stand for values within their halves of a step."""
    return opacities.clamp(0.25 / 255, 1 - 0.25 / 255).logit()
