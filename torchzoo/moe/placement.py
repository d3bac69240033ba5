"""Which ranks hold which experts, and where tokens go: planning without a process group.

An expert has one owner, which keeps its parameters and optimizer state, and may be copied to other
ranks for an iteration. `P` is the `(E, D)` matrix of owners and `P' >= P` that of all holders.
Every plan is a deterministic function of its inputs, so ranks that know the same loads agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

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
        lost = (one_owner(self.owner, held.shape[1]) & ~held.cpu()).any(1)
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
        steps: dict[int, list[tuple[int, int, int]]] = {}
        owners = self.owner.tolist()
        for expert in (self.materialized.sum(1) > 1).nonzero().flatten().tolist():
            line = sorted(
                self.replicas(expert), key=lambda rank: self._distance(owners, expert, rank)
            )
            for stride, source, target in _tree(len(line)):
                steps.setdefault(stride, []).append((expert, line[source], line[target]))
        return [steps[stride] for stride in sorted(steps, reverse=True)]

    def _distance(self, owners: list[int], expert: int, rank: int) -> tuple[int, int]:
        nodes = self.num_devices // self.node_size
        far = (rank // self.node_size - owners[expert] // self.node_size) % nodes
        return far, (rank - owners[expert]) % self.num_devices


def _tree(length: int) -> Iterator[tuple[int, int, int]]:
    """Steps `(stride, from, to)` of a binomial tree over positions, the longest first."""
    stride = 1 << max(length - 1, 0).bit_length()
    while stride := stride // 2:
        for source in range(0, length - stride, 2 * stride):
            yield stride, source, source + stride


def sparse_materialize(
    owner: Tensor,
    load: Tensor,
    *,
    overlap_degree: int,
    memory_capacity: int,
    node_size: int,
    num_devices: int,
    present: Tensor | None = None,
) -> Tensor:
    """Choose which ranks get copies of the experts with the highest loads.

    With `t = overlap_degree` and `m = memory_capacity`: if `t <= m`, the `t` experts with the
    highest loads go everywhere. Else `D m` slots are shared among them in proportion to their
    loads, each expert getting 1 to `D - 1`, and the copies are spread over nodes, then devices.
    Shares are rounded to the nearest whole numbers within those bounds, which is the method of
    largest remainders where no bound acts.

    Args:
        owner: Device that owns each expert.
        load: Tokens expected at each expert.
        overlap_degree: How many experts can be sent while other layers compute.
        memory_capacity: How many experts a device can hold besides its own.
        node_size: Devices a node.
        num_devices: Number of devices `D`.
        present: Copies that are already there and count towards the capacity.

    Shape:
        - owner, load: `(E,)`
        - present: `(E, D)`, bool
        - output: `(E, D)`, bool

    Returns:
        Which devices hold which experts; owners and `present` are among them.

    Raises:
        ValueError: Shapes that don't fit, negative options, or an expert without an owner.

    Source:
        Qing et al., "Hecate", 2025, algorithm 1; the rounding of the shares is ours.

    Example:
        >>> owner, load = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 9, 2, 3])
        >>> options = {"memory_capacity": 1, "node_size": 2, "num_devices": 2}
        >>> sparse_materialize(owner, load, overlap_degree=1, **options).int().tolist()
        [[1, 0], [1, 1], [0, 1], [0, 1]]
    """
    check_nodes(num_devices, node_size)
    check_count("overlap_degree", overlap_degree, 0)
    check_count("memory_capacity", memory_capacity, 0)
    held = one_owner(owner, num_devices)
    if load.shape != owner.shape:
        raise ValueError(f"load: expected {tuple(owner.shape)}, as owner, got {tuple(load.shape)}")
    if present is not None:
        if present.shape != held.shape:
            raise ValueError(f"present: expected {tuple(held.shape)}, got {tuple(present.shape)}")
        held = held | present.cpu()
    free = memory_capacity - (held.sum(0) - one_owner(owner, num_devices).sum(0))
    top = load.cpu().argsort(descending=True, stable=True)[: min(overlap_degree, len(load))]
    everywhere = held.clone()
    everywhere[top] = True
    if bool(((everywhere.sum(0) - held.sum(0)) <= free).all()) and len(top) <= memory_capacity:
        return everywhere
    shares = _shares(load.cpu()[top].double(), int(free.clamp_min(0).sum()), num_devices - 1)
    grid = held.numpy().copy()
    left = free.clamp_min(0).numpy().reshape(-1, node_size)
    for expert, copies in zip(top.tolist(), shares, strict=True):
        _spread(grid[expert].reshape(-1, node_size), left, copies)
    return torch.from_numpy(grid)


def _shares(load: Tensor, slots: int, most: int) -> list[int]:
    """Whole numbers from 1 to `most` that sum to `slots` and are nearest to the loads' shares.

    Nearest in the sum of squares, which giving one slot at a time to the largest shortfall
    minimises. `load` is in decreasing order; with fewer slots than experts the last get none.
    """
    total = float(load.sum())
    quota = (slots * load / total).tolist() if total > 0 else [slots / len(load)] * len(load)
    shares = [int(index < slots and most > 0) for index in range(len(quota))]
    short = [(1 - q, index) for index, q in enumerate(quota) if most > 1]
    heapq.heapify(short)
    for _ in range(slots - sum(shares)):
        if not short:
            break
        gap, index = heapq.heappop(short)
        shares[index] += 1
        if shares[index] < most:
            heapq.heappush(short, (gap + 1, index))
    return shares


def _spread(row: np.ndarray, free: np.ndarray, copies: int) -> None:
    """Put copies of an expert on devices; `row` and `free` are `(nodes, node_size)`.

    A copy goes to the node with the fewest of this expert, then with the most free slots, then to
    the device with the most.
    """
    crowd = free.size * (free.max() + 1)  # outweighs any number of free slots
    for _ in range(copies):
        room = free * ~row
        open_nodes = room.any(1)
        if not open_nodes.any():
            return
        score = free.sum(1) - crowd * row.sum(1)
        node = int(np.where(open_nodes, score, score.min() - 1).argmax())
        device = int(room[node].argmax())
        row[node, device] = True
        free[node, device] -= 1


def heterogeneous_shard(
    loads: Tensor, *, overlap_degree: int, num_devices: int, node_size: int
) -> Tensor:
    """Choose the owners of the experts of all layers together.

    Experts below the `overlap_degree` highest loads of their layer will not be copied, so their
    owners decide the balance: they are placed first, layers in decreasing order of their highest
    load and experts of a layer in decreasing load, each on the node, then the device, that has the
    least load of this layer so far (then the fewest free slots). The others fill the free slots by
    the same rule. Every device owns the same number of experts, but any number of a layer.

    Args:
        loads: Tokens expected at each expert of each layer.
        overlap_degree: How many experts a layer can send while other layers compute.
        num_devices: Number of devices `D`.
        node_size: Devices a node.

    Shape:
        - loads: `(L, E)`
        - output: `(L, E)`, int64

    Returns:
        The owner of each expert; if `D` doesn't divide `L E`, the first devices own one more.

    Raises:
        ValueError: Loads that are no matrix, a negative overlap degree, or nodes that don't
            divide the devices.

    Source:
        Qing et al., "Hecate", 2025, algorithm 2.

    Example:
        >>> loads = torch.tensor([[8.0, 1.0, 4.0, 5.0]])
        >>> heterogeneous_shard(loads, overlap_degree=0, num_devices=2, node_size=2).tolist()
        [[0, 0, 1, 1]]
    """
    check_nodes(num_devices, node_size)
    check_count("overlap_degree", overlap_degree, 0)
    if loads.ndim != 2 or not loads.numel():
        raise ValueError(f"loads: expected (L, E), got {tuple(loads.shape)}")
    values = loads.detach().cpu().double().numpy()
    slots, more = divmod(values.size, num_devices)
    free = (slots + (np.arange(num_devices) < more)).reshape(-1, node_size)
    ranking = np.argsort(-values, axis=1, kind="stable")
    owners = np.zeros(values.shape, dtype=np.int64)
    busy = np.zeros((len(values), *free.shape))
    for experts in (ranking[:, overlap_degree:], ranking[:, :overlap_degree]):
        for layer in np.argsort(-values.max(1), kind="stable"):
            for expert in experts[layer]:
                node, device = _least(busy[layer], free)
                owners[layer, expert] = node * node_size + device
                busy[layer, node, device] += values[layer, expert]
                free[node, device] -= 1
    return torch.from_numpy(owners)


def _least(busy: np.ndarray, free: np.ndarray) -> tuple[int, int]:
    """The node, then device, with a free slot, the least load, and then the fewest free slots."""
    nodes = np.where(free.any(1), busy.sum(1), np.inf)
    node = int(np.lexsort((free.sum(1), nodes))[0])
    devices = np.where(free[node] > 0, busy[node], np.inf)
    return node, int(np.lexsort((free[node], devices))[0])


def plan_dispatch(counts: Tensor, materialized: Tensor, node_size: int) -> Tensor:
    """Say how many tokens each device sends where.

    Tokens stay on their device if it holds their expert; else they are split evenly among the
    holders on the same node; else, where there is none, among all holders. What remains of a
    split goes to different holders for different devices and experts.

    Args:
        counts: Tokens that each device has for each expert.
        materialized: Which devices hold which experts.
        node_size: Devices a node.

    Shape:
        - counts: `(D, E)`, int64
        - materialized: `(E, D)`, bool
        - output: `(D, E, D)`, int64

    Returns:
        Tokens from a device for an expert to a device.

    Raises:
        ValueError: Shapes that don't fit, negative counts, or an expert that nobody holds.

    Source:
        Qing et al., "Hecate", 2025, section 4; that remainders are spread is ours.

    Example:
        >>> counts, held = torch.tensor([[3], [4]]), torch.tensor([[True, False]])
        >>> plan_dispatch(counts, held, 2)[:, 0].tolist()
        [[3, 0], [4, 0]]
    """
    return torch.cat(list(dispatch_by_node(counts, materialized, node_size)))


def dispatch_by_node(counts: Tensor, materialized: Tensor, node_size: int) -> Iterator[Tensor]:
    """The rows of `plan_dispatch`, the devices of a node at a time, to bound memory."""
    num_experts, num_devices = materialized.shape if materialized.ndim == 2 else (0, 0)
    if not num_experts or counts.shape != (num_devices, num_experts):
        raise ValueError(
            "counts, materialized: expected (D, E) and (E, D), "
            f"got {tuple(counts.shape)} and {tuple(materialized.shape)}"
        )
    check_nodes(num_devices, node_size)
    if bool((counts < 0).any()):
        raise ValueError(f"counts: expected at least 0, got {int(counts.min())}")
    if not bool(materialized.any(1).all()):
        lost = int((~materialized.any(1)).nonzero()[0])
        raise ValueError(f"materialized: expected a holder of expert {lost}, got none")
    devices = torch.arange(num_devices, device=counts.device)
    experts = torch.arange(num_experts, device=counts.device)
    for first in range(0, num_devices, node_size):
        near = materialized & (devices // node_size == first // node_size)
        holders = torch.where(near.any(1, keepdim=True), near, materialized)
        yield _split(counts[first : first + node_size], holders, materialized, first + experts)


def _split(counts: Tensor, holders: Tensor, materialized: Tensor, start: Tensor) -> Tensor:
    """`(node_size, E, D)`: counts of a node's devices, kept or split evenly among the holders."""
    node_size, num_devices = len(counts), holders.shape[1]
    sources = torch.arange(node_size, device=counts.device)
    first = int(start[0])
    size = holders.sum(1)
    place = holders.cumsum(1) - 1  # of a holder among the holders
    turn = (place - (start[:, None] + sources[:, None, None])) % size[:, None]
    one_more = turn < (counts % size)[..., None]
    split = ((counts // size)[..., None] + one_more) * holders
    here = torch.arange(num_devices, device=counts.device) == (first + sources)[:, None]
    kept = materialized[:, first : first + node_size].T  # (node_size, E)
    return torch.where(kept[..., None], counts[..., None] * here[:, None], split)
