"""S5: one diagonal state space with many inputs and outputs, run by an associative scan.

J. T. H. Smith, A. Warrington and S. W. Linderman, Simplified State Space Layers for Sequence
Modeling, 2023. With P complex states for all D features together, stored as P/2 conjugate pairs,

    x' = Lambda x + B u,   y = 2 Re(C x) + D u,   B (P/2, D), C (D, P/2), D diagonal,

each state with a time step of its own. The states are block-diagonal: each block starts from
HiPPO-LegS, `B = V^-1 B_0`, `C = C_0 V` with B_0, C_0 random and V the eigenvectors of its normal
part (`"legs-n"`), or of HiPPO-LegS itself after a small perturbation (`"ptd"`): A. Yu,
A. Nigmetov, D. Morozov, M. W. Mahoney and N. B. Erichson, Robustifying State-space Models for Long
Sequences via Approximate Diagonalization, 2023.

Deviations: Re Lambda is -exp of its parameter, so that it stays negative.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.ops import lti_scan, vandermonde
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.functional import discretise, log_transition
from torchzoo.ssm.init import check_d_state, legs_normal_part
from torchzoo.ssm.layer import SSMKernel, SSMLayer
from torchzoo.ssm.params import mark_dynamics
from torchzoo.ssm.ptd import ptd_system

Init = Literal["legs-n", "ptd"]


class S5Kernel(SSMKernel):
    """A diagonal state space that all features drive together.

    Args:
        d_model: Features D.
        d_state: Complex states P, even.
        blocks: Number of equal blocks of states, each initialised by itself.
        init: `"legs-n"` or `"ptd"`.
        eps: Norm of the perturbation of `"ptd"`.
        disc: `"zoh"` or `"bilinear"`.
        dt_min: Lower end of the range that time steps are drawn from, uniform in the logarithm.
        dt_max: Its upper end.
        lr: Largest learning rate of Lambda, B and the time steps in `ssm_param_groups`; 0 freezes
            them.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - output: `(D, D, L)`, outputs by inputs
        - state: `(..., P/2)`, complex

    Returns:
        `forward(L, rate)`: the real impulse response over L steps.

    Raises:
        ValueError: An option out of its range.

    Source:
        Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling, 2023,
        section 3.

    Example:
        >>> S5Kernel(3, 16)(100).shape
        torch.Size([3, 3, 100])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        blocks: int = 1,
        init: Init = "legs-n",
        eps: float = 0.1,
        disc: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_d_state(d_state)
        if d_model < 1:
            raise ValueError(f"d_model: expected a number of at least 1, got {d_model!r}")
        if blocks < 1 or d_state % (2 * blocks):
            raise ValueError(
                f"blocks: expected a number that cuts d_state={d_state} into even parts, "
                f"got {blocks!r}"
            )
        if init not in ("legs-n", "ptd"):
            raise ValueError(f"init: expected 'legs-n' or 'ptd', got {init!r}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: expected a finite number above 0, got {eps!r}")
        if disc not in ("zoh", "bilinear"):
            raise ValueError(f"disc: expected 'zoh' or 'bilinear', got {disc!r}")
        if not 0 < dt_min < dt_max < math.inf:
            raise ValueError(f"dt_min: expected 0 < dt_min < dt_max, got {dt_min} and {dt_max}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: expected a number of at least 0, got {lr!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.blocks = blocks
        self.channels = 1
        self.state_shape = (d_state // 2,)
        self.init = init
        self.eps = eps
        self.disc = disc
        self.dt_min = dt_min
        self.dt_max = dt_max
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(pairs, **factory))
        self.log_A_real = nn.Parameter(torch.empty(pairs, **factory))
        self.A_imag = nn.Parameter(torch.empty(pairs, **factory))
        self.B = nn.Parameter(torch.empty(pairs, d_model, 2, **factory))
        self.C = nn.Parameter(torch.empty(d_model, pairs, 2, **factory))
        mark_dynamics(self, ("log_dt", "log_A_real", "A_imag", "B"), lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Lambda and V of each block, B = V^-1 B_0 and C = C_0 V, dt log-uniform.

        B_0 is real of variance 1/D, C_0 complex of variance 1/P.
        """
        size = self.d_state // self.blocks
        eigenvalues, V, V_inv = self._block(size)
        draw: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        B0 = torch.randn(self.blocks, size, self.d_model, **draw) / math.sqrt(self.d_model)
        real, imag = torch.randn(2, self.blocks, self.d_model, size, **draw)
        C0 = torch.complex(real, imag) / math.sqrt(2 * self.d_state)
        B = rearrange(V_inv @ B0.to(V), "block pair d -> (block pair) d")
        C = rearrange(C0 @ V, "block d pair -> d (block pair)")
        self.log_A_real.copy_((-eigenvalues.real).log().repeat(self.blocks))
        self.A_imag.copy_(eigenvalues.imag.repeat(self.blocks))
        self.B.copy_(torch.view_as_real(B))
        self.C.copy_(torch.view_as_real(C.contiguous()))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))

    def _block(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues `(n/2,)`, V `(n, n/2)` and the rows of V^-1 `(n/2, n)` of a block."""
        if self.init == "ptd":
            system = ptd_system(size, eps=self.eps)
            return system.A, system.V, system.V_inv
        eigenvalues, V = legs_normal_part(size)
        return eigenvalues, V, V.mH

    def discrete(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log of Abar `(P/2,)`, Bbar `(P/2, D)` and C `(D, P/2)`, in complex128."""
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B, C = (torch.view_as_complex(part.double().contiguous()) for part in (self.B, self.C))
        dt = rate * self.log_dt.double().exp()
        _, Bbar = discretise(A[:, None], dt[:, None], B, self.disc)
        return log_transition(A, dt, self.disc), Bbar, C

    def forward(self, L: int, rate: float = 1.0) -> Tensor:
        if L < 1:
            raise ValueError(f"L: expected a length of at least 1, got {L!r}")
        log_Abar, Bbar, C = self.discrete(rate)
        v = torch.einsum("op,pi->oip", C, Bbar)
        return vandermonde(v.to(self._complex), log_Abar, L).to(self._real)

    def states(self, u: Tensor, state: Tensor | None, rate: float = 1.0) -> Tensor:
        """The states `(B, L, P/2)` after each of the inputs u `(B, L, D)`."""
        log_Abar, Bbar, _ = self.discrete(rate)
        driven = _real_times(u, Bbar.mT.to(self._complex))
        start = None if state is None else state[:, None]
        return lti_scan(log_Abar.exp().to(driven.dtype)[None], driven[:, :, None], start)[:, :, 0]

    def readout(self, states: Tensor) -> Tensor:
        """Outputs `2 Re(C x)`, `(..., D)`, for states `(..., P/2)`."""
        C = 2 * torch.stack([self.C[..., 0], -self.C[..., 1]], -1)
        parts = torch.view_as_real(states).flatten(-2)
        return parts @ C.flatten(-2).mT.to(parts.dtype)

    def coefficients(self, rate: float = 1.0) -> tuple[Tensor, ...]:
        log_Abar, Bbar, _ = self.discrete(rate)
        return log_Abar.exp().to(self._complex), Bbar.mT.contiguous().to(self._complex)

    def initial_state(self, *batch: int) -> Tensor:
        return torch.zeros(*batch, *self.state_shape, device=self.C.device, dtype=self._complex)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        Abar, Bbar = self.prepared()
        state = torch.addcmul(_real_times(u, Bbar), Abar, state)
        return self.readout(state).unsqueeze(-2), state

    @property
    def _real(self) -> torch.dtype:
        """Of the outputs; states are complex numbers of it."""
        return torch.promote_types(self.C.dtype, torch.float32)

    @property
    def _complex(self) -> torch.dtype:
        return torch.complex128 if self._real == torch.float64 else torch.complex64

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.d_state}, blocks={self.blocks}, init={self.init!r}, "
            f"disc={self.disc!r}"
        )


def _real_times(u: Tensor, matrix: Tensor) -> Tensor:
    """`u @ matrix` for real u `(..., D)` and a complex matrix `(D, P)`, by one real product."""
    parts = torch.view_as_real(matrix).flatten(-2)
    product = u.to(parts.dtype) @ parts
    return torch.view_as_complex(product.unflatten(-1, (-1, 2)))


@register(
    paper=132,
    example=lambda: Example(
        {"d_model": 4, "d_state": 8, "blocks": 2},
        (torch.randn(2, 7, 4),),
        bad_options={
            "d_model": 0,
            "d_state": 5,
            "blocks": 3,
            "init": "lin",
            "eps": 0.0,
            "disc": "euler",
            "dt_min": 0.2,
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
class S5(SSMLayer):
    """State space layer with one system for all features, run by a parallel scan.

    Features mix inside the system, and the state is as small as P numbers for all of them. `step`
    runs the same system one step at a time; both take the state that the other left.

    Args:
        d_model: Features D.
        d_state: Complex states P of the whole layer, even.
        blocks: Number of equal blocks of states, each initialised by itself.
        init: `"legs-n"`, the normal part of HiPPO-LegS, or `"ptd"`, the perturbed whole of it.
        eps: Norm of the perturbation of `"ptd"`.
        disc: `"zoh"` or `"bilinear"`.
        dt_min: Lower end of the range that time steps are drawn from, uniform in the logarithm.
        dt_max: Its upper end.
        lr: Largest learning rate of Lambda, B and the time steps in `ssm_param_groups`; 0 freezes
            them.
        dropout: Probability of dropping a feature of a sequence, at all steps together.
        activation: `"gelu"`, `"relu"`, `"silu"`, `"tanh"` or None.
        post: `"glu"` maps the features to 2D and gates one half with the other; `"linear"` maps
            them to D; None leaves them.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(..., L, D)`
        - output: `(..., L, D)`
        - state: `(..., P/2)`, complex
        - lengths: `(...)`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: An option out of its range, or tensors of other shapes.

    Source:
        Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling, 2023.

    Example:
        >>> layer = S5(8, d_state=16, blocks=2).eval()
        >>> y, state = layer(torch.randn(2, 100, 8), return_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8]))
        >>> layer.setup_step()
        >>> next_y, state = layer.step(torch.randn(2, 8), state)
    """

    kernel: S5Kernel

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        blocks: int = 1,
        init: Init = "legs-n",
        eps: float = 0.1,
        disc: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float = 1e-3,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu", "silu", "tanh"] | None = "gelu",
        post: Literal["glu", "linear"] | None = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        times: dict[str, Any] = {"dt_min": dt_min, "dt_max": dt_max, "lr": lr}
        super().__init__(
            S5Kernel(
                d_model, d_state, blocks=blocks, init=init, eps=eps, disc=disc, **times, **factory
            ),
            dropout=dropout,
            activation=activation,
            post=post,
            **factory,
        )

    def _sequence(
        self,
        u: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        rate: float,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        states = self.kernel.states(u, state, rate)
        y = self.kernel.readout(states).unsqueeze(-2)
        if not return_state:
            return y, None
        if lengths is None:
            return y, states[:, -1]
        start = self.initial_state(len(u)) if state is None else state
        passed = torch.cat([start[:, None], states], 1)
        return y, passed[torch.arange(len(u), device=u.device), lengths]


@register(
    paper=132,
    example=lambda: Example(
        {"d_model": 4, "d_state": 6, "eps": 0.5},
        (torch.randn(2, 7, 4),),
        bad_options={"d_model": 0, "d_state": 5, "blocks": 2, "eps": -1.0, "dropout": 1.0},
    ),
    compare=lambda: Comparison(
        {"d_model": 64, "d_state": 16}, (torch.randn(4, 1024, 64),), peers.SEQUENCES
    ),
)
class S5PTD(S5):
    """`S5` that starts from a perturbed HiPPO matrix, near the transfer function of the whole one.

    Args:
        d_model: Features D.
        d_state: Complex states P of the whole layer, even.
        eps: Norm of the perturbation.
        blocks: Number of equal blocks of states, each initialised by itself.
        disc: `"zoh"` or `"bilinear"`.
        options: Further options of `S5`: `dt_min`, `dt_max`, `lr`, `dropout`, `activation` and
            `post`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - as `S5`

    Returns:
        The outputs; with `return_state=True` a pair of them and the state.

    Raises:
        ValueError: An option out of its range, or tensors of other shapes.
        RuntimeError: No perturbation of this size gives conjugate pairs only.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023.

    Example:
        >>> S5PTD(8, d_state=32, blocks=2)(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        eps: float = 0.1,
        blocks: int = 1,
        disc: Literal["zoh", "bilinear"] = "zoh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(
            d_model,
            d_state,
            blocks=blocks,
            init="ptd",
            eps=eps,
            disc=disc,
            device=device,
            dtype=dtype,
            **options,
        )
