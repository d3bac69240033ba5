"""A cost model of one training step of a mixture-of-experts layer on a cluster.

    latency = T_nonMoE + a2a + max_d compute_d + exposed
    compute_d = 3 tokens_d flops_per_token / flops                   (forward and backward)
    a2a       = 4 exchanges, each as long as its busiest link
    exposed   = max(0, spAG - T_fwd) + max(0, spAG + spRS - T_bwd) + what can't be hidden

`T_nonMoE = T_fwd + T_bwd`, `T_bwd = 2 T_fwd`. Devices of a node have links of `bw_intra` bytes a
second, a node has one link of `bw_inter` to the others, all full duplex and working side by side.
Latencies are simulated; none is a measured speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.moe.placement import ExpertPlacement
from torchzoo.moe.planning import sparse_materialize
from torchzoo.moe.token_plan import token_flow

CONSTANTS: Mapping[str, float] = {
    "flops": 150e12,  # multiply and add counted as two, reached on an A100 in bfloat16
    "bw_intra": 300e9,  # NVLink, a direction
    "bw_inter": 50e9,  # 400 Gb/s a node
    "token_bytes": 2 * 1024,  # 1,024 features in bfloat16
    "expert_bytes": 2 * 4 * 1024**2,  # two matrices 1,024 x 2,048 in bfloat16
    "flops_per_token": 2 * 4 * 1024**2,
    "non_moe_seconds": 1e-3,  # attention and the rest, forward
}
"""Defaults of `simulate_step`: A100-like devices, eight a node."""


def link_seconds(flow: Tensor, node_size: int, *, bw_intra: float, bw_inter: float) -> float:
    """How long an exchange takes: the most loaded link's bytes over its bandwidth.

    Args:
        flow: `(D, D)`, bytes from a device to a device.
        node_size: Devices a node.
        bw_intra: Bytes a second of a device's link within its node, each way.
        bw_inter: Bytes a second of a node's link to the other nodes, each way.
    """
    return float(_link_times(flow, node_size, bw_intra=bw_intra, bw_inter=bw_inter))


def _link_times(flow: Tensor, node_size: int, *, bw_intra: float, bw_inter: float) -> Tensor:
    """Seconds `(...)` of exchanges `(..., D, D)`."""
    blocks = rearrange(flow, "... (n i) (m j) -> ... n m i j", i=node_size, j=node_size)
    across = blocks.sum((-2, -1))
    across = across - torch.diag_embed(across.diagonal(dim1=-2, dim2=-1))  # node to node
    within = blocks.diagonal(dim1=-4, dim2=-3)  # (..., i, j, node)
    own = within.diagonal(dim1=-3, dim2=-2).mT
    device = torch.stack([within.sum(-2) - own, within.sum(-3) - own]).amax((0, -2, -1))
    node = torch.stack([across.sum(-1), across.sum(-2)]).amax((0, -1))
    return torch.maximum(device / bw_intra, node / bw_inter)


def simulate_step(
    loads: Tensor,
    plan: ExpertPlacement,
    *,
    flops: float = CONSTANTS["flops"],
    bw_intra: float = CONSTANTS["bw_intra"],
    bw_inter: float = CONSTANTS["bw_inter"],
    token_bytes: float = CONSTANTS["token_bytes"],
    expert_bytes: float = CONSTANTS["expert_bytes"],
    flops_per_token: float = CONSTANTS["flops_per_token"],
    non_moe_seconds: float = CONSTANTS["non_moe_seconds"],
    late: ExpertPlacement | None = None,
) -> dict[str, float]:
    """Predict what an iteration of a layer costs under a placement.

    Args:
        loads: Tokens that each device has for each expert.
        plan: The placement whose copies are gathered, used and freed in this iteration.
        flops: Floating-point operations a second of a device.
        bw_intra: Bytes a second of a device's link within its node, each way.
        bw_inter: Bytes a second of a node's link to the others, each way.
        token_bytes: Bytes of a token.
        expert_bytes: Bytes of an expert's parameters.
        flops_per_token: Floating-point operations of an expert on a token, forward.
        non_moe_seconds: Forward time of the other layers up to this one.
        late: A placement with further copies, chosen when the loads were known: its first gather
            starts after the gate and is not hidden.

    Shape:
        - loads: `(D, E)`, int64

    Returns:
        `latency`, `a2a_time`, `compute_time` and `exposed_time` in seconds, `straggler_ratio`
        (most tokens of a device over their mean), `bytes` that tokens and experts move between
        devices, `gather_time` of one gather, and `balanced`, the latency with the mean load
        everywhere and no traffic.

    Raises:
        ValueError: Loads that don't fit the plan, or a constant that is not positive.

    Source:
        Qing et al., "Hecate", 2025, sections 3 and 4, for what overlaps with what.

    Example:
        >>> plan = ExpertPlacement(torch.tensor([0, 1]), torch.eye(2) > 0, node_size=2)
        >>> step = simulate_step(torch.tensor([[30, 10], [30, 10]]), plan)
        >>> step["straggler_ratio"]
        1.5
    """
    constants = {
        "flops": flops,
        "bw_intra": bw_intra,
        "bw_inter": bw_inter,
        "token_bytes": token_bytes,
        "expert_bytes": expert_bytes,
        "flops_per_token": flops_per_token,
    }
    for name, value in constants.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    used = late or plan
    links = {"bw_intra": bw_intra, "bw_inter": bw_inter}
    tokens = token_flow(loads, used.materialized, used.node_size)
    received = tokens.sum(0)
    most, mean = float(received.max()), float(received.sum()) / len(received)

    def compute(count: float) -> float:
        return 3 * count * flops_per_token / flops

    a2a = 4 * link_seconds(tokens * token_bytes, plan.node_size, **links)
    gather = _rounds_seconds(plan, expert_bytes, links)
    reduce = gather if late is None else _rounds_seconds(used, expert_bytes, links)
    unhidden = 0.0 if late is None else max(reduce - gather, 0.0)
    exposed = max(0.0, gather - non_moe_seconds) + unhidden
    exposed += max(0.0, 2 * reduce - 2 * non_moe_seconds)
    moved = int(used.materialized.sum()) - used.num_experts
    away = float(tokens.sum() - tokens.diagonal().sum())
    return {
        "latency": 3 * non_moe_seconds + a2a + compute(most) + exposed,
        "a2a_time": a2a,
        "compute_time": compute(most),
        "exposed_time": exposed,
        "gather_time": gather,
        "straggler_ratio": most / mean if mean else 1.0,
        "bytes": 4 * away * token_bytes + 3 * moved * expert_bytes,
        "balanced": 3 * non_moe_seconds + compute(mean),
    }


def _rounds_seconds(
    placement: ExpertPlacement, expert_bytes: float, links: Mapping[str, float]
) -> float:
    """How long the rounds of a sparse all-gather take, one after the other."""
    flows = placement.flows * expert_bytes
    return sum(_link_times(flows, placement.node_size, **links).tolist())


def overlap_degree(
    non_moe_seconds: float, bandwidth: float, expert_bytes: float, num_experts: int
) -> int:
    """How many experts can be sent while the other layers compute, at most all.

    Source:
        Qing et al., "Hecate", 2025, section 4: `floor(T_nonMoE bw / expert_bytes)`.

    Example:
        >>> overlap_degree(1e-3, 50e9, 8.4e6, 64)
        5
    """
    return min(int(non_moe_seconds * bandwidth // expert_bytes), num_experts)


def calibrate(
    loads: Tensor,
    plan: ExpertPlacement,
    *,
    overlap_degree: int,
    memory_capacity: int,
    constants: Mapping[str, float] | None = None,
) -> ExpertPlacement:
    """Add copies to a placement now that the loads are known, if that pays off.

    The planner runs again on the true loads with the memory that is left; its further copies,
    whose gather can't be hidden any more, are accepted if the predicted latency falls.

    Args:
        loads: Tokens that each device has for each expert.
        plan: The placement made from past loads.
        overlap_degree: As in `sparse_materialize`.
        memory_capacity: As in `sparse_materialize`.
        constants: Constants of `simulate_step` that differ from the defaults.

    Shape:
        - loads: `(D, E)`, int64

    Returns:
        The plan, or one with more copies.

    Raises:
        ValueError: Loads that don't fit the plan.

    Source:
        Qing et al., "Hecate", 2025, section 4.

    Example:
        >>> plan = ExpertPlacement(torch.tensor([0, 1]), torch.eye(2) > 0, node_size=2)
        >>> loads = torch.tensor([[30_000, 0], [30_000, 0]])
        >>> calibrate(loads, plan, overlap_degree=1, memory_capacity=1).replicas(0)
        [0, 1]
    """
    held = sparse_materialize(
        plan.owner,
        loads.sum(0),
        overlap_degree=overlap_degree,
        memory_capacity=memory_capacity,
        node_size=plan.node_size,
        num_devices=plan.num_devices,
        present=plan.materialized,
    )
    more = ExpertPlacement(plan.owner, held, node_size=plan.node_size)
    options: dict[str, Any] = dict(constants or {})
    now = simulate_step(loads, plan, **options)["latency"]
    return more if simulate_step(loads, plan, late=more, **options)["latency"] < now else plan
