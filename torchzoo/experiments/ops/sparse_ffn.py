"""`sparse_ffn` for one token against the dense layer, forward and backward.

The layer has the size of a language model's of seven billion parameters. A bias makes the wanted
share of neurons count; `"mask"` says beforehand which, as a perfect predictor would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops.sparse_ffn import sparse_ffn

DIM, HIDDEN = 4096, 11008
TENTH = 1.2816  # a standard normal number is above this in a tenth of all cases


def _layer(
    device: torch.device, gated: bool, lowered: float, tokens: int
) -> tuple[dict[str, Tensor], Tensor, Callable[..., Tensor]]:
    """The tensors of a layer, its down-projection as a dense layer keeps it, and that layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layer = {"x": draw(tokens, DIM), "w_up": draw(HIDDEN, DIM) / DIM**0.5}
    layer["w_down_t"] = draw(HIDDEN, DIM) / HIDDEN**0.5
    bias = torch.full((HIDDEN,), -lowered, device=device)
    if gated:
        layer |= {"w_gate": draw(HIDDEN, DIM) / DIM**0.5, "b_gate": bias}
    else:
        layer["b_up"] = bias

    def dense(x: Tensor, w_down: Tensor, **weights: Tensor) -> Tensor:
        up = F.linear(x, weights["w_up"], weights.get("b_up"))
        if not gated:
            return F.linear(F.relu(up), w_down)
        return F.linear(F.relu(F.linear(x, weights["w_gate"], weights["b_gate"])) * up, w_down)

    return layer, layer["w_down_t"].mT.contiguous(), dense


def forward(
    device: torch.device, gated: bool, lowered: float, masked: bool, policy: str, tokens: int
) -> Mapping[str, Callable[[], Any]]:
    """The layer without gradients."""
    layer, w_down, dense = _layer(device, gated, lowered, tokens)
    options: dict[str, Any] = {**layer, "policy": policy}
    if masked:
        options["mask"] = F.linear(layer["x"], layer["w_gate"], layer["b_gate"]) > 0
    return {
        OURS: partial(sparse_ffn, **options),
        "dense": partial(dense, w_down=w_down, **layer),
    }


def backward(device: torch.device) -> Mapping[str, Callable[[], Any]]:
    """The derivative by the token and all weights."""
    layer, w_down, dense = _layer(device, True, TENTH, 1)
    ours: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in layer.items()}
    w_down.requires_grad_()
    theirs = [w_down if name == "w_down_t" else tensor for name, tensor in ours.items()]
    grad = torch.ones_like(layer["x"])
    outputs = sparse_ffn(**ours), dense(w_down=w_down, **ours)
    calls = zip(outputs, (list(ours.values()), theirs), strict=True)
    first, second = (
        partial(torch.autograd.grad, y, leaves, grad, retain_graph=True) for y, leaves in calls
    )
    return {OURS: first, "dense": second}


def _case(
    name: str,
    bar: float | None,
    *,
    gated: bool = True,
    share: float = 0.1,
    masked: bool = False,
    policy: str = "sparse",
    tokens: int = 1,
) -> Case:
    lowered = {0.1: TENTH, 1.0: -10.0}[share]
    read = share if masked else (1 + 2 * share) / 3 if gated else (1 + share) / 2
    weights = (3 if gated else 2) * DIM * HIDDEN * read
    make = partial(
        forward, gated=gated, lowered=lowered, masked=masked, policy=policy, tokens=tokens
    )
    return Case(name, make, 2.0 * tokens * weights, 4.0 * weights, 2.0 * tokens * weights, bar)


BENCH = Bench(
    "sparse_ffn",
    [
        _case("gated, 10% active", 2.1),
        _case("plain, 10% active", 1.6, gated=False),
        _case("gated, mask of 10%", 6.0, masked=True),
        _case("gated, all active, auto", 0.9, share=1.0, policy="auto"),
        _case("gated, 10% active, 32 tokens, auto", None, policy="auto", tokens=32),
        Case(
            "gated, 10% active, backward",
            backward,
            0.6 * 4 * DIM * HIDDEN,
            4.0 * 0.3 * 2 * DIM * HIDDEN,
            0.6 * 4 * DIM * HIDDEN,
            2.0,
        ),
    ],
)
