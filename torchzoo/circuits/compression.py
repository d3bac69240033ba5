"""Lossless compression with the exact conditionals of a circuit.

Liu, Mandt and Van den Broeck, Lossless Compression with Probabilistic Circuits, 2022. Variables are
coded one after the other, each by its conditional given those before (`torchzoo.circuits.order`):

    q_i(c) = p(x_i = c | x before i),   f_i(c) = 1 + floor((2^n - C) q_i(c)),   sum_c f_i(c) = 2^n

and rANS with these integer tables takes -log2 f_i(x_i) / 2^n bits a variable, 64 more a block.

Deviations from the paper. One tour finds all conditionals in O(|p|) where the paper's schedule is
O(log(D) |p|); a table of all categories takes the place of a binary search; parameters are rounded
to float32, and tables come from float64 sums in a fixed order, so that other machines, batch sizes
and numbers of threads decode the same; samples share a coder's state by blocks.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from torchzoo.circuits.blocks import BlockCoder
from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.container import (
    DTYPES,
    Block,
    Header,
    pack_index,
    read_block,
    read_header,
    read_index,
)
from torchzoo.circuits.order import SCHEDULES
from torchzoo.circuits.vtree import factors_of
from torchzoo.files import write_json
from torchzoo.ops.rans import MAX_PRECISION

_OPTIONS = "codec.json"
_OPTION_NAMES = ("precision", "block_size", "schedule", "deterministic")


class CodeLength(NamedTuple):
    """How many bits samples take, in all.

    Attributes:
        payload: Bits of the coders' words.
        container: Bits of the file, that is payload, header, index and footer.
        tables: Ideal length under the integer tables, -sum log2 f / 2^n.
        ideal: Ideal length under the circuit, -sum log2 p.
        variables: Number of coded values, N D.
    """

    payload: int
    container: int
    tables: float
    ideal: float
    variables: int


class CircuitCodec:
    """Compresses integer samples with a circuit over them, bit for bit losslessly.

    The circuit's parameters are copied when the codec is made, and all is computed on the CPU,
    whatever device the circuit is on.

    Args:
        circuit: A structured circuit of one class with leaves over finitely many values.
        precision: Bits n that the frequencies of a table sum to; 16 is enough for 256 categories,
            24 costs less for more or for samples that the circuit knows well.
        block_size: Samples that share a coder. Each block costs 64 bits and is decoded as a whole;
            1 gives access to any sample by itself.
        schedule: `"tour"`, or `"paper"` for the schedule of the paper, which is slower and only
            there to compare; what one of them made the other decodes where their sums round alike.
        deterministic: Sum in a fixed order. Without it the fastest product is taken, and decoding
            is only sure on the same machine with the same block size.

    Shape:
        - x: `(N, D)`, or `(N, *shape)` with D entries a sample

    Raises:
        ValueError: A region of the circuit has several partitions, a leaf is continuous, or an
            option is out of its range.

    Source:
        A. Liu, S. Mandt and G. Van den Broeck, Lossless Compression with Probabilistic Circuits,
        2022: sections 3 and 4 and algorithm 1.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, hclt
        >>> codec = CircuitCodec(Circuit(hclt([-1, 0, 1]), CategoricalLeaf(4), num_units=2))
        >>> x = torch.tensor([[0, 3, 1], [2, 2, 0]])
        >>> torch.equal(codec.decode(codec.encode(x)), x)
        True
    """

    def __init__(
        self,
        circuit: Circuit,
        *,
        precision: int = 16,
        block_size: int = 256,
        schedule: str = "tour",
        deterministic: bool = True,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {list(SCHEDULES)}, got {schedule!r}")
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        self.circuit, self.precision, self.block_size = circuit, precision, block_size
        self.schedule, self.deterministic = schedule, deterministic
        exact = factors_of(deepcopy(circuit).cpu().double())
        factors = exact.map(lambda t: t.detach().float().double().contiguous())
        self._coder = BlockCoder(factors, precision, block_size, schedule, deterministic)
        self.num_categories = self._coder.num_categories
        if not 1 <= precision <= MAX_PRECISION or 2 * self.num_categories > 1 << precision:
            raise ValueError(
                f"precision: expected at most {MAX_PRECISION} and at least "
                f"{self.num_categories.bit_length() + 1} for {self.num_categories} categories, "
                f"got {precision}"
            )
        self.order = factors.tree.order
        self.num_variables = len(self.order)
        self._hash = factors.fingerprint()

    def __repr__(self) -> str:
        return (
            f"CircuitCodec(variables={self.num_variables}, categories={self.num_categories}, "
            f"precision={self.precision}, block_size={self.block_size})"
        )

    def encode(self, x: Tensor, *, shape: Sequence[int] | None = None) -> bytes:
        """Code samples into a container.

        Args:
            x: Integers below the number of categories.
            shape: Shape of a sample that decoding gives; by default that of `x`.

        Raises:
            ValueError: Samples of another number of entries, no integers, or values out of range.
        """
        x = self._checked(x)
        shape = tuple(x.shape[1:] if shape is None else shape)
        return b"".join(self._encode([x], x.dtype, shape))

    def encode_iter(self, batches: Iterable[Tensor]) -> Iterator[bytes]:
        """The same as a stream: pieces of the container as samples come in, batch by batch.

        The bytes don't depend on how samples are batched.

        Raises:
            ValueError: As `encode`; or batches of different shapes or types.
        """
        return self._encode(self._alike(batches), torch.int64, None)

    def _alike(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        first: Tensor | None = None
        for batch in batches:
            first = batch if first is None else first
            if batch.shape[1:] != first.shape[1:] or batch.dtype != first.dtype:
                raise ValueError(
                    f"batches: expected {first.dtype} (N, {', '.join(map(str, first.shape[1:]))}), "
                    f"got {batch.dtype} {tuple(batch.shape)}"
                )
            yield self._checked(batch)

    def _encode(
        self, batches: Iterable[Tensor], dtype: torch.dtype, shape: tuple[int, ...] | None
    ) -> Iterator[bytes]:
        header: bytes | None = None
        blocks: list[Block] = []
        for rows in _rebatch(batches, self._coder.rows_at_once):
            if header is None:
                header = self._header(rows.dtype, shape or tuple(rows.shape[1:])).pack()
                yield header
            for data, samples in self._coder.encode(rows.reshape(-1, self.num_variables)):
                blocks.append(Block(samples, len(data) // 4, zlib.crc32(data), 0))
                yield data
        if header is None:
            yield self._header(dtype, shape or (self.num_variables,)).pack()
        yield pack_index(blocks)

    def decode(self, data: bytes, *, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """The samples of a container.

        Args:
            data: What `encode` made, or `encode_iter` altogether.
            indices: Which samples; only their blocks are decoded. None gives all.

        Returns:
            The samples, in the shape and type that they had.

        Raises:
            ValueError: The data is no container, truncated, damaged, or of another model or other
                options; or an index is out of range.
        """
        file = io.BytesIO(data)
        header, blocks = self._open(file)
        if indices is None:
            parts = list(self._samples(file, header, list(enumerate(blocks))))
            return torch.cat(parts) if parts else self._no_samples(header)
        return self._pick(file, header, blocks, torch.as_tensor(indices, dtype=torch.int64))

    def decode_iter(self, file: BinaryIO) -> Iterator[Tensor]:
        """The samples of a container in a file that can seek, some blocks at a time.

        Raises:
            ValueError: As `decode`.
        """
        header, blocks = self._open(file)
        return self._samples(file, header, list(enumerate(blocks)))

    def _pick(self, file: BinaryIO, header: Header, blocks: list[Block], at: Tensor) -> Tensor:
        ends = torch.tensor([0, *(block.samples for block in blocks)]).cumsum(0)
        if at.ndim != 1 or ((at < 0) | (at >= ends[-1])).any():
            raise ValueError(f"indices: expected (n,) in [0, {int(ends[-1])}), got {at.tolist()}")
        numbers = torch.searchsorted(ends, at, right=True) - 1
        wanted = numbers.unique().tolist()
        parts = list(self._samples(file, header, [(number, blocks[number]) for number in wanted]))
        if not parts:
            return self._no_samples(header)
        sizes = torch.tensor([0, *(blocks[number].samples for number in wanted)]).cumsum(0)
        place = sizes[torch.searchsorted(torch.tensor(wanted), numbers)]
        return torch.cat(parts)[place + at - ends[numbers]]

    def _open(self, file: BinaryIO) -> tuple[Header, list[Block]]:
        header, start = read_header(file)
        own = self._header(header.dtype, header.shape)
        if header.model_hash != own.model_hash or header.order_hash != own.order_hash:
            raise ValueError(
                f"data: coded with another model, {header.model_hash.hex()[:12]}, "
                f"than this one, {own.model_hash.hex()[:12]}"
            )
        if header._replace(block_size=1) != own._replace(block_size=1):
            raise ValueError(
                f"data: coded with precision {header.precision}, C {header.categories}, samples of "
                f"{header.shape} and flags {header.flags}; expected precision {own.precision}, "
                f"C {own.categories}, {self.num_variables} variables and flags {own.flags}"
            )
        return header, read_index(file, start, header.block_size)

    def _samples(
        self, file: BinaryIO, header: Header, blocks: Sequence[tuple[int, Block]]
    ) -> Iterator[Tensor]:
        """Samples of some numbered blocks, several blocks at a time."""
        limit = self._coder.rows_at_once
        first = 0
        while first < len(blocks):
            last, rows = first, 0
            while last < len(blocks) and (last == first or rows + blocks[last][1].samples <= limit):
                rows += blocks[last][1].samples
                last += 1
            x = self._decoded(file, blocks[first:last])
            yield x.to(header.dtype).view(-1, *header.shape)
            first = last

    def _decoded(self, file: BinaryIO, blocks: Sequence[tuple[int, Block]]) -> Tensor:
        for number, block in blocks:
            if self._coder.least_bits(block.samples) > 32 * block.words:
                raise ValueError(f"data: block {number} is too short for {block.samples} samples")
        streams = [read_block(file, number, block) for number, block in blocks]
        x, left = self._coder.decode(streams, [block.samples for _, block in blocks])
        if left:
            raise ValueError(f"data: block {blocks[left[0]][0]} does not decode with this model")
        return x

    def _no_samples(self, header: Header) -> Tensor:
        return torch.empty(0, *header.shape, dtype=header.dtype)

    def measure(self, x: Tensor) -> CodeLength:
        """Code samples, and give the lengths of what came out beside the ideal ones."""
        x = self._checked(x)
        data = self.encode(x)
        _, blocks = self._open(io.BytesIO(data))
        rows = x.reshape(-1, self.num_variables)
        freq, _ = self._coder.intervals(rows) if len(rows) else (torch.ones(1), None)
        tables = self.precision * freq.numel() - freq.double().log2().sum().item()
        return CodeLength(
            payload=32 * sum(block.words for block in blocks),
            container=8 * len(data),
            tables=tables if len(rows) else 0.0,
            ideal=self.theoretical_bits_per_dim(x) * rows.numel() if len(rows) else 0.0,
            variables=rows.numel(),
        )

    def bits_per_dim(self, x: Tensor) -> float:
        """Bits a variable that the coders' words take; header and index are in `measure`."""
        x = self._checked(x)
        blocks = self._coder.encode(x.reshape(-1, self.num_variables)) if len(x) else ()
        return sum(8 * len(data) for data, _ in blocks) / max(1, x.numel())

    @torch.no_grad()
    def theoretical_bits_per_dim(self, x: Tensor) -> float:
        """The ideal length, -log2 p(x) a variable, by the circuit."""
        x = self._checked(x).reshape(-1, self.num_variables)
        device = next(self.circuit.parameters()).device
        log_p = self.circuit(x.long().to(device))[..., 0].double()
        return -log_p.sum().item() / math.log(2) / max(1, x.numel())

    def save(self, path: str | Path) -> Path:
        """Write the circuit and the codec's options into a folder."""
        folder = self.circuit.save(path)
        write_json(folder / _OPTIONS, {name: getattr(self, name) for name in _OPTION_NAMES})
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The codec that `save` wrote; its circuit has the parameters that it was saved with."""
        options = json.loads((Path(path) / _OPTIONS).read_text(encoding="utf-8"))
        return cls(Circuit.load(path), **{name: options[name] for name in _OPTION_NAMES})

    def _header(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Header:
        if prod(shape) != self.num_variables:
            raise ValueError(f"shape: expected {self.num_variables} entries, got {shape}")
        flags = self.deterministic + 2 * (self.schedule == "paper")
        order = hashlib.sha256(struct.pack(f"<{len(self.order)}I", *self.order)).digest()[:8]
        return Header(
            flags,
            self.precision,
            self.num_categories,
            self.block_size,
            dtype,
            shape,
            order,
            self._hash,
        )

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype not in DTYPES:
            raise ValueError(f"x: expected integers, got {x.dtype}")
        if x.ndim < 2 or prod(x.shape[1:]) != self.num_variables:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (*, {self.num_variables})")
        outside = ((x < 0) | (x.long() >= self.num_categories)).reshape(-1, self.num_variables)
        if outside.any():
            variable = int(outside.any(0).nonzero()[0])
            raise ValueError(
                f"x: variable {variable} got a value outside 0 to {self.num_categories - 1}"
            )
        return x


def _rebatch(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same samples in batches of `size`, the last one smaller."""
    held: list[Tensor] = []
    count = 0
    for batch in batches:
        while len(batch):
            part, batch = batch[: size - count], batch[size - count :]
            held.append(part)
            count += len(part)
            if count == size:
                yield torch.cat(held)
                held, count = [], 0
    if held:
        yield torch.cat(held)
