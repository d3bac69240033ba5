"""Linear layers of a stream: computed whole for training, from what changed for inference.

With frames x_t, the inputs last sent x_ref and the accumulator acc, a step is
`delta_linear_step(x_t, x_ref, acc, weightᵀ)`, or `delta_conv2d_step` for a convolution (see
`torchzoo.sparsity.delta_conv`), and acc = dense(x_ref) holds at every step: the stream gives what
the whole computation gives, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.ops.delta_linear import (
    as_quantum,
    delta_linear_step,
    delta_scan,
    encode,
    state_dtype,
)
from torchzoo.registry import Comparison, Example, register

_DENSE_ABOVE = 1.0  # changed inputs, of all streams together, for each input of the layer


class DeltaLayer(ZooModel):
    """A linear map of the features of a frame, computed whole or from what changed.

    A subclass gives `_dense`, the map itself, and `_accumulate`, its delta form.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, threshold: float, quantum: float | None, resync_every: int | None):
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a number ≥ 0, got {threshold}")
        if quantum is not None:
            check_positive("quantum", quantum)
        if resync_every is not None:
            check_positive("resync_every", resync_every)
        self.threshold = threshold
        self.quantum = quantum
        self.resync_every = resync_every

    def reset_parameters(self) -> None:
        """Uniform in ±1/√fan_in, as `nn.Linear` and `nn.Conv2d` start."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.threshold or self.quantum:
            if x.ndim < 3:
                raise ValueError(f"x: expected shape (B, T, ..., features), got {tuple(x.shape)}")
            frames = rearrange(x, "b t ... c -> b ... t c")
            sent, _ = delta_scan(frames, self.threshold, self.quantum)
            x = rearrange(sent, "b ... t c -> b t ... c")
        return self._dense(x, self.weight, self.bias)

    def init_state(self, batch_shape: Sequence[int]) -> tuple[Any, ...]:
        """The state before the first frame: nothing sent, and the bias as accumulator.

        Args:
            batch_shape: Shape of a frame without its features, `x_t.shape[:-1]`.

        Returns:
            `(x_ref, acc)`, and with `resync_every` the number of steps since the last resync.
        """
        options: dict[str, Any] = {"device": self.weight.device, "dtype": state_dtype(self.weight)}
        x_ref = torch.zeros((*batch_shape, self.weight.shape[1]), **options)
        acc = torch.zeros((*self._out_shape(batch_shape), self.weight.shape[0]), **options)
        if self.bias is not None:
            acc = acc + self.bias
        return (x_ref, acc) if self.resync_every is None else (x_ref, acc, 0)

    def step(self, x_t: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """One frame of `forward`, which reads only the weights of inputs that changed.

        Args:
            x_t: The frame itself, not its delta, without the time dimension.
            state: From `init_state` or the last step; left as it was.

        Returns:
            The frame's output, in the dtype of `x_t`, and the next state.
        """
        self._check(x_t)
        x_ref, acc, *age = state
        acc, x_ref = self._accumulate(x_t, x_ref, acc)
        if self.resync_every is not None:
            age = [(age[0] + 1) % self.resync_every]
            if age == [0]:
                acc = self.resync((x_ref, acc))[1]
        return acc.to(x_t.dtype), (x_ref, acc, *age)

    def resync(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """The state with its accumulator computed anew, which drops rounding that piled up."""
        x_ref, acc, *_ = state
        bias = None if self.bias is None else self.bias.to(acc.dtype)
        with torch.autocast(acc.device.type, enabled=False):
            acc = self._dense(x_ref, self.weight.to(acc.dtype), bias)
        return (x_ref, acc) if self.resync_every is None else (x_ref, acc, 0)

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def _out_shape(self, batch_shape: Sequence[int]) -> Sequence[int]:
        return batch_shape

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _accumulate(self, x_t: Tensor, x_ref: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@register(
    paper=157,
    example=lambda: Example(
        {"in_features": 4, "out_features": 3},
        (torch.randn(2, 5, 4),),
        bad_options={
            "in_features": 0,
            "out_features": 0,
            "threshold": -1.0,
            "quantum": 0.0,
            "resync_every": 0,
            "policy": "fast",
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 1024, "out_features": 1024},
        (torch.randn(1, 1, 1024).expand(1, 64, -1).clone(),),
        peers.LINEAR,
    ),
)
class DeltaLinear(DeltaLayer):
    """A linear layer with a streaming form that skips inputs which did not change.

    Weights are those of `nn.Linear`, name by name. `step` works on them as they are; a model from
    `fold_to_streaming` keeps them with an input a row, the order in which they are read.

    Args:
        in_features: Inputs I.
        out_features: Outputs O.
        bias: Whether there is a bias. Leave it out where the inputs are deltas.
        threshold: A change counts where it is strictly above this, ≥ 0; 0 is exact.
        quantum: Quantisation step of the inputs; None where they are levels already.
        resync_every: Compute the accumulator anew after so many steps, against rounding.
        policy: What a step does. `"sparse"`: never read weights of inputs that did not change;
            `"auto"`: the dense product where it is faster, which is where the changed inputs of all
            streams are about as many as inputs in all. To count them it waits for the device;
            under `torch.compile` and `torch.export` it is as `"sparse"`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (..., I) → (..., O); with a threshold or quantum (B, T, ..., I) with T frames.

    Returns:
        What the dense layer gives for the inputs as sent, which are `x` itself by default.

    Raises:
        ValueError: An option out of its range, or an input of other features.

    Source:
        Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks,
        application in video processing", 2021 (delta inference).

    Example:
        >>> layer = DeltaLinear(4, 3)
        >>> frames = torch.randn(2, 5, 4)
        >>> state = layer.init_state((2,))
        >>> for x_t in frames.unbind(1):
        ...     y_t, state = layer.step(x_t, state)
        >>> torch.allclose(y_t, layer(frames)[:, -1], atol=1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        threshold: float = 0.0,
        quantum: float | None = None,
        resync_every: int | None = None,
        policy: Literal["sparse", "auto"] = "sparse",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(threshold, quantum, resync_every)
        check_positive("in_features", in_features)
        check_positive("out_features", out_features)
        if policy not in ("sparse", "auto"):
            raise ValueError(f"policy: expected 'sparse' or 'auto', got {policy!r}")
        self.policy = policy
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_module(cls, linear: nn.Linear, **options: Any) -> Self:
        """The delta layer with a copy of an `nn.Linear`'s weights."""
        weight = linear.weight
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        layer = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **options
        )
        layer.load_state_dict(linear.state_dict())
        return layer

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (..., {self.in_features}), got {tuple(x.shape)}")

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _accumulate(self, x_t: Tensor, x_ref: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
        if self.policy == "auto" and not torch.compiler.is_compiling():
            frame = x_t.to(x_ref.dtype)
            quantum = as_quantum(self.quantum, frame, frame.dtype)
            sent, delta = encode(frame, x_ref, quantum, self.threshold)
            if int(delta.count_nonzero()) >= _DENSE_ABOVE * self.in_features:
                return self.resync((sent, acc))[1], sent
        return delta_linear_step(
            x_t, x_ref, acc, self.weight.mT, threshold=self.threshold, quantum=self.quantum
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
