"""The operators under `torchzoo.ops.rans`: streams of symbols, tables, and their references.

Streams are independent of each other, each with lanes of its own, `state (S, lanes)`. Symbols
`(T,)` are in decoding order, stream after stream, `ends (S,)` saying where each stops; within a
stream they take turns among its lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOW = 1 << 31
"""The state that coding starts from, and the least that it has between symbols."""

SMALLEST = 1e-280
"""Probabilities with a sum below this are taken as uniform, as its inverse might overflow."""


@torch.library.custom_op("torchzoo::rans_encode", mutates_args=())
def rans_encode(
    freq: Tensor, start: Tensor, ends: Tensor, state: Tensor, precision: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words in the order they spill, stream by stream; their numbers; the states."""
    words: list[int] = []
    counts: list[int] = []
    states = state.tolist()
    f, c = freq.tolist(), start.tolist()
    first = 0
    for lanes, end in zip(states, ends.tolist(), strict=True):
        before = len(words)
        for i in range(end - 1, first - 1, -1):
            s = lanes[(i - first) % len(lanes)]
            if s >= f[i] << 63 - precision:
                words.append(s & 0xFFFFFFFF)
                s >>= 32
            high, low = divmod(s, f[i])
            lanes[(i - first) % len(lanes)] = (high << precision) + low + c[i]
        counts.append(len(words) - before)
        first = end
    spilled = np.array(words, dtype=np.uint32).view(np.int32)
    return (
        torch.from_numpy(spilled),
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor(states, dtype=torch.int64).view(state.shape),
    )


@torch.library.custom_op("torchzoo::rans_decode", mutates_args=())
def rans_decode(
    cdf: Tensor,
    ends: Tensor,
    words: Tensor,
    position: Tensor,
    limit: Tensor,
    state: Tensor,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols, positions and states; past its last word a stream reads zeros and counts on."""
    symbols = np.empty(len(cdf), dtype=np.int64)
    tables, read = cdf.numpy(), words.numpy().view(np.uint32).tolist()
    positions, states = position.tolist(), state.tolist()
    mask, first = (1 << precision) - 1, 0
    for stream, (end, last) in enumerate(zip(ends.tolist(), limit.tolist(), strict=True)):
        lanes, at = states[stream], positions[stream]
        for i in range(first, end):
            s = lanes[(i - first) % len(lanes)]
            r = s & mask
            row = tables[i]
            symbol = int(row.searchsorted(r, "right")) - 1
            c, above = int(row[symbol]), int(row[symbol + 1])
            s = (above - c) * (s >> precision) + r - c
            if s < LOW:
                s = s << 32 | (read[at] if at < last else 0)
                at += 1
            lanes[(i - first) % len(lanes)] = s
            symbols[i] = symbol
        positions[stream] = at
        first = end
    return (
        torch.from_numpy(symbols),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(states, dtype=torch.int64).view(state.shape),
    )


@torch.library.custom_op("torchzoo::rans_tables", mutates_args=())
def rans_tables(pmf: Tensor, precision: int) -> Tensor:
    p = pmf.numpy()
    rows, categories = p.shape
    total = np.add.accumulate(p, axis=1)[:, -1:]  # in order, which np.sum is not
    proper = (total >= SMALLEST) & np.isfinite(total)
    p, total = np.where(proper, p, 1.0), np.where(proper, total, float(categories))
    freq = 1 + np.floor(p * (((1 << precision) - categories) / total)).astype(np.int64)
    freq[np.arange(rows), p.argmax(1)] += (1 << precision) - freq.sum(1)
    cdf = np.zeros((rows, categories + 1), dtype=np.int32)
    cdf[:, 1:] = freq.cumsum(1)
    return torch.from_numpy(cdf)


@rans_encode.register_fake
def _(
    freq: Tensor, start: Tensor, ends: Tensor, state: Tensor, precision: int
) -> tuple[Tensor, Tensor, Tensor]:
    words = torch.library.get_ctx().new_dynamic_size()
    return freq.new_empty(words), ends.new_empty(ends.shape), torch.empty_like(state)


@rans_decode.register_fake
def _(
    cdf: Tensor,
    ends: Tensor,
    words: Tensor,
    position: Tensor,
    limit: Tensor,
    state: Tensor,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return ends.new_empty(len(cdf)), torch.empty_like(position), torch.empty_like(state)


@rans_tables.register_fake
def _(pmf: Tensor, precision: int) -> Tensor:
    return pmf.new_empty(pmf.shape[0], pmf.shape[1] + 1, dtype=torch.int32)
