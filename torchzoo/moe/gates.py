"""Gates of the usual kinds: dense softmax, top-k and noisy top-k.

Every gate maps tokens to a `Routing` (see `torchzoo.moe.routing`), so that gates, experts and
losses can be exchanged freely. The dense-to-sparse gates have a file of their own,
`torchzoo.moe.dense_to_sparse`, and can be imported from here too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.moe.dense_to_sparse import ActivationDenseToSparseGate, DenseToSparseGate
from torchzoo.moe.losses import cv_squared
from torchzoo.moe.routing import (
    Gate,
    Routing,
    all_experts,
    check_count,
    chosen_experts,
    top_k_experts,
)
from torchzoo.registry import Comparison, Example, register

__all__ = [
    "ActivationDenseToSparseGate",
    "DenseToSparseGate",
    "Gate",
    "NoisyTopKGate",
    "Routing",
    "SoftmaxGate",
    "TopKGate",
]


@register(
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "bias": True},
        inputs=(torch.randn(5, 6),),
        bad_options={"dim": 0, "num_experts": 0},
    ),
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64}, (torch.randn(1024, 512),), ("ActivationDenseToSparseGate",)
    ),
)
class SoftmaxGate(Gate):
    """Dense gate: every token uses every expert, weighted by `softmax(x W^T + b)`.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        bias: Whether the scores have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k = E`.

    Returns:
        A `Routing` with all slots in use.

    Raises:
        ValueError: A size below 1, or an input whose last dimension is not `dim`.

    Source:
        Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", 1991.

    Example:
        >>> SoftmaxGate(8, 4)(torch.randn(10, 8)).weights.shape
        torch.Size([10, 4])
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Use all experts."""
        probs = logits.softmax(-1)
        return all_experts(probs, logits, probs, torch.ones_like(probs, dtype=torch.bool))


@register(
    paper=146,
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "k": 2},
        inputs=(torch.randn(5, 6),),
        bad_options={"k": 5},
    ),
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64, "k": 2}, (torch.randn(1024, 512),), ("NoisyTopKGate",)
    ),
)
class TopKGate(Gate):
    """Sparse gate: the `k` experts with the largest logits, ties to the lowest expert.

    With `renormalize` the weights are the softmax over the chosen experts; with `k = 1` they are
    then exactly 1 and the router gets no gradient through them. Without, the chosen experts keep
    their share of the softmax over all experts.

    With `balanced` the loads are evened out without a loss: experts are chosen by their share of
    the softmax plus a bias of the choice alone, which `balance` raises for experts that got too
    few tokens and lowers for those that got too many.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        k: Experts a token.
        balanced: Whether there is a bias of the choice; call `balance` after each update.
        renormalize: Whether the weights of a token add up to 1.
        select_with_bias: Whether the bias takes part in the choice, as is usual in routers; if
            not, it enters the weights only.
        bias: Whether the scores have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k` slots.

    Attributes:
        choice_bias: `(E,)` buffer, the bias of the choice; None unless `balanced`.

    Returns:
        A `Routing` with all slots in use, largest selection score first.

    Raises:
        ValueError: A size below 1, `k` above `num_experts`, `balanced` with a bias that takes no
            part in the choice, or an input whose last dimension is not `dim`.

    Source:
        Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", 2017, eq. (3) and (5); balancing Wang et al., "Auxiliary-Loss-
        Free Load Balancing Strategy for Mixture-of-Experts", 2024, algorithm 1; without
        renormalisation Fedus, Zoph and Shazeer, "Switch Transformers", 2021, eq. (2); with a bias
        that takes no part in the choice Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of
        Top-K Sparse Softmax Gating Mixture of Experts", 2024, eq. (1).

    Example:
        >>> routing = TopKGate(8, 4, 2)(torch.randn(10, 8))
        >>> routing.experts.shape, int(routing.load.sum())
        (torch.Size([10, 2]), 20)
    """

    choice_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        balanced: bool = False,
        renormalize: bool = True,
        select_with_bias: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        check_count("k", k, 1, num_experts)
        if balanced and not select_with_bias:
            raise ValueError("balanced: expected False where select_with_bias=False, got True")
        self.k = k
        self.renormalize = renormalize
        self.select_with_bias = select_with_bias
        start = torch.empty(num_experts, device=device, dtype=torch.float32) if balanced else None
        self.register_buffer("choice_bias", start)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weight and bias like `nn.Linear`, and the bias of the choice to zero."""
        super().reset_parameters()
        if self.choice_bias is not None:
            nn.init.zeros_(self.choice_bias)

    @torch.no_grad()
    def balance(self, load: Tensor, *, rate: float = 1e-3) -> None:
        """Move the bias of the choice by `rate sign(mean(load) - load)`.

        Loads even out up to the tokens that a step of `rate` moves.

        Args:
            load: `(E,)`, tokens of each expert since the last update: the `load` of the routings,
                added up over micro-batches and over ranks.
            rate: Size of the step, in units of the softmax.

        Raises:
            ValueError: The gate is not `balanced`, or a load of another shape.
        """
        if self.choice_bias is None:
            raise ValueError("balance: expected a gate with balanced=True")
        if load.shape != self.choice_bias.shape:
            wanted = tuple(self.choice_bias.shape)
            raise ValueError(f"load: expected {wanted}, got {tuple(load.shape)}")
        load = load.to(self.choice_bias)
        self.choice_bias += rate * (load.mean() - load).sign()

    def choose(self, x: Tensor, logits: Tensor) -> Tensor:
        """`(..., k)`, the chosen experts of tokens `(..., dim)` with logits `(..., E)`."""
        return top_k_experts(self.selection(x, logits), self.k)

    def selection(self, x: Tensor, logits: Tensor) -> Tensor:
        """`(..., E)`, scores whose `k` largest say which experts are chosen, without gradient."""
        selection = logits
        if self.choice_bias is not None:
            selection = logits.softmax(-1) + self.choice_bias.to(logits.dtype)
        if self.bias is not None and not self.select_with_bias:
            selection = self.linear(x, self.weight)
        return selection.detach()

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Choose the `k` best experts."""
        experts = self.choose(x, logits)
        probs = logits.softmax(-1)
        if self.renormalize:
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = probs.gather(-1, experts)
        return chosen_experts(weights, experts, logits, probs)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        rule = f"renormalize={self.renormalize}, select_with_bias={self.select_with_bias}"
        balanced = "" if self.choice_bias is None else ", balanced=True"
        return f"{super().extra_repr()}, k={self.k}, {rule}{balanced}"


@register(
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "k": 2},
        inputs=(torch.randn(5, 6),),
        bad_options={"k": 0},
    ),
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64, "k": 2}, (torch.randn(1024, 512),), ("TopKGate",)
    ),
)
class NoisyTopKGate(Gate):
    """Top-k gate whose logits get learned Gaussian noise in training.

    `H(x) = x W^T + b + epsilon * softplus(x W_noise^T)` with `epsilon ~ N(0, 1)`; the weights are
    the softmax over the `k` largest entries of `H`. In evaluation there is no noise. The noise is
    drawn from torch's global generator.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        k: Experts a token.
        bias: Whether the scores have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k` slots.

    Returns:
        A `Routing` with all slots in use, largest entry of `H` first.

    Raises:
        ValueError: A size below 1, `k` above `num_experts`, or an input whose last dimension is
            not `dim`.

    Source:
        Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", 2017, eq. (3)-(5); load of an expert eq. (8)-(11). Both
        matrices start at zero, as in its appendix A, so that the first loads are balanced.

    Example:
        >>> gate = NoisyTopKGate(8, 4, 2)
        >>> gate.load_loss(torch.randn(100, 8)).item() < 1
        True
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        check_count("k", k, 1, num_experts)
        self.k = k
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all parameters to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def noise_scale(self, x: Tensor) -> Tensor:
        """`(..., E)`, standard deviation of the noise of each logit."""
        return F.softplus(self.linear(x, self.noise_weight))

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Choose the `k` best experts by the noisy logits."""
        noisy = logits
        if self.training:
            noisy = logits + torch.randn_like(logits) * self.noise_scale(x)
        experts = top_k_experts(noisy, self.k)
        weights = noisy.gather(-1, experts).softmax(-1)
        return chosen_experts(weights, experts, logits, logits.softmax(-1))

    def expected_load(self, x: Tensor) -> Tensor:
        """`(E,)`, smooth estimate of how many of the tokens `(..., dim)` each expert gets.

        The mean over draws of the noise is the expected load; unlike the load itself it has a
        gradient. A new draw of the noise is made.
        """
        logits, scale = self.score(x), self.noise_scale(x)
        noisy = logits + torch.randn_like(logits) * scale
        chance = probability_in_top_k(logits, noisy, scale, self.k)
        return chance.reshape(-1, self.num_experts).sum(0)

    def load_loss(self, x: Tensor) -> Tensor:
        """Scalar, squared coefficient of variation of the expected load of tokens `(..., dim)`."""
        return cv_squared(self.expected_load(x))

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return f"{super().extra_repr()}, k={self.k}"


def probability_in_top_k(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Chance that a new draw of one logit's noise, the others kept, puts it in the top k.

    `P_i = Phi((clean_i - threshold_i) / scale_i)`, where `threshold_i` is the k-th largest of the
    other noisy logits.

    Args:
        clean: `(..., E)`, logits without noise.
        noisy: `(..., E)`, logits with noise.
        scale: `(..., E)`, standard deviations of the noise.
        k: How many are chosen.

    Returns:
        `(..., E)`, probabilities.
    """
    if k == clean.shape[-1]:
        return torch.ones_like(clean)
    best = noisy.topk(k + 1, dim=-1).values
    kth, following = best[..., k - 1 : k], best[..., k : k + 1]
    threshold = torch.where(noisy >= kth, following, kth)
    return torch.special.ndtr((clean - threshold) / scale)
