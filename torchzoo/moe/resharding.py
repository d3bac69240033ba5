"""New owners for experts: their parameters and optimizer states move with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchzoo.moe.collectives import sparse_all_gather
from torchzoo.moe.placement import ExpertPlacement, one_owner
from torchzoo.moe.planning import heterogeneous_shard

if TYPE_CHECKING:
    from torchzoo.moe.parallel import FSSDPExperts


def reshard(
    layers: Sequence[FSSDPExperts],
    optimizer: torch.optim.Optimizer,
    owners: Tensor | None = None,
) -> None:
    """Give experts new owners and move their parameters and optimizer states; a collective.

    Call it between iterations: gradients of experts that move are dropped.

    Args:
        layers: Layers with the same number of experts, on the same ranks.
        optimizer: The optimizer of their parameters.
        owners: The new owners; by default `heterogeneous_shard` of the past loads of all layers.

    Shape:
        - owners: `(L, E)`

    Raises:
        ValueError: Owners that don't fit, layers that differ, an optimizer that doesn't have the
            experts' parameters or has a state that is no tensor.
        RuntimeError: Another rank ended.

    Source:
        Qing et al., "Hecate", 2025, section 4.
    """
    kinds = {(layer.num_experts, layer.size, layer.node_size) for layer in layers}
    if len(kinds) != 1:
        raise ValueError(f"layers: expected equal (experts, ranks, node size), got {sorted(kinds)}")
    if owners is None:
        owners = heterogeneous_shard(
            torch.stack([layer.load_history.sum(0) for layer in layers]),
            overlap_degree=layers[0].overlap_degree,
            num_devices=layers[0].size,
            node_size=layers[0].node_size,
        )
    if owners.shape != (len(layers), layers[0].num_experts):
        raise ValueError(
            f"owners: expected {(len(layers), layers[0].num_experts)}, got {tuple(owners.shape)}"
        )
    for layer, owner in zip(layers, owners, strict=True):
        held = one_owner(owner, layer.size) | one_owner(layer.owner, layer.size)
        way = ExpertPlacement(layer.owner, held, node_size=layer.node_size)
        for name in layer.names if layer.size > 1 else ():
            _move(layer, name, owner, way, optimizer)
        layer.owner = owner.clone()


@torch.no_grad()
def _move(
    layer: FSSDPExperts,
    name: str,
    owner: Tensor,
    way: ExpertPlacement,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Move the parameters of a name, with their optimizer states, to the new owners."""
    old = {int(expert): weight for expert, weight in layer.weights_of(name).items()}
    home, kinds = _agree(layer, list(old.values()), optimizer)
    group = optimizer.param_groups[home]

    def moved(rows: list[Tensor], shape: Sequence[int], dtype: torch.dtype) -> dict[int, Tensor]:
        device = layer.load_history.device
        local = torch.empty(len(rows), *shape, dtype=dtype, device=device)
        for into, row in zip(local, rows, strict=True):
            into.copy_(row)
        there = sparse_all_gather(local, way, layer.group, traffic=layer.traffic)
        return dict(zip(way.held(layer.rank), there, strict=True))

    like = layer.template.get_parameter(name)
    weights = moved(list(old.values()), like.shape[1:], like.dtype)
    states = {
        key: (device, moved([optimizer.state[w][key] for w in old.values()], shape, dtype))
        for key, (shape, dtype, device) in kinds.items()
    }
    rows: dict[int, Tensor] = {}
    for expert in (owner == layer.rank).nonzero().flatten().tolist():
        if expert in old:
            rows[expert] = old.pop(expert)
            continue
        new = nn.Parameter(weights[expert].clone(), like.requires_grad)
        rows[expert] = new
        group["params"].append(new)
        for key, (device, values) in states.items():
            optimizer.state[new][key] = values[expert].clone().to(device)
    for weight in old.values():
        optimizer.state.pop(weight, None)
    gone = {id(weight) for weight in old.values()}
    group["params"][:] = [weight for weight in group["params"] if id(weight) not in gone]
    layer.set_rows(name, rows)


Kinds = dict[str, tuple[tuple[int, ...], torch.dtype, str]]


def _agree(
    layer: FSSDPExperts, weights: list[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, Kinds]:
    """The parameter group and the kinds of state of these weights; a rank may have none itself."""
    mine: tuple[int | None, Kinds] = (None, {})
    if weights:
        home = [
            index
            for index, group in enumerate(optimizer.param_groups)
            if any(weight is weights[0] for weight in group["params"])
        ]
        state = optimizer.state.get(weights[0], {})
        if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"optimizer: expected states that are tensors, got {wrong}")
        kinds = {k: (tuple(v.shape), v.dtype, v.device.type) for k, v in state.items()}
        mine = (home[0] if home else None, kinds)
    found: list[Any] = [None] * layer.size
    dist.all_gather_object(found, mine, group=layer.group)
    for home_index, kinds in found:
        if home_index is not None:
            return home_index, kinds
    raise ValueError("optimizer: expected one of the experts' parameters, got none of them")
