"""Categorical, Bernoulli and binomial leaves of a circuit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.circuits.finite_leaf import FiniteLeaf
from torchzoo.circuits.leaf import Leaf, blend

__all__ = ["BernoulliLeaf", "BinomialLeaf", "CategoricalLeaf", "FiniteLeaf", "Leaf"]


class CategoricalLeaf(FiniteLeaf):
    """Categorical leaves: any distribution over the values 0 to `num_categories - 1`.

    Args:
        num_categories: Number of values `C`.
        num_folds: Folds; a circuit sets it, like `num_units` and `shared`.
        num_units: Units of a fold.
        shared: Whether all folds have the same parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        logits: `(F, C, K)`, log-probabilities up to a constant for each unit.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> leaf = CategoricalLeaf(5, num_folds=2, num_units=3)
        >>> leaf.log_prob(torch.tensor([[0, 4, 1], [2, 2, 0]])).shape
        torch.Size([2, 3, 3])
    """

    def __init__(
        self,
        num_categories: int,
        *,
        num_folds: int = 1,
        num_units: int = 1,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_folds, num_units, shared)
        if num_categories < 1:
            raise ValueError(f"num_categories: got {num_categories}, expected at least 1")
        self.num_categories = num_categories
        size = (self.stored_folds, num_categories, num_units)
        self.logits = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def options(self) -> dict[str, Any]:
        """See `Leaf.options`."""
        return {"num_categories": self.num_categories}

    def reset_parameters(self) -> None:
        """Draw logits from N(0, 1)."""
        nn.init.normal_(self.logits)

    def log_table(self) -> Tensor:
        """See `FiniteLeaf.log_table`."""
        return self.logits.log_softmax(1)

    def scores(self) -> Tensor:
        """See `FiniteLeaf.scores`."""
        return self.logits

    @torch.no_grad()
    def set_probs(self, probs: Tensor) -> None:
        """Set the probabilities `(F, C, K)`."""
        self.logits.copy_(probs.log())

    @torch.no_grad()
    def fit_counts(self, counts: Tensor, step_size: float) -> None:
        """See `FiniteLeaf.fit_counts`: probabilities in proportion to the counts."""
        self.set_probs(blend(self.log_table().exp(), counts, 1, step_size))


class BernoulliLeaf(FiniteLeaf):
    """Bernoulli leaves: 1 with probability `sigmoid(logit)`, else 0.

    Args:
        num_folds: Folds; a circuit sets it, like `num_units` and `shared`.
        num_units: Units of a fold.
        shared: Whether all folds have the same parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        logit: `(F, K)`, log-odds of 1.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> leaf = BernoulliLeaf(num_folds=2, num_units=3)
        >>> leaf.log_prob(torch.tensor([[0], [1]])).shape
        torch.Size([2, 1, 3])
    """

    trials = 1

    def __init__(
        self,
        *,
        num_folds: int = 1,
        num_units: int = 1,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_folds, num_units, shared)
        self.num_categories = self.trials + 1
        size = (self.stored_folds, num_units)
        self.logit = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw logits from N(0, 1)."""
        nn.init.normal_(self.logit)

    def log_table(self) -> Tensor:
        """See `FiniteLeaf.log_table`."""
        n = self.trials
        ones = torch.arange(n + 1, device=self.logit.device, dtype=self.logit.dtype)[:, None]
        ways = torch.lgamma(ones.new_tensor(n + 1.0)) - torch.lgamma(ones + 1)
        ways = ways - torch.lgamma(n - ones + 1)
        logit = self.logit[:, None]
        return ways + ones * F.logsigmoid(logit) + (n - ones) * F.logsigmoid(-logit)

    @torch.no_grad()
    def fit_counts(self, counts: Tensor, step_size: float) -> None:
        """See `FiniteLeaf.fit_counts`: the mean share of ones."""
        ones = torch.arange(self.trials + 1, device=counts.device, dtype=counts.dtype)[:, None]
        pair = torch.stack([(counts * ones).sum(1), (counts * (self.trials - ones)).sum(1)], 1)
        probs = self.logit.sigmoid()
        both = blend(torch.stack([probs, 1 - probs], 1), pair, 1, step_size)
        self.logit.copy_(both[:, 0].log() - both[:, 1].log())


class BinomialLeaf(BernoulliLeaf):
    """Binomial leaves: the number of successes of `n` trials, each of chance `sigmoid(logit)`.

    Args:
        n: Number of trials; values are 0 to `n`.
        num_folds: Folds; a circuit sets it, like `num_units` and `shared`.
        num_units: Units of a fold.
        shared: Whether all folds have the same parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        logit: `(F, K)`, log-odds of success.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> BinomialLeaf(3, num_folds=2).log_prob(torch.tensor([[0], [3]])).shape
        torch.Size([2, 1, 1])
    """

    def __init__(
        self,
        n: int,
        *,
        num_folds: int = 1,
        num_units: int = 1,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n: got {n}, expected at least 1")
        self.trials = n
        super().__init__(
            num_folds=num_folds, num_units=num_units, shared=shared, device=device, dtype=dtype
        )

    def options(self) -> dict[str, Any]:
        """See `Leaf.options`."""
        return {"n": self.trials}
