"""Choosing owners and copies of experts by their loads, without a process group.

Every plan is a deterministic function of its inputs, so ranks that know the same loads agree.
"""

from __future__ import annotations

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
    owned = one_owner(owner, num_devices)
    if load.shape != owner.shape:
        raise ValueError(f"load: expected {tuple(owner.shape)}, as owner, got {tuple(load.shape)}")
    if present is not None and present.shape != owned.shape:
        raise ValueError(f"present: expected {tuple(owned.shape)}, got {tuple(present.shape)}")
    held = owned if present is None else owned | present.cpu()
    limits = {"overlap_degree": overlap_degree, "memory_capacity": memory_capacity}
    return materialize_layers(owned[None], held[None], load[None], node_size=node_size, **limits)[0]


def materialize_layers(
    owned: Tensor,
    held: Tensor,
    loads: Tensor,
    *,
    overlap_degree: int,
    memory_capacity: int,
    node_size: int,
) -> Tensor:
    """`(L, E, D)` bool, `sparse_materialize` of several layers on the same devices, at once.

    Args:
        owned: `(L, E, D)` bool, which device owns which expert of a layer.
        held: `(L, E, D)` bool, owners and the copies that are already there.
        loads: `(L, E)`, tokens expected at each expert.
        overlap_degree: As in `sparse_materialize`.
        memory_capacity: As in `sparse_materialize`.
        node_size: Devices a node.
    """
    layers, start, loads = np.arange(len(owned)), held.numpy(), loads.cpu()
    top = loads.argsort(dim=-1, descending=True, stable=True)[:, :overlap_degree]
    free = memory_capacity - (start.sum(1) - owned.numpy().sum(1))
    everywhere, spread = start.copy(), start.copy()
    everywhere[layers[:, None], top.numpy()] = True
    fits = (everywhere.sum(1) - start.sum(1) <= free).all(1) & (top.shape[1] <= memory_capacity)
    left = free.clip(0)
    high = loads.gather(1, top).double().numpy()
    shares = _shares(high, left.sum(1), owned.shape[2] - 1)
    for experts, copies in zip(top.T.numpy(), shares.T, strict=True):
        spread[layers, experts] |= _spread(spread[layers, experts], left, copies, node_size)
    return torch.from_numpy(np.where(fits[:, None, None], everywhere, spread))


def _shares(load: np.ndarray, slots: np.ndarray, most: int) -> np.ndarray:
    """Whole numbers from 1 to `most` that sum to `slots` and are nearest to the loads' shares.

    Nearest in the sum of squares, which giving one slot at a time to the largest shortfall
    minimises. `load` `(L, t)` is in decreasing order; with fewer slots `(L,)` than experts the
    last get none.
    """
    expert, slots, total = np.arange(load.shape[1]), slots[:, None], load.sum(1, keepdims=True)
    quota = np.tile(slots / max(len(expert), 1), len(expert))
    np.divide(slots * load, total, where=total > 0, out=quota)
    shares = ((expert < slots) & (most > 0)).astype(np.int64)
    # The shortfalls of an expert at each slot that it may get besides its first.
    ones = np.ones((len(load), max(most - 2, 0), len(expert)))
    gaps = np.concatenate([1 - quota[:, None], ones], 1)[:, : max(most - 1, 0)].cumsum(1)
    ties = np.broadcast_to(expert, gaps.shape)
    order = np.lexsort([keys.reshape(len(load), -1) for keys in (ties, gaps)])
    got = np.zeros(order.shape, dtype=np.int64)
    given = np.arange(order.shape[1]) < slots - shares.sum(1, keepdims=True)
    np.put_along_axis(got, order, given, 1)
    return shares + got.reshape(gaps.shape).sum(1)


def _spread(rows: np.ndarray, free: np.ndarray, copies: np.ndarray, node_size: int) -> np.ndarray:
    """New copies `(L, D)` of an expert of each layer, `copies` `(L,)` of them if there is room.

    A copy goes to the node with the fewest of this expert, then with the most free slots, then to
    the device with the most. It takes a slot from `free`.
    """

    def by_node(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), -1, node_size)

    room = by_node(np.where(rows, 0, free))
    # The devices of a node in the order of their free slots; each that gets a copy adds one to
    # the node's copies and takes one of its slots.
    turn = np.argsort(np.argsort(-room, axis=2, kind="stable"), axis=2)
    crowd = by_node(rows).sum(2, keepdims=True) + turn
    slots = by_node(free).sum(2, keepdims=True) - turn
    node = np.broadcast_to(np.arange(room.shape[1])[:, None], room.shape)
    order = np.lexsort([keys.reshape(rows.shape) for keys in (node, -slots, crowd, room == 0)])
    new = np.zeros_like(rows)
    np.put_along_axis(new, order, np.arange(rows.shape[1]) < copies[:, None], 1)
    new &= room.reshape(rows.shape) > 0
    free -= new
    return new


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
