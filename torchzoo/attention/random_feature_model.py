"""Models that are linear in frozen random features of a query and keys, fitted in closed form.

`RandomFeatureModel` is the base of `RandomFeatureAttention` and of the two-layer network that
H. Fu, T. Guo, Y. Bai and S. Mei compare it with: What can a Single Attention Layer Learn? A Study
Through the Random Features Lens, 2023.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.common.solvers import ridge as solve_ridge
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

Solver = Literal["auto", "primal", "dual", "cg"]


def check_inputs(
    query: Tensor, keys: Tensor, mask: Tensor | None, dim: int | None = None, suffix: str = ""
) -> None:
    """Raise a ValueError unless query is (..., d), keys (..., N, d) and mask (..., N)."""
    if query.ndim == 0 or (dim is not None and query.shape[-1] != dim):
        wanted = "d" if dim is None else dim
        raise ValueError(f"query{suffix}: expected (..., {wanted}), got {tuple(query.shape)}")
    dim = query.shape[-1]
    if keys.ndim < 2 or keys.shape[-1] != dim:
        raise ValueError(f"keys{suffix}: expected (..., N, {dim}), got {tuple(keys.shape)}")
    if keys.shape[:-2] != query.shape[:-1]:
        raise ValueError(
            f"keys{suffix}: expected the leading dimensions of the query, "
            f"{tuple(query.shape[:-1])}, got {tuple(keys.shape)}"
        )
    if keys.shape[-2] == 0:
        raise ValueError(f"keys{suffix}: expected at least one, got {tuple(keys.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:-1]):
        raise ValueError(
            f"mask{suffix}: expected bool of shape {tuple(keys.shape[:-1])}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")


class RandomFeatureModel(ZooModel):
    """A model linear in `value`, `(*feature shape, out)`, on features of frozen weights.

    Subclasses have the buffer `weight`, the parameter `value` and `features`.
    """

    weight: Tensor
    value: nn.Parameter
    seed: int | None

    def _normal_weight(self) -> Tensor:
        """Standard normal values for `weight`: one seed gives the same on any device and dtype."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randn(self.weight.shape, generator=generator, device="cpu").to(self.weight)

    def features(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def fit(
        self,
        query: Tensor,
        keys: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        ridge: float = 1e-6,
        solver: Solver = "auto",
        chunk: int = 1024,
    ) -> Self:
        """Set `value` to the ridge regression of y on the features, in closed form.

        Args:
            query: Queries, `(n, d)`.
            keys: Keys, `(n, N, d)`.
            y: Targets, `(n,)` or `(n, out)`.
            mask: True for real keys, `(n, N)`.
            ridge: Penalty on the squared norm of `value`, which is added to the sum of squared
                errors; features are not scaled by the number of heads.
            solver: See `torchzoo.common.solvers.ridge`.
            chunk: Rows whose features are formed at one time.

        Returns:
            The module itself.

        Raises:
            ValueError: Shapes that don't fit, or a negative penalty.
        """
        out = self.value.shape[-1]
        if query.ndim != 2:
            raise ValueError(f"query: expected (n, d), got {tuple(query.shape)}")
        if y.shape not in ((len(query), out), *([(len(query),)] if out == 1 else [])):
            raise ValueError(f"y: expected ({len(query)}, {out}), got {tuple(y.shape)}")
        if not ridge >= 0:
            raise ValueError(f"ridge: expected at least 0, got {ridge}")
        check_counts(chunk=chunk)
        masks: Any = mask.split(chunk) if mask is not None else [None] * -(-len(query) // chunk)
        rows = zip(query.split(chunk), keys.split(chunk), masks, strict=True)
        features = torch.cat([self.features(*row).flatten(1) for row in rows])
        value = solve_ridge(features, y.reshape(-1, out), ridge, solver=solver)
        self.value.copy_(value.reshape(self.value.shape))
        return self


@register(
    paper=168,
    example=lambda: Example(
        {"dim": 4, "num_keys": 5, "width": 7, "out_features": 2},
        (torch.randn(3, 4), torch.randn(3, 5, 4)),
        bad_options={"dim": 0, "num_keys": 0, "width": 0, "out_features": 0},
    ),
    compare=lambda: Comparison(
        {"dim": 32, "num_keys": 64, "width": 8448},
        (
            torch.randn(256, 32),
            torch.randn(256, 64, 32),
        ),
        ("RandomFeatureAttention(num_heads=256)",),
    ),
)
class RandomFeatureMLP(RandomFeatureModel):
    """Two-layer ReLU network on query and keys in a row, with a frozen first layer.

    The baseline of random-feature attention; `width = num_heads * (dim + 1)` has as many trained
    parameters. It depends on the order of the keys, and takes no mask.

    Args:
        dim: Dimension d of query and keys.
        num_keys: Number of keys N.
        width: Number of neurons.
        out_features: Number of outputs.
        seed: Seed of the weights; by default they come from PyTorch's global generator.
        device: Device of the weights.
        dtype: Type of the weights.

    Shape:
        - query: `(..., d)`
        - keys: `(..., N, d)`
        - output: `(..., out_features)`
        - weight: `(width, (N + 1) d + 1)`, frozen; value: `(width, out_features)`, starts at 0

    Returns:
        The outputs `sum_m v_m relu(<w_m, [x_0; ..; x_N; 1]>)`.

    Raises:
        ValueError: An option out of range, or shapes that don't fit.

    Source:
        The comparison of Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study
        Through the Random Features Lens, 2023; weights N(0, 1) over the root of the input's length.

    Example:
        >>> model = RandomFeatureMLP(4, num_keys=8, width=100, seed=0)
        >>> model(torch.randn(3, 4), torch.randn(3, 8, 4)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        dim: int,
        num_keys: int,
        width: int,
        out_features: int = 1,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_keys=num_keys, width=width, out_features=out_features)
        self.dim, self.num_keys, self.width, self.out_features = dim, num_keys, width, out_features
        self.seed = seed
        length = (num_keys + 1) * dim + 1
        self.register_buffer("weight", torch.empty(width, length, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(width, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and set the values to 0."""
        with torch.no_grad():
            self.weight.copy_(self._normal_weight() / math.sqrt(self.weight.shape[1]))
        nn.init.zeros_(self.value)

    def features(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """The activations `(..., width)` of the frozen layer."""
        check_inputs(query, keys, None, self.dim)
        if keys.shape[-2] != self.num_keys:
            raise ValueError(
                f"keys: expected (..., {self.num_keys}, {self.dim}), got {tuple(keys.shape)}"
            )
        if mask is not None:
            raise ValueError("mask: expected None, as every key has its own weights, got a mask")
        row = torch.cat([query.unsqueeze(-2), keys], -2).flatten(-2)
        return F.relu(F.linear(F.pad(row, (0, 1), value=1.0), self.weight))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        features = self.features(query, keys)
        return features @ self.value.to(features.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_keys} keys, width={self.width}, {self.out_features} outputs"
