"""The file format of coded samples: header, blocks, index table, footer; every byte is checked.

    header   "TZPC", version, flags, precision, lanes, C, block size, dtype, shape of a sample,
             hash of the variable order (8 bytes), SHA-256 of the model, CRC-32 of all this
    blocks   the words of one coder each, one after the other
    index    for each block: number of samples, number of words, CRC-32
    footer   length and CRC-32 of the index, "CPZT"

Numbers are LEB128 varints unless a width is given, all little-endian. The index comes last, so that
blocks can be written while samples still arrive, and any block can be found without the others.
"""

from __future__ import annotations

import io
import struct
import zlib
from math import prod
from typing import BinaryIO, NamedTuple

import torch

MAGIC, END, VERSION = b"TZPC", b"CPZT", 1
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)

_FOOTER = struct.Struct("<II4s")
_MAX_HEADER = 1 << 12
_MAX_DIMS = 16


class Header(NamedTuple):
    """What a container says before its blocks.

    Attributes:
        flags: Bit 0: whether tables are computed in the fixed order; bit 1: the paper's schedule.
        precision: Bits that frequencies sum to.
        categories: Number of categories C.
        block_size: Samples a block at most.
        dtype: Type of the samples.
        shape: Shape of a sample; its entries are the D variables.
        order_hash: Eight bytes that stand for the order of the variables.
        model_hash: SHA-256 of the region graph and of the parameters as the codec rounds them.
    """

    flags: int
    precision: int
    categories: int
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order_hash: bytes
    model_hash: bytes

    @property
    def num_variables(self) -> int:
        """Number of variables D."""
        return prod(self.shape)

    def pack(self) -> bytes:
        """The header's bytes."""
        numbers = (self.categories, self.block_size, DTYPES.index(self.dtype), len(self.shape))
        head = MAGIC + bytes((VERSION, self.flags, self.precision, 1))
        head += b"".join(varint(number) for number in (*numbers, *self.shape))
        head += self.order_hash + self.model_hash
        return head + struct.pack("<I", zlib.crc32(head))


class Block(NamedTuple):
    """An entry of the index: samples, words and checksum of a block, and where it starts."""

    samples: int
    words: int
    crc: int
    offset: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return 4 * self.words


def varint(number: int) -> bytes:
    """A non-negative integer, seven bits a byte, lowest first.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


class Reader:
    """Reads numbers off bytes; running over the end is an error that says what was read."""

    def __init__(self, data: bytes, what: str):
        self.data, self.what, self.at = data, what, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"data: the {self.what} is truncated")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        """The next number, of 63 bits at most."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise ValueError(f"data: the {self.what} is damaged, got a number of over 63 bits")


def read_header(file: BinaryIO) -> tuple[Header, int]:
    """The header at the start of a file, and its size.

    Raises:
        ValueError: The file is no container, of another version, truncated or damaged.
    """
    file.seek(0)
    reader = Reader(file.read(_MAX_HEADER), "header")
    if (magic := reader.take(4)) != MAGIC:
        raise ValueError(f"data: expected a container that starts with {MAGIC!r}, got {magic!r}")
    version, flags, precision, lanes = reader.take(4)
    if version != VERSION:
        raise ValueError(f"data: expected container version {VERSION}, got {version}")
    categories, block_size, dtype, dims = (reader.varint() for _ in range(4))
    if dims > _MAX_DIMS:
        raise ValueError(f"data: the header is damaged, got samples of {dims} dimensions")
    shape = tuple(reader.varint() for _ in range(dims))
    order_hash, model_hash = reader.take(8), reader.take(32)
    crc = zlib.crc32(reader.data[: reader.at])
    if struct.unpack("<I", reader.take(4))[0] != crc:
        raise ValueError("data: the header is damaged, its checksum does not fit")
    if dtype >= len(DTYPES) or lanes != 1 or flags > 3 or block_size < 1:
        raise ValueError("data: the header asks for what this version does not know")
    header = Header(
        flags, precision, categories, block_size, DTYPES[dtype], shape, order_hash, model_hash
    )
    return header, reader.at


def pack_index(blocks: list[Block]) -> bytes:
    """Index table and footer."""
    index = b"".join(
        varint(block.samples) + varint(block.words) + struct.pack("<I", block.crc)
        for block in blocks
    )
    return index + _FOOTER.pack(len(index), zlib.crc32(index), END)


def read_index(file: BinaryIO, start: int, block_size: int) -> list[Block]:
    """The index table of a file whose blocks begin at `start`.

    Raises:
        ValueError: The file is truncated or damaged, or its parts don't add up.
    """
    size = file.seek(0, io.SEEK_END)
    if size < start + _FOOTER.size:
        raise ValueError("data: the container is truncated, its footer is missing")
    file.seek(size - _FOOTER.size)
    length, crc, end = _FOOTER.unpack(file.read(_FOOTER.size))
    if end != END:
        raise ValueError("data: the container is truncated or damaged, it has no footer")
    if length > size - start - _FOOTER.size:
        raise ValueError("data: the footer is damaged, the index does not fit")
    file.seek(size - _FOOTER.size - length)
    reader = Reader(file.read(length), "index")
    if zlib.crc32(reader.data) != crc:
        raise ValueError("data: the index is damaged, its checksum does not fit")
    blocks: list[Block] = []
    offset = start
    while reader.at < length:
        samples, words = reader.varint(), reader.varint()
        blocks.append(Block(samples, words, struct.unpack("<I", reader.take(4))[0], offset))
        offset += 4 * words
        if not 1 <= samples <= block_size or words < 2:
            raise ValueError(f"data: block {len(blocks) - 1} says {samples} samples, {words} words")
    if offset != size - _FOOTER.size - length:
        raise ValueError("data: the container is damaged, its blocks don't fill it")
    return blocks


def read_block(file: BinaryIO, number: int, block: Block) -> bytes:
    """A block's bytes.

    Raises:
        ValueError: Its checksum does not fit.
    """
    file.seek(block.offset)
    data = file.read(block.size)
    if zlib.crc32(data) != block.crc:
        raise ValueError(f"data: block {number} is damaged, its checksum does not fit")
    return data
