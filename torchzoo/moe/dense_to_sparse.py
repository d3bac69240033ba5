"""Two objects that are both called dense-to-sparse gate, and the remedy of the second.

One is a training recipe (Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework
via Dense-To-Sparse Gate", 2021): Gumbel noise, an annealed temperature, pruning of small weights

    g = softmax((log softmax(x W^T) + Gumbel) / tau),   g_i kept where g_i > threshold.

The other is a deterministic gate whose temperature is a parameter to be estimated (Nguyen, Akbarian
and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", 2024):

    g = softmax((x W^T + b) / tau).

It does not change when (W, b, tau) are multiplied by one factor, so data can't tell temperature
from weights. The second paper's remedy puts an activation between them, bias and temperature
outside:

    g = softmax((sigma(x W^T) + b) / tau).

`DenseToSparseGate` is both of the first two by its options, `ActivationDenseToSparseGate` is the
third. Deviations: the schedule's shape is not given with the recipe, so two are offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.moe.routing import (
    Gate,
    Routing,
    all_experts,
    check_count,
    check_positive,
    chosen_experts,
    top_k_experts,
    without_autocast,
)
from torchzoo.registry import Comparison, Example, register


def _annealed(start: float, final: float, progress: Tensor, schedule: str) -> Tensor:
    """Logarithm of the temperature at `progress` in [0, 1] of its way from start to final."""
    if schedule == "exponential":
        return math.log(start) + math.log(final / start) * progress
    return (start + (final - start) * progress).log()


@register(
    paper=69,
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "temperature": "learned", "noise": None, "bias": True},
        inputs=(torch.randn(5, 6),),
        bad_options={"temperature": 0.0, "schedule": "cosine", "noise": "normal", "threshold": 1.0},
    ),
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64}, (torch.randn(1024, 512),), ("TopKGate(k=1)",)
    ),
)
class DenseToSparseGate(Gate):
    """Gate that goes from dense to sparse as its temperature falls.

    In training `g = softmax((log softmax(logits) + Gumbel) / tau)`; weights of at most `threshold`
    are set to zero and the others keep their values, without renormalisation. As tau is annealed
    by `step`, ever fewer experts stay above the threshold. In evaluation the `eval_top_k` best
    experts are used with their share of `softmax(logits / tau)`. The noise is drawn from torch's
    global generator.

    With `noise=None` the gate is `softmax(logits / tau)` in training and evaluation;
    `temperature="learned"` makes tau a parameter, started at 1.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        temperature: Tau at the start, or "learned".
        final_temperature: Tau after `steps` calls of `step`; None for a constant one.
        steps: Length of the annealing.
        schedule: "exponential" or "linear" in the temperature.
        threshold: Weights at or below it are pruned; None for 0.02 with noise and 0 without.
        noise: "gumbel" or None.
        soft: Whether all weights above the threshold are used; if not, only the largest of the
            noisy weights, with its soft value.
        eval_top_k: Experts a token in evaluation; None for 1 with noise, and for the same
            function as in training without.
        keep_top: Whether the largest weight stays when it is below the threshold.
        bias: Whether the scores have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k = E`; 1 where `soft` is False, `eval_top_k` in evaluation.

    Returns:
        A `Routing` whose `mask` is False where a weight was pruned.

    Raises:
        ValueError: A size below 1, a temperature that is not above 0, a schedule of which only a
            part is given, a threshold outside [0, 1), a threshold of at least `1 / num_experts`
            without `keep_top`, or an input whose last dimension is not `dim`.

    Source:
        Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via
        Dense-To-Sparse Gate", 2021, for noise, annealing and pruning; Nguyen, Akbarian and Ho,
        "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", 2024, for the
        gate without noise.

    Example:
        >>> gate = DenseToSparseGate(8, 4, temperature=2.0, final_temperature=0.1, steps=100)
        >>> for _ in range(100):
        ...     gate.step()
        >>> round(float(gate.temperature), 4)
        0.1
    """

    num_steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        temperature: float | str = 1.0,
        final_temperature: float | None = None,
        steps: int | None = None,
        schedule: str = "exponential",
        threshold: float | None = None,
        noise: str | None = "gumbel",
        soft: bool = True,
        eval_top_k: int | None = None,
        keep_top: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        learned = temperature == "learned"
        if isinstance(temperature, str) and not learned:
            raise ValueError(f"temperature: expected a number or 'learned', got {temperature!r}")
        super().__init__(
            dim,
            num_experts,
            bias=bias,
            temperature=1.0 if isinstance(temperature, str) else temperature,
            learn_temperature=learned,
            device=device,
            dtype=dtype,
        )
        _check_annealing(learned, final_temperature, steps, schedule)
        if noise not in ("gumbel", None):
            raise ValueError(f"noise: expected 'gumbel' or None, got {noise!r}")
        if threshold is None:
            threshold = 0.0 if noise is None else 0.02
        _check_threshold(threshold, num_experts, keep_top)
        if eval_top_k is not None:
            check_count("eval_top_k", eval_top_k, 1, num_experts)
        elif noise is not None:
            eval_top_k = 1
        self.final_temperature = final_temperature
        self.steps = steps
        self.schedule = schedule
        self.threshold = threshold
        self.noise = noise
        self.soft = soft
        self.eval_top_k = eval_top_k
        self.keep_top = keep_top
        self.register_buffer("num_steps", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the scores like `nn.Linear` and go back to the start of the annealing."""
        super().reset_parameters()
        nn.init.zeros_(self.num_steps)

    @torch.no_grad()
    def step(self) -> None:
        """Advance the annealing by one update."""
        self.num_steps += 1
        if self.log_tau is None or self.initial_temperature is None:
            return
        if self.final_temperature is not None and self.steps is not None:
            progress = (self.num_steps.double() / self.steps).clamp(max=1)
            start, final = self.initial_temperature, self.final_temperature
            self.log_tau.copy_(_annealed(start, final, progress, self.schedule))

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Weigh all experts and prune, or choose the best ones in evaluation."""
        probs = self.tempered(logits).softmax(-1)
        if self.eval_top_k is not None and not self.training:
            experts = top_k_experts(probs, self.eval_top_k)
            return chosen_experts(probs.gather(-1, experts), experts, logits, probs)
        weights = probs
        if self.noise is not None and self.training:
            gumbel = -torch.empty_like(logits).exponential_().log()
            weights = self.tempered(logits.log_softmax(-1) + gumbel).softmax(-1)
        if not self.soft:
            experts = top_k_experts(weights, 1)
            return chosen_experts(weights.gather(-1, experts), experts, logits, probs)
        mask = weights > self.threshold
        if self.keep_top:
            mask = mask.scatter(-1, weights.argmax(-1, keepdim=True), True)
        return all_experts(weights * mask, logits, probs, mask)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        text = f"{super().extra_repr()}, threshold={self.threshold:g}, noise={self.noise!r}"
        if self.final_temperature is not None:
            text += f", final_temperature={self.final_temperature:g}, steps={self.steps}"
        return text


def _check_annealing(learned: bool, final: float | None, steps: int | None, schedule: str) -> None:
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"schedule: expected 'exponential' or 'linear', got {schedule!r}")
    if (final is None) != (steps is None):
        raise ValueError(
            "final_temperature, steps: expected both or neither, "
            f"got final_temperature={final!r} and steps={steps!r}"
        )
    if final is not None and steps is not None:
        if learned:
            raise ValueError("final_temperature: expected None with temperature='learned'")
        check_positive("final_temperature", final)
        check_count("steps", steps)


def _check_threshold(threshold: float, num_experts: int, keep_top: bool) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold!r}")
    if threshold >= 1 / num_experts and not keep_top:
        raise ValueError(
            f"threshold: expected below 1 / num_experts = {1 / num_experts:g} without keep_top, "
            f"as a token could lose all experts, got {threshold!r}"
        )


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": _identity,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
}

# Homogeneous activations, sigma(c z) = c sigma(z) for c > 0: temperature and weights can't be
# told apart.
_DEGENERATE: tuple[Any, ...] = ("identity", "relu", "leaky_relu", torch.relu, F.relu, F.leaky_relu)
_DEGENERATE_MODULES = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)


@register(
    paper=69,
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "learn_temperature": True},
        inputs=(torch.randn(5, 6),),
        bad_options={"activation": "cubic", "temperature": -1.0},
    ),
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64}, (torch.randn(1024, 512),), ("SoftmaxGate",)
    ),
)
class ActivationDenseToSparseGate(Gate):
    """Softmax gate with a temperature that data can determine: `softmax((sigma(x W^T) + b) / tau)`.

    Bias and temperature are outside the activation.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        activation: Sigma: "sigmoid", "tanh", "gelu", "silu", "identity", "relu", "leaky_relu", or
            a function of a tensor. The last three names are accepted with a warning, as with them
            temperature and weights can't be told apart.
        temperature: Tau, or its start where it is learned.
        learn_temperature: Whether tau is a parameter.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k = E`.

    Returns:
        A `Routing` with `logits = sigma(x W^T) + b`. A slot is unused where its weight is exactly
        0, as happens at a low temperature.

    Raises:
        ValueError: A size below 1, a temperature that is not above 0, an unknown activation, or
            an input whose last dimension is not `dim`.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
        Experts?", 2024: the activation dense-to-sparse gate.

    Example:
        >>> gate = ActivationDenseToSparseGate(8, 4, learn_temperature=True)
        >>> gate(torch.randn(10, 8)).weights.sum(-1).allclose(torch.ones(10))
        True
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "sigmoid",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(activation) and activation not in _ACTIVATIONS:
            names = ", ".join(_ACTIVATIONS)
            raise ValueError(f"activation: expected a function or {names}, got {activation!r}")
        super().__init__(
            dim,
            num_experts,
            bias=bias,
            temperature=temperature,
            learn_temperature=learn_temperature,
            device=device,
            dtype=dtype,
        )
        if activation in _DEGENERATE or isinstance(activation, _DEGENERATE_MODULES):
            warnings.warn(
                f"activation {activation!r} is homogeneous: multiplying weights, bias and "
                "temperature by one factor leaves the gate unchanged, so the temperature is not "
                "determined by data; sigmoid, tanh and gelu are",
                UserWarning,
                stacklevel=2,
            )
        self.activation = activation
        self.reset_parameters()

    def score(self, x: Tensor) -> Tensor:
        """Logits `sigma(x W^T) + b`, `(..., E)`, of tokens `(..., dim)`."""
        sigma = (
            _ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        )
        scores = self.linear(x, self.weight)
        with without_autocast(x):
            scores = sigma(scores)
        return scores if self.bias is None else scores + self.bias.to(scores.dtype)

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Use all experts whose weight is not zero."""
        probs = self.tempered(logits).softmax(-1)
        return all_experts(probs, logits, probs, probs > 0)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return f"{super().extra_repr()}, activation={self.activation!r}"
