"""Which ranks hold which experts, and how copies reach them.

An expert has one owner, which keeps its parameters and optimizer state, and may be copied to other
ranks for an iteration. `P` is the `(E, D)` matrix of owners and `P' >= P` that of all holders.
`torchzoo.moe.planning` chooses them, and `torchzoo.moe.token_plan` says where tokens go then.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from torchzoo.moe.routing import check_count


def one_owner(owner: Tensor, num_devices: int) -> Tensor:
    """`(E, D)` bool, True where a device owns an expert.

    Raises:
        ValueError: An expert whose owner is none of the devices, or no expert.
    """
    if owner.ndim != 1 or not owner.numel() or owner.is_floating_point():
        raise ValueError(
            f"owner: expected integers of shape (E,), got {owner.dtype} {tuple(owner.shape)}"
        )
    owned = owner[:, None].cpu() == torch.arange(num_devices, device="cpu")
    for expert in (~owned.any(1)).nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"owner: expert {expert} has 0 owners, expected one of the devices 0 to "
            f"{num_devices - 1}, got {int(owner[expert])}"
        )
    return owned


def check_nodes(num_devices: int, node_size: int) -> None:
    """Raise a ValueError unless the devices fill nodes of this size."""
    check_count("num_devices", num_devices)
    check_count("node_size", node_size)
    if num_devices % node_size:
        raise ValueError(f"node_size: expected a divisor of {num_devices}, got {node_size}")


def contiguous_owner(num_experts: int, num_devices: int) -> Tensor:
    """`(E,)`, blocks of `ceil(E / D)` neighbouring experts a device, as `Shard(0)` has them."""
    return torch.arange(num_experts, device="cpu") // -(-num_experts // num_devices)


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Owners of the experts, and all ranks that hold a copy in this iteration.

    Args:
        owner: Rank that owns each expert.
        materialized: Which ranks hold which experts; the owners among them.
        node_size: Ranks a node; ranks of a node are neighbours.

    Shape:
        - owner: `(E,)`, integers
        - materialized: `(E, D)`, bool

    Raises:
        ValueError: See `validate`.

    Source:
        Qing et al., "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse
        Data Parallelism", 2025, section 3.

    Example:
        >>> held = torch.tensor([[True, True], [False, True]])
        >>> placement = ExpertPlacement(torch.tensor([0, 1]), held, node_size=2)
        >>> placement.sparsity, placement.replicas(0)
        (0.5, [0, 1])
    """

    owner: Tensor
    materialized: Tensor
    _: KW_ONLY
    node_size: int

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check that every expert has one owner, which holds it.

        Raises:
            ValueError: Shapes that don't fit, an expert without an owner, an owner that doesn't
                hold its expert, or nodes that don't divide the ranks.
        """
        held = self.materialized
        if held.ndim != 2 or held.dtype != torch.bool or len(held) != len(self.owner):
            raise ValueError(
                f"materialized: expected bool of shape ({len(self.owner)}, D), "
                f"got {held.dtype} {tuple(held.shape)}"
            )
        check_nodes(held.shape[1], self.node_size)
        lost = (self.at_owner & ~held.cpu()).any(1)
        for expert in lost.nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"materialized: expected expert {expert} at its owner, rank "
                f"{int(self.owner[expert])}, got it at {held[expert].nonzero().flatten().tolist()}"
            )

    @property
    def num_experts(self) -> int:
        """Number of experts `E`."""
        return self.materialized.shape[0]

    @property
    def num_devices(self) -> int:
        """Number of ranks `D`."""
        return self.materialized.shape[1]

    @cached_property
    def at_owner(self) -> Tensor:
        """`(E, D)` bool, True where a rank owns an expert."""
        return one_owner(self.owner, self.num_devices)

    @property
    def sparsity(self) -> float:
        """The fraction of the experts that move, written lambda in the paper."""
        return int((self.materialized.sum(1) > 1).sum()) / self.num_experts

    def replicas(self, expert: int) -> list[int]:
        """The ranks that hold an expert."""
        return self.materialized[expert].nonzero().flatten().tolist()

    def owned(self, rank: int) -> list[int]:
        """The experts that a rank owns."""
        return (self.owner == rank).nonzero().flatten().tolist()

    def held(self, rank: int) -> list[int]:
        """The experts that a rank holds."""
        return self.materialized[:, rank].nonzero().flatten().tolist()

    @cached_property
    def rounds(self) -> list[list[tuple[int, int, int]]]:
        """Transfers `(expert, from, to)` that bring every copy to its holder, round by round.

        An expert goes down a binomial tree from its owner, so that an owner of many copies sends
        `log2` of them; every other holder receives it once. Holders are ordered by node, and the
        longest steps come first: nearly each node receives an expert once.
        """
        step, *transfers = self._transfers
        rounds: list[list[tuple[int, int, int]]] = [[] for _ in range(step.max(initial=-1) + 1)]
        for index, expert, source, target in np.stack([step, *transfers], 1).tolist():
            rounds[index].append((expert, source, target))
        return rounds

    @cached_property
    def flows(self) -> Tensor:
        """`(rounds, D, D)` float64, how many experts a rank sends to a rank in each round."""
        step, _, source, target = self._transfers
        shape = step.max(initial=-1) + 1, self.num_devices, self.num_devices
        cells = (step * shape[1] + source) * shape[1] + target
        counts = np.bincount(cells, minlength=math.prod(shape)).astype(np.float64)
        return torch.from_numpy(counts.reshape(shape))

    @cached_property
    def _transfers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Round, expert, sender and receiver of each transfer, expert by expert."""
        held, owner = self.materialized.cpu().numpy(), self.owner.cpu().numpy()[:, None]
        devices, size = self.num_devices, self.node_size
        copied = np.flatnonzero(held.sum(1) > 1)
        held, owner = held[copied], owner[copied]
        rank = np.arange(devices)
        nodes_on = (rank // size - owner // size) % (devices // size)
        place = nodes_on * devices + (rank - owner) % devices
        line = np.where(held, place, devices**2).argsort(1)  # an expert's holders come first
        step, source, target = _tree(devices)
        index, used = np.nonzero(target < held.sum(1)[:, None])
        step = step[used] - step[used].min(initial=devices)
        return step, copied[index], line[index, source[used]], line[index, target[used]]


@cache
def _tree(length: int) -> np.ndarray:
    """Rounds, senders and receivers of a binomial tree over positions, the longest steps first.

    That of fewer positions is made of the steps that stay within them.
    """
    strides = [1 << bit for bit in reversed(range((length - 1).bit_length()))]
    steps = [
        (index, source, source + stride)
        for index, stride in enumerate(strides)
        for source in range(0, length - stride, 2 * stride)
    ]
    return np.array(steps, dtype=np.int64).reshape(-1, 3).T
