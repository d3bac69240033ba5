"""The mixture-of-experts layer: a gate chooses, experts compute, weights combine.

    y_t = sum_{slots s of t in use} weights_ts FFN_{experts_ts}(x_t)  (+ shared(x_t))

Any gate goes with any experts. Losses of the router are functions of the routing that the layer
returns on request (`torchzoo.moe.losses`); the layer stores nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.moe.dense_to_sparse import ActivationDenseToSparseGate
from torchzoo.moe.dispatch import DROP_POLICIES, sort_slots, unpermute_tokens
from torchzoo.moe.experts import GroupedExperts
from torchzoo.moe.gates import TopKGate
from torchzoo.moe.routing import Routing, check_positive
from torchzoo.registry import Comparison, Example, register


def moe_layer(
    x: Tensor,
    gate: Callable[[Tensor], Routing],
    experts: Callable[[Tensor, Tensor], Tensor],
    *,
    capacity_factor: float | None = None,
    drop_policy: str = "position",
) -> tuple[Tensor, Routing]:
    """Send tokens to experts and combine what they return.

    Args:
        x: Tokens.
        gate: Maps tokens to a `Routing`.
        experts: Maps rows sorted by expert `(N, dim)` and ends `(E,)` to `(N, out_dim)`.
        capacity_factor: An expert takes `ceil(capacity_factor T k / E)` slots; None takes all.
        drop_policy: Which slots are dropped beyond that, see `apply_capacity`.

    Shape:
        - x: `(..., dim)`
        - output: `(..., out_dim)`

    Returns:
        The outputs, and the routing with the slots that capacity dropped taken out.

    Raises:
        ValueError: A capacity factor that is not above 0, an unknown policy, or inputs that the
            gate refuses.

    Example:
        >>> from torchzoo.moe import TopKGate
        >>> x = torch.randn(3, 5, 8)
        >>> y, routing = moe_layer(x, TopKGate(8, 4, 2), GroupedExperts(8, 16, 4))
        >>> y.shape, routing.load.shape
        (torch.Size([3, 5, 8]), torch.Size([4]))
    """
    _check_capacity(capacity_factor, drop_policy)
    routing = gate(x)
    tokens, k = routing.mask.shape
    num_experts = routing.logits.shape[-1]
    capacity = None
    if capacity_factor is not None:
        capacity = math.ceil(capacity_factor * tokens * k / num_experts)
    offs, src, weights, routing = sort_slots(
        routing, num_experts, capacity=capacity, drop_policy=drop_policy
    )
    rows = x.reshape(tokens, x.shape[-1])
    if isinstance(experts, GroupedExperts):  # they can do without a copy of each slot's token
        y = experts(rows, offs, src=src, weights=weights)
    else:
        y = unpermute_tokens(experts(rows[src], offs), src, weights, tokens)
    return y.reshape(*x.shape[:-1], y.shape[-1]), routing


def _check_capacity(capacity_factor: float | None, drop_policy: str) -> None:
    if capacity_factor is not None:
        check_positive("capacity_factor", capacity_factor)
    if drop_policy not in DROP_POLICIES:
        raise ValueError(f"drop_policy: expected one of {DROP_POLICIES}, got {drop_policy!r}")


@register(
    paper=69,
    example=lambda: Example(
        kwargs={
            "gate": ActivationDenseToSparseGate(6, 3, learn_temperature=True),
            "experts": GroupedExperts(6, 8, 3),
        },
        inputs=(torch.randn(5, 6),),
        bad_options={"capacity_factor": 0.0},
    ),
    compare=lambda: Comparison(
        {"gate": TopKGate(256, 8, k=2), "experts": GroupedExperts(256, 512, 8)},
        (torch.randn(2048, 256),),
        {
            "Linear, ReLU, Linear of all experts": lambda **_: peers.feed_forward(256, 8 * 512),
            "Linear, ReLU, Linear of two experts": lambda **_: peers.feed_forward(256, 2 * 512),
        },
    ),
)
class MoELayer(ZooModel):
    """Mixture-of-experts layer of any gate and any experts.

    Without a capacity nothing is dropped and the output of a token does not depend on the other
    tokens; with one, it does.

    Args:
        gate: Maps tokens to a `Routing`.
        experts: Maps rows sorted by expert `(N, dim)` and ends `(E,)` to `(N, out_dim)`.
        capacity_factor: An expert takes `ceil(capacity_factor T k / E)` slots; None takes all.
        drop_policy: Which slots are dropped beyond that, see `apply_capacity`.
        shared_expert: A module that every token passes; its output is added.

    Shape:
        - x: `(..., dim)`
        - output: `(..., out_dim)`

    Returns:
        The outputs; with `return_routing=True` also the `Routing`, from which losses, the load of
        each expert and the fraction of dropped slots are computed.

    Raises:
        ValueError: A capacity factor that is not above 0, an unknown policy, gate and experts of
            different numbers of experts, or inputs that the gate refuses.

    Source:
        Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", 2017, eq. (1); the default example has the activation
        dense-to-sparse gate of Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for
        Softmax Gaussian Mixture of Experts?", 2024.

    Example:
        >>> from torchzoo.moe import TopKGate, load_balance_loss
        >>> layer = MoELayer(TopKGate(8, 4, 2), GroupedExperts(8, 16, 4))
        >>> y, routing = layer(torch.randn(3, 5, 8), return_routing=True)
        >>> loss = y.square().mean() + 0.01 * load_balance_loss(routing)
        >>> loss.backward()
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        *,
        capacity_factor: float | None = None,
        drop_policy: str = "position",
        shared_expert: nn.Module | None = None,
    ) -> None:
        _check_capacity(capacity_factor, drop_policy)
        counts = [getattr(module, "num_experts", None) for module in (gate, experts)]
        if None not in counts and counts[0] != counts[1]:
            raise ValueError(
                f"experts: expected {counts[0]} experts, as the gate has, got {counts[1]}"
            )
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self.capacity_factor = capacity_factor
        self.drop_policy = drop_policy

    def forward(
        self, x: Tensor, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Send tokens to experts and combine what they return."""
        y, routing = moe_layer(
            x,
            self.gate,
            self.experts,
            capacity_factor=self.capacity_factor,
            drop_policy=self.drop_policy,
        )
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return (y, routing) if return_routing else y

    def extra_repr(self) -> str:
        """Capacity in short."""
        if self.capacity_factor is None:
            return "dropless"
        return f"capacity_factor={self.capacity_factor:g}, drop_policy={self.drop_policy!r}"
