"""The routing contract: what every gate returns, and the base class that gates share.

A gate scores `E` experts for each token, `logits = x W^T + b`, and chooses at most `k` of them.
The maths is done in float32 (float64 for float64 tokens), under autocast too: rounding the scores
to bfloat16 changes which experts are chosen.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weights.

    `T` tokens (all leading dimensions flattened), `E` experts, `k` slots a token.

    Attributes:
        weights: `(T, k)`, combine weights; 0 where `mask` is False.
        experts: `(T, k)` int64, expert of each slot.
        logits: `(T, E)`, scores before temperature and noise.
        probs: `(T, E)`, softmax of the logits over all experts, with temperature, without noise.
        mask: `(T, k)` bool, False where the slot is unused: pruned by the gate, or dropped.
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor
    probs: Tensor
    mask: Tensor

    @property
    def load(self) -> Tensor:
        """`(E,)` int64, the number of slots in use at each expert."""
        load = self.experts.new_zeros(self.logits.shape[-1])
        return load.scatter_add(0, self.experts.flatten(), self.mask.flatten().to(load.dtype))

    @property
    def dropped_fraction(self) -> Tensor:
        """Scalar, the fraction of the `T k` slots that is unused; 0 without tokens."""
        return (~self.mask).sum() / max(self.mask.numel(), 1)


def top_k_experts(scores: Tensor, k: int) -> Tensor:
    """`(T, k)`, the experts of the k largest scores, largest first; ties to the lowest expert."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


FEW = 8
"""Numbers of experts up to which comparing all pairs is faster than sorting."""


def top_k_mask(scores: Tensor, k: int, dim: int = -1) -> Tensor:
    """Bool like the scores, True at the experts, along `dim`, that `top_k_experts` gives."""
    num_experts = scores.shape[dim]
    if k >= num_experts:
        return torch.ones_like(scores, dtype=torch.bool)
    if num_experts > FEW:
        chosen = top_k_experts(scores.movedim(dim, -1), k).movedim(-1, dim)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, chosen, True)
    ahead = torch.zeros_like(scores, dtype=torch.uint8)  # how many experts are
    counts, each = ahead.unbind(dim), scores.unbind(dim)
    for j in range(num_experts):
        counts[j].add_(j)  # of two equal ones the lower
        for i in range(j):
            higher = (each[j] > each[i]).to(torch.uint8)
            counts[i].add_(higher)
            counts[j].sub_(higher)
    return ahead < k


def all_experts(weights: Tensor, logits: Tensor, probs: Tensor, mask: Tensor) -> Routing:
    """Routing with a slot for each expert; all arguments are `(T, E)`."""
    experts = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    return Routing(weights, experts, logits, probs, mask)


def chosen_experts(weights: Tensor, experts: Tensor, logits: Tensor, probs: Tensor) -> Routing:
    """Routing whose `(T, k)` slots are all in use."""
    return Routing(weights, experts, logits, probs, torch.ones_like(experts, dtype=torch.bool))


def check_count(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raise a ValueError unless `value` is an integer in `[low, high]`."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is a finite number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which no operation on the device of `x` is cast to a lower precision."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class Gate(ZooModel):
    """Base of the gates: linear scores, an optional temperature, and a choice of experts.

    A gate of your own overrides `route`, and `score` where its scores are not linear.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        bias: Whether the scores have a bias.
        temperature: Divides the logits in the softmax; None for a gate that has none.
        learn_temperature: Whether the temperature is a parameter.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `T` the product of the leading dimensions.

    Attributes:
        weight: `(E, dim)` parameter, initialised like that of `nn.Linear`.
        bias: `(E,)` parameter or None.
        log_tau: Logarithm of the temperature: a parameter where it is learned, else a buffer, so
            that the state of an annealed gate is in its `state_dict`; None without temperature.

    Raises:
        ValueError: `dim` or `num_experts` below 1, a temperature that is not above 0, or an input
            whose last dimension is not `dim`.
    """

    log_tau: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        temperature: float | None = None,
        learn_temperature: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("dim", dim)
        check_count("num_experts", num_experts)
        if temperature is not None:
            check_positive("temperature", temperature)
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.initial_temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        empty_bias = torch.empty(num_experts, device=device, dtype=dtype) if bias else None
        self.bias = None if empty_bias is None else nn.Parameter(empty_bias)
        log_tau = None if temperature is None else torch.empty((), device=device, dtype=dtype)
        if log_tau is not None and learn_temperature:
            self.log_tau = nn.Parameter(log_tau)
        else:
            self.register_buffer("log_tau", log_tau)

    def reset_parameters(self) -> None:
        """Initialise weight and bias like `nn.Linear`, and set the temperature to its start."""
        bound = self.dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.log_tau is not None and self.initial_temperature is not None:
            nn.init.constant_(self.log_tau, math.log(self.initial_temperature))

    @property
    def temperature(self) -> Tensor | None:
        """Scalar tensor, the temperature in use; None for a gate that has none."""
        return None if self.log_tau is None else self.log_tau.exp()

    def step(self) -> None:
        """Advance the annealing schedule by one update; nothing for a gate that has none."""

    def score(self, x: Tensor) -> Tensor:
        """Logits `(..., E)` of tokens `(..., dim)`, before temperature and noise."""
        return self.linear(x, self.weight, self.bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x weight^T + bias`, in at least float32."""
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (..., {self.dim}), got {tuple(x.shape)}")
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        with without_autocast(x):
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def log_probs(self, x: Tensor) -> Tensor:
        """`(..., E)`, log-softmax over all experts, with temperature, without noise."""
        return self.tempered(self.score(x)).log_softmax(-1)

    def tempered(self, logits: Tensor) -> Tensor:
        """The logits divided by the temperature."""
        return logits if self.log_tau is None else logits / self.log_tau.to(logits.dtype).exp()

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Choose experts for tokens `(T, dim)` with logits `(T, E)`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it routes")

    def forward(self, x: Tensor) -> Routing:
        """Route tokens `(..., dim)`."""
        logits = self.score(x).reshape(-1, self.num_experts)
        with without_autocast(x):
            routing = self.route(x.reshape(-1, self.dim), logits)
        return routing._replace(weights=routing.weights.to(x.dtype))

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        text = f"{self.dim}, {self.num_experts}, bias={self.bias is not None}"
        if isinstance(self.log_tau, nn.Parameter):
            text += ", temperature='learned'"
        elif self.initial_temperature is not None:
            text += f", temperature={self.initial_temperature:g}"
        return text
