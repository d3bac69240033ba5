"""Mixtral's experts as transformers hold them, and `GroupedExperts`: the same weights, both ways.

Checkpoints hold `experts.{i}.w1` (gate), `w3` (up), both `(H, D)`, and `w2` (down), `(D, H)`.
Newer models hold them stacked: `gate_up_proj` `(E, 2 H, D)`, gate first, and `down_proj`
`(E, D, H)`. `GroupedExperts` has `w_in` `(E, D, 2 H)` and `w_out` `(E, H, D)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.moe import GroupedExperts, MoELayer, TopKGate


def is_mixtral_block(module: Any) -> bool:
    """Whether a module is transformers' block of a router and experts with stacked weights."""
    weight = getattr(getattr(module, "gate", None), "weight", None)
    experts: Any = getattr(module, "experts", None)
    return (
        isinstance(weight, Tensor)
        and hasattr(module, "top_k")
        and all(hasattr(experts, name) for name in ("gate_up_proj", "down_proj", "act_fn"))
    )


def from_mixtral_block(block: nn.Module) -> MoELayer:
    """A `MoELayer` that computes what a Mixtral block of transformers computes.

    Args:
        block: A `MixtralSparseMoeBlock`; it is left alone.

    Raises:
        ValueError: It is none.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
        >>> block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=8, intermediate_size=16))
        >>> for weight in block.parameters():
        ...     _ = nn.init.normal_(weight, std=0.1)
        >>> x = torch.randn(2, 5, 8)
        >>> torch.testing.assert_close(from_mixtral_block(block)(x), block(x))
    """
    if not is_mixtral_block(block):
        raise ValueError(
            f"block: expected transformers' MixtralSparseMoeBlock, got {type(block).__name__}"
        )
    held: Any = block
    w_in, w_out = held.experts.gate_up_proj.detach(), held.experts.down_proj.detach()
    router = held.gate.weight.detach()
    where: dict[str, Any] = {"device": router.device, "dtype": router.dtype}
    gate = TopKGate(router.shape[1], router.shape[0], int(held.top_k), bias=False, **where)
    experts = GroupedExperts(w_in.shape[2], w_out.shape[2], w_in.shape[0], **where)
    with torch.no_grad():
        gate.weight.copy_(router)
        experts.w_in.copy_(w_in.mT)
        experts.w_out.copy_(w_out.mT)
    return MoELayer(gate, experts).train(block.training)


@torch.no_grad()
def to_mixtral_block(layer: MoELayer, block: nn.Module) -> None:
    """Copy router and experts of a layer into a Mixtral block of transformers.

    Args:
        layer: A layer with a `TopKGate` without bias and `GroupedExperts` without biases.
        block: A `MixtralSparseMoeBlock` of the same sizes.

    Raises:
        ValueError: A layer that has no such form, or sizes that differ.
    """
    if not is_mixtral_block(block):
        raise ValueError(
            f"block: expected transformers' MixtralSparseMoeBlock, got {type(block).__name__}"
        )
    gate, experts = layer.gate, _plain(layer.experts)
    if not isinstance(gate, TopKGate) or gate.bias is not None or gate.k != block.top_k:
        raise ValueError(f"layer: expected TopKGate with k={block.top_k} and no bias, got {gate}")
    target: Any = block
    pairs = (
        (target.gate.weight, gate.weight),
        (target.experts.gate_up_proj, experts.w_in.mT),
        (target.experts.down_proj, experts.w_out.mT),
    )
    for held, value in pairs:
        if held.shape != value.shape:
            raise ValueError(f"layer: expected {tuple(held.shape)}, got {tuple(value.shape)}")
    for held, value in pairs:
        held.copy_(value)


def to_mixtral_state(experts: GroupedExperts) -> dict[str, Tensor]:
    """The weights of experts under the names of Mixtral's checkpoints.

    The way back is `GroupedExperts.from_mixtral`.

    Args:
        experts: Experts with swiglu and without biases.

    Returns:
        `experts.{i}.w1.weight` (gate), `w2` (down) and `w3` (up), in memory of their own.

    Raises:
        ValueError: Another activation, or biases.

    Example:
        >>> state = to_mixtral_state(GroupedExperts(4, 6, 2))
        >>> sorted(state)[:3], tuple(state["experts.1.w2.weight"].shape)
        (['experts.0.w1.weight', 'experts.0.w2.weight', 'experts.0.w3.weight'], (4, 6))
    """
    _plain(experts)
    state: dict[str, Tensor] = {}
    for index in range(experts.num_experts):
        gate, up = experts.w_in[index].detach().mT.chunk(2)
        parts = {"w1": gate, "w2": experts.w_out[index].detach().mT, "w3": up}
        state |= {f"experts.{index}.{name}.weight": w.contiguous() for name, w in parts.items()}
    return state


def _plain(experts: nn.Module) -> GroupedExperts:
    if not isinstance(experts, GroupedExperts):
        raise ValueError(f"experts: expected GroupedExperts, got {type(experts).__name__}")
    if experts.activation != "swiglu" or experts.b_in is not None:
        raise ValueError(f"experts: expected swiglu without biases, got {experts}")
    return experts
