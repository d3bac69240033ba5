"""Blocks of samples as the words of one coder each, by the tables of a structured circuit.

A block is coded step-major: the values of all its samples at the first variable, then those at the
second one, so that decoding makes one batch of tables a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchzoo.circuits.order import SCHEDULES
from torchzoo.circuits.vtree import Factors
from torchzoo.ops.ordered_matmul import ordered_matmul
from torchzoo.ops.rans import StreamDecoder, encode_streams, unchecked_tables

TABLE_ENTRIES = 1 << 22
"""How many entries the tables of one step may have: samples times categories."""


class BlockCoder:
    """Turns samples `(N, D)` into coded blocks, and back.

    Args:
        factors: Parameters of the circuit, float64 on the CPU.
        precision: Bits n that the frequencies of a table sum to.
        block_size: Samples that share a coder.
        schedule: How conditionals are computed.
        deterministic: Whether sums have a fixed order.
    """

    def __init__(
        self, factors: Factors, precision: int, block_size: int, schedule: str, deterministic: bool
    ):
        self.factors, self.precision, self.block_size = factors, precision, block_size
        self.schedule, self.deterministic = schedule, deterministic
        self.num_variables = len(factors.tree.order)
        self.num_categories = len(next(iter(factors.leaves.values())))

    @property
    def rows_at_once(self) -> int:
        """Samples that are coded side by side: whole blocks, as many as memory is meant to hold."""
        blocks = TABLE_ENTRIES // (self.block_size * self.num_categories)
        return self.block_size * max(1, blocks)

    def encode(self, x: Tensor) -> Iterator[tuple[bytes, int]]:
        """The coded blocks of some samples, with their sizes."""
        freq, start = self.intervals(x)
        bounds = range(0, len(x), self.block_size)
        parts = [slice(first, first + self.block_size) for first in bounds]
        sizes = [len(x[part]) for part in parts]
        ends = self.num_variables * torch.tensor(sizes).cumsum(0)
        step_major = [torch.cat([t[:, part].flatten() for part in parts]) for t in (freq, start)]
        streams, _ = encode_streams(step_major[0], step_major[1], ends, self.precision)
        return zip(streams, sizes, strict=True)

    def intervals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies and starts of the samples' values, `(D, N)`, by the turn of the variables."""
        x = x.cpu().long()
        found: list[Tensor] = []

        def choose(variable: int, pmf: Tensor) -> Tensor:
            at = x[:, variable]
            tables = unchecked_tables(pmf, self.precision)
            found.append(tables.gather(1, torch.stack([at, at + 1], 1)))
            return at

        self._walk(len(x), choose)
        start, end = torch.stack(found).unbind(-1)
        return end - start, start

    def decode(self, streams: list[bytes], sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The samples of coded blocks, and which of the blocks did not end where they should."""
        coder = StreamDecoder(streams, self.precision)
        ends = torch.tensor(sizes).cumsum(0)
        columns: list[Tensor] = [torch.empty(0)] * self.num_variables

        def choose(variable: int, pmf: Tensor) -> Tensor:
            columns[variable] = coder.pop(unchecked_tables(pmf, self.precision), ends)
            return columns[variable]

        self._walk(int(ends[-1]), choose)
        return torch.stack(columns, 1), coder.unfinished()

    def least_bits(self, samples: int) -> float:
        """Bits that so many samples take at least, as no value has all of a table."""
        least = -math.log2(1 - (self.num_categories - 1) / 2**self.precision)
        return samples * self.num_variables * least

    @torch.no_grad()
    def _walk(self, rows: int, choose: Callable[[int, Tensor], Tensor]) -> None:
        matmul = ordered_matmul if self.deterministic else torch.matmul
        SCHEDULES[self.schedule](self.factors, rows, choose, matmul)
