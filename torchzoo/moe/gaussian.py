"""Gaussian mixture of experts: a conditional density with a gate and linear Gaussian experts.

H. Nguyen, P. Akbarian and N. Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
Experts?", 2024. With `k` experts, inputs `x` in R^d and a scalar response `y`

    p(y | x) = sum_i pi_i(x) N(y | a_i^T x + b_i, var_i),
    pi(x) = softmax(s(x) / tau),   s_i(x) = beta1_i^T x + beta0_i   (dense-to-sparse gate)
                              or   s_i(x) = sigma(beta1_i^T x) + beta0_i   (activation gate).

The top-K gate, which takes the softmax over the chosen experts only, is the subject of
`torchzoo.moe.topk_softmax`.

The gate is any `Gate` of the package, so that the gate studied here is the one that routes tokens
in a network. With the linear gate `u = exp(beta1^T x / tau) N(y | a^T x + b, var)` satisfies
`du/dtau = -(1/tau) beta1^T du/dbeta1`, which makes (beta1, beta0, tau) known up to a common factor
only, as well as `d2u/dbeta1 db = (1/tau) du/da` and `du/dvar = (1/2) d2u/db2`.

Deviations from the paper: none in the density. The paper maximises the likelihood over measures of
at most `k` atoms without saying how; here by L-BFGS or by expectation-maximisation.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from torchzoo.hub import ZooModel
from torchzoo.moe.dense_to_sparse import ActivationDenseToSparseGate, DenseToSparseGate
from torchzoo.moe.em import fit_em
from torchzoo.moe.gates import NoisyTopKGate, SoftmaxGate, TopKGate
from torchzoo.moe.gaussian_params import MoEParams
from torchzoo.moe.likelihood import check_responses, minimize_known, negative_log_likelihood
from torchzoo.moe.routing import Gate, check_count, top_k_mask, without_autocast
from torchzoo.registry import Example, register

MIN_GAIN = 1e-13
"""Least gain of mean log-likelihood in a whole line search: where the experts chosen change, the
likelihood jumps, and L-BFGS would halve its steps towards the jump for ever."""


def _make_gate(
    kind: str, dim: int, num_experts: int, top_k: int | None, with_bias: bool, **factory: Any
) -> Gate:
    """A gate by its name, its biases and its temperature (if it has one) to be estimated."""
    if kind == "softmax":
        return SoftmaxGate(dim, num_experts, bias=True, **factory)
    if kind == "dense_to_sparse":
        return DenseToSparseGate(
            dim, num_experts, temperature="learned", noise=None, bias=True, **factory
        )
    if kind == "activation":
        return ActivationDenseToSparseGate(dim, num_experts, learn_temperature=True, **factory)
    if kind == "topk":
        if top_k is None:
            raise ValueError(f"top_k: expected 1..{num_experts} with the gate 'topk', got None")
        check_count("top_k", top_k, 1, num_experts)
        return TopKGate(dim, num_experts, top_k, select_with_bias=with_bias, **factory)
    kinds = "'softmax', 'dense_to_sparse', 'activation', 'topk' or a Gate"
    raise ValueError(f"gate: expected {kinds}, got {kind!r}")


def _check_gate(gate: Gate, dim: int, num_experts: int) -> None:
    if not isinstance(gate, Gate):
        raise ValueError(f"gate: expected a name or a Gate, got {type(gate).__name__}")
    if (gate.dim, gate.num_experts) != (dim, num_experts):
        raise ValueError(
            f"gate: expected one of dim {dim} with {num_experts} experts, "
            f"got dim {gate.dim} with {gate.num_experts}"
        )
    noisy = isinstance(gate, NoisyTopKGate)
    if noisy or (isinstance(gate, DenseToSparseGate) and gate.noise is not None):
        raise ValueError(f"gate: expected one without noise, got {gate}")


@register(
    paper=69,
    example=lambda: Example(
        kwargs={"dim": 3, "num_experts": 4, "gate": "activation"},
        inputs=(torch.randn(5, 3),),
        bad_options={"num_experts": 0, "gate": "hard", "top_k": 2},
    ),
    compare="a statistical model: what counts is its fit, which its experiment measures",
)
class GaussianMoE(ZooModel):
    """Conditional density of a scalar given features: gated linear experts with Gaussian noise.

    Args:
        dim: Features `d` of an input.
        num_experts: Number of experts `k`.
        gate: "softmax", "dense_to_sparse" (linear scores and a learned temperature),
            "activation" (sigmoid of the scores and a learned temperature), "topk", or a `Gate`
            without noise. The named ones have a bias.
        top_k: Experts a token with the gate "topk", which weighs them by the softmax over their
            scores `beta1_i^T x + beta0_i`. None with the other gates.
        select_with_bias: Whether the gate "topk" chooses the experts by these scores, as routers
            do; if not, it chooses them by `beta1_i^T x` alone, as in the paper. A `TopKGate` has
            an option of its own.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., d)`
        - output: distribution over y with batch shape `(...)`.

    Returns:
        A `torch.distributions.MixtureSameFamily` of normals.

    Attributes:
        gate: The `Gate`, whose `weight` is beta1 and whose `bias` is beta0.
        a: `(k, d)` parameter, slopes.
        b: `(k,)` parameter, intercepts.
        log_var: `(k,)` parameter, logarithms of the variances.

    Raises:
        ValueError: A size below 1, an unknown gate, one with noise or of another size, a `top_k`
            that the gate has no use for, or an input whose last dimension is not `dim`.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
        Experts?", 2024, eq. (1); the gate "topk": Nguyen, Akbarian, Yan and Ho, "Statistical
        Perspective of Top-K Sparse Softmax Gating Mixture of Experts", 2024, eq. (1).

    Example:
        >>> model = GaussianMoE(3, 4, gate="activation")
        >>> x, y = torch.randn(100, 3), torch.randn(100)
        >>> model(x).mean.shape, model.log_prob(x, y).shape
        (torch.Size([100]), torch.Size([100]))
        >>> before = model.log_prob(x, y).mean()
        >>> bool(model.fit(x, y, max_iter=5).log_prob(x, y).mean() > before)
        True
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        gate: str | Gate = "softmax",
        top_k: int | None = None,
        select_with_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("dim", dim)
        check_count("num_experts", num_experts)
        factory = {"device": device, "dtype": dtype}
        if isinstance(gate, str):
            built = _make_gate(gate, dim, num_experts, top_k, select_with_bias, **factory)
        else:
            _check_gate(gate, dim, num_experts)
            built = gate
        k = built.k if isinstance(built, TopKGate) else None
        if top_k is not None and top_k != k:
            raise ValueError(f"top_k: expected {k} with this gate, got {top_k}")
        if select_with_bias and not (isinstance(built, TopKGate) and built.select_with_bias):
            raise ValueError("select_with_bias: expected False with this gate, got True")
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.gate = built
        self.a = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.log_var = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the lines at random, with unit variances; the gate has its own reset."""
        nn.init.normal_(self.a, std=self.dim**-0.5)
        nn.init.normal_(self.b)
        nn.init.zeros_(self.log_var)

    @classmethod
    def from_params(
        cls,
        params: MoEParams,
        *,
        gate: str | Gate = "softmax",
        top_k: int | None = None,
        select_with_bias: bool = False,
    ) -> GaussianMoE:
        """The model with given parameters.

        Args:
            params: Parameters without batch dimensions; copied.
            gate: Gate by name, or a `Gate`, which is copied. It must have a temperature where
                `params` has one.
            top_k: Experts a token, with the gate "topk".
            select_with_bias: Whether the gate "topk" chooses by scores with bias.

        Raises:
            ValueError: Shapes that don't fit, variances or a temperature that are not above 0, or
                a bias or temperature that the gate doesn't have.
        """
        params.check()
        if params.beta1.ndim != 2:
            got = tuple(params.beta1.shape)
            raise ValueError(f"params.beta1: expected (k, d) without batch dimensions, got {got}")
        num_experts, dim = params.beta1.shape
        kind = gate if isinstance(gate, str) else copy.deepcopy(gate)
        options: dict[str, Any] = {"top_k": top_k, "select_with_bias": select_with_bias}
        model = cls(dim, num_experts, gate=kind, **options).to(params.beta1)
        model.set_params(params)
        return model

    def params(self) -> MoEParams:
        """The parameters, as tensors that carry gradients to those of the model."""
        beta0 = self.b.new_zeros(self.num_experts) if self.gate.bias is None else self.gate.bias
        values = (self.gate.weight, self.a, self.b, self.log_var.exp(), self.gate.temperature)
        return MoEParams(beta0, *values)

    @torch.no_grad()
    def set_params(self, params: MoEParams) -> None:
        """Copy parameters into the model; see `from_params` for what is refused."""
        if not bool((params.var > 0).all()):
            raise ValueError(f"params.var: expected values above 0, got {params.var}")
        if self.gate.bias is not None:
            self.gate.bias.copy_(params.beta0)
        elif bool(params.beta0.any()):
            raise ValueError(f"params.beta0: expected zeros, the gate has no bias: {params.beta0}")
        if params.temperature is not None:
            if self.gate.log_tau is None:
                raise ValueError("params.temperature: expected None, the gate has no temperature")
            if not bool(params.temperature > 0):
                raise ValueError(f"params.temperature: expected above 0, got {params.temperature}")
            self.gate.log_tau.copy_(params.temperature.log())
        self.gate.weight.copy_(params.beta1)
        self.a.copy_(params.a)
        self.b.copy_(params.b)
        self.log_var.copy_(params.var.log())

    def selected(self, x: Tensor) -> Tensor:
        """`(..., k)` bool, the experts that the gate uses for inputs `(..., d)`."""
        logits = self.gate.score(x)
        if not isinstance(self.gate, TopKGate):
            return torch.ones_like(logits, dtype=torch.bool)
        return top_k_mask(self.gate.selection(x, logits), self.gate.k)

    def log_weights(self, x: Tensor, *, selected: Tensor | None = None) -> Tensor:
        """`(..., k)`, log-weights of the gate for inputs `(..., d)`; -inf off the top k.

        The weights of the top k add up to 1, whether the gate renormalises them or not.

        Args:
            x: Inputs, `(..., d)`.
            selected: `(..., k)` bool, experts to use in place of the top k.
        """
        logits = self.gate_logits(x)
        if not isinstance(self.gate, TopKGate):
            return logits
        selected = self.selected(x) if selected is None else selected
        return logits.masked_fill(~selected, -math.inf).log_softmax(-1)

    def gate_logits(self, x: Tensor) -> Tensor:
        """`(..., k)`, whose softmax over the selected experts are the weights of the gate."""
        return self.gate.score(x) if isinstance(self.gate, TopKGate) else self.gate.log_probs(x)

    def expert_means(self, x: Tensor) -> Tensor:
        """`(..., k)`, the means `a_i^T x + b_i` for inputs `(..., d)`."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.a.dtype), torch.float32)
        with without_autocast(x):
            return F.linear(x.to(dtype), self.a.to(dtype), self.b.to(dtype))

    def forward(self, x: Tensor) -> MixtureSameFamily:
        """Distribution of y for inputs `(..., d)`."""
        weights = Categorical(logits=self.log_weights(x), validate_args=False)
        mean = self.expert_means(x)
        std = (0.5 * self.log_var.to(mean.dtype)).exp().expand_as(mean)
        return MixtureSameFamily(weights, Normal(mean, std, validate_args=False), False)

    def mean(self, x: Tensor) -> Tensor:
        """`(...)`, the mean of y given x `(..., d)`, the regression function."""
        return self(x).mean

    def variance(self, x: Tensor) -> Tensor:
        """`(...)`, the variance of y given x `(..., d)`."""
        return self(x).variance

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """`(..., k)`, `log pi_i(x) + log N(y | a_i^T x + b_i, var_i)`, y `(...)`."""
        check_responses(x, y)
        log_weights, mean = self.log_weights(x), self.expert_means(x)
        log_var = self.log_var.to(mean.dtype)
        squared = (y.unsqueeze(-1) - mean).square() * (-log_var).exp()
        return log_weights - 0.5 * (squared + log_var + math.log(2 * math.pi))

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """`(...)`, the log-density of y `(...)` given x `(..., d)`."""
        return self.log_joint(x, y).logsumexp(-1)

    def responsibilities(self, x: Tensor, y: Tensor) -> Tensor:
        """`(..., k)`, the probability that each expert made y `(...)`, given x `(..., d)`."""
        return self.log_joint(x, y).softmax(-1)

    @torch.no_grad()
    def sample(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw a y `(...)` for each x `(..., d)`."""
        cumulated = self.log_weights(x).exp().cumsum(-1)
        mean = self.expert_means(x)
        std = self.log_var.to(mean.dtype).mul(0.5).exp().expand_as(mean)
        one = mean.new_empty(*mean.shape[:-1], 1)
        uniform = torch.empty_like(one).uniform_(generator=generator)
        # With "<=" a draw of exactly 0 doesn't fall on a first expert of weight 0.
        expert = (cumulated <= uniform * cumulated[..., -1:]).sum(-1, keepdim=True)
        noise = torch.empty_like(one).normal_(generator=generator)
        return (mean.gather(-1, expert) + std.gather(-1, expert) * noise).squeeze(-1)

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        method: str = "lbfgs",
        max_iter: int = 200,
        tol: float = 1e-9,
        restarts: int = 1,
    ) -> GaussianMoE:
        """Climb to a local maximum of the likelihood from the present parameters.

        Parameters that don't require a gradient stay as they are with "lbfgs". The likelihood
        never decreases.

        Args:
            x: Inputs, `(..., d)`.
            y: Responses, `(...)`.
            method: "lbfgs" or "em"; see `fit_em`.
            max_iter: Most iterations.
            tol: Stop where the gradient of the mean log-likelihood ("lbfgs") or the gain of an
                iteration ("em") is below it.
            restarts: Number of starts, of which the best is kept: the present parameters, and
                clusters of `(n, d)` inputs for the rest, as in `fit_mle`.

        Returns:
            The model itself.

        Raises:
            ValueError: An unknown method, no data, or shapes that don't fit.
        """
        check_count("restarts", restarts)
        if y.numel() == 0:
            raise ValueError(f"y: expected at least one response, got {tuple(y.shape)}")
        if restarts > 1:
            from torchzoo.moe.fitting import fit_restarts

            fit_restarts(self, x, y, restarts, method=method, max_iter=max_iter, tol=tol)
        elif method == "em":
            fit_em(self, x, y, max_iter=max_iter, tol=tol)
        elif method == "lbfgs":
            check_responses(x, y)
            rows = x.reshape(-1, x.shape[-1])
            objective = partial(negative_log_likelihood, self, rows, y.flatten())
            minimize_known(
                objective, self.parameters(), max_iter=max_iter, tol=tol, min_gain=MIN_GAIN
            )
        else:
            raise ValueError(f"method: expected 'lbfgs' or 'em', got {method!r}")
        return self

    def extra_repr(self) -> str:
        """Sizes in short."""
        return f"{self.dim}, {self.num_experts}"
