"""What the layers of S-KAN share, and the layer that is left when each node has chosen.

A pooled layer has bases by family and, for each, coefficients (O, nodes, K); its output is the sum
of a matrix product a family, of its functions with its coefficients, in tiles as in `kan`. In the
pruned layer a family is computed for the inputs that chose it only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import UnivariateBasis, check_count
from torchzoo.activations.kan import as_columns, as_weights, compute_type, in_tiles, make_basis
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

POOL = ("bspline", "rbf", "chebyshev", "wavelet")
FULL, SELECTIVE, PRUNED = 1, 2, 3


class NodeReport(NamedTuple):
    """What one node chose.

    Attributes:
        node: Index of the input.
        family: The family of the largest gate.
        gate: That gate.
        scores: For each family, its gate times the mean size of its part of an edge's function
            over the batch and the outputs; empty without a batch.
    """

    node: int
    family: str
    gate: float
    scores: dict[str, float]


def _input(*shape: int) -> tuple[Tensor]:
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1,)


class PooledKAN(ZooModel):
    """Bases by family, the coefficients of each, and the product of the two."""

    in_features: int
    out_features: int
    bases: nn.ModuleDict
    coef: nn.ParameterDict
    bias: nn.Parameter | None

    def families(self) -> list[tuple[str, UnivariateBasis, nn.Parameter]]:
        """Name, basis and coefficients (O, nodes, K) of each family."""
        return [(name, basis, self.coef[name]) for name, basis in self.bases.items()]  # type: ignore[misc]

    @property
    def macs(self) -> int:
        """Multiplications with weights for one row of inputs."""
        return sum(coef.numel() for coef in self.coef.values())

    def check_inputs(self, x: Tensor) -> None:
        """Raise the ValueError that `forward` raises for this x, if any."""
        if x.ndim == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., {self.in_features}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )

    def _inputs_of(self, name: str, x: Tensor) -> Tensor:
        return x

    def _product(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The sum over the families of functions times weights (O, nodes, K)."""
        self.check_inputs(x)
        rows = compute_type(x).reshape(-1, self.in_features)
        total = rows.new_zeros(len(rows), self.out_features, dtype=weights[0].dtype)
        if self.bias is not None:
            total = total + self.bias
        for (name, basis, _), coef in zip(self.families(), weights, strict=True):
            weight = as_columns(coef)

            def product(part: Tensor, basis: UnivariateBasis = basis, w: Tensor = weight) -> Tensor:
                return as_weights(basis.evaluate(part).flatten(-2), w) @ w

            total = total + in_tiles(product, self._inputs_of(name, rows), len(weight))
        return total.reshape(*x.shape[:-1], self.out_features)

    def _reset_functions(self) -> None:
        """Coefficients of variance 1 / (D sum_k E B_k^2), x spread over the family's range."""
        for _, basis, coef in self.families():
            basis.reset_parameters()
            low, high = basis.grid_range
            x = torch.linspace(low, high, 257, device=coef.device, dtype=torch.float32)
            width = basis.in_features or 1
            with torch.no_grad():
                energy = basis.evaluate(x.unsqueeze(-1).expand(-1, width)).square().mean(0).sum(0)
                std = (self.in_features * energy).rsqrt().to(coef.dtype)  # (1,) or (nodes,)
                coef.normal_().mul_(std.unsqueeze(-1))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def check_pool(pool: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; raises a ValueError where there are none or one repeats."""
    names = (pool,) if isinstance(pool, str) else tuple(pool)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"pool: expected distinct names of families, got {names}")
    for name in names:
        try:
            make_basis(name, 1, device="meta")
        except ValueError as error:
            raise ValueError(f"pool: {error}") from None
    return names


@register(
    paper=10,
    example=lambda: Example(
        {
            "in_features": 3,
            "out_features": 2,
            "nodes": {"bspline": [0, 2], "wavelet": [1], "chebyshev": [2]},
        },
        _input(4, 3),
        bad_options={
            "in_features": 2,
            "out_features": 0,
            "nodes": {"bspline": [0, 3]},
        },
    ),
    compare=lambda: Comparison(
        {
            "in_features": 64,
            "out_features": 64,
            "nodes": {"bspline": range(32), "chebyshev": range(32, 64)},
        },
        (2 * torch.rand(256, 64) - 1,),
        peers.LINEAR,
    ),
)
class PrunedKANLinear(PooledKAN):
    """A layer whose nodes each have their own family of functions, what `SKANLinear.prune` leaves.

    It costs what a layer with one family does: O times the sum of K over the nodes.

    Args:
        in_features: Number of inputs D.
        out_features: Number of outputs O.
        nodes: For each family, the inputs that use it.
        bias: Whether a bias is added.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`
        - output: `(..., O)`
        - coef: for each family `(O, nodes, K)`
        - gates: `(D, M)`, for the families that are left; one-hot after a top-1 choice

    Returns:
        The outputs.

    Raises:
        ValueError: A count below 1, an unknown family, an input that doesn't exist or is repeated
            in one family, or x of another width.

    Source:
        Yang, Zhang, Luo, Lu and Shen, Activation Space Selectable Kolmogorov-Arnold Networks, 2024,
        section 3.

    Example:
        >>> layer = PrunedKANLinear(3, 2, {"bspline": [0, 2], "chebyshev": [1]})
        >>> layer.macs == 2 * (8 + 5 + 8)
        True
    """

    phase = PRUNED

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nodes: Mapping[str, Sequence[int]],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        if not nodes:
            raise ValueError("nodes: expected inputs for at least one family, got none")
        for name, index in nodes.items():
            if not index or len(set(index)) < len(index) or not set(index) <= {*range(in_features)}:
                raise ValueError(
                    f"nodes: expected distinct inputs below in_features={in_features}, "
                    f"got {list(index)} for {name}"
                )
        self.in_features, self.out_features = in_features, out_features
        self.pool = check_pool(sorted(nodes))
        self.nodes = {name: tuple(nodes[name]) for name in self.pool}
        factory = {"device": device, "dtype": dtype}
        bases = {
            n: make_basis(n, len(i), device=device, dtype=dtype) for n, i in self.nodes.items()
        }
        self.bases = nn.ModuleDict(bases)
        self.coef = nn.ParameterDict(
            {
                name: torch.empty(out_features, len(nodes[name]), basis.num_basis, **factory)  # type: ignore[arg-type]
                for name, basis in bases.items()
            }
        )
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None  # type: ignore[arg-type]
        for name, index in self.nodes.items():
            self.register_buffer(
                f"_nodes_{name}", torch.tensor(index, device=device), persistent=False
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Coefficients that would give each family's sum variance 1 if it had all nodes."""
        self._reset_functions()

    def _inputs_of(self, name: str, x: Tensor) -> Tensor:
        return x.index_select(-1, self.get_buffer(f"_nodes_{name}"))

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, [coef for _, _, coef in self.families()])

    @property
    def gates(self) -> Tensor:
        """1 where a node has a family, else 0: (D, M) for the families in `pool`."""
        gates = torch.zeros(self.in_features, len(self.pool))
        for m, name in enumerate(self.pool):
            gates[list(self.nodes[name]), m] = 1
        return gates

    def report(self) -> list[NodeReport]:
        """What each node kept; a node of several families is there for each."""
        entries = [
            NodeReport(node, name, 1.0, {}) for name in self.pool for node in self.nodes[name]
        ]
        return sorted(entries)

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {len(index)}" for name, index in self.nodes.items())
        return f"{self.in_features}, {self.out_features}, nodes of {counts}"
