"""Attributes of splats that are Gaussian together with an embedding, and follow from it.

G. Serifi and M. C. Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
Animatable Face Avatars", 2025. Each splat has a normal distribution of its own over an attribute
o in R^m, such as an offset of its place, and a latent i in R^d, with precision `L L^T` and
`L = [[L11, 0], [L21, L22]]`. Given the latent's value z,

    mean            mu_o - L11^-T L21^T (z - mu_i)
    covariance      L11^-T L11^-1
    log determinant of it  -2 sum_k log (L11)_kk

The same in terms of the covariance is `mu_o + S_oi S_ii^-1 (z - mu_i)`, which takes a system of d
unknowns for each splat; this takes one of m, which is 3 or 4, and needs neither L22 nor its d^2
numbers. The mean is affine in z, and the covariance does not depend on it.

Deviation from the authors' code: `(B, d)` is always a batch, even where B is the number of splats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchzoo import ops
from torchzoo.hub import ZooModel
from torchzoo.ops.hyper_condition import solve_upper, unpack
from torchzoo.registry import Example, register
from torchzoo.splatting import edits

__all__ = ["ConditionalGaussian", "HyperGaussian"]


class ConditionalGaussian(NamedTuple):
    """Distributions of N attributes given a latent.

    Attributes:
        mean: `(..., N, m)`.
        log_uncertainty: Logarithms of the covariances' determinants, `(N,)`.
        scale_tril: `(N, m, m)`, upper triangles S such that `S S^T` are the covariances.
    """

    mean: Tensor
    log_uncertainty: Tensor
    scale_tril: Tensor


@register(
    paper=63,
    example=lambda: Example(
        {"num": 5, "latent_dim": 4, "out_dim": 3},
        (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "num": -1,
            "latent_dim": 0,
            "out_dim": 0,
            "init_output": torch.zeros(5, 2),
        },
    ),
    exempt={"fixed-rank": "the axis before the last is a batch, or the items, by the rank"},
    compare="its rival, the same through covariances, is measured in the paper's experiment",
)
class HyperGaussian(ZooModel):
    """N items, each with a Gaussian over its attribute and a latent, conditioned on the latent.

    At first the attribute is `init_output` for every latent. In that state the loss has no gradient
    with respect to z and `mean_latent`, but one with respect to `l21`: what makes the latents has
    to wait for a step. Every parameter has one row for each item; `keep` and `duplicate` edit them,
    and `load_state_dict` takes over the number of items of what it loads.

    Args:
        num: Number N of items.
        latent_dim: Size d of the latent.
        out_dim: Size m of the attribute.
        init_output: What the attributes are at first, `(N, m)`; None: 0.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - z: `(d,)`, `(B, d)` or `(B, N, d)`; with `per_item` `(..., N, d)`
        - mean: `(N, m)`, `(B, N, m)` or `(B, N, m)`; with `per_item` `(..., N, m)`
        - log_uncertainty: `(N,)`
        - scale_tril: `(N, m, m)`

    Attributes:
        mean_out: mu_o, `(N, m)`.
        mean_latent: mu_i, `(N, d)`.
        raw_l11: Lower triangle of L11 row by row, `(N, m (m + 1) / 2)`, its diagonal as logarithms.
        l21: L21, `(N, d, m)`.

    Returns:
        A `ConditionalGaussian`.

    Raises:
        ValueError: A size out of its range, or inputs of the wrong shape.

    Source:
        Serifi and Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
        Animatable Face Avatars", 2025, the conditional distribution and the inverse covariance
        trick.

    Example:
        >>> attribute = HyperGaussian(100, latent_dim=8, out_dim=3)
        >>> attribute(torch.randn(2, 8)).mean.shape  # two latents, shared by all items
        torch.Size([2, 100, 3])
        >>> attribute(torch.randn(100, 8), per_item=True).mean.shape
        torch.Size([100, 3])
    """

    mean_out: nn.Parameter
    mean_latent: nn.Parameter
    raw_l11: nn.Parameter
    l21: nn.Parameter

    keep = edits.keep
    duplicate = edits.clone

    def __init__(
        self,
        num: int,
        latent_dim: int,
        out_dim: int,
        *,
        init_output: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num", num, 0),
            ("latent_dim", latent_dim, 1),
            ("out_dim", out_dim, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if init_output is not None and init_output.shape != (num, out_dim):
            got = tuple(init_output.shape)
            raise ValueError(f"init_output: got {got}, expected {(num, out_dim)}")
        shapes = {
            "mean_out": (out_dim,),
            "mean_latent": (latent_dim,),
            "raw_l11": (out_dim * (out_dim + 1) // 2,),
            "l21": (latent_dim, out_dim),
        }
        for name, shape in shapes.items():
            rows = torch.empty(num, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(rows))
        self.reset_parameters(init_output)
        if "init_output" in self._zoo_config:  # saved as `mean_out`
            self._zoo_config["init_output"] = None

    @torch.no_grad()
    def reset_parameters(self, init_output: Tensor | None = None) -> None:
        """L11 the identity, L21 zero, the means `init_output` (None: 0) and 0."""
        for parameter in self.parameters():
            parameter.zero_()
        if init_output is not None:
            self.mean_out.copy_(init_output)

    @classmethod
    def from_joint(cls, mean: Tensor, covariance: Tensor, *, out_dim: int) -> Self:
        """Items with these joint distributions, of which only what conditioning needs is kept.

        Args:
            mean: `(N, m + d)`, the attribute first.
            covariance: `(N, m + d, m + d)`, symmetric and positive definite.
            out_dim: m.

        Raises:
            ValueError: Shapes that don't fit, or `out_dim` that leaves no latent.
        """
        size = mean.shape[-1] if mean.dim() == 2 else 0
        if not 1 <= out_dim < size:
            got = tuple(mean.shape)
            raise ValueError(f"mean: got {got} with out_dim={out_dim}, expected (N, m + d)")
        if covariance.shape != (len(mean), size, size):
            expected = (len(mean), size, size)
            raise ValueError(f"covariance: got {tuple(covariance.shape)}, expected {expected}")
        # With J the reversal and J S J = C C^T, S = U U^T for the upper triangle U = J C J: the
        # precision's factor is U^-T, without an inverse of S.
        upper = torch.linalg.cholesky(covariance.flip(-2, -1)).flip(-2, -1)
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        factor = torch.linalg.solve_triangular(upper.mT, eye, upper=False)
        l11, l21 = factor[:, :out_dim, :out_dim], factor[:, out_dim:, :out_dim]
        diagonal = torch.diag_embed(l11.diagonal(dim1=-2, dim2=-1).log())
        rows, columns = torch.tril_indices(out_dim, out_dim, device=l11.device)
        made = cls(len(mean), size - out_dim, out_dim, device=mean.device, dtype=covariance.dtype)
        with torch.no_grad():
            made.mean_out.copy_(mean[:, :out_dim])
            made.mean_latent.copy_(mean[:, out_dim:])
            made.raw_l11.copy_((l11.tril(-1) + diagonal)[:, rows, columns])
            made.l21.copy_(l21)
        return made

    @property
    def num(self) -> int:
        """N."""
        return len(self.mean_out)

    @property
    def log_uncertainty(self) -> Tensor:
        """Logarithms of the determinants of the conditional covariances, `(N,)`."""
        places = [k * (k + 3) // 2 for k in range(self.mean_out.shape[1])]
        return -2 * self.raw_l11[:, places].sum(-1)

    @property
    def scale_tril(self) -> Tensor:
        """`L11^-T`, `(N, m, m)`: an upper triangle, a square root of the conditional covariance."""
        m = self.mean_out.shape[1]
        eye = torch.eye(m, dtype=self.raw_l11.dtype, device=self.raw_l11.device)
        columns = eye[:, :, None].expand(m, m, self.num).contiguous()  # (m, column, N)
        return solve_upper(unpack(self.raw_l11, m), columns).permute(2, 0, 1)

    def condition_covariance(self) -> Tensor:
        """The conditional covariances, `(N, m, m)`, which do not depend on the latent."""
        return self.scale_tril @ self.scale_tril.mT

    def joint_precision(self, l22: Tensor | None = None) -> Tensor:
        """Precisions of the joint distributions, the attribute first.

        Args:
            l22: The block L22, lower triangles `(N, d, d)`; None: the identity.

        Returns:
            `(N, m + d, m + d)`.

        Raises:
            ValueError: `l22` of another shape.
        """
        (N, m), d = self.mean_out.shape, self.mean_latent.shape[1]
        if l22 is None:
            l22 = torch.eye(d, dtype=self.l21.dtype, device=self.l21.device).expand(N, d, d)
        if l22.shape != (N, d, d):
            raise ValueError(f"l22: got {tuple(l22.shape)}, expected {(N, d, d)}")
        l11 = unpack(self.raw_l11, m).permute(2, 0, 1)
        l11 = l11.tril(-1) + torch.diag_embed(l11.diagonal(dim1=-2, dim2=-1).exp())
        upper = torch.cat([l11, self.l21.new_zeros(N, m, d)], -1)
        factor = torch.cat([upper, torch.cat([self.l21, l22], -1)], -2)
        return factor @ factor.mT

    def conditional_mean(self, z: Tensor, *, per_item: bool = False) -> Tensor:
        """The means that `forward` gives, alone."""
        own = per_item or z.dim() == 3
        tail = self.mean_latent.shape if own else self.mean_latent.shape[1:]
        if z.dim() < len(tail) or z.shape[-len(tail) :] != tail or (z.dim() > 3 and not per_item):
            shapes = "(..., N, d)" if per_item else "(d,), (B, d) or (B, N, d)"
            sizes = "N={}, d={}".format(*self.mean_latent.shape)
            raise ValueError(f"z: got {tuple(z.shape)}, expected {shapes} with {sizes}")
        latent = z if own else z[..., None, :]
        given = (self.mean_out, self.mean_latent, self.raw_l11, self.l21)
        return ops.hyper_condition(latent, *given)

    def forward(self, z: Tensor, *, per_item: bool = False) -> ConditionalGaussian:
        """Condition on latents; see the class.

        Args:
            z: What the latents are.
            per_item: Whether the axis before the last is that of the items, with any others in
                front; without it `(B, d)` are B latents that all items share.
        """
        mean = self.conditional_mean(z, per_item=per_item)
        return ConditionalGaussian(mean, self.log_uncertainty, self.scale_tril)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over the number of items, then load."""
        edits.adopt_size(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _note_size(self) -> None:
        """Let the saved config say how many items there are now."""
        if "num" in self._zoo_config:
            self._zoo_config["num"] = self.num

    def extra_repr(self) -> str:
        """What `print` shows."""
        (_, d), m = self.mean_latent.shape, self.mean_out.shape[1]
        return f"{self.num}, latent_dim={d}, out_dim={m}"
