"""A simulated cluster of 32 devices on which six ways of training see the same drifting loads.

Latencies are predictions of a cost model, not measured speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from torchzoo.moe import (
    ExpertPlacement,
    heterogeneous_shard,
    overlap_degree,
)
from torchzoo.moe.placement import contiguous_owner, one_owner
from torchzoo.moe.planning import materialize_layers
from torchzoo.moe.simulate import CONSTANTS, calibrate_layers, link_seconds, simulate_layers

NODES, NODE_SIZE, EXPERTS, LAYERS = 4, 8, 64, 4
DEVICES = NODES * NODE_SIZE
TOKENS, TOP_K = 8192, 2  # of a device
ZIPF, DECAY, SPREAD = 1.2, 0.95, 1.0  # AR(1) deviations of the logits, of this standard deviation
CAPACITY, WINDOW = 4, 5
OVERLAP = overlap_degree(
    CONSTANTS["non_moe_seconds"], CONSTANTS["bw_inter"], CONSTANTS["expert_bytes"], EXPERTS
)
REARRANGE_EVERY, RESHARD_EVERY, STATE = 10, 50, 6  # STATE: parameter bytes that move with an expert
FSSDP = ("FSSDP", "FSSDP, sharded", "FSSDP, calibrated")
REARRANGED = ("permuted", "replicated")
SYSTEMS = ("EP", *REARRANGED, *FSSDP)


def drifting_loads(steps: int, seed: int, *, skewed: bool) -> Iterator[Tensor]:
    """For each step `(LAYERS, DEVICES, EXPERTS)`, tokens of a device for an expert."""
    random = np.random.default_rng(seed)
    rank = np.stack([random.permutation(EXPERTS) for _ in range(LAYERS)])
    base = -ZIPF * np.log(1.0 + rank) * skewed
    noise = np.zeros((LAYERS, EXPERTS))
    for step in range(steps):
        fresh = random.normal(size=noise.shape) * SPREAD * skewed
        noise = DECAY * noise + (1 - DECAY**2) ** 0.5 * fresh if step else fresh
        probs = softmax(base + noise, axis=-1)
        counts = [random.multinomial(TOKENS * TOP_K, p, size=DEVICES) for p in probs]
        yield torch.from_numpy(np.stack(counts))


@dataclass
class System:
    """A way of training: plans from past loads, and what a step then costs."""

    name: str
    owners: Tensor = field(init=False)
    alone: list[ExpertPlacement] = field(init=False)  # experts at their owners only, by layer
    history: list[Tensor] = field(default_factory=list)  # (LAYERS, EXPERTS) of the last steps
    kept: list[ExpertPlacement] = field(default_factory=list)  # plans that stay, by layer
    copies: int = 0  # the most copies of a device and layer so far

    def __post_init__(self) -> None:
        self._own(contiguous_owner(EXPERTS, DEVICES).repeat(LAYERS, 1))

    def plans(self, capacity: int = CAPACITY) -> list[ExpertPlacement]:
        """For each layer copies of the experts that were busiest in the last steps."""
        if not self.history:
            return self.alone
        owned = torch.stack([alone.materialized for alone in self.alone])
        held = materialize_layers(
            owned,
            owned,
            torch.stack(self.history).sum(0),
            overlap_degree=OVERLAP,
            memory_capacity=capacity,
            node_size=NODE_SIZE,
        )
        return [
            ExpertPlacement(owner, copies, node_size=NODE_SIZE)
            for owner, copies in zip(self.owners, held, strict=True)
        ]

    def step(self, index: int, counts: Tensor) -> dict[str, float]:
        """Latency, straggler ratio and balanced bound of a step, all layers together."""
        moving = self._move(index)
        steps = self._layers(counts)
        self.history = [*self.history, counts.sum(1)][-WINDOW:]
        return {
            "latency": moving + sum(step["latency"] for step in steps),
            "balanced": sum(step["balanced"] for step in steps),
            "straggler_ratio": sum(step["straggler_ratio"] for step in steps) / LAYERS,
        }

    def _layers(self, counts: Tensor) -> list[dict[str, float]]:
        if self.name == "FSSDP, calibrated":
            plans = self.plans(CAPACITY // 2)
            capacity = {"overlap_degree": OVERLAP, "memory_capacity": CAPACITY}
            found = calibrate_layers(counts, plans, {}, **capacity)
            plans, steps = [list(part) for part in zip(*found, strict=True)]
        else:
            plans = self.alone
            if self.name in FSSDP:
                plans = self.plans()
            elif self.kept:
                plans = self.kept
            steps = simulate_layers(counts, plans, [None] * LAYERS, {})
        for plan, alone in zip(plans, self.alone, strict=True):
            self.copies = max(
                self.copies, int((plan.materialized & ~alone.materialized).sum(0).max())
            )
        if self.name == "replicated":  # copies stay, so that no gather precedes forward
            for step in steps:
                step["latency"] -= max(0.0, step["gather_time"] - CONSTANTS["non_moe_seconds"])
        return steps

    def _move(self, index: int) -> float:
        """Change what changes rarely; the seconds that moving experts with their states takes."""
        if self.name == "replicated" and index and index % REARRANGE_EVERY == 0:
            new = self.plans()
            pairs = list(zip(self.kept or [None] * LAYERS, new, strict=True))
            self.kept = new
            return sum(map(self._copy_seconds, *zip(*pairs, strict=True)))
        if self.name == "permuted" and index and index % REARRANGE_EVERY == 0:
            loads = torch.stack(self.history).sum(0)
            owners = [self._shard(loads[i : i + 1], 0) for i in range(LAYERS)]
            return self._moved(torch.cat(owners))
        first = index == REARRANGE_EVERY
        if self.name in FSSDP[1:] and (first or (index and index % RESHARD_EVERY == 0)):
            return self._moved(self._shard(torch.stack(self.history).sum(0), OVERLAP))
        return 0.0

    @staticmethod
    def _shard(loads: Tensor, overlap: int) -> Tensor:
        return heterogeneous_shard(
            loads, overlap_degree=overlap, num_devices=DEVICES, node_size=NODE_SIZE
        )

    def _own(self, owners: Tensor) -> None:
        self.owners = owners
        self.alone = [
            ExpertPlacement(owner, one_owner(owner, DEVICES), node_size=NODE_SIZE)
            for owner in owners
        ]

    def _moved(self, owners: Tensor) -> float:
        """Take new owners; the seconds of moving parameters and states to them."""
        flow = torch.zeros(DEVICES, DEVICES, dtype=torch.float64)
        one = torch.ones(owners.numel(), dtype=torch.float64)
        flow.index_put_((self.owners.flatten(), owners.flatten()), one, accumulate=True)
        self._own(owners)
        return _seconds(flow * STATE * CONSTANTS["expert_bytes"])

    def _copy_seconds(self, old: ExpertPlacement | None, new: ExpertPlacement) -> float:
        """The seconds of bringing parameters and states to devices that lack them."""
        have = one_owner(new.owner, DEVICES)
        here = have if old is None else old.materialized
        held = have | (new.materialized & ~here)
        flows = ExpertPlacement(new.owner, held, node_size=NODE_SIZE).flows
        return sum(map(_seconds, flows * STATE * CONSTANTS["expert_bytes"]))


def _seconds(flow: Tensor) -> float:
    return link_seconds(
        flow, NODE_SIZE, bw_intra=CONSTANTS["bw_intra"], bw_inter=CONSTANTS["bw_inter"]
    )


def simulate(
    names: tuple[str, ...], steps: int, seed: int, *, skewed: bool, tick: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Mean figures of a step for each system, on the same loads."""
    systems = [System(name) for name in names]
    sums: dict[str, dict[str, float]] = {name: {} for name in names}
    for index, counts in enumerate(drifting_loads(steps, seed, skewed=skewed)):
        tick(f"simulated step {index + 1} of {steps}")
        for system in systems:
            for key, value in system.step(index, counts).items():
                sums[system.name][key] = sums[system.name].get(key, 0.0) + value / steps
    return {s.name: sums[s.name] | {"copies": float(s.copies)} for s in systems}
