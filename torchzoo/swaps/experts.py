"""Sparse upcycling: a mixture of experts that starts as the feed-forward layer it replaces.

    y = Σ_{slots s} w_s FFN_{e_s}(x),   Σ_s w_s = 1,   FFN_1 = … = FFN_E = the old layer at first,

so that the output is the old one's, whatever the router chooses (Komatsuzaki et al., "Sparse
Upcycling: Training Mixture-of-Experts from Dense Checkpoints", 2023).
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.moe import GroupedExperts, MoELayer, TopKGate
from torchzoo.sparsity import mlp_parts
from torchzoo.sparsity.layouts import MLPParts, linear_weight
from torchzoo.surgery import Init, Match, Swapped, swap
from torchzoo.swaps.mixtral import from_mixtral_block, is_mixtral_block
from torchzoo.swaps.selectors import WORDS, inputs_of

_CLOSE = 1e-4  # of the largest output: the same layer in float32, computed in another order


class CopiedExperts(nn.Module):
    """Experts of any kind: copies of a module, each applied to the rows of its group.

    Args:
        module: What each expert starts as; maps `(n, D)` to `(n, D')` row by row.
        num_experts: Number of experts E.

    Shape:
        x: (N, D), rows sorted by expert; offsets: (E,), where each expert's rows end → (N, D'),
        zeros past the last end.

    Example:
        >>> experts = CopiedExperts(nn.Linear(4, 3), 2)
        >>> experts(torch.randn(5, 4), torch.tensor([2, 5])).shape
        torch.Size([5, 3])
    """

    def __init__(self, module: nn.Module, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.experts = nn.ModuleList(copy.deepcopy(module) for _ in range(num_experts))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        ends = [0, *offsets.tolist()]
        rows = [
            expert(x[start:end])
            for expert, (start, end) in zip(self.experts, pairwise(ends), strict=True)
        ]
        rest = x.shape[0] - ends[-1]
        return torch.cat([*rows, rows[0].new_zeros(rest, rows[0].shape[-1])])


def upcycle(mlp: nn.Module, *, num_experts: int = 4, k: int = 2, **gate: Any) -> MoELayer:
    """A mixture of experts that computes what a feed-forward layer computes.

    Experts are stacked weights where the layer is linear, activation, linear, or gated, with an
    activation that `GroupedExperts` has, and where that gives the same output for random inputs;
    else they are copies of the layer.

    Args:
        mlp: The feed-forward layer; it is left alone.
        num_experts: Number of experts.
        k: Experts a token. With one, the router learns from losses of its own alone.
        **gate: More options of `TopKGate`.

    Raises:
        ValueError: No linear layer inside, or numbers that `TopKGate` refuses.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> x = torch.randn(5, 4)
        >>> torch.testing.assert_close(upcycle(mlp)(x), mlp(x))
    """
    matrices = (m for m in mlp.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2)
    first: Any = next(matrices, None)
    if first is None:
        raise ValueError(f"mlp: expected a feed-forward layer, got {type(mlp).__name__}")
    dim = inputs_of(first)
    where: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
    router = TopKGate(dim, num_experts, k, **gate, **where)
    experts = _grouped(mlp, num_experts)
    if experts is None or not _same(MoELayer(router, experts), mlp, dim):
        return MoELayer(router, CopiedExperts(mlp, num_experts)).train(mlp.training)
    return MoELayer(router, experts).train(mlp.training)


def swap_experts(
    model: nn.Module,
    match: Match = WORDS["mlp"],
    *,
    num_experts: int = 4,
    k: int = 2,
    init: Init = "match",
    inputs: Any = None,
    **gate: Any,
) -> Swapped:
    """Upcycle feed-forward layers of a model, in place; it computes what it did.

    A block of Mixtral of transformers, which has experts, becomes a `MoELayer` with them; options
    then have no say.

    Args:
        model: The model to change.
        match: As for `torchzoo.surgery.find`; by default every layer that `mlp_parts` knows.
        num_experts: Number of experts.
        k: Experts a token.
        init: As for `torchzoo.surgery.swap`; `"fresh"` draws all experts anew.
        inputs: As there.
        **gate: More options of `TopKGate`.

    Returns:
        What changed.

    Raises:
        UnknownNameError: Nothing is selected.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> print(swap_experts(model, num_experts=2))
        parameters 76 → 162
          0: Sequential → MoELayer  76 → 162
    """

    def made(old: nn.Module) -> nn.Module:
        if is_mixtral_block(old):
            return from_mixtral_block(old)
        return upcycle(old, num_experts=num_experts, k=k, **gate)

    return swap(model, match, made, init=init, inputs=inputs)


def _grouped(mlp: nn.Module, num_experts: int) -> GroupedExperts | None:
    """The layer's weights `num_experts` times, stacked; None where its layout has no such form."""
    try:
        parts = mlp_parts(mlp)
    except ValueError:
        return None
    known = ("silu",) if parts.gate is not None else ("relu", "gelu")
    if parts.activation not in known:
        return None
    w_in, b_in = _first(parts)
    w_out, b_out = linear_weight(parts.down).mT, getattr(parts.down, "bias", None)
    bias = b_in is not None or b_out is not None
    experts = GroupedExperts(
        w_in.shape[0],
        w_out.shape[0],
        num_experts,
        activation="swiglu" if parts.gate is not None else parts.activation,
        bias=bias,
        device=w_in.device,
        dtype=w_in.dtype,
    )
    with torch.no_grad():
        experts.w_in.copy_(w_in)
        experts.w_out.copy_(w_out)
        for held, value in ((experts.b_in, b_in), (experts.b_out, b_out)):
            if held is not None:
                held.copy_(torch.zeros_like(held) if value is None else value)
    return experts


def _first(parts: MLPParts) -> tuple[Tensor, Tensor | None]:
    """`(D, H)`, with a gate `(D, 2 H)`, gate first, and the biases."""
    layers = [layer for layer in (parts.gate, parts.up) if layer is not None]
    weights = [linear_weight(layer).mT for layer in layers]
    biases = [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return torch.cat(weights, dim=1), None
    width = weights[0].shape[1]
    filled = [weights[0].new_zeros(width) if bias is None else bias for bias in biases]
    return torch.cat(weights, dim=1), torch.cat(filled)


@torch.no_grad()
def _same(layer: nn.Module, mlp: nn.Module, dim: int) -> bool:
    """Whether both give the same for random inputs, in evaluation mode."""
    weight = next(mlp.parameters())
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, dim, generator=generator).to(weight)
    mode = mlp.training
    try:
        expected, found = mlp.eval()(x), layer.eval()(x)
    finally:
        mlp.train(mode)
    close = _CLOSE if x.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((found - expected).abs().max() <= close * expected.abs().max())
