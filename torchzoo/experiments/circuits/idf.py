"""Integer discrete flow: a neural coder that is lossless, as additions of rounded numbers undo.

Each coupling leaves some pixels as they are and moves the others by what a net says of the first,

    x_b <- x_b + round(t(x_a)),

whose gradient passes through the rounding as if it were not there. What comes out are mixtures of
discretised logistic distributions, whose parameters a net takes, for one half, from the other.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.ops.rans import StreamDecoder, encode_streams, frequency_tables

_HEAD = struct.Struct("<ii")
PRECISION = 20
MIXED = 5
"""Distributions in a mixture."""


def checkers(side: int) -> Tensor:
    """`(5, side^2)` bool, what couplings read: both colours of a chessboard, lines, and columns."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    colour = (row + column) % 2
    parts = (colour == 0, colour == 1, row % 2 == 0, column % 2 == 0, colour == 0)
    return torch.stack(parts).flatten(1)


class IntegerFlow(nn.Module):
    """Couplings of rounded shifts, and a prior of discretised logistic mixtures.

    Args:
        read: What each coupling reads, and last what the prior of the rest reads.
        num_categories: Number of categories C of the data, which sets the scale of shifts.
        hidden: Hidden units of the nets, which have two hidden layers.

    Shape:
        - read: `(L + 1, D)` bool
        - x: `(N, D)`, integers

    Source:
        E. Hoogeboom, J. Peters, R. van den Berg and M. Welling, Integer Discrete Flows and
        Lossless Compression, 2019.

    Example:
        >>> flow, x = IntegerFlow(checkers(2), 17, 16), torch.randint(17, (3, 4))
        >>> torch.equal(flow.inverse(flow.latents(x)), x)
        True
    """

    read: Tensor

    def __init__(self, read: Tensor, num_categories: int, hidden: int):
        super().__init__()
        size = read.shape[1]
        self.scale = num_categories / 8
        self.register_buffer("read", read)

        def net(out: int) -> nn.Sequential:
            last = nn.Linear(hidden, out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            inner = nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
            return nn.Sequential(*inner, last)

        self.shifts = nn.ModuleList(net(size) for _ in read[:-1])
        self.prior = net(3 * size * MIXED)
        self.logits = nn.Parameter(torch.zeros(size, MIXED))
        spread = self.scale * torch.linspace(-2, 2, MIXED)
        self.mean = nn.Parameter(num_categories / 2 + spread.repeat(size, 1))
        self.log_width = nn.Parameter(torch.full((size, MIXED), self.scale).log())

    def _shift(self, layer: int, x: Tensor) -> Tensor:
        read = self.read[layer]
        shift = self.scale * self.shifts[layer](x.masked_fill(~read, 0) / self.scale)
        rounded = shift + (shift.round() - shift).detach()
        return rounded.masked_fill(read, 0)

    def latents(self, x: Tensor) -> Tensor:
        """`(N, D)`, where the couplings take samples; integers, as those of `x`."""
        z = x.float()
        for layer in range(len(self.shifts)):
            z = z + self._shift(layer, z)
        return z if self.training else z.round().long()

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """The samples that the couplings took to `z`."""
        x = z.float()
        for layer in reversed(range(len(self.shifts))):
            x = (x - self._shift(layer, x)).round()
        return x.long()

    def mixtures(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and widths, `(N, D, 5)`; of latents the first half is read only."""
        first = self.read[-1]
        told = self.prior(z.float().masked_fill(~first, 0) / self.scale)
        told = rearrange(told, "n (t d k) -> t n d k", t=3, k=MIXED)
        logits, move, spread = told.masked_fill(first[:, None], 0)
        return (
            (self.logits + logits).log_softmax(-1),
            self.mean + self.scale * move,
            (self.log_width + spread).exp().clamp_min(1e-2),
        )

    def nats(self, x: Tensor) -> Tensor:
        """Mean -log p of a variable."""
        z = self.latents(x)
        return -log_mass(z, *self.mixtures(z)).mean()

    def fit(self, x: Tensor, epochs: int, *, batch_size: int = 100, lr: float = 2e-3) -> None:
        """Train by Adam, keeping the best of 10 % held out."""
        held, x = x[: len(x) // 10], x[len(x) // 10 :]
        with torch.no_grad():
            self.mean.add_((x.float().mean(0) - self.mean.mean(1))[:, None])
        optimizer = torch.optim.Adam(self.parameters(), lr)
        best, kept = float("inf"), self.state_dict()
        for _ in range(epochs):
            self.train()
            for batch in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                self.nats(x[batch]).backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
            self.eval()
            with torch.no_grad():
                loss = self.nats(held).item()
            if loss < best:
                best, kept = loss, {k: v.clone() for k, v in self.state_dict().items()}
        self.load_state_dict(kept)

    def _order(self) -> list[int]:
        """Latents in the order of coding: those that the prior reads come first."""
        return [*self.read[-1].nonzero()[:, 0].tolist(), *(~self.read[-1]).nonzero()[:, 0].tolist()]

    @torch.no_grad()
    def encode(self, x: Tensor) -> bytes:
        """Code samples: the range of their latents, then these variable by variable."""
        z = self.eval().latents(x)
        low, high = int(z.min()), int(z.max())
        parameters = self.mixtures(z)
        ends = []
        for i in self._order():
            at = (z[:, i] - low)[:, None]
            tables = _tables(low, high, *(p[:, i] for p in parameters))
            ends.append(tables.gather(1, torch.cat([at, at + 1], 1)))
        start, end = torch.cat(ends).T
        streams, _ = encode_streams(end - start, start, torch.tensor([z.numel()]), PRECISION)
        return _HEAD.pack(low, high) + streams[0]

    @torch.no_grad()
    def decode(self, data: bytes, n: int) -> Tensor:
        """The `n` samples that `encode` coded, on the same machine."""
        low, high = _HEAD.unpack_from(data)
        coder = StreamDecoder([data[_HEAD.size :]], PRECISION)
        z = torch.zeros(n, self.read.shape[1], dtype=torch.long)
        first = int(self.read[-1].sum())
        for turn, i in enumerate(self._order()):
            if turn in (0, first):
                parameters = self.eval().mixtures(z)
            tables = _tables(low, high, *(p[:, i] for p in parameters))
            z[:, i] = low + coder.pop(tables, torch.tensor([n]))
        if coder.unfinished():
            raise ValueError("data: expected what this flow coded, got something else")
        return self.inverse(z)


def log_mass(z: Tensor, log_weight: Tensor, mean: Tensor, width: Tensor) -> Tensor:
    """Logarithm of a mixture's mass on `[z - 1/2, z + 1/2]`; parameters have an axis more than z.

    With `s = sigmoid`, `s(u) - s(v) = s(u) s(-v) (1 - exp(v - u))`, and here `u - v = 1 / width`.
    """
    upper, lower = ((z[..., None] + half - mean) / width for half in (0.5, -0.5))
    mass = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-1 / width))
    return (log_weight + mass).logsumexp(-1)


def _tables(low: int, high: int, *mixture: Tensor) -> Tensor:
    """`(N, V + 1)`, integer tables over the values from low to high, of mixtures `(N, 5)` each."""
    values = torch.arange(low, high + 1, dtype=torch.float64)
    pmf = log_mass(values, *(parameter[:, None].double() for parameter in mixture)).exp()
    return frequency_tables(pmf, PRECISION)
