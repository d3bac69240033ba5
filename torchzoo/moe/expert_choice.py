"""Expert choice: every expert takes the tokens that suit it best, the same number each.

With shares `S = softmax(x W^T + b)` of `T` tokens, expert `e` takes the `c` tokens with the largest
`S[:, e]`, `c = ceil(capacity_factor T / E)`, at weight `S[t, e]`. Loads are equal by construction;
a token may be taken by many experts or by none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchzoo.moe.routing import Gate, Routing, all_experts, check_positive, top_k_experts
from torchzoo.registry import Comparison, Example, register


@register(
    example=lambda: Example(
        kwargs={"dim": 6, "num_experts": 4, "bias": True},
        inputs=(torch.randn(5, 6),),
        bad_options={"capacity_factor": 0.0},
    ),
    exempt={"couples-batch": "experts choose among the tokens of the batch"},
    compare=lambda: Comparison(
        {"dim": 512, "num_experts": 64}, (torch.randn(1024, 512),), ("SoftmaxGate",)
    ),
)
class ExpertChoiceGate(Gate):
    """Gate in which experts choose tokens, so that all have the same load.

    What happens to a token depends on the other tokens of the batch, later ones of its sequence
    included: not for generating text token by token.

    Args:
        dim: Features of a token.
        num_experts: Number of experts `E`.
        capacity_factor: Experts a token, on average.
        bias: Whether the scores have a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., dim)`
        - output: `Routing` with `k = E`.

    Returns:
        A `Routing` in whose mask each expert has `min(T, ceil(capacity_factor T / E))` tokens.

    Raises:
        ValueError: A size below 1, a capacity factor that is not above 0, or an input whose last
            dimension is not `dim`.

    Source:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022, eq. (1)-(2).

    Example:
        >>> ExpertChoiceGate(8, 4)(torch.randn(10, 8)).load.tolist()
        [5, 5, 5, 5]
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        check_positive("capacity_factor", capacity_factor)
        self.capacity_factor = capacity_factor
        self.reset_parameters()

    def route(self, x: Tensor, logits: Tensor) -> Routing:
        """Let each expert take its tokens, ties to the earliest."""
        probs = logits.softmax(-1)
        tokens = logits.shape[0]
        capacity = min(tokens, math.ceil(self.capacity_factor * tokens / self.num_experts))
        taken = top_k_experts(probs.detach().mT, capacity)
        mask = torch.zeros_like(logits.mT, dtype=torch.bool).scatter(-1, taken, True).mT
        return all_experts(probs * mask, logits, probs, mask)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor:g}"
