"""BBKB: batches of arms for `torchzoo.gp.bkb`, as long as variances can be trusted.

With means, inducing points and features of the last round, a batch is made greedily: after each of
its arms V grows by z(x) z(x)^T, and with it variances shrink, until

    1 + sum_s sigma^2(x_s) > C,

sigma^2 being the variance before the batch. The sum bounds by how much variances can shrink.

D. Calandriello, L. Carratino, A. Lazaric, M. Valko and L. Rosasco, "Near-linear time Gaussian
process optimization with adaptive batching and resparsification", 2020. Deviations: beta is the one
that the authors compute with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchzoo.gp.bkb import BKB


class BBKB(BKB):
    """BKB in batches: `ask` gives arms until their variances have added up to a threshold.

    Within a batch means and inducing points stay, and variances shrink as if the rewards had come.
    The confidence width sums `log(1 + sigma²)` over pulls, with the variances before their batch,
    in place of the effective dimension.

    Args:
        kernel: As for `BKB`.
        ratio_threshold: C; a batch ends when `1 + sum sigma²(x_s)`, with the variances before the
            batch, is above it. Just above 1: single arms.
        **options: Those of `BKB`; `constants` is `"practical"`.

    Raises:
        ValueError: An option out of its range.

    Source:
        D. Calandriello and others, "Near-linear time Gaussian process optimization with adaptive
        batching and resparsification", 2020, algorithm 1.

    Example:
        >>> arms = torch.eye(3, dtype=torch.float64)
        >>> bandit = BBKB(lambda a, b: a @ b.mT, ratio_threshold=1.6)
        >>> bandit.initialize(arms, [0, 1, 2], [0.0, 0.1, -0.1])
        >>> bandit.ask()  # each pull of an arm lowers its variance
        tensor([1, 0])
    """

    def __init__(self, kernel: Any, *, ratio_threshold: float = 2.0, **options: Any):
        if not 1 <= ratio_threshold < math.inf:
            raise ValueError(f"ratio_threshold: expected at least 1, got {ratio_threshold}")
        super().__init__(kernel, **options)
        if self.constants != "practical":
            raise ValueError(f"constants: expected 'practical', got {self.constants!r}")
        self.ratio_threshold = ratio_threshold
        self._logdet = 0.0

    @property
    def beta(self) -> Tensor:
        """Width of the confidence intervals in units of sigma, `beta_scale` included."""
        self._check_initialized()
        spread = self.ratio_threshold * self._logdet + math.log(1 / self.delta)
        width = math.sqrt(self.lam) * self.fnorm + math.sqrt(self.noise_variance * spread)
        return self.variances.new_tensor(self.beta_scale * width)

    @torch.no_grad()
    def ask(self, candidates: Tensor | None = None) -> Tensor:
        """The arms of the next batch, in order.

        Shape:
            - candidates: `(A', d)`
            - output: `(b,)`, int64
        """
        mean, variance, _ = self._field(candidates)
        cross = self._columns if candidates is None else self._cross(candidates, "candidates")
        white = self._whiten(cross @ self._root).mT
        inverse = torch.eye(white.shape[-1], dtype=white.dtype, device=white.device)
        beta, start, ratio = self.beta, variance, 1.0
        batch: list[int] = []
        while ratio <= self.ratio_threshold:
            best = int((mean + beta * variance.sqrt()).argmax())
            batch.append(best)
            ratio += float(start[best])
            if not start[best] > 0:
                break
            along = inverse @ white[best]
            gain = 1 + white[best] @ along
            variance = (variance - (white @ along).square() / gain).clamp_min(0)
            inverse = inverse - torch.outer(along, along) / gain
        return torch.tensor(batch)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bandit with the same options needs to go on, bit by bit the same."""
        return super().state_dict() | {"logdet": torch.tensor(self._logdet, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of another bandit with the same options."""
        super().load_state_dict(state)
        self._logdet = float(state["logdet"])

    def _record(self, index: Tensor, y: Tensor) -> None:
        if not self._pulls:
            self._logdet = 0.0
        self._logdet += float(self.variances[index.to(self.arms.device)].double().log1p().sum())
        super()._record(index, y)
