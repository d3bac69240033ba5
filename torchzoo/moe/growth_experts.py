"""Experts that are growth curves: for each class a random-coefficient curve and its covariates.

J. Liu and R. A. Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
Trajectories: When, Where and How to Add Which Covariates", 2021. The expert of class k says that
the responses of a subject with covariates x are normal,

    y | k ~ N( Lambda(gamma_k) (alpha_k + B_k (x - mean)) + z kappa_k,
               Lambda(gamma_k) Psi_k Lambda(gamma_k)^T + theta_k I ),

where the bilinear spline `eta0 + eta1 min(t, gamma) + eta2 max(t - gamma, 0)` has the loadings
`(1, min(t, gamma), max(t - gamma, 0))`.

Deviations from the paper: the knot is fixed within a class, for which no linearisation is needed;
time-varying covariates act on the responses directly, with effects `kappa` of each class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.moe.growth_curves import (
    TRAJECTORIES,
    Conditional,
    ExpertParams,
    GrowthData,
    Trajectory,
    apply,
    centring,
    condition,
    pack_tril,
    unpack_tril,
)
from torchzoo.moe.routing import check_count, without_autocast
from torchzoo.registry import Example, register


class GrowthExpert(ZooModel):
    """Densities of repeated measurements under the growth curves of several classes.

    Args:
        num_classes: Number of classes `K`.
        num_covariates: Covariates `p` of the growth factors.
        trajectory: "bilinear", "linear", "quadratic" or "exponential".
        shared_residual: Whether all classes have the same residual variance.
        tvc: Number `q` of time-varying covariates.
        time_range: First and last time, between which a knot is looked for; the rate of an
            exponential is looked for from 0.1 to 20 over their difference.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        gamma_raw: `(K, c)` parameter, logits of where the knots or rates are in their range; `c`
            is 0 for curves that have none.
        alpha: `(K, d)` parameter, means of the growth factors.
        beta: `(K, d, p)` parameter, effects of the covariates.
        psi_raw: `(K, d (d + 1) / 2)` parameter, Cholesky factors of the covariances of the growth
            factors, row by row, with the logarithm of the diagonal.
        log_theta: `(K,)` or `(1,)` parameter, logarithms of the residual variances.
        kappa: `(K, q)` parameter, effects of the time-varying covariates.
        mean: `(p,)` buffer, which is taken off the covariates.
    """

    mean: Tensor

    def __init__(
        self,
        num_classes: int,
        num_covariates: int = 0,
        *,
        trajectory: str = "bilinear",
        shared_residual: bool = False,
        tvc: int = 0,
        time_range: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        check_count("num_classes", num_classes)
        check_count("num_covariates", num_covariates, 0)
        check_count("tvc", tvc, 0)
        if trajectory not in TRAJECTORIES:
            known = ", ".join(map(repr, TRAJECTORIES))
            raise ValueError(f"trajectory: expected one of {known}, got {trajectory!r}")
        if not (len(time_range) == 2 and time_range[0] < time_range[1]):
            raise ValueError(f"time_range: expected (first, last), increasing, got {time_range}")
        super().__init__()
        self.num_classes = num_classes
        self.num_covariates = num_covariates
        self.trajectory_name = trajectory
        self.shared_residual = shared_residual
        self.tvc = tvc
        self.time_range = (float(time_range[0]), float(time_range[1]))
        factors, shapes = self.trajectory.num_factors, self.trajectory.num_shapes

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gamma_raw = empty(num_classes, shapes)
        self.alpha = empty(num_classes, factors)
        self.beta = empty(num_classes, factors, num_covariates)
        self.psi_raw = empty(num_classes, factors * (factors + 1) // 2)
        self.log_theta = empty(1 if shared_residual else num_classes)
        self.kappa = empty(num_classes, tvc)
        mean = torch.empty(num_covariates, device=device, dtype=dtype)
        self.register_buffer("mean", mean)
        self.reset_parameters()

    @property
    def trajectory(self) -> Trajectory:
        """The family of curves."""
        return TRAJECTORIES[self.trajectory_name]

    def reset_parameters(self) -> None:
        """Standard normal growth factors around random means, unit noise, shapes spread evenly."""
        nn.init.normal_(self.alpha)
        for zero in (self.beta, self.psi_raw, self.log_theta, self.kappa, self.mean):
            nn.init.zeros_(zero)
        with torch.no_grad():
            steps = torch.arange(1.0, self.num_classes + 1, device=self.gamma_raw.device)
            self.gamma_raw.copy_((steps / (self.num_classes + 1)).logit()[:, None])

    def params(self) -> ExpertParams:
        """The parameters, as tensors that carry gradients to those of the module."""
        fraction = self.gamma_raw.sigmoid()
        bounds = self.trajectory.bounds
        if bounds is not None:
            low, high = bounds(*self.time_range)
            fraction = low + (high - low) * fraction
        scale_tril = unpack_tril(self.psi_raw, self.trajectory.num_factors)
        theta = self.log_theta.exp().expand(self.num_classes)
        return ExpertParams(fraction, self.alpha, self.beta, scale_tril, theta, self.kappa)

    @torch.no_grad()
    def set_params(self, params: ExpertParams) -> None:
        """Copy parameters into the module; a residual variance that is shared is the mean of all.

        Raises:
            ValueError: Shapes that don't fit, a knot or rate that is not within its range,
                variances that are not above 0.
        """
        for name, value, own in zip(params._fields, params, self.params(), strict=True):
            if value.shape != own.shape:
                raise ValueError(
                    f"params.{name}: expected {tuple(own.shape)}, got {tuple(value.shape)}"
                )
        diagonal = params.scale_tril.diagonal(dim1=-2, dim2=-1)
        for name, positive in (("theta", params.theta), ("scale_tril", diagonal)):
            if not bool((positive > 0).all()):
                raise ValueError(f"params.{name}: expected above 0, got {positive.tolist()}")
        if self.trajectory.bounds is not None:
            low, high = self.trajectory.bounds(*self.time_range)
            fraction = (params.gamma - low) / (high - low)
            if not bool(((fraction > 0) & (fraction < 1)).all()):
                got = params.gamma.flatten().tolist()
                raise ValueError(f"params.gamma: expected within ({low:g}, {high:g}), got {got}")
            self.gamma_raw.copy_(fraction.logit())
        self.alpha.copy_(params.alpha)
        self.beta.copy_(params.beta)
        self.psi_raw.copy_(pack_tril(params.scale_tril))
        theta = params.theta.mean(0, keepdim=True) if self.shared_residual else params.theta
        self.log_theta.copy_(theta.log())
        self.kappa.copy_(params.kappa)

    def data(
        self,
        y: Tensor,
        t: Tensor,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        gate_x: Tensor | None = None,
    ) -> GrowthData:
        """Check shapes, blank out what is missing, and centre the covariates."""
        if y.ndim == 0 or y.shape != t.shape:
            raise ValueError(
                f"y, t: expected both (..., J), got {tuple(y.shape)} and {tuple(t.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(y.dtype, self.alpha.dtype), torch.float32)
        expert_x = covariates("expert_x", expert_x, y, y.shape[:-1], self.num_covariates)
        tvc_x = covariates("tvc_x", tvc_x, y, y.shape, self.tvc)
        if mask is None:
            mask = torch.ones_like(y, dtype=torch.bool)
        elif mask.dtype != torch.bool or mask.shape != y.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"mask: expected bool of shape {tuple(y.shape)} as y, got {got}")
        gate_x = y.new_zeros(*y.shape[:-1], 0) if gate_x is None else gate_x
        return GrowthData(
            y.to(dtype).where(mask, 0),
            t.to(dtype).where(mask, 0),
            mask.to(dtype),
            gate_x.to(dtype),
            expert_x.to(dtype) - self.mean.to(dtype),
            tvc_x.to(dtype).where(mask[..., None], 0),
        )

    def condition(self, data: GrowthData) -> Conditional:
        """Densities and growth factors of subjects in all classes."""
        with without_autocast(data.y):
            return condition(self.trajectory, cast(self.params(), data.y.dtype), data)

    def forward(
        self,
        y: Tensor,
        t: Tensor,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Log-densities of responses in each class."""
        return self.condition(self.data(y, t, expert_x, tvc_x, mask)).log_density

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        text = f"{self.num_classes}, {self.num_covariates}, trajectory={self.trajectory_name!r}"
        if self.shared_residual:
            text += ", shared_residual=True"
        return text + (f", tvc={self.tvc}" if self.tvc else "")


class CentredFactors(NamedTuple):
    """Growth factors of bilinear splines in terms of the knot.

    The factors are the level at the knot, the mean of the two slopes, and half their rise.

    Attributes:
        alpha: `(K, 3)`, their means.
        beta: `(K, 3, p)`, effects of the covariates on them.
        psi: `(K, 3, 3)`, their covariances.
    """

    alpha: Tensor
    beta: Tensor
    psi: Tensor


@register(
    paper=41,
    example=lambda: Example(
        kwargs={"num_classes": 2, "num_covariates": 2, "tvc": 1, "shared_residual": True},
        inputs=(
            torch.randn(4, 5),
            torch.linspace(0.02, 0.98, 20).reshape(5, 4).T,
            torch.randn(4, 2),
            torch.randn(4, 5, 1),
            torch.arange(20).reshape(4, 5) % 7 != 3,
        ),
        bad_options={"num_classes": 0, "num_covariates": -1, "tvc": -1},
    ),
    compare="a statistical model: what counts is its fit, which its experiment measures",
)
class BilinearSplineExpert(GrowthExpert):
    """Densities of repeated measurements that follow two straight lines joined at a knot.

    Args:
        num_classes: Number of classes `K`, each with a knot of its own.
        num_covariates: Covariates `p` of the growth factors: the level at time 0 and the slopes
            before and after the knot.
        shared_residual: Whether all classes have the same residual variance.
        tvc: Number `q` of time-varying covariates.
        time_range: First and last time; the knots stay between them, 5 % of the span from each.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - y: `(..., J)`, responses at `J` occasions
        - t: `(..., J)`, times, which may differ between subjects
        - expert_x: `(..., p)`, covariates
        - tvc_x: `(..., J, q)`, time-varying covariates
        - mask: `(..., J)` bool, True where measured; all by default
        - output: `(..., K)`

    Returns:
        The log-density of a subject's responses in each class.

    Raises:
        ValueError: A number of classes below 1, negative numbers of covariates, times that don't
            increase, or inputs that don't fit.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021: the within-class model.

    Example:
        >>> expert = BilinearSplineExpert(2, time_range=(0.0, 9.0))
        >>> t = torch.arange(10.0).expand(5, 10)
        >>> expert(torch.randn(5, 10), t).shape
        torch.Size([5, 2])
        >>> expert.params().gamma.flatten().tolist()  # doctest: +ELLIPSIS
        [3.1..., 5.8...]
    """

    def __init__(
        self,
        num_classes: int,
        num_covariates: int = 0,
        *,
        shared_residual: bool = False,
        tvc: int = 0,
        time_range: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        super().__init__(
            num_classes,
            num_covariates,
            shared_residual=shared_residual,
            tvc=tvc,
            time_range=time_range,
            device=device,
            dtype=dtype,
        )

    def centred(self) -> CentredFactors:
        """The growth factors in terms of the knot; they go with `centred_bilinear_loadings`."""
        params = self.params()
        turn = centring(params.gamma)
        alpha = apply(turn, params.alpha)
        return CentredFactors(alpha, turn @ params.beta, turn @ params.psi @ turn.mT)


def covariates(
    name: str, value: Tensor | None, like: Tensor, batch: torch.Size, columns: int
) -> Tensor:
    """The covariates, or none; raises a ValueError unless they are `(*batch, columns)`."""
    if value is None:
        if columns:
            raise ValueError(f"{name}: got None, expected {(*batch, columns)}")
        return like.new_zeros(*batch, 0)
    if value.ndim and value.shape[-1] != columns:
        raise ValueError(f"{name}: got {value.shape[-1]} columns, expected {columns}")
    if value.shape != (*batch, columns):
        raise ValueError(f"{name}: got {tuple(value.shape)}, expected {(*batch, columns)}")
    return value


def cast(params: ExpertParams, dtype: torch.dtype) -> ExpertParams:
    """The parameters in another type."""
    return ExpertParams(*(p.to(dtype) for p in params))
