"""Containers whose checksums fit, but that no codec would write."""

import io
import struct
import zlib
from itertools import pairwise

import pytest
import torch

from torchzoo.circuits import CategoricalLeaf, Circuit, CircuitCodec, container, hclt
from torchzoo.circuits.container import Block, Header, pack_index, read_header, read_index

HEADER = Header(1, 16, 3, 8, torch.uint8, (2, 2), bytes(8), bytes(32))


def with_checksum(head):
    return head + struct.pack("<I", zlib.crc32(head))


def test_a_header_comes_back():
    wide = HEADER._replace(shape=(3, 400, 1), block_size=10**9, dtype=torch.int64, flags=3)
    for header in (HEADER, wide):
        found, size = read_header(io.BytesIO(header.pack() + b"rest"))
        assert found == header
        assert size == len(header.pack())


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 2, "expected container version 1, got 2"),
        (4, 0, "expected container version 1, got 0"),
        (5, 4, "what this version does not know"),
        (7, 2, "what this version does not know"),
        (9, 0, "what this version does not know"),
        (10, 6, "what this version does not know"),
        (11, 17, "samples of 17 dimensions"),
    ],
)
def test_a_header_of_another_kind_is_refused(at, value, message):
    """Version, flags, lanes, block size, type and number of dimensions, in their places."""
    head = bytearray(HEADER.pack()[:-4])
    head[at] = value
    with pytest.raises(ValueError, match=message):
        read_header(io.BytesIO(with_checksum(bytes(head)) + bytes(99)))


def test_numbers_have_63_bits_at_most():
    head = HEADER.pack()[:8] + b"\xff" * 9 + b"\x01"
    with pytest.raises(ValueError, match="number of over 63 bits"):
        read_header(io.BytesIO(head + bytes(99)))
    reader = container.Reader(container.varint(2**63 - 1), "number")
    assert reader.varint() == 2**63 - 1


@pytest.mark.parametrize(
    ("blocks", "content", "message"),
    [
        ([(0, 2)], 8, "block 0 says 0 samples, 2 words"),
        ([(8, 2), (9, 2)], 16, "block 1 says 9 samples, 2 words"),
        ([(8, 1)], 4, "block 0 says 8 samples, 1 words"),
        ([(8, 2)], 12, "its blocks don't fill it"),
        ([(8, 3)], 8, "its blocks don't fill it"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(blocks, content, message):
    index = pack_index([Block(samples, words, 0, 0) for samples, words in blocks])
    with pytest.raises(ValueError, match=message):
        read_index(io.BytesIO(bytes(5 + content) + index), 5, 8)


def test_an_index_ends_after_the_header():
    """Its length reaches back into the header, and its checksum is right."""
    start = 8
    index = container.varint(1) + container.varint(2) + bytes(4)
    data = bytes(start) + index[4:]
    footer = struct.pack("<II4s", len(index), zlib.crc32(data[-len(index) :]), b"CPZT")
    with pytest.raises(ValueError, match="the index does not fit"):
        read_index(io.BytesIO(data + footer), start, 8)
    with pytest.raises(ValueError, match="its footer is missing"):
        read_index(io.BytesIO(bytes(start + 11)), start, 8)


def test_blocks_are_counted_from_the_header_on():
    codec = CircuitCodec(Circuit(hclt([-1, 0]), CategoricalLeaf(3), num_units=2), block_size=2)
    data = codec.encode(torch.randint(3, (5, 2)))
    header, start = read_header(io.BytesIO(data))
    blocks = read_index(io.BytesIO(data), start, header.block_size)
    assert [block.samples for block in blocks] == [2, 2, 1]
    assert blocks[0].offset == start
    for before, after in pairwise(blocks):
        assert after.offset == before.offset + before.size
