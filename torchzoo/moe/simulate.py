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

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.moe.placement import ExpertPlacement
from torchzoo.moe.planning import materialize_layers
from torchzoo.moe.token_plan import token_flows

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
        "non_moe_seconds": non_moe_seconds,
    }
    (step,) = simulate_layers(loads[None], [plan], [late], constants)
    return step


def simulate_layers(
    loads: Tensor,
    plans: Sequence[ExpertPlacement],
    late: Sequence[ExpertPlacement | None],
    constants: Mapping[str, float],
) -> list[dict[str, float]]:
    """`simulate_step` of several layers on the same devices, at once.

    Args:
        loads: `(L, D, E)`, int64, tokens that each device has for each expert of each layer.
        plans: Placement of each layer.
        late: For each layer a placement with further copies, or None.
        constants: Constants of `simulate_step` that differ from the defaults.

    Raises:
        ValueError: See `simulate_step`, or a constant that it doesn't have.
    """
    given = _checked(constants)
    non_moe, token_bytes, expert_bytes = (
        given[name] for name in ("non_moe_seconds", "token_bytes", "expert_bytes")
    )
    links = {"bw_intra": given["bw_intra"], "bw_inter": given["bw_inter"]}
    used = [more or plan for more, plan in zip(late, plans, strict=True)]
    held = torch.stack([placement.materialized for placement in used])
    tokens = token_flows(loads, held, used[0].node_size)
    times = _link_times(tokens * token_bytes, used[0].node_size, **links).tolist()
    received = tokens.sum(1)
    away = tokens.sum((1, 2)) - tokens.diagonal(dim1=1, dim2=2).sum(-1)
    counted = (received.amax(1), received.sum(1), away, held.sum((1, 2)))
    gathers = _rounds_seconds(plans, expert_bytes, links)
    reduces = _rounds_seconds(used, expert_bytes, links) if any(late) else gathers

    def compute(count: float) -> float:
        return 3 * count * given["flops_per_token"] / given["flops"]

    steps = []
    for layer, row in enumerate(zip(*(values.tolist() for values in counted), strict=True)):
        most, total, moving, copies = row
        gather, reduce, mean = gathers[layer], reduces[layer], total / received.shape[1]
        unhidden = 0.0 if late[layer] is None else max(reduce - gather, 0.0)
        exposed = max(0.0, gather - non_moe) + unhidden
        exposed += max(0.0, 2 * reduce - 2 * non_moe)
        a2a, moved = 4 * times[layer], copies - held.shape[1]
        steps.append(
            {
                "latency": 3 * non_moe + a2a + compute(most) + exposed,
                "a2a_time": a2a,
                "compute_time": compute(most),
                "exposed_time": exposed,
                "gather_time": gather,
                "straggler_ratio": most / mean if mean else 1.0,
                "bytes": 4 * moving * token_bytes + 3 * moved * expert_bytes,
                "balanced": 3 * non_moe + compute(mean),
            }
        )
    return steps


def _checked(constants: Mapping[str, float]) -> dict[str, float]:
    """The constants with the defaults of those that aren't given."""
    for name, value in constants.items():
        if name not in CONSTANTS:
            raise ValueError(f"constants: expected some of {', '.join(CONSTANTS)}, got {name!r}")
        if not value > 0 and name != "non_moe_seconds":
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return {**CONSTANTS, **constants}


def _rounds_seconds(
    placements: Sequence[ExpertPlacement], expert_bytes: float, links: Mapping[str, float]
) -> list[float]:
    """How long the rounds of each sparse all-gather take, one after the other."""
    flows = [placement.flows for placement in placements]
    if not any(map(len, flows)):
        return [0.0] * len(flows)
    times = _link_times(torch.cat(flows) * expert_bytes, placements[0].node_size, **links)
    return [sum(part.tolist()) for part in times.split([len(flow) for flow in flows])]


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
    capacity = {"overlap_degree": overlap_degree, "memory_capacity": memory_capacity}
    ((placement, _),) = calibrate_layers(loads[None], [plan], constants or {}, **capacity)
    return placement


def calibrate_layers(
    loads: Tensor,
    plans: Sequence[ExpertPlacement],
    constants: Mapping[str, float],
    *,
    overlap_degree: int,
    memory_capacity: int,
) -> list[tuple[ExpertPlacement, dict[str, float]]]:
    """`calibrate` of several layers on the same devices, each with what its step then costs.

    Args:
        loads: `(L, D, E)`, int64, tokens that each device has for each expert of each layer.
        plans: Placement of each layer, made from past loads.
        constants: As in `calibrate`.
        overlap_degree: As in `sparse_materialize`.
        memory_capacity: As in `sparse_materialize`.
    """
    held = materialize_layers(
        torch.stack([plan.at_owner for plan in plans]),
        torch.stack([plan.materialized.cpu() for plan in plans]),
        loads.sum(1),
        overlap_degree=overlap_degree,
        memory_capacity=memory_capacity,
        node_size=plans[0].node_size,
    )
    more = [
        ExpertPlacement(plan.owner, row, node_size=plan.node_size)
        for plan, row in zip(plans, held, strict=True)
    ]
    now = simulate_layers(loads, plans, [None] * len(plans), constants)
    then = simulate_layers(loads, plans, more, constants)
    pairs = zip(zip(plans, now, strict=True), zip(more, then, strict=True), strict=True)
    return [late if late[1]["latency"] < early[1]["latency"] else early for early, late in pairs]
