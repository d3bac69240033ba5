"""A masked autoencoder for distributions: a small autoregressive net over categories."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MADE(nn.Module):
    """Two masked layers; the logits of variable i see the variables before it only.

    Args:
        num_variables: Number of variables D.
        num_categories: Number of categories C.
        hidden: Hidden units.

    Shape:
        - x: `(N, D)`, integers
        - output: `(N, D, C)`

    Source:
        M. Germain, K. Gregor, I. Murray and H. Larochelle, MADE: Masked Autoencoder for
        Distribution Estimation, 2015.

    Example:
        >>> MADE(6, 4, 32)(torch.zeros(2, 6).long()).shape
        torch.Size([2, 6, 4])
    """

    first_mask: Tensor
    second_mask: Tensor

    def __init__(self, num_variables: int, num_categories: int, hidden: int):
        super().__init__()
        self.num_variables, self.num_categories = num_variables, num_categories
        self.first = nn.Linear(num_variables * num_categories, hidden)
        self.second = nn.Linear(hidden, num_variables * num_categories)
        own = torch.arange(num_variables).repeat_interleave(num_categories)
        degree = torch.arange(hidden) % max(1, num_variables - 1)
        self.register_buffer("first_mask", (own <= degree[:, None]).float())
        self.register_buffer("second_mask", (degree < own[:, None]).float())

    def forward(self, x: Tensor) -> Tensor:
        hot = F.one_hot(x, self.num_categories).flatten(1).float()
        hidden = F.relu(F.linear(hot, self.first.weight * self.first_mask, self.first.bias))
        out = F.linear(hidden, self.second.weight * self.second_mask, self.second.bias)
        return out.view(*x.shape, self.num_categories)

    def nats(self, x: Tensor) -> Tensor:
        """Mean -log p of a variable."""
        return F.cross_entropy(self(x).flatten(0, 1), x.flatten())

    def fit(self, x: Tensor, seconds: float, *, batch_size: int = 100, lr: float = 3e-3) -> int:
        """Train by Adam for some seconds, keeping the best of 10 % held out; epochs done."""
        held, x = x[: len(x) // 10], x[len(x) // 10 :]
        optimizer = torch.optim.Adam(self.parameters(), lr, weight_decay=1e-4)
        best, kept, epochs, stop = float("inf"), self.state_dict(), 0, time.perf_counter() + seconds
        while time.perf_counter() < stop:
            for batch in torch.randperm(len(x)).split(batch_size):
                optimizer.zero_grad()
                self.nats(x[batch]).backward()
                optimizer.step()
            epochs += 1
            with torch.no_grad():
                loss = self.nats(held).item()
            if loss < best:
                best, kept = loss, {k: v.clone() for k, v in self.state_dict().items()}
        self.load_state_dict(kept)
        return epochs
