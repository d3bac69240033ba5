"""Choosing owners and copies of experts by their loads, without a process group.

Every plan is a deterministic function of its inputs, so ranks that know the same loads agree.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor

from torchzoo.moe.placement import check_nodes, one_owner
from torchzoo.moe.routing import check_count


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
    held = owned = one_owner(owner, num_devices)
    if load.shape != owner.shape:
        raise ValueError(f"load: expected {tuple(owner.shape)}, as owner, got {tuple(load.shape)}")
    if present is not None:
        if present.shape != held.shape:
            raise ValueError(f"present: expected {tuple(held.shape)}, got {tuple(present.shape)}")
        held = held | present.cpu()
    free = memory_capacity - (held.sum(0) - owned.sum(0))
    top = load.cpu().argsort(descending=True, stable=True)[: min(overlap_degree, len(load))]
    everywhere = held.clone()
    everywhere[top] = True
    if bool(((everywhere.sum(0) - held.sum(0)) <= free).all()) and len(top) <= memory_capacity:
        return everywhere
    if not len(top):
        return held
    shares = _shares(load.cpu()[top].double(), int(free.clamp_min(0).sum()), num_devices - 1)
    grid, left = held.numpy().copy(), free.clamp_min(0).tolist()
    for expert, copies in zip(top.tolist(), shares, strict=True):
        row = grid[expert].tolist()
        _spread(row, left, copies, node_size)
        grid[expert] = row
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


def _spread(row: list[bool], free: list[int], copies: int, node_size: int) -> None:
    """Put copies of an expert on devices that lack it, of which some have free slots.

    A copy goes to the node with the fewest of this expert, then with the most free slots, then to
    the device with the most.
    """
    room = [0 if held else slots for held, slots in zip(row, free, strict=True)]
    nodes = []  # of each with room: copies, minus the free slots, the first device
    for first in range(0, len(free), node_size):
        node = slice(first, first + node_size)
        if any(room[node]):
            nodes.append((sum(row[node]), -sum(free[node]), first))
    heapq.heapify(nodes)
    for _ in range(min(copies, sum(map(bool, room)))):
        crowd, slots, first = heapq.heappop(nodes)
        of_node = room[first : first + node_size]
        device = first + of_node.index(max(of_node))
        row[device], room[device] = True, 0
        free[device] -= 1
        if any(room[first : first + node_size]):
            heapq.heappush(nodes, (crowd + 1, slots + 1, first))


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
