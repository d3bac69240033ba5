"""Delta activation: quantised activations whose changes over time are penalised, then skipped.

Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks, application in
video processing", 2021. For a sequence z of shape (B, T, ..., C), one layer computes

    s_t = Σ_{τ≤t} z_τ  (only where its input is deltas),   a_t = act(s_t + b),
    o_t = q · round(a_t / q),   d_t = o_t − o_{t−1},   penalty = rate · fan_out · mean_{t≥1} |d_t|

with a trained step q = |threshold|. The rounding passes gradients straight through; the gradient of
the step is −r · g with r = round(a / q), the sign of r · g flipped, so that the penalty makes the
step coarser instead of shrinking it to zero. The flip holds for every gradient that arrives, the
task's too: nothing promises that the task loss makes the step finer.

Deviations: two frames differ as o_t − o_{t−1} in both delta modes (the authors' layer negates one
of them); no pooling between quantising and taking differences: pool after the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.ops.delta_linear import state_dtype
from torchzoo.registry import Comparison, Example, register
from torchzoo.sparsity.delta_conv import DeltaConv2d
from torchzoo.sparsity.delta_layers import DeltaLinear, check_positive

__all__ = [
    "ActivationState",
    "DeltaActivation",
    "DeltaConv2d",
    "DeltaLinear",
    "L1Activation",
    "delta_penalty",
]

_ACTIVATIONS = {"relu": torch.relu, "softmax": lambda a: a.softmax(-1), "none": lambda a: a}
_SMALLEST_STEP = 1e-12  # keeps a / q finite where a step has been trained to 0


class _LastPenalty:
    """Holds the penalty of the last forward with its graph; copied or pickled it is empty.

    A graph can be neither deep-copied nor pickled, so the module holds this instead of the tensor.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __reduce__(self) -> tuple[type[_LastPenalty], tuple[()]]:
        return _LastPenalty, ()


class _PenalisedActivation(ZooModel):
    """An activation with a penalty; `penalty_term` computes it, `penalty` remembers the last."""

    def __init__(self, activation: str, rate: float, fan_out: float):
        super().__init__()
        _choice("activation", activation, _ACTIVATIONS)
        for name, value in (("rate", rate), ("fan_out", fan_out)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number ≥ 0, got {value}")
        self.activation = activation
        self.rate = rate
        self.fan_out = fan_out
        self._last = _LastPenalty()

    @property
    def penalty(self) -> Tensor:
        """The penalty of the last forward, a scalar with its graph.

        The graph stays alive until the next forward; `backward` frees what is large in it. Copies,
        pickles and exported programs of the module hold none. Under `torch.func` transforms, and
        where one module runs several times in a forward, use `penalty_term`.

        Raises:
            ValueError: No forward has run yet, or the last input had too few frames.
        """
        if self._last.value is None:
            raise ValueError("penalty: none yet; call forward with an x of at least 2 frames first")
        return self._last.value

    def penalty_term(self, x: Tensor) -> Tensor:
        """The penalty that the input `x` costs, a scalar; a function of `x` and the parameters."""
        raise NotImplementedError

    def _remember(self, penalty: Tensor | None) -> None:
        if not torch.compiler.is_exporting():
            self._last.value = penalty

    def _mean_size(self, values: Tensor) -> Tensor:
        return self.rate * self.fan_out * values.abs().sum() / max(values.numel(), 1)


class ActivationState(NamedTuple):
    """What a stream of `DeltaActivation` remembers; a field is None where it is not needed.

    Attributes:
        total: Sum of the deltas so far, `(..., C)`.
        level: The last output level, `(..., C)`.
    """

    total: Tensor | None
    level: Tensor | None


@register(
    paper=157,
    # a step too fine to be seen, as finite differences can't see a straight-through gradient
    example=lambda: Example(
        {"num_features": 4, "step_init": 1e-10, "train_step": False, "delta": "full"},
        (torch.randn(2, 5, 4),),
        bad_options={
            "num_features": 0,
            "activation": "tanh",
            "step_init": 0.0,
            "granularity": "pixel",
            "rate": -1.0,
            "fan_out": -1.0,
            "delta": "half",
            "step_grad": "none",
        },
    ),
    exempt={"fixed-rank": "the second dimension of the input is time"},
    compare=lambda: Comparison(
        {"num_features": 256}, (torch.randn(8, 16, 256),), ("torch.nn.ReLU",)
    ),
)
class DeltaActivation(_PenalisedActivation):
    """Activation, quantisation with a trained step, and a penalty on changes over time.

    Args:
        num_features: Channels C, the last dimension of the input.
        activation: `"relu"`, `"softmax"` (over the channels) or `"none"`.
        step_init: First value of the quantisation step, > 0.
        granularity: A step for each `"channel"` (C,), each `"neuron"` (the shape of one frame), or
            one for the `"layer"`.
        frame_shape: Shape of one frame, channels last; for `granularity="neuron"`.
        rate: Weight of the penalty, ≥ 0.
        fan_out: Multiplications that a non-zero output costs, a second factor of the penalty.
        sigma: The inputs are deltas: sum them over time first.
        delta: False: put out levels o_t; `"full"`: d_t with the first frame whole;
            `"no_background"`: (d_1, d_1, d_2, …), for cameras that report changes only.
        bias: Add a trained bias before the activation, for linear layers without one.
        step_grad: Gradient of the step, for g that arrives: `"paper"`: −r g, `"lsq"`: (r − a/q) g,
            the slope of learned-step quantisation.
        train_step: Whether the step learns.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (B, T, ..., C) with B sequences of T frames; output the same.

    Returns:
        Levels or deltas, in the dtype of `x`; the penalty is in `penalty`.

    Raises:
        ValueError: An option out of its range; `granularity="neuron"` without `frame_shape`; an
            input of fewer than 3 dimensions or other features.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021. `"lsq"`: Esser et al., "Learned step size
        quantization", 2020, eq. 3.

    Example:
        >>> layer = DeltaActivation(1, step_init=0.5, delta="full")
        >>> layer(torch.tensor([[[1.1], [1.2], [1.9]]])).flatten().tolist()
        [1.0, 0.0, 1.0]
        >>> layer.penalty.item()
        0.5
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: Literal["relu", "softmax", "none"] = "relu",
        step_init: float = 0.1,
        granularity: Literal["channel", "neuron", "layer"] = "channel",
        frame_shape: Sequence[int] | None = None,
        rate: float = 1.0,
        fan_out: float = 1.0,
        sigma: bool = False,
        delta: Literal[False, "full", "no_background"] = False,
        bias: bool = False,
        step_grad: Literal["paper", "lsq"] = "paper",
        train_step: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(activation, rate, fan_out)
        check_positive("num_features", num_features)
        check_positive("step_init", step_init)
        _choice("granularity", granularity, ("channel", "neuron", "layer"))
        _choice("delta", delta, (False, "full", "no_background"))
        _choice("step_grad", step_grad, ("paper", "lsq"))
        self.num_features = num_features
        self.step_init = step_init
        self.granularity = granularity
        self.frame_shape = tuple(frame_shape) if frame_shape is not None else None
        self.sigma = sigma
        self.delta = delta
        self.step_grad = step_grad
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.threshold = nn.Parameter(
            torch.empty(self._step_shape(), **factory), requires_grad=train_step
        )
        self.bias = nn.Parameter(torch.empty(num_features, **factory)) if bias else None
        self.reset_parameters()

    def _step_shape(self) -> tuple[int, ...]:
        if self.granularity == "layer":
            return ()
        if self.granularity == "channel":
            return (self.num_features,)
        if self.frame_shape is None or self.frame_shape[-1:] != (self.num_features,):
            raise ValueError(
                "frame_shape: expected the shape of a frame that ends in num_features = "
                f"{self.num_features} with granularity='neuron', got {self.frame_shape}"
            )
        return self.frame_shape

    def reset_parameters(self) -> None:
        """Set the step to `step_init` and the bias to 0."""
        nn.init.constant_(self.threshold, self.step_init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        level = self.levels(x)
        self._remember(self._changes_penalty(level) if x.shape[1] > 1 else None)
        if self.delta:
            if self.delta == "no_background" and x.shape[1] < 2:
                raise ValueError(f"x: no_background needs at least 2 frames, got {tuple(x.shape)}")
            change = level.diff(dim=1)
            first = level if self.delta == "full" else change
            level = torch.cat([first[:, :1], change], dim=1)
        return level.to(x.dtype)

    def levels(self, x: Tensor) -> Tensor:
        """The quantised activations o `(B, T, ..., C)`, in float32 at least, whatever `delta`."""
        if x.ndim < 3 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"x: expected shape (B, T, ..., {self.num_features}), got {tuple(x.shape)}"
            )
        if self.granularity == "neuron" and x.shape[2:] != self.frame_shape:
            raise ValueError(f"x: expected frames {self.frame_shape}, got shape {tuple(x.shape)}")
        total = x.to(state_dtype(x, self.threshold))
        return self._level(total.cumsum(1) if self.sigma else total)

    def penalty_term(self, x: Tensor) -> Tensor:
        level = self.levels(x)
        if x.shape[1] < 2:
            raise ValueError(f"x: a penalty needs at least 2 frames, got shape {tuple(x.shape)}")
        return self._changes_penalty(level)

    def _changes_penalty(self, level: Tensor) -> Tensor:
        return self._mean_size(level.diff(dim=1))

    def _level(self, total: Tensor) -> Tensor:
        if self.bias is not None:
            total = total + self.bias
        return self._quantise(_ACTIVATIONS[self.activation](total))

    def _quantise(self, a: Tensor) -> Tensor:
        """Give o = q r in value, with slope 1 to `a` and slope −r or r − a/q to q."""
        q = self.threshold.to(a.dtype).abs().clamp_min(_SMALLEST_STEP)
        ratio = (a / q).detach()
        r = ratio.round()
        if not torch.is_grad_enabled():
            return q * r
        slope = -r if self.step_grad == "paper" else r - ratio
        surrogate = a + slope * q
        return (q * r).detach() + (surrogate - surrogate.detach())

    def init_state(self, batch_shape: Sequence[int]) -> ActivationState:
        """The state before the first frame.

        Args:
            batch_shape: Shape of a frame without its channels, `x_t.shape[:-1]`.
        """
        if self.delta == "no_background":
            raise ValueError("delta: no_background looks one frame ahead, so it can't be streamed")
        zeros = torch.zeros(
            (*batch_shape, self.num_features),
            device=self.threshold.device,
            dtype=state_dtype(self.threshold),
        )
        return ActivationState(zeros if self.sigma else None, zeros if self.delta else None)

    def step(self, x_t: Tensor, state: ActivationState) -> tuple[Tensor, ActivationState]:
        """One frame `(B, ..., C)` of `forward`: its output and the next state."""
        total = x_t.to(state_dtype(x_t, self.threshold))
        if state.total is not None:
            total = state.total + total
        level = self._level(total)
        y = level if state.level is None else level - state.level
        return y.to(x_t.dtype), ActivationState(
            None if state.total is None else total, None if state.level is None else level
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, {self.activation}, granularity={self.granularity!r}, "
            f"delta={self.delta!r}, sigma={self.sigma}, rate={self.rate:g}"
        )


@register(
    paper=157,
    example=lambda: Example(
        {"rate": 0.5},
        (torch.randn(2, 5, 4),),
        bad_options={"activation": "tanh", "rate": -1.0, "fan_out": -1.0},
    ),
    compare=lambda: Comparison({}, (torch.randn(512, 4096),), peers.ACTIVATIONS),
)
class L1Activation(_PenalisedActivation):
    """An activation with a penalty on its size, the spatial counterpart of `DeltaActivation`.

    Args:
        activation: `"relu"`, `"softmax"` (over the channels) or `"none"`.
        rate: Weight of the penalty rate · fan_out · mean abs(a), ≥ 0.
        fan_out: Multiplications that a non-zero output costs, a second factor of the penalty.

    Shape:
        x: (..., C); output the same.

    Returns:
        The activations; the penalty is in `penalty`.

    Raises:
        ValueError: An option out of its range.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (the baseline).

    Example:
        >>> layer = L1Activation(rate=2.0)
        >>> layer(torch.tensor([-1.0, 3.0])).tolist(), layer.penalty.item()
        ([0.0, 3.0], 3.0)
    """

    def __init__(
        self,
        *,
        activation: Literal["relu", "softmax", "none"] = "relu",
        rate: float = 1.0,
        fan_out: float = 1.0,
    ):
        super().__init__(activation, rate, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        a = _ACTIVATIONS[self.activation](x)
        self._remember(self._mean_size(a))
        return a

    def penalty_term(self, x: Tensor) -> Tensor:
        return self._mean_size(_ACTIVATIONS[self.activation](x))

    def extra_repr(self) -> str:
        return f"{self.activation}, rate={self.rate:g}"


def delta_penalty(model: nn.Module) -> Tensor:
    """Sum of the penalties of a model's last forward, to be added to the task's loss.

    Args:
        model: A model with `DeltaActivation` or `L1Activation` layers, each of which ran.

    Returns:
        A scalar; 0 for a model without such layers.

    Raises:
        ValueError: One of the layers has not run yet, or not on at least 2 frames.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021.

    Example:
        >>> model = nn.Sequential(DeltaActivation(2), nn.Linear(2, 1))
        >>> loss = model(torch.ones(1, 3, 2)).square().mean() + delta_penalty(model)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _PenalisedActivation)]
    return torch.stack([layer.penalty for layer in layers]).sum() if layers else torch.zeros(())


def _choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")
