"""SPZ files, the compressed format of Niantic: versions 1 to 3 (gzip) and 4 (zstd) are read.

Versions 1 to 3 are gzip over a header of 16 bytes and one block for each attribute:

    positions   3 float16 each (version 1), or 3 x 24 bits, fixed point
    alphas      255 times the opacity
    colours     255 (0.15 sh0 + 0.5)
    scales      16 (log s + 10)
    rotations   x, y, z as 127.5 (q + 1), with w >= 0 (versions 1, 2); else the index of the largest
                component of xyzw in 2 bits, the others as sign and 9 bits of sqrt(2) q
    SH          128 (q + 1), colour fastest, to 5 bits in degree 1 and 4 above

Version 4 has a header of 32 bytes and a zstd stream for each block that is not empty. The axes are
right, up, back; ours are right, down, forward.
"""

from __future__ import annotations

import math
import struct
import zlib
from importlib import import_module
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from torchzoo.splatting.scene import MAX_SH_DEGREE, GaussianScene
from torchzoo.splatting.splat_file import byte_logit

__all__ = ["read_spz", "write_spz"]

MAGIC = b"NGSP"
_HEADER = struct.Struct("<4sIIBBBB")
_HEADER_V4 = struct.Struct("<4sIIBBBBI12x")
_MAX_RATIO = 1032
"""What gzip can gain at most."""

_COLOUR_SCALE = 0.15
_SIGNS = torch.tensor([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1])
"""What y -> -y, z -> -z does to the spherical harmonics of degrees 1 to 3."""

Array = np.ndarray[Any, Any]


def read_spz(data: bytes) -> GaussianScene:
    """A scene from the bytes of an SPZ file.

    Raises:
        ValueError: It is no SPZ file, is damaged or shorter than its header says, or is of version
            4 where no zstd module is installed.
    """
    if data[:4] == MAGIC:
        return _decode(*_blocks_v4(data))
    if data[:2] != b"\x1f\x8b":
        raise ValueError("no SPZ file: it begins neither as gzip nor with NGSP")
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        head = stream.decompress(data, _HEADER.size)
        if len(head) < _HEADER.size:
            raise ValueError("truncated SPZ: its header is not whole")
        magic, version, count, degree, bits, *_ = _HEADER.unpack(head)
        if magic != MAGIC or version not in (1, 2, 3):
            raise ValueError(f"no SPZ file of version 1 to 3: it says {magic!r}, {version}")
        sizes = _sizes(version, count, degree)
        wanted = sum(sizes)
        if wanted > _MAX_RATIO * len(data):
            raise ValueError(f"damaged SPZ: {len(data)} bytes can't hold {count} Gaussians")
        body = stream.decompress(stream.unconsumed_tail, wanted) if wanted else b""
    except zlib.error as error:
        raise ValueError(f"damaged SPZ: {error}") from None
    if len(body) < wanted:
        raise ValueError(f"truncated SPZ: {len(body)} of {wanted} bytes are there")
    blocks = [body[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]
    return _decode(version, count, bits, blocks)


@torch.no_grad()
def write_spz(scene: GaussianScene) -> bytes:
    """A scene as an SPZ file of version 3.

    Positions have 12 bits after the point, fewer where the scene reaches beyond 2048. Scales are
    cut to exp(-10) to exp(5.94), coefficients of degree 0 to -3.3 to 3.3, others to -1 to 1.

    Raises:
        ValueError: A parameter is not finite.
    """
    for name, parameter in scene.named_parameters(recurse=False):
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: got values that are not finite, which SPZ can't hold")
    flip = scene.means.new_tensor([1, -1, -1])
    bits = _fractional_bits(scene.means.abs().amax().item() if len(scene.means) else 0.0)
    fixed = (scene.means.double() * flip * 2**bits).round().cpu().numpy().astype("<i4")
    shN = scene.shN * _SIGNS[: scene.shN.shape[1], None].to(scene.shN)
    blocks = [
        fixed[..., None].view("u1")[..., :3].tobytes(),
        _bytes(scene.opacities * 255),
        _bytes((scene.sh0 * _COLOUR_SCALE + 0.5) * 255),
        _bytes((scene.log_scales + 10) * 16),
        _pack_rotations(scene.unit_quats * flip.new_tensor([1, 1, -1, -1])),
        _pack_sh(shN),
    ]
    head = _HEADER.pack(MAGIC, 3, len(scene.means), scene.sh_degree, bits, 0, 0)
    pack = zlib.compressobj(6, wbits=16 + zlib.MAX_WBITS)  # no clock, no name: equal for equal
    return pack.compress(head + b"".join(blocks)) + pack.flush()


def _sizes(version: int, count: int, degree: int) -> list[int]:
    """Bytes of each block."""
    if degree > MAX_SH_DEGREE:
        raise ValueError(f"SPZ of degree {degree}: expected 0 to {MAX_SH_DEGREE}")
    widths = [6 if version == 1 else 9, 1, 3, 3, 3 if version < 3 else 4]
    return [count * width for width in [*widths, 3 * ((degree + 1) ** 2 - 1)]]


def _blocks_v4(data: bytes) -> tuple[int, int, int, list[bytes]]:
    """Version, count, fractional bits and blocks of a file of version 4."""
    if len(data) < _HEADER_V4.size:
        raise ValueError("truncated SPZ: its header is not whole")
    _, version, count, degree, bits, _, streams, table = _HEADER_V4.unpack_from(data)
    if version != 4:
        raise ValueError(f"SPZ of version {version} without gzip: expected version 4")
    sizes = _sizes(version, count, degree)
    if streams != sum(size > 0 for size in sizes):
        raise ValueError(f"damaged SPZ: it has {streams} streams")
    start = table + 16 * streams
    if table < _HEADER_V4.size or start > len(data):
        raise ValueError("truncated SPZ: its table of contents is not whole")
    entries = [struct.unpack_from("<QQ", data, table + 16 * index) for index in range(streams)]
    blocks = []
    for size in sizes:
        if not size:
            blocks.append(b"")
            continue
        packed, whole = entries.pop(0)
        if packed > len(data) - start:
            raise ValueError("truncated SPZ: a stream ends after the file")
        if whole != size:
            raise ValueError(f"damaged SPZ: a stream of {whole} bytes where {size} are due")
        blocks.append(_zstd(data[start : start + packed], size))
        start += packed
    return version, count, bits, blocks


def _zstd(data: bytes, size: int) -> bytes:
    """A zstd stream's content, which must have this size."""
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        try:
            zstd = import_module(name)
        except ImportError:
            continue
        decompressor = zstd.ZstdDecompressor()
        try:
            if name == "zstandard":
                content = decompressor.stream_reader(data).read(size + 1)
            else:
                content = decompressor.decompress(data, size + 1)
        except (zstd.ZstdError, EOFError) as error:
            raise ValueError(f"damaged SPZ: {error}") from None
        if len(content) != size:
            raise ValueError(f"damaged SPZ: a stream of {len(content)} bytes where {size} are due")
        return bytes(content)
    raise ValueError("SPZ of version 4 needs zstd: install zstandard, or convert it to version 3")


def _decode(version: int, count: int, bits: int, blocks: list[bytes]) -> GaussianScene:
    positions, alphas, colours, scales, rotations, sh = (
        np.frombuffer(block, np.uint8).reshape(count, len(block) // count if count else 0)
        for block in blocks
    )
    if not count:
        return GaussianScene(0, sh_degree=0)
    means = _tensor(
        np.frombuffer(blocks[0], "<f2").reshape(count, 3)
        if version == 1
        else _unpack_fixed(positions, bits)
    )
    unpack = _unpack_rotations if version >= 3 else _unpack_xyz
    quats = _tensor(unpack(rotations))
    shN = rearrange(_tensor(sh) / 128 - 1, "n (k c) -> n k c", c=3)
    flip = torch.tensor([1.0, -1.0, -1.0])
    return GaussianScene.from_tensors(
        means * flip,
        quats * torch.tensor([1.0, 1.0, -1.0, -1.0]),
        _tensor(scales) / 16 - 10,
        byte_logit(_tensor(alphas).squeeze(-1) / 255),
        torch.cat(
            [
                ((_tensor(colours) / 255 - 0.5) / _COLOUR_SCALE)[:, None],
                shN * _SIGNS[: shN.shape[1], None],
            ],
            1,
        ),
    )


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _bytes(values: Tensor) -> bytes:
    return values.round().clamp(0, 255).to(torch.uint8).cpu().numpy().tobytes()


def _fractional_bits(reach: float) -> int:
    """How many of the 23 bits for a coordinate's size are after the point; 12 where that fits."""
    bits = math.frexp((2**23 - 1) / max(reach, 1.0))[1] - 1
    if bits < 0:
        raise ValueError(f"means: got coordinates up to {reach:.3g}, SPZ holds up to 8e6")
    return min(12, bits)


def _unpack_fixed(rows: Array, bits: int) -> Array:
    """Signed 24-bit integers, as `(N, 9)` bytes, over `2^bits`."""
    triples = rearrange(rows, "n (i b) -> n i b", b=3).astype(np.int32)
    low, middle, high = triples[..., 0], triples[..., 1], triples[..., 2]
    fixed = low + (middle << 8) + ((high ^ 0x80) - 0x80 << 16)
    return np.ldexp(fixed.astype(np.float64), -bits)


def _unpack_xyz(rows: Array) -> Array:
    """Quaternions wxyz from bytes `(N, 3)` of x, y, z."""
    xyz = rows / 127.5 - 1
    w = np.sqrt(np.maximum(0, 1 - (xyz**2).sum(-1, keepdims=True)))
    return np.concatenate([w, xyz], -1)


def _pack_rotations(quats: Tensor) -> bytes:
    xyzw = quats.roll(-1, -1).double().cpu().numpy()
    largest = np.abs(xyzw).argmax(-1)
    sign = np.where(np.take_along_axis(xyzw, largest[:, None], -1) < 0, -1, 1)
    size = np.minimum(np.floor(np.abs(xyzw) * math.sqrt(2) * 511 + 0.5), 511).astype(np.uint32)
    fields = size | ((xyzw * sign < 0).astype(np.uint32) << 9)
    word = largest.astype(np.uint32)
    for index in range(4):
        word = np.where(largest == index, word, (word << 10) | fields[:, index])
    return word.astype("<u4").tobytes()


def _unpack_rotations(rows: Array) -> Array:
    """Quaternions wxyz from bytes `(N, 4)`, the smallest three of xyzw."""
    word = np.ascontiguousarray(rows).view("<u4").squeeze(-1).astype(np.int64)
    largest = word >> 30
    xyzw = np.zeros((len(word), 4))
    for index in (3, 2, 1, 0):
        field = word & 0x3FF
        value = np.where(field & 0x200, -1, 1) * (field & 0x1FF) / (511 * math.sqrt(2))
        stored = largest != index
        xyzw[stored, index] = value[stored]
        word = np.where(stored, word >> 10, word)
    rest = np.sqrt(np.maximum(0, 1 - (xyzw**2).sum(-1)))
    np.put_along_axis(xyzw, largest[:, None], rest[:, None], -1)
    return np.roll(xyzw, 1, -1)


def _pack_sh(shN: Tensor) -> bytes:
    """Bytes with 5 bits in degree 1 and 4 above, as the format's own writer has them."""
    bucket = torch.where(torch.arange(shN.shape[1], device=shN.device) < 3, 8, 16)[:, None]
    steps = (shN * 128).round() + 128
    return _bytes(((steps + bucket // 2) / bucket).floor() * bucket)
