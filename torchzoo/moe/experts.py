"""Feed-forward experts with stacked weights, computed group by group.

For a row `x` of expert `e`, with `h = x w_in[e] + b_in[e]`,

    y = activation(h) w_out[e] + b_out[e],   swiglu: activation([g, u]) = silu(g) * u.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.moe.dispatch import unpermute_tokens
from torchzoo.moe.routing import check_count
from torchzoo.ops import grouped_ffn, grouped_mm
from torchzoo.ops.grouped_ffn import ACTIVATIONS as FUSED
from torchzoo.ops.grouped_ffn import swiglu
from torchzoo.registry import Comparison, Example, register

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "gelu": F.gelu,
    "relu": torch.relu,
}


@register(
    example=lambda: Example(
        kwargs={"dim": 6, "hidden_dim": 8, "num_experts": 3, "bias": True},
        inputs=(torch.randn(7, 6), torch.tensor([3, 3, 7], dtype=torch.int32)),
        batch_dims=0,
        bad_options={"hidden_dim": 0, "activation": "swish"},
    ),
    compare=lambda: Comparison(
        {"dim": 256, "hidden_dim": 512, "num_experts": 8},
        (
            torch.randn(1024, 256),
            128 * torch.arange(1, 9, dtype=torch.int32),
        ),
        peers.EXPERTS,
    ),
)
class GroupedExperts(ZooModel):
    """Two-layer feed-forward experts whose weights are stacked along the first dimension.

    Args:
        dim: Features of a token.
        hidden_dim: Hidden features of an expert.
        num_experts: Number of experts `E`.
        activation: "swiglu", "gelu" or "relu".
        bias: Whether both layers have biases.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(N, dim)`, rows sorted by expert
        - offsets: `(E,)`, int32 or int64, where each expert's rows end
        - output: `(N, dim)`, zeros past the last end

    Attributes:
        w_in: `(E, dim, hidden_dim)`, twice the width for swiglu.
        w_out: `(E, hidden_dim, dim)`.
        b_in: `(E, hidden_dim)`, twice the width for swiglu, or None.
        b_out: `(E, dim)` or None.

    Returns:
        For each row the output of its expert.

    Raises:
        ValueError: A size below 1, an unknown activation, or inputs that don't fit.

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020, for swiglu.

    Example:
        >>> experts = GroupedExperts(8, 16, 2)
        >>> experts(torch.randn(5, 8), torch.tensor([2, 5])).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            check_count(name, size)
        if activation not in _ACTIVATIONS:
            names = ", ".join(_ACTIVATIONS)
            raise ValueError(f"activation: expected one of {names}, got {activation!r}")
        super().__init__()
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.activation = activation
        width = 2 * hidden_dim if activation == "swiglu" else hidden_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w_in = parameter(dim, width)
        self.w_out = parameter(hidden_dim, dim)
        self.b_in = parameter(width) if bias else None
        self.b_out = parameter(dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert like two `nn.Linear`: uniform within `fan_in ** -0.5`."""
        layers = ((self.w_in, self.b_in, self.dim), (self.w_out, self.b_out, self.hidden_dim))
        for weight, bias, fan_in in layers:
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
            if bias is not None:
                nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        *,
        src: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Apply to each row its expert.

        With `src` and `weights`, both `(N,)`, `x` are the tokens `(T, dim)` and row `n` of the
        sorted rows is token `src[n]`; returned is, for each token, the sum of the outputs of its
        rows, weighted.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (N, {self.dim}), got {tuple(x.shape)}")
        if src is None or weights is None:
            return self._rows(x, offsets)
        if x.is_cpu and self.b_in is None and self.activation in FUSED:
            return grouped_ffn(
                x, self.w_in, self.w_out, offsets, src, weights, activation=self.activation
            )
        return unpermute_tokens(self._rows(x[src], offsets), src, weights, x.shape[0])

    def _rows(self, x: Tensor, offsets: Tensor) -> Tensor:
        hidden = self._linear(x, self.w_in, self.b_in, offsets)
        return self._linear(_ACTIVATIONS[self.activation](hidden), self.w_out, self.b_out, offsets)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        y = grouped_mm(x, weight, offsets)
        if bias is None:
            return y
        # Rows past the last end belong to expert E, whose bias is the zero row that is added here.
        rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, rows, right=True)
        return y + F.pad(bias, (0, 0, 0, 1))[expert].to(y.dtype)

    @classmethod
    def from_mixtral(cls, state_dict: Mapping[str, Tensor]) -> GroupedExperts:
        """Stack the experts of a Mixtral block.

        Args:
            state_dict: Weights `experts.{i}.w1.weight` (gate), `w3` (up), both `(hidden, dim)`,
                and `w2` (down), `(dim, hidden)`; a prefix before `experts` and entries of other
                names are ignored.

        Returns:
            Experts with swiglu that compute the same.

        Raises:
            ValueError: No experts, experts of several blocks, or a weight that is missing.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for name, value in state_dict.items():
            match = re.search(r"(?:^|\.)experts\.(\d+)\.(w[123])\.weight$", name)
            if match is None:
                continue
            key = int(match[1]), match[2]
            if key in found:
                raise ValueError(
                    f"state_dict: expected the experts of one block, got also {name!r}"
                )
            found[key] = value
        num_experts = len(found) // 3
        wanted = {(expert, part) for expert in range(num_experts) for part in ("w1", "w2", "w3")}
        if not found or wanted != set(found):
            raise ValueError(
                "state_dict: expected w1, w2 and w3 of experts 0, 1, ..., "
                f"got {sorted(found) or 'none'}"
            )
        w1, w2, w3 = (
            torch.stack([found[expert, part].mT for expert in range(num_experts)])
            for part in ("w1", "w2", "w3")
        )
        experts = cls(w1.shape[1], w1.shape[2], num_experts, device=w1.device, dtype=w1.dtype)
        experts.load_state_dict({"w_in": torch.cat([w1, w3], dim=-1), "w_out": w2})
        return experts

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return (
            f"{self.dim}, {self.hidden_dim}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, bias={self.b_in is not None}"
        )
