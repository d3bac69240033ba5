"""The frame that every state space layer shares, and what it asks of a kernel.

    y = post(dropout(activation(SSM(x) + D x)))

The linear system SSM runs in two modes that agree: over a whole sequence as a long convolution,
and one step at a time as a recurrence with a state of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.ssm.functional import fft_conv

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    None: lambda x: x,
}
POSTS = ("glu", "linear", None)


class SSMKernel(nn.Module):
    """A bank of linear systems, one a feature, each with one input and `channels` outputs.

    Subclasses implement the methods down to `reset_parameters`; `SSMLayer` needs nothing else.

    Attributes:
        d_model: Features D.
        channels: Outputs C of each feature's system.
        state_shape: Shape of one sequence's state, without batch dimensions.
    """

    d_model: int
    channels: int
    state_shape: tuple[int, ...]

    def forward(self, L: int, rate: float = 1.0) -> Tensor:
        """The impulse response `(C, D, L)`, time steps `rate` times as long."""
        raise NotImplementedError

    def response(self, state: Tensor, L: int, rate: float = 1.0) -> Tensor:
        """The next L outputs `(B, C, D, L)` from a state `(B, *state_shape)` without any input."""
        raise NotImplementedError

    def advance(
        self, u: Tensor, state: Tensor | None, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """The state after the inputs u `(B, L, D)`; after `lengths` `(B,)` of them, if given."""
        raise NotImplementedError

    def coefficients(self, rate: float = 1.0) -> tuple[Tensor, ...]:
        """What `step` computes with: tensors worked out from the parameters."""
        raise NotImplementedError

    def initial_state(self, *batch: int) -> Tensor:
        """The state of rest, `(*batch, *state_shape)`."""
        raise NotImplementedError

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(..., C, D)` and next state for one input `(..., D)`, from `prepared()`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        raise NotImplementedError

    _prepared: tuple[Tensor, ...] | None = None

    def setup_step(self, rate: float = 1.0) -> None:
        """Work the coefficients of `step` out now, once for all steps to come."""
        with torch.no_grad():
            self._prepared = self.coefficients(rate)

    def prepared(self) -> tuple[Tensor, ...]:
        """The coefficients from `setup_step`, or fresh ones, which carry gradients."""
        return self.coefficients() if self._prepared is None else self._prepared

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._prepared = None  # the parameters are about to change
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared = None  # they are moved or cast
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args)


class SSMLayer(ZooModel):
    """A sequence layer around an `SSMKernel`; `S4D` is the first of its kind.

    A subclass whose system mixes features, and so has no `SSMKernel`, overrides `_sequence` and
    what the modes by step need: `setup_step`, `initial_state`, `_step`.

    Args:
        kernel: The linear systems; with `bidirectional` it has twice the channels.
        bidirectional: Half of the kernel's channels look at the future.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        activation: `"gelu"`, `"relu"`, `"silu"`, `"tanh"` or None.
        post: `"glu"` maps the features to 2D and gates one half with the other; `"linear"` maps
            them to D; None leaves them, C D in number.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`, or `(..., L, C D)` without `post`
        - state: `(..., *state_shape)`

    Raises:
        ValueError: An option out of its range.
    """

    def __init__(
        self,
        kernel: SSMKernel,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
        post: Literal["glu", "linear"] | None = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {[*ACTIVATIONS]}, got {activation!r}")
        if post not in POSTS:
            raise ValueError(f"post: expected one of {POSTS}, got {post!r}")
        self.kernel = kernel
        self.d_model = kernel.d_model
        self.channels = kernel.channels // 2 if bidirectional else kernel.channels
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.activation = activation
        self.post = post
        self.D = nn.Parameter(torch.empty(self.channels, self.d_model, device=device, dtype=dtype))
        self.output_linear = (
            nn.Linear(
                self.channels * self.d_model,
                self.d_model * (2 if post == "glu" else 1),
                device=device,
                dtype=dtype,
            )
            if post
            else None
        )
        nn.init.normal_(self.D)  # kernel and linear drew theirs when they were built

    def reset_parameters(self) -> None:
        """Draw the kernel anew, D from N(0, 1), and the linear map as `nn.Linear` does."""
        self.kernel.reset_parameters()
        nn.init.normal_(self.D)
        if self.output_linear is not None:
            self.output_linear.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            x: The sequences, or their next parts.
            state: Where an earlier part left off; None starts at rest.
            lengths: Steps of each sequence that count, for padded batches. Later ones change
                nothing, and their outputs are 0.
            rate: Length of a time step, relative to the one of training.
            return_state: Also return the state after the last step that counts.

        Shape:
            - x: `(..., L, D)`
            - state: `(..., *state_shape)`
            - lengths: `(...)`

        Returns:
            The outputs `(..., L, D)`; with `return_state` a pair of them and the state.
        """
        self._check(x, state, lengths, return_state)
        batch, rows = x.shape[:-2], math.prod(x.shape[:-2])
        u = x.reshape(rows, *x.shape[-2:])
        if state is not None:
            state = state.reshape(rows, *state.shape[len(batch) :])
        padding = None
        if lengths is not None:
            lengths = lengths.reshape(rows)
            padding = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]
            u = u.masked_fill(padding[..., None], 0)
        with no_autocast(u):
            u = u.to(self._compute_dtype(u))
            y, state = self._sequence(u, state, lengths, rate, return_state)
            y = y + u[:, :, None] * self.D
        y = self._finish(y.to(x.dtype))
        if padding is not None:
            y = y.masked_fill(padding[..., None], 0)
        y = y.reshape(*batch, *y.shape[1:])
        if not return_state:
            return y
        assert state is not None
        return y, state.reshape(*batch, *state.shape[1:])

    def _check(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, return_state: bool
    ) -> None:
        if x.ndim < 2 or x.shape[-1] != self.d_model or x.shape[-2] < 1:
            raise ValueError(
                f"x: expected shape (..., L, {self.d_model}) with L >= 1, got {tuple(x.shape)}"
            )
        if self.bidirectional and (state is not None or return_state):
            name = "return_state" if state is None else "state"
            raise ValueError(f"{name}: a bidirectional layer has no state, got one asked for")
        if state is not None:
            self._check_state(state, x.shape[:-2])
        if lengths is not None and lengths.shape != x.shape[:-2]:
            raise ValueError(
                f"lengths: expected shape {tuple(x.shape[:-2])}, got {tuple(lengths.shape)}"
            )

    def _check_state(self, state: Tensor, batch: torch.Size) -> None:
        expected = (*batch, *self.kernel.state_shape)
        if tuple(state.shape) != expected:
            raise ValueError(f"state: expected shape {expected}, got {tuple(state.shape)}")

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """Float32 at least, whatever autocast and the parameters say."""
        return torch.promote_types(torch.promote_types(x.dtype, self.D.dtype), torch.float32)

    def _sequence(
        self,
        u: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        rate: float,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs `(B, L, C, D)` of the linear system for u `(B, L, D)`, and the state after it."""
        L = u.shape[1]
        k = self.kernel(L, rate).to(u.dtype)
        inputs = rearrange(u, "b l d -> b 1 d l")
        if self.bidirectional:
            past, future = k.chunk(2)
            y = fft_conv(inputs, past, future)
        else:
            y = fft_conv(inputs, k)
        if state is not None:
            y = y + self.kernel.response(state, L, rate).to(y.dtype)
        after = self.kernel.advance(u, state, lengths, rate) if return_state else None
        return rearrange(y, "b c d l -> b l c d"), after

    def _finish(self, y: Tensor) -> Tensor:
        """Activation, dropout and the linear map, for y `(..., L, C, D)`."""
        y = ACTIVATIONS[self.activation](y).flatten(-2)
        if self.dropout and self.training:
            kept = F.dropout(torch.ones_like(y[..., :1, :]), self.dropout)
            y = y * kept
        if self.output_linear is not None:
            y = self.output_linear(y)
            if self.post == "glu":
                y = F.glu(y)
        return y

    def setup_step(self, rate: float = 1.0) -> None:
        """Prepare for many calls of `step` with the present parameters.

        Without it each step works its coefficients out anew, and is differentiable. What was
        prepared is dropped by `train()` and by loading weights.

        Args:
            rate: Length of a time step, relative to the one of training.
        """
        self.kernel.setup_step(rate)

    def initial_state(self, *batch: int) -> Tensor:
        """The state of rest for sequences of these batch dimensions."""
        return self.kernel.initial_state(*batch)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one time step.

        Args:
            x: Inputs of this step.
            state: The state before it, from `initial_state`, `step` or `forward`.

        Shape:
            - x: `(..., D)`
            - state: `(..., *state_shape)`

        Returns:
            The outputs `(..., D)` and the next state.

        Raises:
            ValueError: A bidirectional layer, or tensors of other shapes.
        """
        if self.bidirectional:
            raise ValueError("step: a bidirectional layer needs the future, got bidirectional=True")
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape (..., {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x.shape[:-1])
        with no_autocast(x):
            u = x.to(self._compute_dtype(x))
            y, state = self._step(u, state)
            y = y + u[..., None, :] * self.D
        return self._finish(y.to(x.dtype).unsqueeze(-3)).squeeze(-2), state

    def _step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(..., C, D)` of the linear system, and the next state."""
        return self.kernel.step(u, state)

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, bidirectional={self.bidirectional}, dropout={self.dropout:g}, "
            f"activation={self.activation!r}, post={self.post!r}"
        )


def flush_right(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Move each sequence of u `(B, L, D)` to the end of its row, zeros before it."""
    if lengths is None:
        return u
    place = torch.arange(u.shape[1], device=u.device) - (u.shape[1] - lengths[:, None])
    moved = u.gather(1, place.clamp_min(0)[..., None].expand(u.shape))
    return moved.masked_fill((place < 0)[..., None], 0)
