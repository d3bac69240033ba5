"""Files compressed with the shipped circuits: images by their pixels, all else by its bytes.

    file     "TZFC", version, length and CRC-32 of a JSON object, the object, the content
    content  a container (`torchzoo.circuits.container`), or the bytes as they are where no model
             makes them smaller

The object says what was coded, with what model, and the SHA-256 of what has to come out.

In bits a byte of pixels: the right halves of scikit-learn's photographs, on whose left halves the
model was trained, take 2.80 and 2.73 here, 2.88 and 2.67 as lossless WebP, 4.05 and 3.35 as PNG,
3.65 and 3.98 with xz. Bytes of English take 3.4 bits and some 250 bytes a file, as windows of 64
bytes don't know of each other; xz takes 3.7 for 2 kB of it, 3.1 for 8 kB, and ever less.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from torchzoo import hub
from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.compression import CircuitCodec
from torchzoo.circuits.residuals import from_patches, from_residuals, to_patches, to_residuals

MAGIC, VERSION = b"TZFC", 1
IMAGE_MODEL, BYTE_MODEL = "photo-residuals-8x8", "english-bytes"
"""Shipped circuits over residuals of photographs in patches, and over windows of English."""

PRECISION = 20
BLOCK_SIZE = {IMAGE_MODEL: 1024, BYTE_MODEL: 1024}
_HEAD = struct.Struct("<4sBII")
_FILL = 0x20  # what the last window is filled with, a space

Progress = Callable[[int], None]
"""Called with the number of bytes that were just done."""


class Restored(NamedTuple):
    """What came out of an archive: `pixels` `(H, W)` or `(H, W, 3)` of an image, else `data`."""

    name: str
    pixels: Tensor | None
    data: bytes | None


@cache
def codec(model: str) -> CircuitCodec:
    """The codec of a shipped circuit."""
    circuit = cast(Circuit, hub.from_pretrained(model))
    return CircuitCodec(circuit, precision=PRECISION, block_size=BLOCK_SIZE[model])


def pack_image(pixels: Tensor, name: str = "", progress: Progress = lambda _: None) -> bytes:
    """Compress an image, pixels exactly.

    Args:
        pixels: `(H, W)` or `(H, W, 3)`, uint8.
        name: The file's name, to be kept.
        progress: Called with numbers of bytes done.

    Raises:
        ValueError: Another shape or type.
    """
    if pixels.ndim not in (2, 3):
        raise ValueError(f"pixels: expected (H, W) or (H, W, 3), got {tuple(pixels.shape)}")
    raw = pixels.contiguous().numpy().tobytes()
    whole = pixels if pixels.ndim == 3 else pixels[..., None]
    patches = to_patches(to_residuals(whole))
    about = {"kind": "image", "name": name, "shape": list(pixels.shape)}
    return _pack(about, raw, IMAGE_MODEL, patches, progress)


def pack_bytes(data: bytes, name: str = "", progress: Progress = lambda _: None) -> bytes:
    """Compress bytes of any kind; the model knows English text.

    Args:
        data: The bytes.
        name: The file's name, to be kept.
        progress: Called with numbers of bytes done.
    """
    window = codec(BYTE_MODEL).num_variables
    filled = np.frombuffer(data + bytes([_FILL]) * (-len(data) % window), np.uint8)
    windows = torch.from_numpy(filled.copy()).view(-1, window)
    about = {"kind": "bytes", "name": name, "shape": [len(data)]}
    return _pack(about, data, BYTE_MODEL, windows, progress)


def _pack(
    about: dict[str, Any], raw: bytes, model: str, samples: Tensor, progress: Progress
) -> bytes:
    coder = codec(model)

    def batches() -> Any:
        for batch in samples.split(8 * coder.block_size):
            yield batch
            progress(batch.numel())

    content = b"".join(coder.encode_iter(batches())) if len(samples) else b""
    stored = len(content) >= len(raw)
    about = {**about, "model": None if stored else model, "sha256": hashlib.sha256(raw).hexdigest()}
    text = json.dumps(about, separators=(",", ":")).encode()
    head = _HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text))
    return head + text + (raw if stored else content)


def unpack(data: bytes, progress: Progress = lambda _: None) -> Restored:
    """Restore what `pack_image` or `pack_bytes` compressed.

    Args:
        data: The archive.
        progress: Called with numbers of bytes done.

    Raises:
        ValueError: The data is no archive, truncated, damaged, or from other weights.
    """
    about, content = _read(data)
    shape = about["shape"]
    if about["model"] is None:
        raw = np.frombuffer(content, np.uint8)
    else:
        raw = _decode(about, content, progress)
    if raw.size != np.prod(shape, dtype=np.int64) or _digest(raw) != about["sha256"]:
        raise ValueError("data: what came out is not what was compressed")
    if about["kind"] == "bytes":
        return Restored(about["name"], None, raw.tobytes())
    return Restored(about["name"], torch.from_numpy(raw.reshape(shape).copy()), None)


def _digest(raw: np.ndarray) -> str:
    return hashlib.sha256(raw.tobytes()).hexdigest()


def _decode(about: dict[str, Any], content: bytes, progress: Progress) -> np.ndarray:
    parts = [torch.empty(0, codec(about["model"]).num_variables, dtype=torch.uint8)]
    for part in codec(about["model"]).decode_iter(io.BytesIO(content)):
        parts.append(part)
        progress(part.numel())
    samples = torch.cat(parts)
    if about["kind"] == "bytes":
        return samples.flatten().numpy()[: about["shape"][0]]
    height, width, channels = (*about["shape"], 1)[:3]
    expected = channels * -(-height // 8) * -(-width // 8)
    if len(samples) != expected:
        raise ValueError(f"data: expected {expected} patches, got {len(samples)}")
    return from_residuals(from_patches(samples, channels, height, width)).numpy()


def description(data: bytes) -> dict[str, Any]:
    """What an archive says of itself: `kind`, `name`, `shape`, `model`, `sha256`.

    Raises:
        ValueError: See `unpack`.
    """
    return _read(data)[0]


def _read(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The checked JSON object and the content."""
    if data[:4] != MAGIC:
        raise ValueError(f"data: expected a file that starts with {MAGIC!r}, got {data[:4]!r}")
    if len(data) < _HEAD.size:
        raise ValueError("data: the file is truncated")
    _, version, length, crc = _HEAD.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"data: expected version {VERSION}, got {version}")
    text = data[_HEAD.size : _HEAD.size + length]
    if len(text) < length or zlib.crc32(text) != crc:
        raise ValueError("data: the file is truncated or its description is damaged")
    about = json.loads(text)
    shape, kind, model = (about.get(key) for key in ("shape", "kind", "model"))
    dims = {"bytes": (1,), "image": (2, 3)}.get(kind, ())
    if len(shape) not in dims or model not in (None, *BLOCK_SIZE):
        raise ValueError(f"data: made by a newer version, got {kind}, {model}")
    return about, data[_HEAD.size + length :]
