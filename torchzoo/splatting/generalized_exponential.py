"""Generalised exponential functions: Gaussians with one more parameter, for how steep they end.

    f(x) = A exp(-(abs(x - mu) / alpha)^beta)

is a Gaussian at `beta = 2`, with `alpha = sqrt(2) sigma`, a peak below and more and more of a box
above. A splat's is `exp(-r^beta / 2)` of the distance r in standard deviations s of the Gaussian
that it generalises, so `alpha = 2^(1/beta) s`.

Source: A. Hamdi, L. Melas-Kyriazi, J. Mai, G. Qian, R. Liu, C. Vondrick, B. Ghanem and A. Vedaldi,
"GES: Generalized Exponential Splatting for Efficient Radiance Field Rendering", 2024, section 3.
Deviations: none; `ray_integral` and the variance in 2 and 3 dimensions are not in the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

__all__ = ["GEFMixture1d", "gef", "gef_variance_scale", "ray_integral"]

CENTRE = 1e-12
"""Distances count as this at least: below `beta = 1` the slope at 0 is infinite."""

WIDE = 1.6
"""How much wider the second Gaussian of a difference of Gaussians is."""

KINDS = ("gef", "gaussian", "dog", "laplace")
_LEFT, _RIGHT, _NODES, _DEPTH = -28.0, 0.1, 1001, 45.0


def gef(
    x: Tensor,
    mu: Tensor | float,
    alpha: Tensor | float,
    beta: Tensor | float,
    amplitude: Tensor | float = 1.0,
) -> Tensor:
    """The generalised exponential `A exp(-(abs(x - mu) / alpha)^beta)`.

    Args:
        x: Where.
        mu: Centre.
        alpha: Width, above 0.
        beta: Shape, above 0.
        amplitude: Height A.

    Shape:
        - all: any that broadcast; so is the output

    Raises:
        ValueError: A width or shape that is not above 0.

    Source:
        Hamdi et al., "GES", 2024, equation 1.

    Example:
        >>> gef(torch.tensor([0.0, 1.0, 2.0]), 0.0, 1.0, 2.0)
        tensor([1.0000, 0.3679, 0.0183])
    """
    _check_positive(alpha=alpha, beta=beta)
    return amplitude * _profile((x - mu) / alpha, beta)


def gef_variance_scale(beta: Tensor, dim: int = 1) -> Tensor:
    """Standard deviation along an axis of `exp(-r^beta / 2)` in so many dimensions.

        sqrt(4^(1/beta) Gamma((D + 2) / beta) / (D Gamma(D / beta)))

    It is 1 at `beta = 2` in all dimensions: by this factor the Gaussian with the same variance is
    larger than the one that `beta = 2` would make.

    Args:
        beta: Shapes, above 0.
        dim: Dimensions D: 1 for a line, 2 for a splat on the image, 3 in space.

    Shape:
        - beta: `(...)`
        - output: `(...)`

    Raises:
        ValueError: A shape that is not above 0, or `dim` below 1.

    Source:
        The variance in one dimension is `alpha^2 Gamma(3 / beta) / Gamma(1 / beta)`; in D, polar
        coordinates.

    Example:
        >>> gef_variance_scale(torch.tensor([1.0, 2.0, 4.0]), dim=2)
        tensor([3.4641, 1.0000, 0.6316])
    """
    if dim < 1:
        raise ValueError(f"dim: got {dim}, expected at least 1")
    _check_positive(beta=beta)
    moments = torch.lgamma((dim + 2) / beta) - torch.lgamma(dim / beta) - math.log(dim)
    return ((math.log(4) / beta + moments) / 2).exp()


def ray_integral(q: Tensor, beta: Tensor) -> Tensor:
    """What is left of a ball `exp(-r^beta / 2)` along a ray that passes its centre at `sqrt(q)`.

        g(q) = int exp(-(q + t^2)^(beta/2) / 2) dt / int exp(-abs(t)^beta / 2) dt

    At `beta = 2` it is `exp(-q / 2)`. Elsewhere it differs from `exp(-q^(beta/2) / 2)`, with which
    splats are drawn, which is thus the shape of the picture and not of the ball.

    Args:
        q: Squared distances, in standard deviations, at least 0.
        beta: Shapes, from about 0.3 to 20.

    Shape:
        - q, beta: any that broadcast; so is the output

    Returns:
        From 0 to 1, in the type of `q`; computed in float64 to about 1e-11.

    Raises:
        ValueError: A shape that is not above 0, or a q below 0.

    Source:
        The trapezoidal rule in `log t`, where the singularities stay away from the real line.

    Example:
        >>> ray_integral(torch.tensor([0.0, 2.0]), torch.tensor(2.0))
        tensor([1.0000, 0.3679])
    """
    _check_positive(beta=beta)
    if not torch.compiler.is_compiling() and (q < 0).any():
        raise ValueError(f"q: got {q.min().item():.4g}, expected at least 0")
    square, shape = torch.broadcast_tensors(q.double()[..., None], beta.double()[..., None])
    steps = torch.linspace(_LEFT, _RIGHT, _NODES, dtype=torch.float64, device=q.device)
    t = (steps + math.log(2 * _DEPTH) / shape).exp()  # at the right end exp(-45) is left
    values = torch.exp(-0.5 * (square + t.square()) ** (shape / 2))
    half = (values * t).sum(-1) * ((_RIGHT - _LEFT) / (_NODES - 1))
    inverse = 1 / shape[..., 0]
    return (half / (2**inverse * torch.lgamma(1 + inverse).exp())).to(q.dtype)


@register(
    paper=46,
    example=lambda: Example({"n": 4}, (torch.randn(3, 5),), bad_options={"n": 0, "kind": "sinc"}),
    compare="a study of shapes in one dimension, which its experiment measures",
)
class GEFMixture1d(ZooModel):
    """A sum of n bumps on the line, to fit signals with.

    Args:
        n: Number of bumps.
        kind: `"gef"`: generalised exponentials, whose shapes, from 1 to 12, are learnt as well;
            `"gaussian"`; `"dog"`: a Gaussian less one of the same area 1.6 times as wide;
            `"laplace"`: `exp(-abs(x - mu) / alpha)`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., P)`
        - output: `(..., P)`

    Attributes:
        amplitude: `(n,)`, heights.
        mu: `(n,)`, centres.
        log_alpha: `(n,)`, logarithms of the widths.
        raw_shape: `(n,)`, only of kind `"gef"`; `beta` is `2 exp(raw_shape)`, clamped.

    Returns:
        The sum at each x.

    Raises:
        ValueError: `n` below 1 or an unknown kind.

    Source:
        Hamdi et al., "GES", 2024, section 3: the mixtures that are compared on one-dimensional
        signals.

    Example:
        >>> GEFMixture1d(5)(torch.linspace(-1, 1, 100)).shape
        torch.Size([100])
    """

    amplitude: nn.Parameter
    mu: nn.Parameter
    log_alpha: nn.Parameter
    raw_shape: nn.Parameter | None

    def __init__(
        self,
        n: int,
        *,
        kind: str = "gef",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n: got {n}, expected at least 1")
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {KINDS}")
        self.n, self.kind = n, kind
        for name in ("amplitude", "mu", "log_alpha"):
            self.register_parameter(name, nn.Parameter(torch.empty(n, device=device, dtype=dtype)))
        shape = torch.empty(n, device=device, dtype=dtype) if kind == "gef" else None
        self.register_parameter("raw_shape", None if shape is None else nn.Parameter(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gaussians of height 1/n and width 0.3, anywhere from -1 to 1."""
        self.amplitude.fill_(1 / self.n)
        self.mu.uniform_(-1, 1)
        self.log_alpha.fill_(math.log(0.3))
        if self.raw_shape is not None:
            self.raw_shape.zero_()

    @property
    def beta(self) -> Tensor:
        """Shapes `(n,)`, from 1 to 12."""
        if self.raw_shape is not None:
            return (2 * self.raw_shape.exp()).clamp(1, 12)
        return torch.full_like(self.mu, 1.0 if self.kind == "laplace" else 2.0)

    def forward(self, x: Tensor) -> Tensor:
        z = (x[..., None] - self.mu) * (-self.log_alpha).exp()
        if self.kind == "gef":
            bumps = _profile(z, self.beta)
        elif self.kind == "laplace":
            bumps = torch.exp(-z.abs())
        else:
            bumps = torch.exp(-z.square())
            if self.kind == "dog":
                bumps = bumps - torch.exp(-(z / WIDE).square()) / WIDE
        return (bumps * self.amplitude).sum(-1)

    def extra_repr(self) -> str:
        return f"{self.n}, kind={self.kind!r}"


def _profile(z: Tensor, beta: Tensor | float) -> Tensor:
    return torch.exp(-(z.abs().clamp_min(CENTRE) ** beta))


def _check_positive(**values: Tensor | float) -> None:
    """Every value is above 0; a compiled function takes them as they are."""
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        least = value.min().item() if isinstance(value, Tensor) and value.numel() else value
        if not isinstance(least, Tensor) and not least > 0:
            raise ValueError(f"{name}: got {least:.4g}, expected above 0")
