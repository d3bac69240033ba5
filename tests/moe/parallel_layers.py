"""A small mixture of experts, tokens for it, and ways to spread it over gloo ranks."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from torchzoo.moe import FSSDPExperts, GroupedExperts, MoELayer, TopKGate, parallelize_moe, reshard

DIM, HIDDEN, E = 6, 8, 6
OWNERS = {2: [1, 0, 0, 1, 1, 0], 4: [2, 0, 0, 1, 1, 0]}  # of 4 ranks, rank 3 owns nothing


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def the_layer(dtype=torch.float64, gate=None):
    torch.manual_seed(0)
    gate = gate or TopKGate(DIM, E, 2, dtype=dtype)
    with torch.no_grad():  # some experts with most of the tokens, one with next to none
        gate.weight.mul_(3)
        if gate.bias is not None:
            gate.bias.copy_(torch.tensor([2.0, 1, 0, 0, -1, -9]))
    return MoELayer(gate, GroupedExperts(DIM, HIDDEN, E, bias=True, dtype=dtype))


def the_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def batches(count, dtype=torch.float64):
    """Tokens of all ranks; 24 each, so that 1, 2, 3 or 4 ranks share them evenly."""
    return [
        (drawn(50 + i, 24, DIM).to(dtype), drawn(90 + i, 24, DIM).to(dtype)) for i in range(count)
    ]


def whole(experts):
    """The unsharded weights, on every rank."""
    if isinstance(experts, FSSDPExperts):
        return experts.full_state_dict()
    return {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()
        for name, weight in experts.named_parameters()
    }


def spread(mode="fssdp", owners=None, load=None, **options):
    """A maker of parallel layers, with owners and past loads of choice."""

    def make(layer):
        if mode == "ep":
            return parallelize_moe(layer, the_mesh(), mode="ep", **options)
        layer = parallelize_moe(layer, the_mesh(), mode="fssdp", **options)
        if load is not None:
            layer.experts.remember(torch.tensor(load))
        if owners is not None:
            optimizer = torch.optim.SGD([{"params": [*layer.experts.parameters()]}])
            reshard([layer.experts], optimizer, torch.tensor([owners]))
        return layer

    return make
