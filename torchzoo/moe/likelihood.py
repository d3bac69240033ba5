"""The likelihood of a Gaussian mixture of experts, its gradient in closed form, and its top.

With logits z of the experts in use, residuals `e_i = y - a_i^T x - b_i`, and

    log p(y | x) = logsumexp_i(z_i - (e_i^2 / var_i + log var_i) / 2) - logsumexp_i(z_i) + const,

responsibilities r and weights pi of the gate give all slopes in the pass that gives the value:

    d/dz = r - pi,   d/d(a, b) = r e / var (x, 1),   d/dlog var = r (e^2 / var - 1) / 2.

Experts are the first axis of what is summed over them, and points the last one, which is long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchzoo.common.solvers import minimize_lbfgs
from torchzoo.moe.gates import SoftmaxGate, TopKGate
from torchzoo.moe.routing import Gate, top_k_mask, without_autocast

if TYPE_CHECKING:
    from torchzoo.moe.gaussian import GaussianMoE

Slopes = dict[Tensor, Tensor]
"""For each parameter the slope of an objective."""


def minimize_known(
    objective: Callable[[], tuple[Tensor, Slopes]],
    params: Iterable[Tensor],
    *,
    max_iter: int,
    tol: float = 1e-9,
    min_gain: float = 0.0,
) -> None:
    """Minimise in place by L-BFGS an objective that gives its slopes itself.

    Args:
        objective: Computes the value and the slopes for the parameters as they are.
        params: Parameters; those that don't require a gradient stay as they are.
        max_iter: Most iterations.
        tol: See `minimize_lbfgs`.
        min_gain: See `minimize_lbfgs`.

    Raises:
        ValueError: No parameter requires a gradient.
    """
    free = [p for p in params if p.requires_grad]
    if not free:
        raise ValueError("params: expected one that requires a gradient, got none")
    # As one vector, which takes fewer operations an iteration.
    point = torch.cat([p.detach().flatten() for p in free]).requires_grad_()
    sizes = [p.numel() for p in free]

    def place() -> None:
        with torch.no_grad():
            for p, part in zip(free, point.split(sizes), strict=True):
                p.copy_(part.view_as(p))

    def closure() -> Tensor:
        place()
        value, slopes = objective()
        slope = torch.cat([slopes[p].flatten() for p in free])
        return _Known.apply(point, value.to(point.dtype), slope.to(point.dtype))

    minimize_lbfgs(closure, [point], max_iter=max_iter, tol=tol, min_gain=min_gain)
    place()


class _Known(torch.autograd.Function):
    """A value at a point where the slope is known."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream * ctx.saved_tensors[0], None, None


def negative_log_likelihood(model: GaussianMoE, x: Tensor, y: Tensor) -> tuple[Tensor, Slopes]:
    """The mean of `-log p(y | x)` over the points, and its slope for each parameter.

    Args:
        model: The model.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
    """
    z, gate_slopes = gate_logits(model.gate, x)
    with torch.no_grad(), without_autocast(x):
        used = hide_unchosen(model.gate, x, z)
        a, b, log_var = (p.to(z.dtype) for p in (model.a, model.b, model.log_var))
        x, n = x.to(z.dtype), len(y)
        left = y - torch.addmm(b[:, None], a, x.mT)
        pull = left * (-log_var).exp()[:, None]
        squared = left * pull
        log_p, r = normalise(used - 0.5 * (squared + log_var[:, None]))
        log_sum, pi = normalise(used)
        loss = (log_sum - log_p).mean() + 0.5 * math.log(2 * math.pi)
        to_mean = r * pull / -n
        slopes = {
            model.a: to_mean @ x,
            model.b: to_mean.sum(1),
            model.log_var: (r - r * squared).sum(1) / (2 * n),
        }
        return loss, slopes | gate_slopes((pi - r) / n)


def gate_cross_entropy(
    gate: Gate, x: Tensor, targets: Tensor, unused: Tensor
) -> tuple[Tensor, Slopes]:
    """The mean of `-sum_i r_i log pi_i(x)` over the points, and its slope for each parameter.

    Args:
        gate: The gate.
        x: Inputs, `(n, d)`.
        targets: Responsibilities r, `(k, n)`, 0 for experts that are not used; they add up to 1.
        unused: `(k, n)` bool, experts that are not used.
    """
    z, gate_slopes = gate_logits(gate, x)
    with torch.no_grad(), without_autocast(x):
        log_sum, pi = normalise(z.masked_fill(unused, -math.inf))
        loss = (log_sum - (targets * z).sum(0)).mean()
        return loss, gate_slopes((pi - targets) / len(x))


def gate_logits(gate: Gate, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Slopes]]:
    """`(k, n)`, logits of the gate, and what makes slopes for the gate of slopes for them."""
    with without_autocast(x):
        if type(gate) in (TopKGate, SoftmaxGate):
            with torch.no_grad():
                z = linear_logits(gate, x, gate.bias)

            def known(slope: Tensor) -> Slopes:
                slopes: Slopes = {gate.weight: slope @ x.to(slope.dtype)}
                return slopes if gate.bias is None else slopes | {gate.bias: slope.sum(1)}

            return z, known
        logits = gate.score(x) if isinstance(gate, TopKGate) else gate.log_probs(x)
    free = [p for p in gate.parameters() if p.requires_grad]

    def traced(slope: Tensor) -> Slopes:
        if not free:
            return {}
        return dict(zip(free, torch.autograd.grad(logits, free, slope.mT), strict=True))

    return logits.detach().mT.contiguous(), traced


def linear_logits(gate: Gate, x: Tensor, bias: Tensor | None) -> Tensor:
    """`(k, n)`, `weight x + bias` in at least float32."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.weight.dtype), torch.float32)
    weight, columns = gate.weight.to(dtype), x.mT.to(dtype)
    if bias is None:
        return weight @ columns
    return torch.addmm(bias.to(dtype)[:, None], weight, columns)


def hide_unchosen(gate: Gate, x: Tensor, z: Tensor) -> Tensor:
    """The logits `(k, n)`, -inf for experts that the gate doesn't choose."""
    if not isinstance(gate, TopKGate) or gate.k == gate.num_experts:
        return z
    if type(gate) is TopKGate and gate.choice_bias is None:
        by_weight = gate.bias is not None and not gate.select_with_bias
        selection = linear_logits(gate, x, None) if by_weight else z
    else:
        selection = gate.selection(x, z.mT).mT
    return z.masked_fill(~top_k_mask(selection, gate.k, dim=0), -math.inf)


def normalise(joint: Tensor) -> tuple[Tensor, Tensor]:
    """`logsumexp` and `softmax` along the first axis, `(n,)` and `(k, n)`."""
    # Where all are -inf, as after too long a step of a search, the sum is 0 and its log -inf.
    top = joint.amax(0).clamp_min(torch.finfo(joint.dtype).min)
    parts = (joint - top).exp()
    total = parts.sum(0)
    return top + total.log(), parts / total
