"""Files of compact scenes: fields in JSON, then parts whose sizes say what a scene costs.

A file is `TZC1`, the length of the header as a 32-bit number, the CRC-32 of all that follows, the
header, and the parts in its order. Numbers are little-endian, nothing that is read can run code.

Parts are plain, 16-bit floats and codes of log2 K bits, or entropy-coded: codes, and values rounded
to 8 bits between their least and largest, in a canonical Huffman code, all deflated by zlib.
"""

from __future__ import annotations

import heapq
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "coders",
    "huffman_decode",
    "huffman_encode",
    "morton_order",
    "pack_bytes",
    "pack_codes",
    "read_parts",
    "unpack_bytes",
    "unpack_codes",
    "write_parts",
]

MAGIC = b"TZC1"
_LONGEST = 56
"""Bits of a code word at most; a longer one takes more symbols than there are atoms in a disk."""
_CHUNK = 1 << 20

Bytes = NDArray[np.uint8]


def write_parts(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> bytes:
    """A file from its header and parts."""
    sizes = {name: len(part) for name, part in parts.items()}
    head = json.dumps({**header, "parts": sizes}, allow_nan=False).encode()
    body = struct.pack("<I", len(head)) + head + b"".join(parts.values())
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def read_parts(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header and the parts of a file.

    Raises:
        ValueError: It is no such file, or damaged.
    """
    if data[:4] != MAGIC:
        raise ValueError(f"no compact scene: it begins with {data[:4]!r}, not {MAGIC!r}")
    if len(data) < 12 or zlib.crc32(data[8:]) != struct.unpack_from("<I", data, 4)[0]:
        raise ValueError("damaged compact scene: its checksum doesn't fit")
    start = 12 + struct.unpack_from("<I", data, 8)[0]
    try:
        header = json.loads(data[12:start])
        sizes = {str(name): int(size) for name, size in header.pop("parts").items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"damaged compact scene: no header ({error})") from None
    if min(sizes.values(), default=0) < 0 or start + sum(sizes.values()) != len(data):
        raise ValueError("damaged compact scene: its parts don't fill it")
    parts = {}
    for name, size in sizes.items():
        parts[name] = data[start : start + size]
        start += size
    return header, parts


Coder = tuple[Callable[[Tensor], bytes], Callable[[bytes, int], Tensor]]


def coders(huffman: bool, codebook_size: int, prune: float) -> dict[str, Coder]:
    """For each part what writes its numbers, and what reads so many of them again.

    Args:
        huffman: Entropy-coded, or plain.
        codebook_size: Codes are below this power of 2.
        prune: Values of the table up to this size become 0 in an entropy-coded part.
    """
    bits = codebook_size.bit_length() - 1
    halves: Coder = (partial(_pack_floats, "<f2"), partial(_unpack_floats, "<f2"))
    singles: Coder = (partial(_pack_floats, "<f4"), partial(_unpack_floats, "<f4"))
    codes: Coder = (partial(pack_codes, bits=bits), partial(unpack_codes, bits=bits))
    opacities, grid = halves, halves
    if huffman:
        codes = (
            partial(huffman_encode, alphabet=codebook_size),
            partial(huffman_decode, alphabet=codebook_size),
        )
        opacities, grid = (
            (pack_bytes, unpack_bytes),
            (partial(pack_bytes, prune=prune), unpack_bytes),
        )
    chosen = {
        "means": halves,
        "opacities": opacities,
        "scale_codes": codes,
        "rotation_codes": codes,
        "codebooks": singles,
        "grid": grid,
        "mlp": halves,
    }
    return {name: _deflated(coder) for name, coder in chosen.items()} if huffman else chosen


def _deflated(coder: Coder) -> Coder:
    """A coder whose bytes are deflated."""
    write, read = coder

    def inflate(data: bytes, count: int) -> Tensor:
        room = 8 * count + 512  # more than any part's coder takes
        stream = zlib.decompressobj()
        try:
            plain = stream.decompress(data, room)
        except zlib.error as error:
            raise ValueError(f"damaged compact scene: {error}") from None
        return read(plain, count)

    return lambda values: zlib.compress(write(values), 9), inflate


def _pack_floats(kind: str, values: Tensor) -> bytes:
    return values.detach().cpu().float().numpy().astype(kind).tobytes()


def _unpack_floats(kind: str, data: bytes, count: int) -> Tensor:
    dtype = np.dtype(kind)
    _expect_size("numbers", data, count * dtype.itemsize)
    return torch.from_numpy(np.frombuffer(data, dtype).astype(np.float32))


def pack_codes(codes: Tensor, bits: int) -> bytes:
    """Integers below `2^bits`, one after the other, as `ceil(count · bits / 8)` bytes."""
    rows = np.unpackbits(_bytes_of(codes)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(rows.reshape(-1)).tobytes()


def unpack_codes(data: bytes, count: int, bits: int) -> Tensor:
    """The `count` integers that `pack_codes` packed, uint8.

    Raises:
        ValueError: Another number of bytes than they take.
    """
    _expect_size("codes", data, -(-count * bits // 8))
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits)
    rows = np.pad(flat.reshape(count, bits), ((0, 0), (8 - bits, 0)))
    return torch.from_numpy(np.packbits(rows, axis=1).reshape(-1))


def pack_bytes(values: Tensor, prune: float = 0.0) -> bytes:
    """Least and largest as floats, then `round(255 (v - least) / (largest - least))`, coded.

    Args:
        values: Numbers of any shape.
        prune: Those up to this size become 0 before they are rounded.
    """
    flat = values.detach().cpu().float().flatten()
    low, high = (float(x) for x in flat.aminmax()) if len(flat) else (0.0, 0.0)
    flat = torch.where(flat.abs() <= prune, 0, flat) if prune else flat
    steps = (255 / (high - low or 1.0) * (flat - low)).round().clamp(0, 255)
    return struct.pack("<2f", low, high) + huffman_encode(steps.byte(), 256)


def unpack_bytes(data: bytes, count: int) -> Tensor:
    """The `count` values that `pack_bytes` rounded, float32."""
    if len(data) < 8:
        raise ValueError(f"values: got {len(data)} bytes, expected 8 at least")
    low, high = struct.unpack_from("<2f", data)
    return low + huffman_decode(data[8:], count, 256).float() * ((high - low) / 255)


def huffman_encode(symbols: Tensor, alphabet: int) -> bytes:
    """Symbols below `alphabet` in a canonical Huffman code, the lengths of its words first."""
    values = _bytes_of(symbols)
    lengths = _word_lengths(np.bincount(values, minlength=alphabet))
    words = np.zeros(alphabet, np.int64)
    order, starts = _canonical(lengths)
    words[order] = starts >> (_LONGEST - lengths[order].astype(np.int64))
    size, word = lengths[values].astype(np.int64), words[values]
    first = np.cumsum(size) - size
    bits = np.zeros(int(size.sum()), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        longer = size > place
        bits[first[longer] + place] = word[longer] >> (size[longer] - 1 - place) & 1
    return lengths.tobytes() + np.packbits(bits).tobytes()


def huffman_decode(data: bytes, count: int, alphabet: int) -> Tensor:
    """The `count` symbols that `huffman_encode` coded, uint8.

    Raises:
        ValueError: Lengths that make no code, or a stream that doesn't end with the last symbol.
    """
    lengths = np.frombuffer(data[:alphabet], np.uint8)
    used = lengths[lengths > 0].astype(np.int64)
    if len(lengths) < alphabet or (1 << (_LONGEST - used.clip(max=_LONGEST))).sum() > 1 << _LONGEST:
        raise ValueError("damaged Huffman stream: its lengths make no code")
    if used.max(initial=0) > _LONGEST or (count and not len(used)):
        raise ValueError("damaged Huffman stream: it has no words for its symbols")
    order, starts = _canonical(lengths)
    stream = np.frombuffer(data, np.uint8, offset=alphabet)
    padded = np.concatenate([stream, np.zeros(8, np.uint8)])
    total, at, found = 8 * len(stream), 0, list[int]()
    while len(found) < count and at < total:
        place = np.arange(at, min(at + _CHUNK, total))
        octets = padded[place[:, None] // 8 + np.arange(8)].view(">u8")[:, 0].astype(np.uint64)
        window = (octets << (place % 8).astype(np.uint64)) >> np.uint64(64 - _LONGEST)
        symbol = order[np.searchsorted(starts, window.astype(np.int64), side="right") - 1]
        names, steps = symbol.tolist(), lengths[symbol].tolist()
        here = 0
        while here < len(names) and len(found) < count:
            found.append(names[here])
            here += steps[here]
        at += here
    if len(found) < count or not total - 8 < at <= total:
        raise ValueError(f"damaged Huffman stream: it doesn't hold {count} symbols")
    return torch.tensor(found, dtype=torch.uint8)


def morton_order(points: Tensor) -> Tensor:
    """The order of points `(N, 3)` along a curve that keeps neighbours together, `(N,)`."""
    if not len(points):
        return torch.zeros(0, dtype=torch.long, device=points.device)
    low, high = points.detach().double().aminmax(dim=0)
    cells = ((points.detach().double() - low) / (high - low).clamp_min(1e-12) * (2**21 - 1)).long()
    key = torch.zeros_like(cells[:, 0])
    for bit in range(21):
        for axis in range(3):
            key |= (cells[:, axis] >> bit & 1) << 3 * bit + axis
    return key.argsort(stable=True)


def _word_lengths(counts: NDArray[np.int64]) -> Bytes:
    """Bits of each symbol's word in a Huffman code, 0 for those that don't occur."""
    lengths = np.zeros(len(counts), np.uint8)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    while len(heap) > 1:
        (first, _, a), (second, tie, b) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[a + b] += 1
        heapq.heappush(heap, (first + second, tie, a + b))
    return lengths


def _canonical(lengths: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Symbols that occur, by length and then value, and their words, moved to the top of 56 bits.

    Words of one length follow each other, and a longer one comes after all shorter ones.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    room = np.int64(1) << (_LONGEST - lengths[order].astype(np.int64))
    return order, np.cumsum(room) - room


def _bytes_of(values: Tensor) -> Bytes:
    return values.detach().cpu().to(torch.uint8).flatten().numpy()


def _expect_size(what: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ValueError(f"{what}: got {len(data)} bytes, expected {size}")
