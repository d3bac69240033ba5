"""What circuits compress against: generic codecs, and coders behind neural nets."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.circuits.residuals import SIDE, to_residuals
from torchzoo.experiments.circuits.idf import IntegerFlow, checkers
from torchzoo.experiments.circuits.made import MADE
from torchzoo.ops.rans import StreamDecoder, encode_streams, frequency_tables


def zstd() -> Callable[[bytes], bytes] | None:
    """Zstandard at its strongest: of Python from 3.14 on, or of `zstandard`; None without both."""
    try:
        module = import_module("compression.zstd")
        return lambda data: bytes(module.compress(data, 22))
    except ImportError:
        pass
    try:
        return cast(
            Callable[[bytes], bytes], import_module("zstandard").ZstdCompressor(level=22).compress
        )
    except ImportError:
        return None


def generic(test: Tensor) -> dict[str, float]:
    """Bits a variable of generic codecs on the whole test set, which favours them.

    There is a row for zstd where Python has it.
    """
    raw = test.to(torch.uint8)
    column = rearrange(raw, "n (h w) -> (n h) w 1", h=SIDE)
    predicted = to_residuals(column).numpy().tobytes()
    plain = raw.numpy().tobytes()
    sizes = {
        "zlib": len(zlib.compress(plain, 9)),
        "lzma": len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)),
        "predictor + lzma": len(lzma.compress(predicted, preset=9 | lzma.PRESET_EXTREME)),
    }
    if (compress := zstd()) is not None:
        sizes["zstd"] = len(compress(plain))
    return {name: 8 * size / test.numel() for name, size in sizes.items()}


def flow_bits(train: Tensor, test: Tensor, categories: int, epochs: int) -> float:
    """Bits a variable of an integer discrete flow on square images, decoded to be sure."""
    flow = IntegerFlow(checkers(math.isqrt(train.shape[1])), categories, 128)
    flow.fit(train, epochs)
    data = flow.encode(test)
    if not torch.equal(flow.decode(data, len(test)), test):
        raise AssertionError("the flow's images did not come back")
    return 8 * len(data) / test.numel()


def made_code(net: MADE, x: Tensor) -> tuple[Callable[[], Tensor], float]:
    """Code samples with the net: what decodes them by D forward passes, and bits a variable."""
    size = x.shape[1]
    with torch.no_grad():
        tables = frequency_tables(net(x).double().softmax(-1))  # (N, D, C + 1)
    at = torch.stack([x, x + 1], 2)
    start, end = rearrange(tables.gather(2, at), "n d t -> t (d n)")
    streams, _ = encode_streams(end - start, start, torch.tensor([x.numel()]), 16)

    @torch.no_grad()
    def decode() -> Tensor:
        coder, found = StreamDecoder(streams, 16), torch.zeros_like(x)
        for i in range(size):
            pmf = net(found)[:, i].double().softmax(-1)
            found[:, i] = coder.pop(frequency_tables(pmf), torch.tensor([len(x)]))
        return found

    return decode, 8 * len(streams[0]) / x.numel()
