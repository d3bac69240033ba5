"""Normal-plus-low-rank state spaces, A = V (Lambda - P P^*) V^*, and their convolution kernels.

The HiPPO matrices of `legs`, `legt`, `lagt` and `fout` are normal matrices, skew-symmetric up to a
multiple of the identity, less a matrix of rank 1 or 2. V is therefore unitary, while eigenvectors
of A itself have condition numbers beyond what float64 can hold. With the bilinear rule,

    Abar = (I - dt/2 A)^-1 (I + dt/2 A),   Bbar = (I - dt/2 A)^-1 dt B,   K_l = C Abar^l Bbar,

the discrete Fourier transform of the first L taps, with z = exp(-2 pi i k / L) and
g = 2/dt (1 - z)/(1 + z) = 2i/dt tan(pi k / L), is

    sum_l K_l z^l = 2/(1 + z) C~ (g - Lambda + P P^*)^-1 B,   C~ = C (I - Abar^L),             (1)

and by Woodbury's identity the inverse takes Cauchy sums x y / (g - lambda) alone.

Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO: state space models with generalized
orthogonal basis projections", 2022; kernel: Gu, Goel and Re, "Efficiently modeling long sequences
with structured state spaces", 2022, section 3. Deviations: C is the parameter and C~ follows from
it, so that one set of parameters serves every length and the recurrence; real parts that are 0
start at -1e-4, as their logarithm is what learns; all is computed in float64, as (1) cancels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.ops import cauchy
from torchzoo.ssm.hippo import hippo_matrix
from torchzoo.ssm.init import check_d_state
from torchzoo.ssm.layer import SSMKernel, flush_right
from torchzoo.ssm.params import mark_dynamics

RANKS = {"legs": 1, "legt": 2, "lagt": 1, "fout": 1}
SMALLEST_DECAY = 1e-4


class DPLR(NamedTuple):
    """A real system in unitary coordinates, one of each pair of conjugate coordinates kept.

    Attributes:
        eigenvalues: Lambda `(N/2,)`, with imaginary part 0 or more.
        P: Low-rank part `(rank, N/2)`.
        B: Input vector `(N/2,)`.
        V: Coordinates `(N, N/2)`: the state x of the original system is 2 Re(V z).
    """

    eigenvalues: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def hippo_dplr(measure: str, N: int) -> DPLR:
    """A HiPPO system as normal plus low rank, A = 2 Re(V Lambda V^*) - p p^T with p = 2 Re(V P).

    Args:
        measure: `"legs"`, `"legt"`, `"lagt"` or `"fout"`.
        N: Number of states, even. For `"fout"` the constant and the dummy state are a pair.

    Returns:
        The system, in complex128 on the CPU.

    Raises:
        ValueError: Another measure, or N odd or below 2.

    Source:
        Gu, Goel and Re, "Efficiently modeling long sequences with structured state spaces", 2022,
        theorem 1; `fout`: Gu et al., "How to train your HiPPO", 2022, section 3.2.

    Example:
        >>> system = hippo_dplr("legs", 4)
        >>> system.eigenvalues.real
        tensor([-0.5000, -0.5000], dtype=torch.float64)
    """
    if measure not in RANKS:
        raise ValueError(f"measure: expected one of {[*RANKS]}, got {measure!r}")
    check_d_state(N)
    A, B = hippo_matrix(measure, N)
    P = _low_rank(measure, B)
    decay = -0.5 if measure == "legs" else 0.0
    if measure == "fout":  # cos_j and sin_j of one j are a pair, and the two of j = 0 stay one
        frequencies = 2 * math.pi * torch.arange(N // 2, dtype=A.dtype, device="cpu")
        eye = torch.eye(N, dtype=torch.complex128, device="cpu")
        V = (eye[:, ::2] - 1j * eye[:, 1::2]) * math.sqrt(0.5)
    else:
        skew = A + P.mT @ P - decay * torch.eye(N, dtype=A.dtype, device="cpu")
        frequencies, V = torch.linalg.eigh(-1j * skew)
        frequencies, V = frequencies[N // 2 :], V[:, N // 2 :]
        along = V.mH @ B.to(V)
        V = V * (along / along.abs())  # makes V^* B real and positive
    eigenvalues = torch.complex(torch.full_like(frequencies, decay), frequencies)
    return DPLR(eigenvalues, P.to(V) @ V.conj(), V.mH @ B.to(V), V)


def _low_rank(measure: str, B: Tensor) -> Tensor:
    """P `(rank, N)` in the original coordinates."""
    if measure != "legt":
        return B[None] / math.sqrt(2)
    even = torch.arange(len(B), device=B.device) % 2 == 0
    return torch.stack([B * even, B * ~even])


class DPLRKernel(SSMKernel):
    """Normal-plus-low-rank state spaces, one a feature, as convolution kernel and as recurrence.

    A kernel takes O(N L) operations a feature and log L products of N x N matrices, a step O(N).

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        init: A measure of `hippo_dplr`, or several joined by `+`, which share the features out.
        disc: `"bilinear"`, the only rule that keeps the structure.
        rank: Rank of the low-rank part; None for what `init` needs. More is filled up with zeros,
            whose gradient is 0: to be set by the user.
        dt_min: Lower end of the range that time steps are drawn from, uniform in the logarithm: a
            feature remembers about 1/dt steps.
        dt_max: Its upper end.
        channels: Outputs C of each feature, which share state and time step.
        train_B: Whether B learns.
        lr: Largest learning rate of A, B and the time step in `ssm_param_groups`; 0 freezes them.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - output: `(C, D, L)`
        - state: `(..., D, N/2)`, complex

    Returns:
        `forward(L, rate)`: the real impulse response over L steps.

    Raises:
        ValueError: An option out of its range.

    Source:
        Gu, Johnson, Timalsina, Rudra and Re, "How to train your HiPPO", 2022; Gu, Goel and Re,
        "Efficiently modeling long sequences with structured state spaces", 2022, algorithm 1.

    Example:
        >>> DPLRKernel(4, 16, init="legs+fout")(100).shape
        torch.Size([1, 4, 100])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        disc: Literal["bilinear"] = "bilinear",
        rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        channels: int = 1,
        train_B: bool = True,
        lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_d_state(d_state)
        for name, count in (("d_model", d_model), ("channels", channels)):
            if count < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {count!r}")
        measures = init.split("+") if isinstance(init, str) else [init]
        if not all(measure in RANKS for measure in measures):
            raise ValueError(f"init: expected some of {[*RANKS]} joined by '+', got {init!r}")
        needed = max(RANKS[measure] for measure in measures)
        if rank is not None and rank < needed:
            raise ValueError(f"rank: expected at least {needed} for {init!r}, got {rank}")
        if disc != "bilinear":
            raise ValueError(f"disc: expected 'bilinear', got {disc!r}")
        if not 0 < dt_min < dt_max < math.inf:
            raise ValueError(f"dt_min: expected 0 < dt_min < dt_max, got {dt_min} and {dt_max}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: expected a number of at least 0, got {lr!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.channels = channels
        self.state_shape = (d_model, d_state // 2)
        self.init = init
        self.disc = disc
        self.rank = needed if rank is None else rank
        self.dt_min = dt_min
        self.dt_max = dt_max
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_dt = nn.Parameter(torch.empty(d_model, **factory))
        self.log_A_real = nn.Parameter(torch.empty(self.state_shape, **factory))
        self.A_imag = nn.Parameter(torch.empty(self.state_shape, **factory))
        self.P = nn.Parameter(torch.empty(self.rank, *self.state_shape, 2, **factory))
        self.C = nn.Parameter(torch.empty(channels, *self.state_shape, 2, **factory))
        B = torch.empty(*self.state_shape, 2, **factory)
        if train_B:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)
        mark_dynamics(self, ("log_dt", "log_A_real", "A_imag", "P") + ("B",) * train_B, lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B from `init`, C complex normal of variance 1, dt log-uniform."""
        measures = self.init.split("+")
        for rows, measure in zip(_shares(self.d_model, len(measures)), measures, strict=True):
            system = hippo_dplr(measure, self.d_state)
            decay = (-system.eigenvalues.real).clamp_min(SMALLEST_DECAY)
            missing = self.rank - len(system.P)
            P = F.pad(torch.view_as_real(system.P), (0, 0, 0, 0, 0, missing))
            self.log_A_real[rows] = decay.log().to(self.C)
            self.A_imag[rows] = system.eigenvalues.imag.to(self.C)
            self.P[:, rows] = P[:, None].to(self.C)
            self.B[rows] = torch.view_as_real(system.B).to(self.C)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))

    def system(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Lambda `(D, N/2)`, P `(rank, D, N/2)`, B `(D, N/2)`, C `(C, D, N/2)` and dt `(D, 1)`.

        In complex128 and float64.
        """
        poles = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        P, B, C = (torch.view_as_complex(t.double().contiguous()) for t in (self.P, self.B, self.C))
        return poles, P, B, C, rate * self.log_dt.double().exp()[:, None]

    def dense(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Abar `(D, N, N)`, Bbar `(D, N)` and C `(C, D, N)` for states (Re z, Im z), in float64.

        In these coordinates P P^* of the whole system is 2 p p^T, p = (Re P, Im P).
        """
        poles, P, B, C, dt = self.system(rate)
        real, imag = torch.diag_embed(poles.real), torch.diag_embed(poles.imag)
        normal = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)
        p = _split(P)
        half = dt[..., None] / 2 * (normal - 2 * torch.einsum("rdi,rdj->dij", p, p))
        eye = torch.eye(self.d_state, dtype=half.dtype, device=half.device)
        driven = (dt * _split(B))[..., None]
        both = torch.linalg.solve(eye - half, torch.cat([eye + half, driven], -1))
        return both[..., :-1], both[..., -1], 2 * _split(C.conj())

    def forward(self, L: int, rate: float = 1.0) -> Tensor:
        if L < 1:
            raise ValueError(f"L: expected a length of at least 1, got {L!r}")
        _, _, B, _, _ = self.system(rate)
        return self._outputs(B[None], L, rate)[0]

    def response(self, state: Tensor, L: int, rate: float = 1.0) -> Tensor:
        poles, P, _, _, dt = self.system(rate)
        x = state.to(poles.dtype)
        # the input whose Bbar is Abar x
        fed = 2 * torch.einsum("rdn,bdn->brd", P.conj(), x).real.to(P.dtype)
        return self._outputs(
            x / dt + (poles * x - torch.einsum("brd,rdn->bdn", fed, P)) / 2, L, rate
        )

    def _outputs(self, B: Tensor, L: int, rate: float) -> Tensor:
        """The first L of C Abar^l Bbar `(M, C, D, L)`, for input vectors B `(M, D, N/2)`."""
        poles, P, _, _, dt = self.system(rate)
        Abar, _, c = self.dense(rate)
        c = c - torch.einsum("cdi,dij->cdj", c, torch.linalg.matrix_power(Abar, L))
        truncated = torch.complex(*c.chunk(2, -1)).conj() / 2
        k = torch.arange((L + 1) // 2, dtype=dt.dtype, device=dt.device)
        tangent = (math.pi / L * k).tan()  # without z = -1, where it has a pole
        nodes = torch.complex(torch.zeros_like(tangent), tangent) * (2 / dt)
        left, right = torch.cat([truncated, P.conj()]), torch.cat([B, P])
        sums = cauchy(left[:, None] * right, nodes, poles)  # (C + rank, M + rank, D, nodes)
        sums = _woodbury(sums, self.rank)
        spectrum = sums * torch.complex(torch.ones_like(tangent), tangent)
        if L % 2 == 0:
            last = dt * (truncated[:, None] * B).real.sum(-1, keepdim=True)
            spectrum = torch.cat([spectrum, last.to(spectrum.dtype)], -1)
        taps = torch.fft.irfft(spectrum, n=L)
        return rearrange(taps, "c m d l -> m c d l").to(self._real)

    def advance(
        self, u: Tensor, state: Tensor | None, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        Abar, Bbar, _ = self.dense(rate)
        after = _last_state(Abar, Bbar, flush_right(u, lengths).double())
        if state is not None:
            steps = lengths if lengths is not None else torch.full_like(u[:, 0, 0], u.shape[1])
            bits = u.shape[1].bit_length()
            after = after + _repeat(Abar, _split(state).double(), steps.long(), bits)
        return torch.complex(*after.chunk(2, -1)).to(self._complex)

    def coefficients(self, rate: float = 1.0) -> tuple[Tensor, ...]:
        """With E = I - dt/2 Lambda: E^-1 (I + dt/2 Lambda), E^-1 dt B, Q = dt/2 E^-1 P, and P^*.

        By Woodbury's identity (E + dt/2 P P^*)^-1 is (I - Q (I + P^* Q)^-1 P^*) E^-1.
        """
        poles, P, B, C, dt = self.system(rate)
        E = 1 - dt / 2 * poles
        Q = dt / 2 * P / E
        inner = 2 * torch.einsum("rdn,sdn->drs", P.conj(), Q).real
        eye = torch.eye(self.rank, dtype=inner.dtype, device=inner.device)
        onto = 2 * P.conj()
        solved = torch.einsum("drs,sdn->rdn", torch.linalg.inv(eye + inner).to(P.dtype), onto)
        complex_ones = ((1 + dt / 2 * poles) / E, dt * B / E, Q, onto, solved)
        return (*(value.to(self._complex) for value in complex_ones), 2 * C.to(self._complex))

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        Abar, Bbar, Q, onto, solved, readout = self.prepared()
        x = Abar * state + Bbar * u[..., None] - _along(Q, onto, state)
        x = x - _along(Q, solved, x)
        return (readout * x[..., None, :, :]).sum(-1).real, x

    def initial_state(self, *batch: int) -> Tensor:
        return torch.zeros(*batch, *self.state_shape, device=self.C.device, dtype=self._complex)

    @property
    def _real(self) -> torch.dtype:
        return torch.promote_types(self.C.dtype, torch.float32)

    @property
    def _complex(self) -> torch.dtype:
        return self._real.to_complex()

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.d_state}, init={self.init!r}, rank={self.rank}, "
            f"channels={self.channels}"
        )


def _shares(total: int, parts: int) -> list[slice]:
    """Split a range into slices of equal length, longer ones first."""
    edges = [-(-total * i // parts) for i in range(parts + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def _split(z: Tensor) -> Tensor:
    """Real and imaginary parts side by side, `(..., N)`."""
    return torch.cat([z.real, z.imag], -1)


def _along(Q: Tensor, onto: Tensor, x: Tensor) -> Tensor:
    """Q Re(onto x), with Q and onto `(rank, D, N/2)` and x `(..., D, N/2)`."""
    parts = (onto * x[..., None, :, :]).sum(-1, keepdim=True).real
    return (parts * Q).sum(-3)


def _woodbury(sums: Tensor, rank: int) -> Tensor:
    """From M_xy = x (g - Lambda)^-1 y to C (g - Lambda + P P^*)^-1 B, entry by entry of g.

    The last `rank` rows belong to P^* and the last columns to P. They are eliminated one by one;
    no pivots are needed, as I + M_pp has a Hermitian part of at least I where Re g >= Re Lambda.
    """
    for _ in range(rank):
        pivot = 1 + sums[-1:, -1:]
        sums = sums[:-1, :-1] - sums[:-1, -1:] * sums[-1:, :-1] / pivot
    return sums


def _last_state(Abar: Tensor, Bbar: Tensor, u: Tensor) -> Tensor:
    """The state `(B, D, N)` after the inputs u `(B, L, D)`, from a start at rest.

    In blocks of about sqrt(L) steps: matrix products within the blocks, then from block to block.
    """
    L = u.shape[1]
    size = math.isqrt(L - 1) + 1
    taps, power = Bbar[:, None], Abar.mT  # Abar^t Bbar, (D, T, N)
    while taps.shape[1] < size:
        taps = torch.cat([taps, taps @ power], 1)
        power = power @ power
    blocks = rearrange(F.pad(u, (0, 0, -L % size, 0)), "b (k t) d -> k d b t", t=size)
    over = torch.linalg.matrix_power(Abar.mT, size)
    state = torch.zeros_like(blocks[0] @ taps[:, :size])
    for driven in (blocks @ taps[:, :size].flip(1)).unbind(0):
        state = state @ over + driven
    return rearrange(state, "d b n -> b d n")


def _repeat(Abar: Tensor, x: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Abar^steps x for x `(B, D, N)` and steps `(B,)` of at most `bits` bits."""
    for bit in range(bits):
        moved = torch.einsum("dij,bdj->bdi", Abar, x)
        x = torch.where((steps >> bit & 1).bool()[:, None, None], moved, x)
        Abar = Abar @ Abar
    return x
