"""Perturb, then diagonalise: diagonal state spaces that stay close to their HiPPO matrices.

A. Yu, A. Nigmetov, D. Morozov, M. W. Mahoney and N. B. Erichson, Robustifying State-space Models
for Long Sequences via Approximate Diagonalization, 2023. The eigenvectors of a HiPPO matrix A are
too ill-conditioned to compute with. S4D drops the low-rank part of A instead, which leaves spikes
near the eigenfrequencies in its transfer function that the true one does not have. Here a small E
is added, and the sum is diagonalised as it is:

    A + E = V Lambda V^-1,   B_ptd = V^-1 B,   C_ptd = C V,                                  (1)

with E small and V well-conditioned by gradient descent on

    Phi(E) = kappa(V) + gamma norm(E),   kappa(V) = norm(V) norm(V^-1),                      (2)

in the spectral norm. The transfer function then changes by about C R E R B, R(s) = (s - A)^-1, at
every frequency.

Deviations: the descent is on log Phi, whose minima are those of Phi, inside the ball
norm(E) <= eps, of which it starts from a random point. Large perturbations can make A unstable; E
is shrunk until all eigenvalues are in the left half-plane, with a margin.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchzoo import peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.ssm.hippo import hippo_matrix
from torchzoo.ssm.init import check_d_state
from torchzoo.ssm.s4d import S4D

Method = Literal["optimize", "random"]

MEASURES = ("legs", "legt", "lagt", "lmu")  # those whose matrix is time-invariant and stable
DRAWS = 64


class PTDResult(NamedTuple):
    """An approximate diagonalisation, A + E = V diag(eigenvalues) V^-1.

    Attributes:
        eigenvalues: `(n,)`, complex128.
        V: Eigenvectors, columns of norm 1, `(n, n)`, complex128.
        E: Perturbation, `(n, n)`, complex128; its imaginary part is 0 where A is real.
        kappa: Condition number of V, the ratio of its largest and smallest singular values.
        norm_E: Spectral norm of E.
        max_real: Largest real part of the eigenvalues.
    """

    eigenvalues: Tensor
    V: Tensor
    E: Tensor
    kappa: float
    norm_E: float
    max_real: float


def perturb_then_diagonalize(
    A: Tensor,
    *,
    eps: float = 0.1,
    relative: bool = False,
    method: Method = "optimize",
    gamma: float = 1.0,
    steps: int = 300,
    seed: int = 0,
    stable_margin: float | None = 0.1,
) -> PTDResult:
    """Diagonalise a matrix near A whose eigenvectors are better conditioned than those of A.

    Args:
        A: Any square matrix; it is computed with in double precision on the CPU.
        eps: Largest spectral norm of the perturbation E.
        relative: Whether `eps` is in units of the norm of A.
        method: `"optimize"` to minimise `kappa(V) + gamma norm(E)` from a random E, `"random"`
            to take that, which is Gaussian and scaled to norm `eps`.
        gamma: Weight of the norm of E.
        steps: Steps of the descent.
        seed: Seed of the random E.
        stable_margin: Real parts of all eigenvalues must be at most minus this; a random E is
            shrunk until they are. None to ask for nothing.

    Shape:
        - A: `(n, n)`

    Returns:
        The `PTDResult`. For real A, E is real and the eigenvalues come in conjugate pairs.

    Raises:
        ValueError: A is not square or not finite, or an option is out of range.
        RuntimeError: A itself is not stable by the margin, so that shrinking E does not help.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023, section 4.

    Example:
        >>> jordan = torch.diag(torch.ones(7), 1) - torch.eye(8)  # it has a single eigenvector
        >>> found = perturb_then_diagonalize(jordan, eps=0.05)
        >>> found.kappa < 100, found.norm_E <= 0.0501
        (True, True)
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not len(A):
        raise ValueError(f"A: expected (n, n), got {tuple(A.shape)}")
    if not A.isfinite().all():
        raise ValueError("A: expected finite entries, got others")
    _check_options(eps, method, gamma, steps, stable_margin)
    A = A.detach().to("cpu", torch.complex128 if A.is_complex() else torch.float64)
    radius = eps * torch.linalg.matrix_norm(A, 2).item() if relative else eps
    generator = torch.Generator("cpu").manual_seed(seed)
    E = torch.randn(A.shape, generator=generator, dtype=A.dtype, device="cpu")
    E = _stable(A, E * (radius / torch.linalg.matrix_norm(E, 2)), stable_margin)
    if method == "optimize":
        E = _descend(A, E, radius, gamma, steps, stable_margin)
    eigenvalues, V = torch.linalg.eig(A + E)
    norm = torch.linalg.matrix_norm(E, 2).item()
    kappa, max_real = _condition(V).item(), eigenvalues.real.max().item()
    return PTDResult(eigenvalues, V, E.to(V.dtype), kappa, norm, max_real)


def _check_options(
    eps: float, method: str, gamma: float, steps: int, stable_margin: float | None
) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number above 0, got {eps!r}")
    if method not in ("optimize", "random"):
        raise ValueError(f"method: expected 'optimize' or 'random', got {method!r}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number of at least 0, got {gamma!r}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer of at least 0, got {steps!r}")
    if stable_margin is not None and not stable_margin >= 0:
        raise ValueError(f"stable_margin: expected at least 0 or None, got {stable_margin!r}")


def _condition(V: Tensor) -> Tensor:
    sizes = torch.linalg.svdvals(V)
    return sizes[0] / sizes[-1]


def _is_stable(A: Tensor, margin: float | None) -> bool:
    return margin is None or torch.linalg.eigvals(A).real.max().item() <= -margin


def _stable(A: Tensor, E: Tensor, margin: float | None) -> Tensor:
    """E, or the largest multiple of it that bisection finds to leave A + E stable."""
    if _is_stable(A + E, margin):
        return E
    if not _is_stable(A, margin):
        largest = torch.linalg.eigvals(A).real.max().item()
        raise RuntimeError(
            f"no perturbation was found with all real parts at most -{margin}: A itself has "
            f"{largest:.3g}"
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _is_stable(A + middle * E, margin) else (low, middle)
    return low * E


def _descend(
    A: Tensor, E: Tensor, radius: float, gamma: float, steps: int, margin: float | None
) -> Tensor:
    """The stable E of least Phi on the way of Adam from E, within the ball of this radius."""
    best, least = E, math.inf
    E = E.clone().requires_grad_()
    optimizer = torch.optim.Adam([E], lr=0.1 * radius / math.sqrt(len(A)))
    for _ in range(steps + 1):
        with torch.enable_grad():
            eigenvalues, V = torch.linalg.eig(A + E)
            phi = _condition(V) + gamma * torch.linalg.matrix_norm(E, 2)
            (slope,) = torch.autograd.grad(phi.log(), E)
        stable = margin is None or eigenvalues.real.max().item() <= -margin
        if stable and phi.item() < least:
            best, least = E.detach().clone(), phi.item()
        if not slope.isfinite().all():  # two eigenvalues meet
            break
        E.grad = slope
        optimizer.step()
        with torch.no_grad():
            E.mul_((radius / torch.linalg.matrix_norm(E, 2)).clamp_max(1))
    return best


class PTDSystem(NamedTuple):
    """A real system in diagonal form, one of each conjugate pair of its n coordinates.

    Attributes:
        A: Eigenvalues with positive imaginary part, rising, `(n/2,)`.
        V: Their eigenvectors, `(n, n/2)`: the state x of the original system is `2 Re(V z)`.
        V_inv: The same rows of V^-1, `(n/2, n)`.
        B: Input vector `V^-1 B`, `(n/2,)`.
    """

    A: Tensor
    V: Tensor
    V_inv: Tensor
    B: Tensor


@lru_cache(maxsize=32)
def ptd_system(
    d_state: int,
    measure: str = "legs",
    eps: float = 0.1,
    relative: bool = False,
    method: Method = "optimize",
    gamma: float = 1.0,
    steps: int = 300,
    seed: int = 0,
    stable_margin: float = 0.1,
) -> PTDSystem:
    """`ptd_init` with the eigenvectors. The result is shared between calls: do not write to it."""
    check_d_state(d_state)
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {MEASURES}, got {measure!r}")
    A, B = hippo_matrix(measure, d_state)
    options: dict[str, Any] = {"eps": eps, "relative": relative, "gamma": gamma, "steps": steps}
    _check_options(eps, method, gamma, steps, stable_margin)
    for draw in range(seed, seed + DRAWS):
        for way in dict.fromkeys(("random", method)):  # a look at the start costs next to nothing
            found = perturb_then_diagonalize(
                A, method=way, seed=draw, stable_margin=stable_margin, **options
            )
            if (found.eigenvalues.imag == 0).any():
                break
        else:
            return _halved(found, B)
    raise RuntimeError(
        f"eps={eps}: each of {DRAWS} perturbations left real eigenvalues, which have no conjugate "
        "to pair with; a larger eps pairs them"
    )


def _halved(found: PTDResult, B: Tensor) -> PTDSystem:
    inverse = torch.linalg.inv(found.V)
    order = found.eigenvalues.imag.argsort()[len(B) // 2 :]
    V_inv = inverse[order]
    return PTDSystem(found.eigenvalues[order], found.V[:, order], V_inv, V_inv @ B.to(V_inv))


def ptd_init(
    d_state: int,
    *,
    measure: str = "legs",
    eps: float = 0.1,
    relative: bool = False,
    method: Method = "optimize",
    gamma: float = 1.0,
    steps: int = 300,
    seed: int = 0,
    stable_margin: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and input vector of a perturbed HiPPO matrix, for `S4D(init=(A, B))`.

    B is whole, not halved as for `s4d_init`'s `"legs"`. Draws of E that leave A + E with real
    eigenvalues, which are an even number of them, are redrawn.

    Args:
        d_state: State size n, even.
        measure: `"legs"`, `"legt"`, `"lagt"` or `"lmu"`, see `hippo_matrix`.
        eps: Largest spectral norm of the perturbation.
        relative: Whether `eps` is in units of the norm of the HiPPO matrix.
        method: As for `perturb_then_diagonalize`, like all that follow.
        gamma: Weight of the norm of the perturbation.
        steps: Steps of the descent.
        seed: Seed of the first draw; the others follow it.
        stable_margin: Real parts of all eigenvalues are at most minus this.

    Shape:
        - A, B: `(n/2,)`

    Returns:
        A and B in complex128 on the CPU, by rising imaginary part.

    Raises:
        ValueError: An odd or too small `d_state`, or an option out of range.
        RuntimeError: No draw was without real eigenvalues; a larger `eps` has more of those.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023, section 4.

    Example:
        >>> A, B = ptd_init(16)
        >>> A.shape, bool((A.real < 0).all()), round(A.imag.max().item())
        (torch.Size([8]), True, 16)
    """
    found = ptd_system(d_state, measure, eps, relative, method, gamma, steps, seed, stable_margin)
    return found.A.clone(), found.B.clone()


@register(
    paper=132,
    example=lambda: Example(
        {"d_model": 4, "d_state": 6, "eps": 0.5},
        (torch.randn(2, 7, 4),),
        bad_options={
            "d_model": 0,
            "d_state": 5,
            "measure": "fout",
            "eps": 0.0,
            "method": "newton",
            "gamma": -1.0,
            "steps": -1,
            "stable_margin": -1.0,
            "disc": "euler",
            "dropout": 1.0,
        },
    ),
    compare=lambda: Comparison(
        {"d_model": 64, "d_state": 16}, (torch.randn(4, 1024, 64),), peers.SEQUENCES
    ),
)
class S4PTD(S4D):
    """`S4D` that starts from a perturbed HiPPO matrix: the same cost, near S4's transfer function.

    Only the initial values differ, which take seconds to find for hundreds of states and are then
    kept for layers of the same options.

    Args:
        d_model: Features D.
        d_state: State size N of each feature, even.
        measure: `"legs"`, `"legt"`, `"lagt"` or `"lmu"`, see `hippo_matrix`.
        eps: Largest spectral norm of the perturbation.
        relative: Whether `eps` is in units of the norm of the HiPPO matrix.
        method: `"optimize"` or `"random"`, see `perturb_then_diagonalize`.
        gamma: Weight of the norm of the perturbation in the optimisation.
        steps: Steps of the optimisation.
        seed: Seed of the perturbation, the same one for all features.
        stable_margin: Real parts of all eigenvalues start at minus this or below.
        kernel: Further options of `S4D` and its kernel: `disc`, `dt_min`, `dt_max`, `channels`,
            `train_B`, `real_transform`, `lr`, `bidirectional`, `dropout`, `activation` and `post`.
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
        ValueError: An option out of its range, or tensors of other shapes.
        RuntimeError: No perturbation gives `d_state / 2` conjugate pairs.

    Source:
        Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long
        Sequences via Approximate Diagonalization, 2023.

    Example:
        >>> layer = S4PTD(8, d_state=16)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: Literal["legs", "legt", "lagt", "lmu"] = "legs",
        eps: float = 0.1,
        relative: bool = False,
        method: Method = "optimize",
        gamma: float = 1.0,
        steps: int = 300,
        seed: int = 0,
        stable_margin: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ):
        system = ptd_system(
            d_state, measure, eps, relative, method, gamma, steps, seed, stable_margin
        )
        super().__init__(
            d_model, d_state, init=(system.A, system.B), device=device, dtype=dtype, **kernel
        )
        self._V = system.V
        self._draw_readout()

    def reset_parameters(self) -> None:
        """As `S4D`, but for C = C_0 V with C_0 from N(0, 1), which a unitary V would not change."""
        super().reset_parameters()
        self._draw_readout()

    @torch.no_grad()
    def _draw_readout(self) -> None:
        C = self.kernel.get_parameter("C")
        real = torch.randn(*C.shape[:2], len(self._V), dtype=torch.float64, device="cpu")
        C.copy_(torch.view_as_real(real.to(self._V) @ self._V))
