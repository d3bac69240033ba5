"""Projecting signals onto HiPPO bases step by step: `hippo_project` and the streaming memory.

The input is held constant over a step, u_l on [l dt, (l+1) dt], and x_l is the state after it:

    x_l = Abar x_(l-1) + Bbar u_l,   x_(-1) = 0,                                               (1)

with Abar, Bbar by the bilinear rule or exactly (zero-order hold, `zoh`). For x' = (A x + B u) / t
of the measure `legs_tv` no step size enters: the step from k - 1 to k has A/k, B/k in the bilinear
rule, and exactly it is the one of duration log(k / (k-1)) of x' = A x + B u.

Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with generalized
orthogonal basis projections", 2022; the time-varying system: Gu, Dao, Ermon, Rudra and Re, "HiPPO:
recurrent memory with optimal polynomial projections", 2020. Deviations: none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register
from torchzoo.ssm.hippo import hippo_matrix, hippo_reconstruct
from torchzoo.ssm.recurrence import check_step, discretize_dense, linear_recurrence


class MemoryState(NamedTuple):
    """What a stream of `HiPPOMemory` remembers.

    Attributes:
        coefficients: `(..., D, N)`.
        steps: Number of steps so far, a scalar.
    """

    coefficients: Tensor
    steps: Tensor


def hippo_project(
    u: Tensor, measure: str, N: int, dt: float | None = None, disc: str = "bilinear"
) -> Tensor:
    """Coefficients of the past of a signal after each of its steps, from a start at rest.

    Args:
        u: The signal, one value a step.
        measure: A measure of `hippo_matrix`.
        N: Number of coefficients.
        dt: Length of a step, in windows or time constants; not used by `"legs_tv"`.
        disc: `"bilinear"`, or `"zoh"`, which is exact for an input held over each step.

    Shape:
        - u: `(..., L)`
        - output: `(..., L, N)`

    Returns:
        The coefficients, computed in float64, in the dtype of `u`.

    Raises:
        ValueError: An unknown measure or `disc`, N below 1, `dt` missing or not above 0, or `u`
            without a dimension.

    Source:
        Gu et al., "How to train your HiPPO", 2022, section 2.

    Example:
        >>> x = hippo_project(torch.ones(400), "legs", 4, dt=0.05)
        >>> x[-1].round(decimals=4).abs()  # a constant past: p_0 = 1 alone
        tensor([1., 0., 0., 0.])
    """
    if u.ndim < 1:
        raise ValueError(f"u: expected shape (..., L), got {tuple(u.shape)}")
    A, B = (value.to(u.device) for value in _system(measure, N, dt, disc))
    rows = u.double().reshape(math.prod(u.shape[:-1]), u.shape[-1])
    start = MemoryState(rows.new_zeros(len(rows), N), rows.new_zeros(()))
    x = _run(A, B, rows, start, _time_varying(measure), disc)
    return x.reshape(*u.shape, N).to(u.dtype)


@register(
    paper=62,
    example=lambda: Example(
        {"measure": "legs", "order": 4, "dt": 0.1},
        (torch.randn(2, 5, 3),),
        bad_options={
            "measure": "legendre",
            "order": 0,
            "dt": 0.0,
            "disc": "euler",
            "time_varying": "yes",
        },
    ),
    compare="coefficients of a history, which no layer of torch keeps",
)
class HiPPOMemory(ZooModel):
    """Online memory: compresses the past of each channel into N coefficients, and reads it back.

    It has buffers and no parameters. `forward` takes whole sequences; `initial_state` and `step`
    take a stream value by value, with the same result.

    Args:
        measure: A measure of `hippo_matrix`, which says what of the past is kept.
        order: Number of coefficients N of each channel.
        dt: Length of a step, in windows or time constants: memory reaches back about 1/dt steps.
            Not used by the time-varying memory.
        disc: `"bilinear"`, or `"zoh"`, which is exact for an input held over each step.
        time_varying: With `"legs"`: keep all of the past since the start with equal weight, the
            same as the measure `"legs_tv"`.
        device: Device of the buffers.
        dtype: Dtype of the buffers.

    Shape:
        - u: `(..., L, D)`, L steps of D channels
        - output: `(..., L, D, N)`

    Returns:
        The coefficients after each step; with `return_state=True` also the `MemoryState`.

    Raises:
        ValueError: An option out of its range, or an input of fewer than 2 dimensions.

    Source:
        Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with
        generalized orthogonal basis projections", 2022, section 2.

    Example:
        >>> memory = HiPPOMemory("legs", 16, dt=0.01)
        >>> ramp = torch.linspace(0, 1, 1000)[:, None]
        >>> coefficients = memory(ramp)
        >>> past = memory.reconstruct(coefficients[-1], torch.tensor([0.5, 1.0, 2.0]))
        >>> past.round(decimals=2)  # 50, 100 and 200 steps ago
        tensor([[0.9500, 0.9000, 0.8000]])
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        measure: str,
        order: int,
        dt: float | None = None,
        *,
        disc: str = "bilinear",
        time_varying: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(time_varying, bool) or (time_varying and measure[:4] != "legs"):
            raise ValueError(
                "time_varying: expected False, or True with the measure 'legs', got "
                f"{time_varying!r} with {measure!r}"
            )
        if order < 1:
            raise ValueError(f"order: expected a number of at least 1, got {order}")
        self.measure = "legs_tv" if time_varying else measure
        self.order = order
        self.dt = dt
        self.disc = disc
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("A", torch.empty(order, order, **factory))
        self.register_buffer("B", torch.empty(order, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the buffers: Abar and Bbar of the steps, or A and B where time enters them."""
        A, B = _system(self.measure, self.order, self.dt, self.disc)
        self.A.copy_(A)
        self.B.copy_(B)

    def forward(
        self, u: Tensor, state: MemoryState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, MemoryState]:
        if u.ndim < 2:
            raise ValueError(f"u: expected shape (..., L, D), got {tuple(u.shape)}")
        *batch, length, dim = u.shape
        state = self.initial_state(*batch, dim) if state is None else state
        if state.coefficients.shape != (*batch, dim, self.order):
            raise ValueError(
                f"state: expected coefficients of shape {(*batch, dim, self.order)}, got "
                f"{tuple(state.coefficients.shape)}"
            )
        dtype = torch.promote_types(u.dtype, self.A.dtype)
        rows = math.prod(batch) * dim
        start = MemoryState(
            state.coefficients.to(dtype).reshape(rows, self.order), state.steps.to(dtype)
        )
        signals = u.mT.to(dtype).reshape(rows, length)
        with no_autocast(u):
            x = _run(
                self.A.to(dtype), self.B.to(dtype), signals, start, self.time_varying, self.disc
            )
        x = x.reshape(*batch, dim, length, self.order)
        y = rearrange(x, "... d l n -> ... l d n")
        if not return_state:
            return y
        last = x[..., -1, :] if length else state.coefficients
        return y, MemoryState(last, state.steps + length)

    @property
    def time_varying(self) -> bool:
        """Whether time enters the system, x' = (A x + B u) / t."""
        return _time_varying(self.measure)

    def initial_state(self, *batch_shape: int) -> MemoryState:
        """The state before the first step.

        Args:
            *batch_shape: Shape of the values that come at each step, such as `B, D`.
        """
        steps = torch.zeros((), dtype=torch.int64, device=self.A.device)
        return MemoryState(self.A.new_zeros(*batch_shape, self.order), steps)

    def step(self, u: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Take one value of each channel.

        Args:
            u: The values `(..., D)`.
            state: The state before.

        Returns:
            The coefficients `(..., D, N)` and the state after, which holds them.
        """
        x, after = self.forward(u[..., None, :], state, return_state=True)
        return x[..., 0, :, :], after

    def reconstruct(self, state: MemoryState | Tensor, t: Tensor) -> Tensor:
        """Read the past back.

        Args:
            state: A state, or coefficients `(..., N)` as `forward` gives them.
            t: Times into the past `(T,)`, 0 = now, in windows or time constants of 1/dt steps; for
                the time-varying memory in units of the time since the start.

        Returns:
            The reconstruction `(..., T)`.
        """
        x = state.coefficients if isinstance(state, MemoryState) else state
        return hippo_reconstruct(x, self.measure, t)

    def extra_repr(self) -> str:
        dt = "" if self.dt is None else f", dt={self.dt:g}"
        return f"{self.measure}, {self.order}{dt}, disc={self.disc!r}"


def _time_varying(measure: str) -> bool:
    return measure == "legs_tv"


def _system(measure: str, N: int, dt: float | None, disc: str) -> tuple[Tensor, Tensor]:
    """What `_run` needs, in float64 on the CPU: Abar and Bbar, or A and B where time enters."""
    A, B = hippo_matrix(measure, N)
    if _time_varying(measure):
        check_step(1.0 if dt is None else dt, disc)
        return A, B
    return discretize_dense(A, B, dt, disc)


def _run(
    A: Tensor, B: Tensor, u: Tensor, start: MemoryState, time_varying: bool, disc: str
) -> Tensor:
    """States `(M, L, N)` after each step of the signals u `(M, L)`."""
    if u.shape[-1] == 0:
        return u[..., None] * B
    if not time_varying:
        return linear_recurrence(A, B, u, start.coefficients)
    x, states = start.coefficients, []
    for i, value in enumerate(u.unbind(-1), start=1):
        x = _time_varying_step(A, B, x, value[:, None], start.steps + i, disc)
        states.append(x)
    return torch.stack(states, 1)


def _time_varying_step(A: Tensor, B: Tensor, x: Tensor, u: Tensor, k: Tensor, disc: str) -> Tensor:
    """Step k = 1, 2, ... of x' = (A x + B u) / t, for x `(M, N)` and u `(M, 1)`."""
    if disc == "zoh":
        rest = torch.zeros_like(B)
        rest[0] = 1.0  # -A^-1 B, where a constant input leads
        # At k = 1 the duration is infinite; after 100 time constants nothing is left either.
        decay = (A * (k / (k - 1)).log().clamp_max(100.0)).matrix_exp()
        return u * rest + (x - u * rest) @ decay.mT
    eye = torch.eye(len(B), dtype=A.dtype, device=A.device)
    right = x + (x @ A.mT / 2 + u * B) / k
    left = eye - A / (2 * k)
    return torch.linalg.solve_triangular(left.mT, right, upper=True, left=False)
