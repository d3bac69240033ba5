"""Losses that keep routers balanced and well scaled: functions of a `Routing`, never stored.

With `f_e` the fraction of used slots at expert `e` (no gradient) and `P_e` its mean probability,

    load balance  E sum_e f_e P_e            z  mean_t (logsumexp_e logits_te)^2
    importance    CV(sum_t probs_t)^2        entropy  mean_t -sum_e probs_te log probs_te

All are computed in the precision of the router, at least float32, and are 0 without tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from torchzoo.moe.routing import Routing


def load_balance_loss(routing: Routing, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Balance of the load over experts, `E sum_e f_e P_e`.

    It is 1 when load or probabilities are uniform and `E / k` when all tokens go to the same `k`
    experts with probability `1 / k` each. Only `P` carries a gradient.

    Args:
        routing: What a gate returned.
        group: Process group whose ranks hold the parts of one batch. Each rank then returns the
            loss of the whole batch, and gradients averaged over the ranks, as data parallel
            training does, are those of the whole batch.

    Returns:
        Scalar.

    Source:
        Fedus, Zoph and Shazeer, "Switch Transformers", 2021, eq. (4)-(6).

    Example:
        >>> from torchzoo.moe import SoftmaxGate
        >>> round(load_balance_loss(SoftmaxGate(8, 4)(torch.randn(10, 8))).item(), 5)
        1.0
    """
    load = routing.load.to(routing.probs.dtype)
    probs = routing.probs.sum(0)
    tokens = routing.probs.shape[0]
    if group is None:
        mean_probs = probs / max(tokens, 1)
    else:
        whole = torch.cat([load, probs.detach(), probs.new_tensor([float(tokens)])])
        dist.all_reduce(whole, group=group)
        load, whole_probs, count = whole.split([load.numel(), probs.numel(), 1])
        count = count.clamp(min=1)
        # The value of the whole batch with this rank's gradient, times the ranks that average it.
        local = probs * (dist.get_world_size(group) / count)
        mean_probs = local + (whole_probs / count - local).detach()
    fraction = load / load.sum().clamp(min=1)
    return routing.probs.shape[-1] * (fraction * mean_probs).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-partition function of the logits, which keeps them small.

    Args:
        routing: What a gate returned.

    Returns:
        Scalar.

    Source:
        Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022,
        eq. (5).

    Example:
        >>> from torchzoo.moe import SoftmaxGate
        >>> z_loss(SoftmaxGate(8, 1)(torch.zeros(10, 8))).item()
        0.0
    """
    return routing.logits.logsumexp(-1).square().sum() / max(routing.logits.shape[0], 1)


def importance_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' total probability.

    The source sums the sparse combine weights; probabilities also reach experts that were not
    chosen, and are the same for every gate.

    Args:
        routing: What a gate returned.

    Returns:
        Scalar; 0 with one expert.

    Source:
        Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", 2017, eq. (6) and (7).

    Example:
        >>> from torchzoo.moe import SoftmaxGate
        >>> importance_loss(SoftmaxGate(8, 4)(torch.zeros(10, 8))).item()
        0.0
    """
    return cv_squared(routing.probs.sum(0))


def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy of the experts' probabilities, in nats: from 0 to log E.

    Args:
        routing: What a gate returned.

    Returns:
        Scalar.

    Example:
        >>> from torchzoo.moe import SoftmaxGate
        >>> round(router_entropy(SoftmaxGate(8, 4)(torch.zeros(10, 8))).item(), 4)
        1.3863
    """
    probs = routing.probs
    tiny = torch.finfo(probs.dtype).tiny  # a finite gradient where a probability is 0
    return -(probs * probs.clamp(min=tiny).log()).sum() / max(probs.shape[0], 1)


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance over squared mean; 0 for zeros."""
    tiny = torch.finfo(values.dtype).tiny
    return values.var(correction=0) / values.mean().square().clamp(min=tiny)
