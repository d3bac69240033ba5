"""The Kolmogorov-Arnold layer on any basis, without the memory that such layers are known for.

Z. Liu, Y. Wang, S. Vaidya, F. Ruehle, J. Halverson, M. Soljacic, T. Hou and M. Tegmark, KAN:
Kolmogorov-Arnold Networks, 2024. With basis functions B_k, base activation b, D inputs and O
outputs

    y_o = sum_i ( w_oi b(x_i) + sum_k c_oik B_k(x_i) ),    coefficients c, base weights w.

This is one matrix product of the features (N, D (K + 1)) with (D (K + 1), O). Kept for the backward
pass, the features would need (K + 1) times the memory of the input; so a large batch is cut into
tiles whose features fit into a cache, and the backward pass computes them again tile by tile.

Deviations: the spline and base parts have no trainable scale of their own, as their weights absorb
it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchzoo import peers
from torchzoo.activations.basis import ActivationBasis, FourierBasis, UnivariateBasis, check_count
from torchzoo.activations.local_basis import (
    RBFBasis,
    ReLUProductBasis,
    RSWAFBasis,
    WaveletBasis,
)
from torchzoo.activations.pair_basis import PairBasis
from torchzoo.activations.polynomial_basis import ChebyshevBasis, GramBasis, JacobiBasis
from torchzoo.activations.spline_basis import BSplineBasis
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

TILE = 2**22  # features that are held at once, 16 MiB of float32

_SILU = nn.SiLU()
_FAMILIES: dict[str, Callable[..., UnivariateBasis]] = {
    "bspline": BSplineBasis,
    "rbf": RBFBasis,
    "rswaf": RSWAFBasis,
    "chebyshev": ChebyshevBasis,
    "gram": GramBasis,
    "jacobi": JacobiBasis,
    "wavelet": WaveletBasis,
    "relu_product": lambda: ReLUProductBasis(grid_range=(-1.0, 1.0)),
    "fourier": FourierBasis,
    "pair": PairBasis,
    "silu": ActivationBasis,
}
_WITH_PARAMETERS = ("gram", "wavelet", "pair")


def make_basis(
    name: str,
    in_features: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> UnivariateBasis:
    """A basis by name, with its usual size.

    Args:
        name: bspline, relu_product and pair (grid of 5, order 3), rbf, rswaf and wavelet (8
            functions), chebyshev, gram and jacobi (degree 4), fourier (6 frequencies), or silu.
        in_features: Number of inputs, for a basis with parameters for each.
        device: Device of the parameters, if any.
        dtype: Type of the parameters, if any.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> make_basis("chebyshev", 3)
        ChebyshevBasis(degree=4)
    """
    if name not in _FAMILIES:
        raise ValueError(f"basis: expected one of {', '.join(_FAMILIES)}, got {name!r}")
    options = {"device": device, "dtype": dtype} if name in _WITH_PARAMETERS else {}
    sizes = (in_features,) if name == "wavelet" else ()
    return _FAMILIES[name](*sizes, **options)


def in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, features: int, *, fused: bool = True
) -> Tensor:
    """Apply a function of rows to `x (N, D)`, some rows at a time if there are many.

    What the function computes on its way is not kept for the backward pass but computed again.

    Args:
        function: Takes `(n, D)` to `(n, ...)`, each row by itself, and draws no random numbers.
        x: The rows.
        features: Numbers that the function holds for a row.
        fused: False to apply it at once and keep what is on the way.
    """
    tiles = -(-len(x) * features // TILE)
    if not fused or tiles <= 1:
        return function(x)
    parts = x.split(-(-len(x) // tiles))
    return torch.cat(
        [checkpoint(function, p, use_reentrant=False, preserve_rng_state=False) for p in parts]
    )


def as_columns(coef: Tensor) -> Tensor:
    """Coefficients (O, D, K) as a matrix (K D, O) for features in the order of `evaluate`.

    With a function's outputs side by side the gradient by it is the faster kind of product.
    """
    return rearrange(coef, "o i k -> (k i) o")


def as_weights(features: Tensor, weight: Tensor) -> Tensor:
    """Features in the type of the weights, which a product of the two asks for."""
    return features.to(weight.dtype)


def compute_type(x: Tensor) -> Tensor:
    """The input in at least float32: half precision can't tell where in a cell an input is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register(
    example=lambda: Example(
        {"in_features": 4, "out_features": 3, "basis": BSplineBasis(3, 2)},
        (torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) - 0.5,),
        bad_options={
            "in_features": 0,
            "out_features": 0,
            "basis": "spline",
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 256, "out_features": 256, "basis": BSplineBasis(5, 3)},
        (torch.rand(256, 256) - 0.5,),
        peers.LINEAR,
    ),
)
class KANLinear(ZooModel):
    """A linear layer with a learned function on each edge, in the span of a basis.

    Args:
        in_features: Number of inputs D.
        out_features: Number of outputs O.
        basis: A basis, or the name of one (see `make_basis`).
        base_activation: The base branch's activation; a module without parameters.
        base_weight: Whether there is a base branch, base_activation(x) times base weights.
        fused: Compute features of large batches tile by tile, and again in the backward pass, so
            that memory doesn't grow with K. False keeps them: for transforms of `torch.func` over
            large batches, which can't see through the recomputation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`
        - output: `(..., O)`
        - coef: `(O, D, K)`
        - base: `(O, D)`, or None without `base_weight`

    Returns:
        The sums of the edges' functions, one an output.

    Raises:
        ValueError: A count below 1, an unknown basis, one for another number of inputs, or x of
            another width.

    Source:
        Liu, Wang, Vaidya, Ruehle, Halverson, Soljacic, Hou and Tegmark, KAN: Kolmogorov-Arnold
        Networks, 2024, equations 2.3 and 2.10 to 2.12.

    Example:
        >>> layer = KANLinear(64, 10, BSplineBasis(grid_size=5, order=3))
        >>> layer(torch.rand(2, 7, 64)).shape
        torch.Size([2, 7, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: UnivariateBasis | str = "bspline",
        *,
        base_activation: nn.Module = _SILU,
        base_weight: bool = True,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        if isinstance(basis, str):
            basis = make_basis(basis, in_features, device=device, dtype=dtype)
        if basis.in_features not in (None, in_features):
            raise ValueError(
                f"basis: expected one for {in_features} inputs, got one for {basis.in_features}"
            )
        self.in_features, self.out_features, self.fused = in_features, out_features, fused
        self.basis: UnivariateBasis = basis
        self.base_activation = copy.deepcopy(base_activation)  # not the default shared by all
        shape = (out_features, in_features, basis.num_basis)
        self.coef = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.base: nn.Parameter | None = None
        if base_weight:
            self.base = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Coefficients from N(0, 0.1^2 / D), base weights as those of a linear layer."""
        nn.init.normal_(self.coef, std=0.1 / math.sqrt(self.in_features))
        if self.base is not None:
            nn.init.kaiming_uniform_(self.base, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        self.check_inputs(x)
        weight = as_columns(self.coef)

        def outputs(rows: Tensor) -> Tensor:
            base: Tensor | float = 0.0
            if self.base is not None:
                base = F.linear(as_weights(self.base_activation(rows), weight), self.base)
            # last, as what comes after the last tensor that is kept is not computed again
            return base + as_weights(self.basis.evaluate(rows).flatten(-2), weight) @ weight

        rows = compute_type(x).reshape(-1, self.in_features)
        y = in_tiles(outputs, rows, len(weight), fused=self.fused)
        return y.reshape(*x.shape[:-1], self.out_features)

    def check_inputs(self, x: Tensor) -> None:
        """Raise the ValueError that `forward` raises for this x, if any."""
        if x.ndim == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., {self.in_features}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )

    def edges(self, x: Tensor) -> Tensor:
        """The learned function of every edge, phi_oi(x_i): (..., D) to (..., O, D)."""
        self.check_inputs(x)
        x = compute_type(x)
        phi = torch.einsum("...ik,oik->...oi", as_weights(self.basis(x), self.coef), self.coef)
        if self.base is None:
            return phi
        return phi + self.base * self.base_activation(x).unsqueeze(-2)

    def regularization(self, x: Tensor, *, l1: float = 1.0, entropy: float = 1.0) -> Tensor:
        """A penalty that makes edges sparse: weighted sum of their size and of its entropy.

        The size of an edge is the mean of abs(phi_oi) over the batch; the entropy is that of the
        sizes divided by their sum. All edges of all rows, N D O numbers, are held at once.

        Args:
            x: A batch of inputs, `(..., D)`.
            l1: Weight of the sum of sizes.
            entropy: Weight of their entropy.

        Returns:
            A scalar.

        Source:
            Liu and others, KAN: Kolmogorov-Arnold Networks, 2024, equations 2.17 to 2.20.
        """
        size = self.edges(x).abs().flatten(0, -3).mean(0)
        share = size / size.sum().clamp_min(torch.finfo(size.dtype).tiny)
        return l1 * size.sum() + entropy * torch.special.entr(share).sum()

    @torch.no_grad()
    def update_grid(self, x: Tensor, *, uniform: float = 0.02, margin: float = 0.01) -> None:
        """Move the knots of each input to where its data are, and keep the edges' functions.

        The coefficients become those whose functions on the new knots are nearest the old ones, by
        least squares over the data; the same function where the new splines can express it. A
        basis on a shared grid gives way to one with knots for each input; to save the module
        afterwards, build it with `BSplineBasis(in_features=...)`.

        Args:
            x: Data, `(..., D)`.
            uniform: Weight of a uniform grid over the data against one of their quantiles.
            margin: How far the uniform grid goes beyond the data.

        Raises:
            ValueError: The basis is not of B-splines, or x doesn't fit or is empty.
        """
        old = self.basis
        if not isinstance(old, BSplineBasis):
            raise ValueError(f"basis: expected a BSplineBasis, got {type(old).__name__}")
        self.check_inputs(x)
        x = x.reshape(-1, self.in_features).double()
        new = BSplineBasis(
            old.grid_size,
            old.order,
            old.grid_range,
            in_features=self.in_features,
            device=self.coef.device,
            dtype=self.coef.dtype,
        )
        new.fit_knots(x, uniform=uniform, margin=margin)
        curves = torch.einsum("nik,oik->ino", old(x), self.coef.double())
        design = rearrange(new(x), "n i k -> i n k")
        fit = torch.linalg.lstsq(design.cpu(), curves.cpu()).solution  # (D, K, O)
        self.coef.copy_(rearrange(fit, "i k o -> o i k"))
        self.basis = new

    def extra_repr(self) -> str:
        base = "" if self.base is not None else ", base_weight=False"
        fused = "" if self.fused else ", fused=False"
        return f"{self.in_features}, {self.out_features}{base}{fused}"
