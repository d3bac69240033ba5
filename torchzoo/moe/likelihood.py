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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchzoo.common.solvers import minimize_with_slopes
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
    parts = [part.view_as(p) for p, part in zip(free, point.detach().split(sizes), strict=True)]

    @torch.no_grad()
    def place() -> None:
        for p, part in zip(free, parts, strict=True):
            p.copy_(part)

    def at_point() -> tuple[Tensor, list[Tensor]]:
        place()
        value, slopes = objective()
        slope = torch.cat([slopes[p].flatten() for p in free])
        return value.to(point.dtype), [slope.to(point.dtype)]

    minimize_with_slopes(at_point, [point], max_iter=max_iter, tol=tol, min_gain=min_gain)
    place()


def mean_log_likelihood(model: GaussianMoE, x: Tensor, y: Tensor) -> Tensor:
    """The mean of `log p(y | x)` over the points, faster than `log_prob` and without a graph.

    Args:
        model: The model.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
    """
    with torch.no_grad(), without_autocast(x):
        used, joint, _, _ = _densities(model, x, y, gate_logits(model.gate, x)[0])
        gap = normalise(joint)[0].sub_(normalise(used)[0])
        return gap.mean() - 0.5 * math.log(2 * math.pi)


def negative_log_likelihood(model: GaussianMoE, x: Tensor, y: Tensor) -> tuple[Tensor, Slopes]:
    """The mean of `-log p(y | x)` over the points, and its slope for each parameter.

    Args:
        model: The model.
        x: Inputs, `(n, d)`.
        y: Responses, `(n,)`.
    """
    z, gate_slopes = gate_logits(model.gate, x)
    with torch.no_grad(), without_autocast(x):
        used, joint, pull, squared = _densities(model, x, y, z)
        log_p, r = normalise(joint)
        log_sum, pi = normalise(used)
        loss = log_sum.sub_(log_p).mean() + 0.5 * math.log(2 * math.pi)
        x, n = x.to(z.dtype), len(y)
        to_mean = pull.mul_(r).div_(-n)
        slopes = {
            model.a: to_mean @ x,
            model.b: to_mean.sum(1),
            model.log_var: (r - squared.mul_(r)).sum(1) / (2 * n),
        }
        return loss, slopes | gate_slopes(pi.sub_(r).div_(n))


def _densities(model: GaussianMoE, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """`(k, n)`: logits z in use, z - (e^2 / var + log var) / 2, e / var and e^2 / var."""
    used = hide_unchosen(model.gate, x, z)
    a, b, log_var = (p.to(z.dtype) for p in (model.a, model.b, model.log_var[:, None]))
    left = y - torch.addmm(b[:, None], a, x.mT.to(z.dtype))
    pull = left * (-log_var).exp()
    squared = left.mul_(pull)
    return used, used - (squared + log_var).mul_(0.5), pull, squared


def check_responses(x: Tensor, y: Tensor) -> None:
    """Raise a ValueError unless there is a response `(...)` for each input `(..., d)`."""
    if y.shape != x.shape[:-1]:
        raise ValueError(
            f"y: expected {tuple(x.shape[:-1])} as x is {tuple(x.shape)}, got {tuple(y.shape)}"
        )


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
        return loss, gate_slopes(pi.sub_(targets).div_(len(x)))


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
    top = joint.amax(0).clamp_min_(torch.finfo(joint.dtype).min)
    parts = (joint - top).exp_()
    total = parts.sum(0)
    parts.div_(total)
    return top.add_(total.log_()), parts
