"""Leaves over finitely many values: all queries follow from the table of log-probabilities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.circuits.leaf import Leaf, draw
from torchzoo.ops.categorical_log_prob import categorical_log_prob
from torchzoo.ops.log_einsum_exp import log_einsum_exp

__all__ = ["FiniteLeaf"]


class FiniteLeaf(Leaf):
    """Base of leaves over the values 0 to `C - 1`; all follows from the table of log-probabilities.

    The table is `(F, C, K)`, so that a value reads one contiguous row.
    """

    num_categories: int

    @abstractmethod
    def log_table(self) -> Tensor:
        """`(F, C, K)`, or `(1, C, K)` if shared: log-probabilities of all values."""

    def scores(self) -> Tensor:
        """The table up to a constant for each unit, where that takes less to compute."""
        return self.log_table()

    @abstractmethod
    def fit_counts(self, counts: Tensor, step_size: float) -> None:
        """Move towards the most likely parameters for weights `(F, C, K)` of the values."""

    def invalid(self, x: Tensor) -> Tensor:
        """Values outside 0 to `C - 1`."""
        # a limit beyond the type of x would wrap around
        last = (
            min(self.num_categories - 1, torch.iinfo(x.dtype).max) if x.dtype != torch.bool else 1
        )
        return (x < 0) | (x > last)

    def full_table(self) -> Tensor:
        """`(F, C, K)`, the table of every fold."""
        return self.log_table().expand(self.num_folds, -1, -1)

    def _rows(self, x: Tensor) -> Tensor:
        """`(F, B)`, the rows of the stored table that values read."""
        first = torch.arange(self.stored_folds, device=x.device) * self.num_categories
        return x.long() + first[:, None]

    def _log_prob(self, scores: Tensor, x: Tensor) -> Tensor:
        if not self.shared:
            return categorical_log_prob(scores, x.long())
        found = categorical_log_prob(scores, x.long().reshape(1, -1))
        return found.view(*x.shape, self.num_units)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Leaf.log_prob`."""
        return self._log_prob(self.scores(), x)

    def log_prob_chunks(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """See `Leaf.log_prob_chunks`."""
        scores, sizes = self.scores(), list(sizes)
        parts = [scores] * len(sizes) if self.shared else scores.split(sizes)
        return [self._log_prob(*chunk) for chunk in zip(parts, x.split(sizes), strict=True)]

    def log_cdf(self, x: Tensor) -> Tensor:
        """See `Leaf.log_cdf`."""
        sums = self.log_table().logcumsumexp(1)
        below = torch.cat([torch.full_like(sums[:, :1], -torch.inf), sums[:, :-1]], 1)
        return F.embedding(self._rows(x), below.flatten(0, 1))

    def log_prob_soft(self, log_w: Tensor) -> Tensor:
        """See `Leaf.log_prob_soft`."""
        return log_einsum_exp(log_w, self.full_table().mT.exp())

    def expect(self, values: Tensor) -> Tensor:
        """`(F, K)`, expected value of the function that takes the values `(F, C)`."""
        return torch.einsum("fc,fck->fk", values, self.full_table().exp())

    def _values(self) -> Tensor:
        table = self.log_table()
        return torch.arange(self.num_categories, device=table.device, dtype=table.dtype)

    def mean(self) -> Tensor:
        """See `Leaf.mean`."""
        return self.expect(self._values().expand(self.num_folds, -1))

    def variance(self) -> Tensor:
        """See `Leaf.variance`."""
        gap = self._values()[:, None] - self.mean()[:, None]
        return (gap.square() * self.full_table().exp()).sum(1)

    def mode(self) -> Tensor:
        """See `Leaf.mode`."""
        return self.full_table().argmax(1)

    def max_log_prob(self) -> Tensor:
        """See `Leaf.max_log_prob`."""
        return self.full_table().amax(1)

    def sample(self, units: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `Leaf.sample`."""
        fold = torch.arange(self.num_folds, device=units.device)[:, None]
        return draw(self.full_table().mT.exp()[fold, units], generator)

    def inner(self, other: Leaf) -> Tensor:
        """See `Leaf.inner`."""
        return log_einsum_exp(self.full_table().mT.contiguous(), _table_of(other, self).mT.exp())

    def shared_support(self) -> Tensor:
        """See `Leaf.shared_support`."""
        possible = (self.full_table() > -torch.inf).to(self.log_table())
        return torch.einsum("fck,fcj->fkj", possible, possible).clamp_max(1)

    def product(self, other: Leaf) -> Leaf:
        """See `Leaf.product`: categorical, as few families are closed under products."""
        table = self.full_table()[..., :, None] + _table_of(other, self)[..., None, :]
        table = table.flatten(2)
        # where two units share no value any distribution will do: the circuit never uses it
        table = table.masked_fill((table == -torch.inf).all(1, keepdim=True), 0)
        from torchzoo.circuits.inputs import CategoricalLeaf

        leaf = CategoricalLeaf(
            self.num_categories, num_folds=self.num_folds, num_units=table.shape[2]
        ).to(table)
        leaf.set_probs(table.softmax(1))
        return leaf

    def statistics(self, x: Tensor, flow: Tensor) -> Tensor:
        """See `Leaf.statistics`: the weight `(F, C, K)` of every value, `(1, C, K)` if shared."""
        rows = self._rows(x).expand(self.num_folds, -1)
        counts = flow.new_zeros(self.stored_folds * self.num_categories, self.num_units)
        counts.index_add_(0, rows.flatten(), flow.flatten(0, 1))
        return counts.unflatten(0, (self.stored_folds, -1))

    def soft_statistics(self, log_w: Tensor, flow: Tensor) -> Tensor:
        """See `Leaf.soft_statistics`: each unit's flow goes to values by `p_k(c) w(c)`.

        That share is `p d log(sum_c p w) / d p`, a derivative that holds no `F B C K` numbers.
        """
        with torch.enable_grad():
            table = self.log_table().exp().detach().requires_grad_()
            soft = log_einsum_exp(log_w, table.expand(self.num_folds, -1, -1).mT)
            (slope,) = torch.autograd.grad(soft, table, flow)
        return table.detach() * slope

    @torch.no_grad()
    def update(self, statistics: Tensor, pseudocount: float | Tensor, step_size: float) -> None:
        """See `Leaf.update`; `pseudocount` is added to each count, a number or `(F, C)`."""
        if isinstance(pseudocount, Tensor):
            pseudocount = pseudocount[..., None].to(statistics)
            pseudocount = pseudocount.sum(0, keepdim=True) if self.shared else pseudocount
        self.fit_counts(statistics + pseudocount, step_size)

    @torch.no_grad()
    def fit_noisily(self, x: Tensor, noise: float, generator: torch.Generator | None) -> None:
        """See `Leaf.fit_noisily`: `p_k(c)` in proportion to `p(c) exp(noise N(0, 1))`."""
        table = self.log_table()
        counts = self.statistics(x, table.new_ones(1).expand(*x.shape, self.num_units))
        counts = (counts + 1 / self.num_categories) / (counts.sum(1, keepdim=True) + 1)
        factor = torch.randn(counts.shape, generator=generator, device=x.device).to(table) * noise
        self.fit_counts(counts * factor.exp(), 1.0)


def _table_of(leaf: Leaf, like: FiniteLeaf) -> Tensor:
    """The table of a leaf that must have as many folds and values as `like`."""
    wanted = (like.num_folds, like.num_categories)
    if not isinstance(leaf, FiniteLeaf) or (leaf.num_folds, leaf.num_categories) != wanted:
        raise ValueError(f"other: got {leaf!r}, expected finite leaves of the sizes of {like!r}")
    return leaf.full_table()
