"""Mixture of growth curves in which covariates say which class, and where within it.

J. Liu and R. A. Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
Trajectories: When, Where and How to Add Which Covariates", 2021. Responses y of a subject at its
own times t, with covariates `x_g` of the gate and `x_e` of the experts, have the density

    p(y | t, x_g, x_e) = sum_k pi_k(x_g) N(y | class k, t, x_e),
    pi(x_g) = softmax(b0 + b x_g),   b0_1 = 0,   b_1 = 0,

where the class densities are those of `GrowthExpert`. Without covariates it is a finite mixture
of growth curves; with those of the gate only, or of the experts only, one of the two models
between.

Deviations from the paper: see `GrowthExpert`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.moe.growth_curves import ExpertParams, GrowthData, apply, centers, direct_effects
from torchzoo.moe.growth_experts import BilinearSplineExpert, GrowthExpert, cast, covariates
from torchzoo.moe.routing import check_count, without_autocast
from torchzoo.registry import Example, register


class GrowthParams(NamedTuple):
    """Parameters of a mixture of growth curves, with any leading batch dimensions.

    `K` classes, `g` covariates of the gate; the others as in `ExpertParams`.

    Attributes:
        gate_bias: `(..., K)`, biases of the gate; that of the first class is 0.
        gate_weight: `(..., K, g)`, weights of the gate; those of the first class are 0.
        gamma: `(..., K, c)`, knots or rates.
        alpha: `(..., K, d)`, means of the growth factors.
        beta: `(..., K, d, p)`, effects of the covariates on the growth factors.
        scale_tril: `(..., K, d, d)`, Cholesky factors of the covariances `Psi`.
        theta: `(..., K)`, residual variances.
        kappa: `(..., K, q)`, effects of the time-varying covariates.
    """

    gate_bias: Tensor
    gate_weight: Tensor
    gamma: Tensor
    alpha: Tensor
    beta: Tensor
    scale_tril: Tensor
    theta: Tensor
    kappa: Tensor

    @property
    def experts(self) -> ExpertParams:
        """Those of the experts."""
        return ExpertParams(*self[2:])

    @property
    def psi(self) -> Tensor:
        """`(..., K, d, d)`, covariances of the growth factors within a class."""
        return self.experts.psi

    def log_weights(self, gate_x: Tensor) -> Tensor:
        """`(..., n, K)`, logarithms of the gate's probabilities for covariates `(..., n, g)`."""
        logits = gate_x @ self.gate_weight.mT + self.gate_bias[..., None, :]
        return logits.log_softmax(-1)

    def ordered(self) -> GrowthParams:
        """The same density, its classes in increasing order of the knot or rate.

        Ties, and curves without either, go by the means of the growth factors, last to first.
        """
        keys = torch.cat([self.alpha, self.gamma], -1).unbind(-1)
        order = torch.arange(self.theta.shape[-1], device=self.theta.device)
        order = order.expand_as(self.theta)
        for key in keys:
            order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))

        def sort(value: Tensor) -> Tensor:
            tail = value.shape[order.ndim :]
            index = order.reshape(*order.shape, *(1 for _ in tail)).expand(*order.shape, *tail)
            return value.gather(order.ndim - 1, index)

        bias, weight, *experts = (sort(value) for value in self)
        return GrowthParams(bias - bias[..., :1], weight - weight[..., :1, :], *experts)


class GrowthSample(NamedTuple):
    """Draws from a mixture of growth curves.

    Attributes:
        y: `(..., J)`, responses.
        classes: `(...)` int64, the class of each subject.
        factors: `(..., d)`, growth factors of each subject.
    """

    y: Tensor
    classes: Tensor
    factors: Tensor


@register(
    paper=41,
    example=lambda: Example(
        kwargs={
            "num_classes": 3,
            "num_gate_covariates": 2,
            "num_expert_covariates": 1,
            "trajectory": "bilinear",
        },
        inputs=(
            torch.randn(4, 5),
            torch.linspace(0.02, 0.98, 20).reshape(5, 4).T,
            torch.randn(4, 2),
            torch.randn(4, 1),
        ),
        bad_options={
            "num_classes": 0,
            "num_gate_covariates": -1,
            "num_expert_covariates": -1,
            "trajectory": "cubic",
            "tvc": -1,
            "time_range": (1.0, 0.0),
        },
    ),
    compare="a statistical model: what counts is its fit, which its experiment measures",
)
class GrowthMoE(ZooModel):
    """Density of repeated measurements of subjects from latent classes with growth curves.

    Args:
        num_classes: Number of classes `K`.
        num_gate_covariates: Covariates `g` that say which class.
        num_expert_covariates: Covariates `p` that say where within a class.
        trajectory: "bilinear" (two lines joined at a knot of the class), "linear", "quadratic" or
            "exponential" (towards an asymptote, at a rate of the class).
        shared_residual: Whether all classes have the same residual variance.
        tvc: Number `q` of time-varying covariates, with direct effects on the responses.
        time_range: First and last time, between which knots are looked for.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - y: `(..., J)`, responses at `J` occasions
        - t: `(..., J)`, times, which may differ between subjects
        - gate_x: `(..., g)`, covariates of the gate
        - expert_x: `(..., p)`, covariates of the experts
        - tvc_x: `(..., J, q)`, time-varying covariates
        - mask: `(..., J)` bool, True where measured; all by default
        - output: `(...)`

    Returns:
        The log-density of each subject's measured responses.

    Attributes:
        gate_bias: `(K - 1,)` parameter, biases of the gate for all classes but the first.
        gate_weight: `(K - 1, g)` parameter, weights of the gate.
        experts: The `GrowthExpert`.

    Raises:
        ValueError: A number of classes below 1, negative numbers of covariates, an unknown
            trajectory, or inputs that don't fit.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021: the full mixture of
        experts.

    Example:
        >>> model = GrowthMoE(2, 1, 1, time_range=(0.0, 9.0))
        >>> t = torch.arange(10.0).expand(50, 10)
        >>> gate_x, expert_x = torch.randn(50, 1), torch.randn(50, 1)
        >>> y = model.sample(t, gate_x=gate_x, expert_x=expert_x).y
        >>> model(y, t, gate_x=gate_x, expert_x=expert_x).shape
        torch.Size([50])
        >>> model.posterior(y, t, gate_x=gate_x, expert_x=expert_x).shape
        torch.Size([50, 2])
    """

    def __init__(
        self,
        num_classes: int,
        num_gate_covariates: int = 0,
        num_expert_covariates: int = 0,
        *,
        trajectory: str = "bilinear",
        shared_residual: bool = False,
        tvc: int = 0,
        time_range: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        check_count("num_classes", num_classes)
        check_count("num_gate_covariates", num_gate_covariates, 0)
        check_count("num_expert_covariates", num_expert_covariates, 0)
        super().__init__()
        self.num_classes = num_classes
        self.num_gate_covariates = num_gate_covariates
        self.num_expert_covariates = num_expert_covariates
        options: dict[str, Any] = {
            "shared_residual": shared_residual,
            "tvc": tvc,
            "time_range": time_range,
            "device": device,
            "dtype": dtype,
        }
        self.experts: GrowthExpert
        if trajectory == "bilinear":
            self.experts = BilinearSplineExpert(num_classes, num_expert_covariates, **options)
        else:
            options["trajectory"] = trajectory
            self.experts = GrowthExpert(num_classes, num_expert_covariates, **options)
        others = num_classes - 1
        self.gate_bias = nn.Parameter(torch.empty(others, device=device, dtype=dtype))
        weight = torch.empty(others, num_gate_covariates, device=device, dtype=dtype)
        self.gate_weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all classes equally probable; the experts have their own reset."""
        nn.init.zeros_(self.gate_bias)
        nn.init.zeros_(self.gate_weight)

    def params(self) -> GrowthParams:
        """The parameters, as tensors that carry gradients to those of the model."""
        bias, weight = F.pad(self.gate_bias, (1, 0)), F.pad(self.gate_weight, (0, 0, 1, 0))
        return GrowthParams(bias, weight, *self.experts.params())

    @torch.no_grad()
    def set_params(self, params: GrowthParams) -> None:
        """Copy parameters, without batch dimensions, into the model.

        Raises:
            ValueError: Shapes that don't fit, a gate that is not 0 for the first class, knots or
                rates out of range, variances that are not above 0.
        """
        for name in ("gate_bias", "gate_weight"):
            value, own = getattr(params, name), getattr(self, name)
            wanted = (self.num_classes, *own.shape[1:])
            if value.shape != wanted:
                raise ValueError(f"params.{name}: expected {wanted}, got {tuple(value.shape)}")
            if bool(value[0].any()):
                got = value[0].tolist()
                raise ValueError(f"params.{name}: expected 0 for the first class, got {got}")
        self.experts.set_params(params.experts)
        self.gate_bias.copy_(params.gate_bias[1:])
        self.gate_weight.copy_(params.gate_weight[1:])

    def data(
        self,
        y: Tensor,
        t: Tensor,
        gate_x: Tensor | None = None,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> GrowthData:
        """Check shapes, blank out what is missing, and centre the covariates of the experts."""
        gate_x = covariates("gate_x", gate_x, y, y.shape[:-1], self.num_gate_covariates)
        return self.experts.data(y, t, expert_x, tvc_x, mask, gate_x=gate_x)

    def log_weights(self, gate_x: Tensor) -> Tensor:
        """`(..., K)`, logarithms of the gate's probabilities for covariates `(..., g)`."""
        dtype = torch.promote_types(gate_x.dtype, self.gate_weight.dtype)
        with without_autocast(gate_x):
            logits = F.linear(
                gate_x.to(dtype), self.gate_weight.to(dtype), self.gate_bias.to(dtype)
            )
            return F.pad(logits, (1, 0)).log_softmax(-1)

    def log_joint(self, data: GrowthData) -> Tensor:
        """`(..., K)`, log-probability of the class plus log-density of the responses in it."""
        return self.log_weights(data.gate_x) + self.experts.condition(data).log_density

    def forward(
        self,
        y: Tensor,
        t: Tensor,
        gate_x: Tensor | None = None,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Log-density of responses."""
        return self.log_joint(self.data(y, t, gate_x, expert_x, tvc_x, mask)).logsumexp(-1)

    def posterior(
        self,
        y: Tensor,
        t: Tensor,
        gate_x: Tensor | None = None,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`(..., K)`, the probability of each class given the responses; see `forward`."""
        return self.log_joint(self.data(y, t, gate_x, expert_x, tvc_x, mask)).softmax(-1)

    def growth_factors(
        self,
        y: Tensor,
        t: Tensor,
        gate_x: Tensor | None = None,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`(..., d)`, the mean of each subject's growth factors given the responses."""
        data = self.data(y, t, gate_x, expert_x, tvc_x, mask)
        found = self.experts.condition(data)
        weights = (self.log_weights(data.gate_x) + found.log_density).softmax(-1)
        return (weights[..., None] * found.mean).sum(-2)

    def predict_trajectory(
        self, t: Tensor, expert_x: Tensor | None = None, tvc_x: Tensor | None = None
    ) -> Tensor:
        """`(..., K, J)`, the mean curve of each class at times `(..., J)`."""
        data = self.experts.data(torch.zeros_like(t), t, expert_x, tvc_x)
        params = cast(self.experts.params(), data.t.dtype)
        with without_autocast(t):
            loadings = self.experts.trajectory.loadings(data.t[..., None, :], params.gamma)
            return apply(loadings, centers(params, data)) + direct_effects(params, data)

    @torch.no_grad()
    def sample(
        self,
        t: Tensor,
        gate_x: Tensor | None = None,
        expert_x: Tensor | None = None,
        tvc_x: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> GrowthSample:
        """Draw a class, growth factors and responses for each subject at times `(..., J)`."""
        data = self.data(torch.zeros_like(t), t, gate_x, expert_x, tvc_x)
        params = cast(self.experts.params(), data.t.dtype)
        cumulated = self.log_weights(data.gate_x).exp().cumsum(-1)
        uniform = torch.empty_like(cumulated[..., :1]).uniform_(generator=generator)
        classes = (cumulated < uniform * cumulated[..., -1:]).sum(-1)

        gamma, scale_tril = params.gamma[classes], params.scale_tril[classes]
        center = centers(params, data)
        index = classes[..., None, None].expand(*classes.shape, 1, center.shape[-1])
        center = center.gather(-2, index).squeeze(-2)
        zeta = apply(scale_tril, torch.empty_like(center).normal_(generator=generator))
        factors = center + zeta
        curve = apply(self.experts.trajectory.loadings(data.t, gamma), factors)
        curve = curve + apply(data.tvc_x, params.kappa[classes])
        noise = torch.empty_like(curve).normal_(generator=generator)
        y = curve + params.theta[classes].sqrt()[..., None] * noise
        return GrowthSample(y, classes, factors)

    def extra_repr(self) -> str:
        """Sizes in short."""
        sizes = (self.num_classes, self.num_gate_covariates, self.num_expert_covariates)
        return ", ".join(map(str, sizes))
