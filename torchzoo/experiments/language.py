"""A small decoder and its training loop, shared by experiments on language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.sparsity import SparseFFN


class Block(nn.Module):
    """Attention and feed-forward layer, each after a norm; gives the residual stream."""

    def __init__(self, dim: int, heads: int, hidden: int, **ffn: Any):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.ffn = SparseFFN(dim, hidden, **ffn)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "n l (three h d) -> three n h l d", three=3, h=self.heads
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(attended, "n h l d -> n l (h d)"))
        return x + self.ffn(self.norm2(x))


class Decoder(nn.Module):
    """A language model of a few layers, with learned positions.

    Args:
        vocab: Number of symbols.
        dim: Width of the residual stream, what each of `blocks` puts out.
        depth: Number of blocks.
        heads: Heads of attention.
        hidden: Neurons of a feed-forward layer.
        length: The longest text.
        **ffn: Options of `SparseFFN`: `gated`, `activation`, …

    Shape:
        tokens: (N, L) int64; output logits (N, L, vocab).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        *,
        length: int = 64,
        **ffn: Any,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(torch.empty(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, **ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        for parameter in self.parameters():  # as GPT-2, outputs of blocks a little smaller
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 if parameter.shape[0] == vocab else 0.08)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(
    text: Tensor, *, length: int = 32, size: int = 32, seed: int = 0, bos: int | None = None
) -> Iterator[Tensor]:
    """Endless random windows of a text, with the symbol to predict after the last.

    Args:
        text: One long text or several rows of text.
        length: Symbols that a model sees, L; with `bos` it is the first of them.
        size: Windows in a batch, N.
        seed: Seed of the places.
        bos: Symbol to begin every window with.

    Shape:
        - text: `(T,)` or `(R, T)`
        - output: `(N, L + 1)`
    """
    rows = text.view(1, -1) if text.ndim == 1 else text
    width = length + 1 if bos is None else length
    generator = torch.Generator().manual_seed(seed)
    while True:
        row = torch.randint(len(rows), (size, 1), generator=generator)
        start = torch.randint(rows.shape[1] - width + 1, (size, 1), generator=generator)
        window = rows[row, start + torch.arange(width)]
        yield window if bos is None else F.pad(window, (1, 0), value=bos)


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean surprise in nats of each symbol `(N, L + 1)` but the first, given those before it."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(rearrange(logits, "n l v -> (n l) v"), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor) -> float:
    """`language_loss` in evaluation mode; the mode is left as it was."""
    training = model.training
    loss = float(language_loss(model.eval(), tokens))
    model.train(training)
    return loss


def train(
    model: nn.Module,
    source: Iterator[Tensor],
    steps: int,
    *,
    lr: float = 3e-3,
    final_lr: float = 0.1,
    warmup: int = 20,
    weight_decay: float = 0.01,
    penalty: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train with AdamW, a linear warm-up and a cosine decay; the model is left in evaluation mode.

    Args:
        model: The model.
        source: Batches, one a step.
        steps: How many.
        lr: Highest learning rate.
        final_lr: Its share that is left at the end.
        warmup: Steps of the warm-up.
        weight_decay: Decoupled weight decay.
        penalty: Called with the step after the forward, gives what is added to the loss.
        on_step: Called with the number of steps done after each, the model in training mode.

    Returns:
        The loss of each step, without the penalty.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        return min(1.0, (step + 1) / max(warmup, 1)) * (final_lr + (1 - final_lr) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    model.train()
    for step in range(steps):
        loss = language_loss(model, next(source))
        total = loss if penalty is None else loss + penalty(step)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if on_step:
            on_step(step + 1)
    model.eval()
    return losses
