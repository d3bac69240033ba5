"""Training with sharded experts on four processes, against one process: weights, bytes, memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from torchzoo.moe import (
    FSSDPExperts,
    GroupedExperts,
    MoELayer,
    collectives,
    parallel,
    parallelize_moe,
)
from torchzoo.moe.routing import Routing, chosen_experts, top_k_experts

RANKS, SMALL_EXPERTS, DIM, SMALL_LAYERS, BATCH, STEPS = 4, 16, 16, 4, 64, 20
SMALL_CAPACITY, TOP_K, ZIPF = 3, 2, 1.2


class SampledGate(nn.Module):
    """Top 2 of logits that are given for each batch, as a drifting router would sample them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = SMALL_EXPERTS
        self.logits = torch.zeros(0, SMALL_EXPERTS)

    def forward(self, x: Tensor) -> Routing:
        probs = self.logits.softmax(-1)
        experts = top_k_experts(self.logits, TOP_K)
        return chosen_experts(probs.gather(1, experts), experts, self.logits, probs)


def small_model(seed: int) -> nn.ModuleList:
    """Layers of experts."""
    torch.manual_seed(seed)
    return nn.ModuleList(
        MoELayer(SampledGate(), GroupedExperts(DIM, 2 * DIM, SMALL_EXPERTS, activation="gelu"))
        for _ in range(SMALL_LAYERS)
    )


def train(model: nn.ModuleList, seed: int, part: Callable[[Tensor], Tensor], steps: int) -> Any:
    """AdamW on a regression, with Zipf routing whose order of experts drifts; the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(SMALL_EXPERTS, generator=generator)
    for step in range(steps):
        x, target = torch.randn(2, BATCH, DIM, generator=generator)
        zipf = -ZIPF * (1.0 + order.roll(step // 4)).log()
        noise = torch.rand(len(model), BATCH, SMALL_EXPERTS, generator=generator)
        logits = (
            zipf - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        )  # Gumbel: samples without repeats
        y = part(x)
        for layer, of_layer in zip(model, logits, strict=True):
            assert isinstance(layer, MoELayer)
            layer.gate.logits = part(of_layer)
            y = y + layer(y)
        optimizer.zero_grad()
        ((y - part(target)).square().sum() / target.numel()).backward()
        optimizer.step()
    return optimizer


def nbytes(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and optimizer states."""
    tensors = [t for w in weights for t in (w, w.grad, *optimizer.state[w].values())]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@contextmanager
def gathered_bytes() -> Iterator[dict[str, int]]:
    """Counts the most bytes of gathered weights alive at once, with the gradients of one."""
    count = {"now": 0, "peak": 0}
    gather, reduce = parallel.sparse_all_gather, collectives.sparse_reduce_scatter

    def freed(size: int) -> None:
        count["now"] -= size

    def counted_gather(*args: Any, **options: Any) -> Tensor:
        out = gather(*args, **options)
        count["now"] += out.nbytes
        count["peak"] = max(count["peak"], count["now"])
        weakref.finalize(out, freed, out.nbytes)
        return out

    def counted_reduce(local: Tensor, *args: Any, **options: Any) -> Tensor:
        out = reduce(local, *args, **options)
        # the gradient of the copies, and a working copy of it
        count["peak"] = max(count["peak"], count["now"] + 2 * local.nbytes + out.nbytes)
        return out

    parallel.sparse_all_gather = counted_gather
    collectives.sparse_reduce_scatter = counted_reduce
    try:
        yield count
    finally:
        parallel.sparse_all_gather = gather
        collectives.sparse_reduce_scatter = reduce


def replicated_bytes(experts: list[FSSDPExperts]) -> int:
    """Bytes of a rank that keeps all its copies with gradients and optimizer states."""
    weights: list[nn.Parameter] = []
    for layer in experts:
        copies = layer.holders(torch.zeros(layer.size, layer.num_experts).long())
        for whole in layer.full_state_dict().values():
            weights += [nn.Parameter(whole[e].clone()) for e in copies.held(layer.rank)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return nbytes(weights, optimizer)


def train_on_ranks(seed: int, steps: int) -> dict[str, float]:
    """What a rank of the process group measures; the weights are compared on every rank."""
    size = dist.get_world_size()
    alone = small_model(seed)
    train(alone, seed, lambda x: x, steps)
    plain = [layer.get_submodule("experts") for layer in alone]
    model, mesh = small_model(seed), init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    for layer in model:
        options = {"overlap_degree": 2 * SMALL_CAPACITY, "memory_capacity": SMALL_CAPACITY}
        parallelize_moe(layer, mesh, mode="fssdp", **options)
    with gathered_bytes() as live:
        optimizer = train(model, seed, lambda x: x.chunk(size)[dist.get_rank()], steps)
    found = [layer.get_submodule("experts") for layer in model]
    experts = [layer for layer in found if isinstance(layer, FSSDPExperts)]
    difference = 0.0
    for ours, theirs in zip(experts, plain, strict=True):
        for name, weight in ours.full_state_dict().items():
            expected = theirs.get_parameter(name)
            difference = max(difference, float((weight - expected).detach().abs().max()))
    whole = sum(w.nbytes for layer in plain for w in layer.parameters())
    gathers = experts[0].traffic.calls["sparse_all_gather"] / len(experts[0].names)
    return {
        "difference": difference,
        "received": sum(e.traffic.received["sparse_all_gather"] for e in experts),
        "all-gather": gathers * whole * (size - 1) / size,
        "memory": nbytes([*model.parameters()], optimizer) + live["peak"],
        "replicated": replicated_bytes(experts),
    }
