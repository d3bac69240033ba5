"""S4D: a convolution whose kernel is a sum of damped complex exponentials.

Each feature has a diagonal system with N complex states, stored as N/2 conjugate pairs:

    x' = A x + B u,   y = 2 Re(C x) + D u,   A = -exp(log_A_real) + i A_imag
    zoh       Abar = exp(dt A),                   Bbar = (Abar - 1)/A B
    bilinear  Abar = (1 + dt A/2)/(1 - dt A/2),   Bbar = dt/(1 - dt A/2) B
    K_l = 2 Re sum_n C_n Bbar_n Abar_n^l          y = K * u + D u

Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state space
models", 2022, sections 3 and 4. Deviations: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.ops import diagonal_step, vandermonde
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.functional import discretise, log_transition
from torchzoo.ssm.init import check_d_state, s4d_init
from torchzoo.ssm.layer import SSMKernel, SSMLayer, flush_right
from torchzoo.ssm.params import mark_dynamics

REAL_TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "softplus": (F.softplus, lambda size: size + torch.log(-torch.expm1(-size))),
    "relu": (lambda raw: F.relu(raw) + 1e-4, lambda size: size - 1e-4),
    "none": (lambda raw: raw, lambda size: size),
}
"""From the parameter to -Re A, and back."""


class S4DKernel(SSMKernel):
    """Diagonal state spaces, one a feature, as convolution kernel and as recurrence.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        init: `"lin"`, `"inv"`, `"legs"`, `"real"` or `"random"`, see `s4d_init`; or A itself,
            complex `(N/2,)` or `(D, N/2)`; or a pair of A and B.
        disc: `"zoh"` or `"bilinear"`.
        dt_min: Lower end of the range that time steps are drawn from, uniform in the logarithm.
        dt_max: Its upper end.
        channels: Outputs C of each feature, which share state and time step.
        train_B: Whether B learns.
        real_transform: What maps the parameter `log_A_real` to -Re A: `"exp"`, `"softplus"`,
            `"relu"` (plus 1e-4) or `"none"`. Only the last lets Re A become positive.
        lr: Largest learning rate of A, B and the time step in `ssm_param_groups`; 0 freezes them.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - output: `(C, D, L)`
        - state: `(..., D, N/2)`, complex

    Returns:
        `forward(L, rate)`: the real impulse response over L steps.

    Raises:
        ValueError: An option out of its range, or an A that is not in the left half-plane.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022, section 3.

    Example:
        >>> S4DKernel(4, 16)(100).shape
        torch.Size([1, 4, 100])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str | Tensor | tuple[Tensor, Tensor] = "lin",
        disc: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        channels: int = 1,
        train_B: bool = False,
        real_transform: Literal["exp", "softplus", "relu", "none"] = "exp",
        lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_d_state(d_state)
        for name, count in (("d_model", d_model), ("channels", channels)):
            if count < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {count!r}")
        if disc not in ("zoh", "bilinear"):
            raise ValueError(f"disc: expected 'zoh' or 'bilinear', got {disc!r}")
        if not 0 < dt_min < dt_max < math.inf:
            raise ValueError(f"dt_min: expected 0 < dt_min < dt_max, got {dt_min} and {dt_max}")
        if real_transform not in REAL_TRANSFORMS:
            raise ValueError(
                f"real_transform: expected one of {[*REAL_TRANSFORMS]}, got {real_transform!r}"
            )
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: expected a number of at least 0, got {lr!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.channels = channels
        self.state_shape = (d_model, d_state // 2)
        self.init = init
        self.disc = disc
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.real_transform = real_transform
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        pairs = (d_model, d_state // 2)
        self.log_dt = nn.Parameter(torch.empty(d_model, **factory))
        self.log_A_real = nn.Parameter(torch.empty(pairs, **factory))
        self.A_imag = nn.Parameter(torch.empty(pairs, **factory))
        self.C = nn.Parameter(torch.empty(channels, *pairs, 2, **factory))
        B = torch.empty(*pairs, 2, **factory)
        if train_B:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)
        mark_dynamics(self, ("log_dt", "log_A_real", "A_imag") + ("B",) * train_B, lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B from `init`, C complex normal of variance 1, dt log-uniform."""
        A, B = self._initial_system()
        self.log_A_real.copy_(REAL_TRANSFORMS[self.real_transform][1](-A.real))
        self.A_imag.copy_(A.imag)
        self.B.copy_(torch.view_as_real(B))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))

    def _initial_system(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.init, str):
            return s4d_init(self.d_state, self.init, d_model=self.d_model)
        A, B = self.init if isinstance(self.init, tuple) else (self.init, None)
        B = torch.ones_like(A) if B is None else B
        for tensor in (A, B):
            if tensor.shape not in (self.state_shape, self.state_shape[1:]):
                raise ValueError(
                    f"init: expected shape {self.state_shape[1:]} or {self.state_shape}, "
                    f"got {tuple(tensor.shape)}"
                )
        A, B = (tensor.to(torch.complex128).expand(self.state_shape) for tensor in (A, B))
        if not A.is_meta and not (A.real < 0).all():
            raise ValueError(f"init: expected eigenvalues with Re A < 0, got {A.real.max():.3g}")
        return A, B.contiguous()

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A and B `(D, N/2)`, C `(C, D, N/2)` and dt `(D, 1)`.

        In double precision, as a long kernel needs the phases of A to more digits than a product
        dt A in float32 keeps.
        """
        size = REAL_TRANSFORMS[self.real_transform][0](self.log_A_real.double())
        A = torch.complex(-size, self.A_imag.double())
        B, C = (torch.view_as_complex(part.double().contiguous()) for part in (self.B, self.C))
        return A, B, C, self.log_dt.double().exp()[:, None]

    def discrete(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log of Abar, Bbar `(D, N/2)` and C `(C, D, N/2)`, in complex128."""
        A, B, C, dt = self.continuous()
        _, Bbar = discretise(A, rate * dt, B, self.disc)
        return log_transition(A, rate * dt, self.disc), Bbar, C

    @property
    def _real(self) -> torch.dtype:
        """Of kernels and outputs; states are complex numbers of it."""
        return torch.promote_types(self.C.dtype, torch.float32)

    @property
    def _complex(self) -> torch.dtype:
        return torch.complex128 if self._real == torch.float64 else torch.complex64

    def forward(self, L: int, rate: float = 1.0) -> Tensor:
        if L < 1:
            raise ValueError(f"L: expected a length of at least 1, got {L!r}")
        log_Abar, Bbar, C = self.discrete(rate)
        return vandermonde((C * Bbar).to(self._complex), log_Abar, L).to(self._real)

    def response(self, state: Tensor, L: int, rate: float = 1.0) -> Tensor:
        log_Abar, _, C = self.discrete(rate)
        v = C * log_Abar.exp() * state[:, None]
        return vandermonde(v.to(self._complex), log_Abar, L).to(self._real)

    def advance(
        self, u: Tensor, state: Tensor | None, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        log_Abar, Bbar, _ = self.discrete(rate)
        steps = u.shape[1] if lengths is None else lengths[:, None, None]
        after = Bbar.to(self._complex) * _weighted_sum(flush_right(u, lengths), log_Abar)
        if state is None:
            return after
        return after + (steps * log_Abar).exp().to(self._complex) * state

    def coefficients(self, rate: float = 1.0) -> tuple[Tensor, ...]:
        log_Abar, Bbar, C = self.discrete(rate)
        readout = 2 * torch.stack([C.real, -C.imag], -1)  # 2 Re(C x) as a real product
        parts = torch.view_as_real(log_Abar.exp()), torch.view_as_real(Bbar), readout
        return tuple(part.to(self._real) for part in parts)

    def initial_state(self, *batch: int) -> Tensor:
        return torch.zeros(*batch, *self.state_shape, device=self.C.device, dtype=self._complex)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return diagonal_step(u, state, *self.prepared())

    def extra_repr(self) -> str:
        init = self.init if isinstance(self.init, str) else "given"
        return (
            f"{self.d_model}, {self.d_state}, init={init!r}, disc={self.disc!r}, "
            f"channels={self.channels}"
        )


def _weighted_sum(u: Tensor, log_x: Tensor) -> Tensor:
    """`sum_l exp((L-1-l) log_x) u_l`, `(B, D, N)` for u `(B, L, D)` and log_x `(D, N)`.

    In blocks of about sqrt(L) steps: within the blocks, then over them, so that memory stays at
    sqrt(L) powers, and the sum over l is a batch of matrix products.
    """
    L = u.shape[1]
    block = math.isqrt(L - 1) + 1
    count = -(-L // block)
    u = F.pad(u, (0, 0, count * block - L, 0))
    blocks = rearrange(u, "b (k t) d -> d (b k) t", k=count)
    within = rearrange(torch.view_as_real(_powers(log_x, block)), "t d n z -> d t (n z)")
    local = blocks @ within.to(u.dtype)
    local = rearrange(local, "d (b k) (n z) -> b k d n z", k=count, z=2).contiguous()
    local = torch.view_as_complex(local)
    return (local * _powers(block * log_x, count).to(local.dtype)).sum(1)


def _powers(log_x: Tensor, count: int) -> Tensor:
    """`x^(count-1), ..., x, 1`, `(count, ...)`."""
    falling = torch.arange(count - 1, -1, -1, device=log_x.device)
    return (falling.view(-1, *[1] * log_x.ndim) * log_x).exp()


@register(
    paper=107,
    example=lambda: Example(
        {"d_model": 4, "d_state": 6},
        (torch.randn(2, 7, 4),),
        bad_options={
            "d_model": 0,
            "d_state": 5,
            "init": "hippo",
            "disc": "euler",
            "dt_min": 0.2,
            "channels": 0,
            "real_transform": "square",
            "lr": -1.0,
            "dropout": 1.0,
            "activation": "step",
            "post": "mean",
        },
    ),
    compare=lambda: Comparison(
        {"d_model": 256, "d_state": 64}, (torch.randn(4, 1024, 256),), peers.SEQUENCES
    ),
)
class S4D(SSMLayer):
    """Diagonal state space layer: a long convolution a feature, then a gated linear map.

    Over whole sequences it costs O(L log L) and is parallel; `step` runs the same system as a
    recurrence with a state of fixed size. Both take the state that the other left.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        bidirectional: Convolve with a second kernel from the future too.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        activation: `"gelu"`, `"relu"`, `"silu"`, `"tanh"` or None.
        post: `"glu"` maps the features to 2D and gates one half with the other; `"linear"` maps
            them to D; None leaves them, C D in number.
        kernel: Options of `S4DKernel`: `init`, `disc`, `dt_min`, `dt_max`, `channels`, `train_B`,
            `real_transform` and `lr`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`, or `(..., L, C D)` without `post`
        - state: `(..., D, N/2)`, complex
        - lengths: `(...)`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: An option out of its range, tensors of other shapes, or a state asked of a
            bidirectional layer.

    Source:
        Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state
        space models", 2022.

    Example:
        >>> layer = S4D(8, d_state=16).eval()
        >>> x = torch.randn(2, 100, 8)
        >>> y, state = layer(x, return_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8, 8]))
        >>> layer.setup_step()
        >>> next_y, state = layer.step(torch.randn(2, 8), state)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
        post: Literal["glu", "linear"] | None = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ):
        channels = kernel.pop("channels", 1) * (2 if bidirectional else 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            S4DKernel(d_model, d_state, channels=channels, **kernel, **factory),
            bidirectional=bidirectional,
            dropout=dropout,
            activation=activation,
            post=post,
            **factory,
        )

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Build a layer from weights of the authors' minimal `S4D` module.

        Args:
            state_dict: Holds `D`, `kernel.C`, `kernel.log_dt`, `kernel.log_A_real`,
                `kernel.A_imag`, `output_linear.0.weight` and `output_linear.0.bias`.
            prefix: What stands before these names.

        Returns:
            A layer with these weights that computes the same, features last.

        Raises:
            ValueError: A tensor is missing.

        Example:
            >>> theirs = {"D": torch.ones(2), "kernel.C": torch.ones(2, 4, 2)}
            >>> theirs |= {"kernel.log_dt": torch.zeros(2), "kernel.A_imag": torch.ones(2, 4)}
            >>> theirs |= {"kernel.log_A_real": torch.zeros(2, 4)}
            >>> theirs |= {"output_linear.0.weight": torch.ones(4, 2, 1)}
            >>> theirs |= {"output_linear.0.bias": torch.zeros(4)}
            >>> S4D.from_official(theirs).kernel.d_state
            8
        """
        names = {
            "D": "D",
            "kernel.C": "kernel.C",
            "kernel.log_dt": "kernel.log_dt",
            "kernel.log_A_real": "kernel.log_A_real",
            "kernel.A_imag": "kernel.A_imag",
            "output_linear.weight": "output_linear.0.weight",
            "output_linear.bias": "output_linear.0.bias",
        }
        if missing := [name for name in names.values() if prefix + name not in state_dict]:
            raise ValueError(f"state_dict: expected {missing[0]!r}, got {sorted(state_dict)}")
        d_model, pairs = state_dict[f"{prefix}kernel.A_imag"].shape
        layer = cls(d_model, 2 * pairs)
        own = layer.state_dict()  # theirs have no axis for channels, and convolve with width 1
        theirs = {ours: state_dict[prefix + name] for ours, name in names.items()}
        layer.load_state_dict(
            own | {name: value.reshape(own[name].shape) for name, value in theirs.items()}
        )
        return layer
