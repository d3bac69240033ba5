"""Streaming range variant of asymmetric numeral systems (rANS): an entropy coder of integer tables.

A symbol has frequency f and start c in a table that sums to 2^n. A lane's state s stays in
[2^31, 2^63); 32-bit words spill out of it:

    push:  while s >= f 2^(63 - n): spill s mod 2^32, s <- floor(s / 2^32);
           s <- floor(s / f) 2^n + (s mod f) + c
    pop:   r = s mod 2^n, the symbol has c <= r < c + f;
           s <- f floor(s / 2^n) + r - c;  while s < 2^31: s <- 2^32 s + the next word

The decoder takes symbols back in the reverse of the order they were pushed in. With several lanes
symbols take turns among as many states, which share one run of words. Everything is integers, so
bytes are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchzoo.ops import _rans
from torchzoo.ops._rans import LOW

MAX_PRECISION = 28


class RansEncoder:
    """Codes symbols that are pushed in the reverse of the order in which they will be decoded.

    Args:
        lanes: States that take turns; each costs 64 bits at the end.
        precision: Number n of bits: frequencies of a table sum to 2^n.

    Raises:
        ValueError: No lanes, or a precision outside [1, 28].

    Source:
        J. Duda, Asymmetric numeral systems: entropy coding combining speed of Huffman coding with
        compression rate of arithmetic coding, 2013; streaming with 32-bit words.

    Example:
        >>> encoder = RansEncoder(precision=4)
        >>> encoder.push(torch.tensor([4, 12]), torch.tensor([12, 0]))
        >>> decoder = RansDecoder(encoder.flush(), precision=4)
        >>> decoder.pop(torch.tensor([[0, 12, 16], [0, 12, 16]])).tolist()
        [0, 1]
    """

    def __init__(self, lanes: int = 1, precision: int = 16):
        _check_options(lanes, precision)
        self.lanes, self.precision = lanes, precision
        self._restart()

    def _restart(self) -> None:
        self._state = torch.full((1, self.lanes), LOW, dtype=torch.int64)
        self._words: list[Tensor] = []

    def push(self, freq: Tensor, start: Tensor) -> None:
        """Code symbols, the first entry first.

        Args:
            freq: Their frequencies, from 1.
            start: Where they begin in their tables.

        Shape:
            - freq, start: `(n,)` with one lane, `(n, lanes)` with several: a symbol a lane in a row

        Raises:
            ValueError: Shapes that don't fit, no integers, or symbols outside `[0, 2^precision]`.
        """
        shape = (-1,) if self.lanes == 1 and freq.ndim == 1 else (-1, self.lanes)
        if freq.ndim != len(shape) or freq.shape[1:] not in ((), (self.lanes,)):
            raise ValueError(
                f"freq: expected (n,) with one lane or (n, {self.lanes}), got {tuple(freq.shape)}"
            )
        if start.shape != freq.shape:
            raise ValueError(f"start: expected {tuple(freq.shape)}, got {tuple(start.shape)}")
        if freq.is_floating_point() or start.is_floating_point():
            raise ValueError(f"freq, start: expected integers, got {freq.dtype} and {start.dtype}")
        wide = freq.long(), start.long()
        if ((wide[0] < 1) | (wide[1] < 0) | (wide[0] + wide[1] > 1 << self.precision)).any():
            raise ValueError(
                "freq, start: expected 1 <= freq, 0 <= start and freq + start <= "
                f"2^{self.precision}, got others"
            )
        rows = [t.reshape(-1, self.lanes).flip(0).flatten().int().cpu() for t in wide]
        end = torch.tensor([rows[0].numel()])
        words, _, self._state = _rans.rans_encode(*rows, end, self._state, self.precision)
        self._words.append(words)

    def flush(self) -> bytes:
        """End the stream: its bytes, states first and then the words, last spilled first.

        The encoder is as new afterwards.
        """
        data = stream_bytes(
            torch.cat([torch.empty(0, dtype=torch.int32), *self._words]), self._state
        )
        self._restart()
        return data


class RansDecoder:
    """Decodes what `RansEncoder` made, in the reverse of the order of its pushes.

    Args:
        data: The bytes of `flush`.
        lanes: As the encoder's.
        precision: As the encoder's.

    Raises:
        ValueError: Options out of range, or bytes too short or of a number that no words fill.

    Example:
        >>> table = torch.tensor([0, 1, 4])
        >>> data = rans_encode(torch.tensor([0, 1, 1]), table, precision=2)
        >>> decoder = RansDecoder(data, precision=2)
        >>> decoder.pop(table.expand(3, -1)).tolist(), decoder.finished
        ([0, 1, 1], True)
    """

    def __init__(self, data: bytes, lanes: int = 1, precision: int = 16):
        _check_options(lanes, precision)
        self.lanes, self.precision = lanes, precision
        self._words, self._state = read_stream(data, lanes)
        self._position = torch.zeros(1, dtype=torch.int64)

    @property
    def finished(self) -> bool:
        """Whether every word was read and every state is back where the encoder started."""
        return int(self._position) == len(self._words) and bool((self._state == LOW).all())

    def pop(self, cdf: Tensor) -> Tensor:
        """Decode symbols by their tables.

        Args:
            cdf: For each symbol the sums of the frequencies before it, from 0 to 2^precision.

        Shape:
            - cdf: `(n, C + 1)` with one lane, `(n, lanes, C + 1)` with several
            - output: `(n,)` or `(n, lanes)`

        Returns:
            The symbols, int64.

        Raises:
            ValueError: Tables of other shapes or sums, or a stream that ends too soon.
        """
        wanted = (2, 3) if self.lanes == 1 else (3,)
        if cdf.ndim not in wanted or (cdf.ndim == 3 and cdf.shape[1] != self.lanes):
            raise ValueError(f"cdf: expected (n, {self.lanes}, C + 1), got {tuple(cdf.shape)}")
        _check_tables(cdf, self.precision)
        rows = cdf.reshape(-1, cdf.shape[-1]).int().cpu().contiguous()
        end, limit = torch.tensor([len(rows)]), torch.tensor([len(self._words)])
        symbols, position, state = _rans.rans_decode(
            rows, end, self._words, self._position, limit, self._state, self.precision
        )
        if int(position) > len(self._words):
            raise ValueError("data: the stream ends before its last symbol")
        self._position, self._state = position, state
        return symbols.view(cdf.shape[:-1])


def rans_encode(symbols: Tensor, cdf: Tensor, *, precision: int = 16) -> bytes:
    """Code symbols in one stream, to be decoded in their order.

    Args:
        symbols: Integers below C.
        cdf: One table for all of them or one each: sums of the frequencies before each symbol,
            from 0 to 2^precision. A symbol that occurs needs a frequency of 1 at least.
        precision: Number of bits that frequencies sum to.

    Shape:
        - symbols: `(n,)`
        - cdf: `(C + 1,)` or `(n, C + 1)`

    Raises:
        ValueError: Shapes, ranges or sums that don't fit, or a symbol of frequency 0.

    Example:
        >>> symbols = torch.tensor([0, 2, 1, 0])
        >>> table = torch.tensor([0, 8, 12, 16])
        >>> data = rans_encode(symbols, table, precision=4)
        >>> len(data), rans_decode(data, table, len(symbols), precision=4).tolist()
        (8, [0, 2, 1, 0])
    """
    tables = _expand(cdf, len(symbols) if symbols.ndim == 1 else -1, precision)
    categories = tables.shape[1] - 1
    if symbols.is_floating_point() or ((symbols < 0) | (symbols >= categories)).any():
        raise ValueError(f"symbols: expected integers in [0, {categories}), got others")
    at = symbols.long()[:, None]
    start = tables.gather(1, at).flatten()
    freq = tables.gather(1, at + 1).flatten() - start
    encoder = RansEncoder(precision=precision)
    encoder.push(freq.flip(0), start.flip(0))
    return encoder.flush()


def rans_decode(data: bytes, cdf: Tensor, n: int | None = None, *, precision: int = 16) -> Tensor:
    """Decode the bytes of `rans_encode`.

    Args:
        data: The bytes.
        cdf: The tables that they were coded with.
        n: How many symbols, where one table serves all.
        precision: As in coding.

    Shape:
        - cdf: `(C + 1,)` or `(n, C + 1)`
        - output: `(n,)`

    Returns:
        The symbols, int64.

    Raises:
        ValueError: Tables that don't fit, or bytes that these tables did not make.

    Example:
        >>> rans_decode(rans_encode(torch.zeros(5).int(), torch.tensor([0, 65536])),
        ...             torch.tensor([0, 65536]), 5).tolist()
        [0, 0, 0, 0, 0]
    """
    if n is None and cdf.ndim == 1:
        raise ValueError("n: expected the number of symbols where one table serves all, got None")
    decoder = RansDecoder(data, precision=precision)
    symbols = decoder.pop(_expand(cdf, len(cdf) if n is None else n, precision))
    if not decoder.finished:
        raise ValueError("data: expected the bytes of these tables, got something left over")
    return symbols


def frequency_tables(pmf: Tensor, precision: int = 16) -> Tensor:
    """Integer tables of probabilities, in which every category has a frequency of 1 at least.

    f_c = 1 + floor((2^n - C) p_c / sum p), and what is missing to 2^n goes to the largest p, the
    first of equals. The sum is taken in the order of the categories and nothing but products, a
    quotient and comparisons of float64 come in, so that tables have the same bits everywhere. A row
    whose sum is below 1e-280, or no number, is taken as uniform. A symbol costs at most
    -log2(1 - C / 2^n) bits more than its ideal length.

    Args:
        pmf: Probabilities up to a factor, float64 on the CPU.
        precision: Number n of bits that frequencies sum to.

    Shape:
        - pmf: `(..., C)`
        - output: `(..., C + 1)`

    Returns:
        Sums of the frequencies before each category, from 0 to 2^n, int32.

    Raises:
        ValueError: No categories or more than half of 2^n, negative numbers, or anything but
            float64 on the CPU.

    Example:
        >>> frequency_tables(torch.tensor([0.5, 0.5, 0.0]).double(), precision=4).tolist()
        [0, 8, 15, 16]
    """
    _check_options(1, precision)
    categories = pmf.shape[-1] if pmf.ndim else 0
    if not 1 <= categories <= 1 << precision - 1 or pmf.dtype != torch.float64 or not pmf.is_cpu:
        raise ValueError(
            f"pmf: expected float64 (..., C) on the CPU with C in [1, 2^{precision - 1}], "
            f"got {pmf.dtype} {tuple(pmf.shape)} on {pmf.device}"
        )
    if (pmf < 0).any():
        raise ValueError(f"pmf: expected no negative numbers, got {pmf.min()}")
    rows = pmf.detach().reshape(-1, categories)
    return unchecked_tables(rows, precision).view(*pmf.shape[:-1], categories + 1)


def unchecked_tables(pmf: Tensor, precision: int) -> Tensor:
    """`frequency_tables` of rows `(T, C)` that are known to be right."""
    return _rans.rans_tables(pmf.contiguous(), precision)


def encode_streams(
    freq: Tensor, start: Tensor, ends: Tensor, precision: int
) -> tuple[list[bytes], Tensor]:
    """Code several streams of one lane at once: symbols `(T,)` in decoding order, ends `(S,)`.

    Returns:
        The bytes of each stream, and how many words each has, `(S,)`.
    """
    state = torch.full((len(ends), 1), LOW, dtype=torch.int64)
    words, counts, state = _rans.rans_encode(
        freq.contiguous(), start.contiguous(), ends, state, precision
    )
    parts = words.split(counts.tolist())
    return [stream_bytes(p, s) for p, s in zip(parts, state, strict=True)], counts + 2


class StreamDecoder:
    """Decodes several streams of one lane side by side, some symbols of each at a time.

    Args:
        streams: Their bytes.
        precision: Number of bits that frequencies sum to.

    Raises:
        ValueError: A stream that is too short or no whole number of words.
    """

    def __init__(self, streams: list[bytes], precision: int):
        self.precision = precision
        read = [read_stream(data, 1) for data in streams]
        none = torch.empty(0, dtype=torch.int32)
        self._words = torch.cat([none, *(words for words, _ in read)])
        self._limit = torch.tensor([len(words) for words, _ in read], dtype=torch.int64).cumsum(0)
        self._position = self._limit - torch.tensor([len(words) for words, _ in read])
        self._state = torch.cat([torch.empty(0, 1, dtype=torch.int64), *(s for _, s in read)])

    def pop(self, cdf: Tensor, ends: Tensor) -> Tensor:
        """Symbols `(T,)` of tables `(T, C + 1)`; those of stream s stop before `ends[s]`."""
        symbols, self._position, self._state = _rans.rans_decode(
            cdf, ends, self._words, self._position, self._limit, self._state, self.precision
        )
        return symbols

    def unfinished(self) -> list[int]:
        """The streams that are not exactly at their end: other tables or other bytes coded them."""
        done = (self._position == self._limit) & (self._state[:, 0] == LOW)
        return (~done).nonzero().flatten().tolist()


def stream_bytes(words: Tensor, state: Tensor) -> bytes:
    """Spilled words and final states as the bytes that a decoder reads forwards."""
    heads = state.numpy().reshape(-1).astype("<u8").tobytes()
    return heads + words.numpy()[::-1].astype("<i4").tobytes()


def read_stream(data: bytes, lanes: int) -> tuple[Tensor, Tensor]:
    """Words in reading order, int32, and states `(1, lanes)` from a stream's bytes."""
    if len(data) < 8 * lanes or len(data) % 4:
        raise ValueError(
            f"data: expected a multiple of 4 bytes and {8 * lanes} at least, got {len(data)}"
        )
    state = np.frombuffer(data, "<u8", lanes)
    if not ((state >= LOW) & (state < 1 << 63)).all():
        raise ValueError("data: expected states from 2^31 to 2^63, got others")
    words = np.frombuffer(data, "<i4", offset=8 * lanes)
    return torch.tensor(words.astype(np.int32)), torch.tensor(state.astype(np.int64))[None]


def _check_options(lanes: int, precision: int) -> None:
    if lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {lanes}")
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision: expected 1 to {MAX_PRECISION}, got {precision}")


def _check_tables(cdf: Tensor, precision: int) -> None:
    if cdf.is_floating_point() or cdf.shape[-1] < 2:
        raise ValueError(f"cdf: expected integers (..., C + 1), got {cdf.dtype} {tuple(cdf.shape)}")
    ends_fit = (cdf[..., 0] == 0) & (cdf[..., -1] == 1 << precision)
    if not ends_fit.all() or (cdf.diff(dim=-1) < 0).any():
        raise ValueError(f"cdf: expected sums that rise from 0 to 2^{precision}, got others")


def _expand(cdf: Tensor, n: int, precision: int) -> Tensor:
    _check_options(1, precision)
    if cdf.ndim not in (1, 2) or n < 0 or (cdf.ndim == 2 and len(cdf) != n):
        raise ValueError(
            f"cdf: expected (C + 1,) or ({max(n, 0)}, C + 1) and symbols (n,), "
            f"got {tuple(cdf.shape)}"
        )
    _check_tables(cdf, precision)
    return cdf if cdf.ndim == 2 else cdf.expand(n, -1)
