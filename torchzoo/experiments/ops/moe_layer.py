"""A training step of a mixture-of-experts layer against the public ways to compute one.

All contenders hold the same weights: swiglu experts behind a top-2 softmax router without biases,
no capacity. A step is the forward pass and the gradients of the parameters and of the input.

What can be won is bounded by nine products of 8,192 rows, 77.3 GFLOP in float32, which all
contenders have to do. A core of an AMD EPYC of 2021 with AVX2 does 100 GFLOP/s in registers and 86
to 90 in torch.mm at 2048 x 2048 x 2048. Seconds of a step on one thread, the fastest of seven, page
faults included:

    experts             8       64
    in registers        0.77    0.77
    torchzoo            0.99    1.05
    loop                1.04    1.52
    torch grouped_mm    1.17    1.32

The bars, 1.3 and 2 times the best peer, are then 97 and 117 GFLOP/s for the whole step: the one is
more than any product reaches, the other more than the core has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.moe import GroupedExperts, MoELayer, TopKGate


class Loop(nn.Module):
    """A module an expert, called in turn with the tokens that chose it."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = nn.Parameter(layer.gate.weight.detach().clone())
        stacked = zip(layer.experts.w_in, layer.experts.w_out, strict=True)
        self.weights = nn.ParameterList(
            nn.Parameter(weight.detach().contiguous())
            for w_in, w_out in stacked
            for weight in (*w_in.mT.chunk(2), w_out.mT)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -2)
        weights, chosen = (x @ self.router.mT).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for index in range(len(self.weights) // 3):
            gate, up, down = self.weights[3 * index : 3 * index + 3]
            tokens, slot = torch.where(chosen == index)
            rows = x[tokens]
            out = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            y.index_add_(0, tokens, out * weights[tokens, slot, None])
        return y[None]


class Grouped(nn.Module):
    """Tokens sorted by expert and multiplied by torch's own grouped product."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = nn.Parameter(layer.gate.weight.detach().clone())
        self.w_in = nn.Parameter(layer.experts.w_in.detach().clone())
        self.w_out = nn.Parameter(layer.experts.w_out.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -2)
        weights, chosen = (x @ self.router.mT).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        tokens = order // 2
        counts = chosen.flatten().bincount(minlength=len(self.w_in))
        offsets = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[tokens], self.w_in, offs=offsets).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.w_out, offs=offsets)
        scaled = out * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, tokens, scaled)[None]


def mixtral(layer: MoELayer, implementation: str) -> nn.Module:
    """The block of transformers, with the layer's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts = layer.experts
    config = MixtralConfig(
        hidden_size=experts.dim,
        intermediate_size=experts.hidden_dim,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=2,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    weights = {
        "gate.weight": layer.gate.weight,
        "experts.gate_up_proj": experts.w_in.mT,
        "experts.down_proj": experts.w_out.mT,
    }
    block.load_state_dict({name: value.detach() for name, value in weights.items()})
    return block


def contenders(
    device: torch.device, tokens: int, dim: int, hidden: int, experts: int
) -> Mapping[str, Callable[[], Any]]:
    """Calls that do the same training step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MoELayer(
            TopKGate(dim, experts, 2, bias=False), GroupedExperts(dim, hidden, experts)
        )
        x = torch.randn(tokens, dim)
        upstream = torch.randn(tokens, dim).to(device)
    modules: dict[str, nn.Module] = {
        OURS: layer,
        "loop": Loop(layer),
        "torch grouped_mm": Grouped(layer),
    }
    if find_spec("transformers"):
        modules["transformers"] = mixtral(layer, "eager")
        modules["transformers grouped_mm"] = mixtral(layer, "grouped_mm")
    return {
        name: partial(_step, module.to(device), x.to(device).requires_grad_(), upstream)
        for name, module in modules.items()
    }


def _step(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    # transformers wants a batch dimension; to the others it is one leading dimension more.
    y = module(x[None])[0]
    return torch.autograd.grad(y, (x, *module.parameters()), upstream)


def _case(tokens: int, dim: int, hidden: int, experts: int, bar: float) -> Case:
    flops = 3 * 2.0 * 2 * tokens * (3 * dim * hidden)
    touched = 4.0 * (3 * 3 * experts * dim * hidden + 6 * 2 * tokens * (dim + hidden))
    name = f"{experts} experts, {tokens} tokens, {dim} to {hidden}"
    make = partial(contenders, tokens=tokens, dim=dim, hidden=hidden, experts=experts)
    return Case(name, make, flops, touched, flops, bar)


BENCH = Bench("moe_layer", [_case(4096, 512, 1024, 8, 1.3), _case(4096, 512, 1024, 64, 2.0)])
