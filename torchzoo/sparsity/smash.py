"""A linear layer of sparse weights for sparse activations, by row-wise merging in scratchpad.

K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (2021). The product itself is
`torchzoo.ops.spgemm`: for each row x_i of the activations

    y_i = Σ_{k : x_ik stored} x_ik W[:, k]ᵀ,

where only stored weights of stored activations meet, and the terms of an entry are merged as they
are made. Deviations: the accumulator is chosen by the matrix's width (sums in an array where it
stays in cache, a hash table where not), and the order of additions is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.ops.spgemm import spgemm
from torchzoo.registry import Example, register


def _example() -> Example:
    return Example(
        {"in_features": 5, "out_features": 3, "pattern": [[0, 2], [], [1, 2, 4]]},
        (torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),),
        bad_options={"in_features": 0, "out_features": -1, "pattern": [[0], [5], []]},
    )


@register(
    paper=135,
    example=_example,
    compare="sparse products are measured beside their peers by `bench --op spgemm`",
)
class SparseSparseLinear(ZooModel):
    """A linear layer whose weight is stored on a fixed pattern, for sparse or dense inputs.

    A sparse input gives a sparse output: the pattern of the product, with the bias added to its
    stored entries. A dense input stores every entry, and gives a dense output.

    Args:
        in_features: Size of an input, F.
        out_features: Size of an output, O.
        pattern: Which weights there are: for each output the inputs that it reads, or a matrix
            `(O, F)`, dense or sparse, whose non-zeros say so.
        bias: Whether to add a bias.
        device: Where to make the parameters.
        dtype: Their type.

    Shape:
        - x: `(..., F)` dense, or sparse CSR or COO `(N, F)`
        - output: `(..., O)` dense, or sparse CSR `(N, O)`

    Returns:
        x Wᵀ, plus the bias where it is stored.

    Raises:
        ValueError: Sizes below 1, a pattern that doesn't fit them, or an input that doesn't.

    Source:
        K. Shivdikar, "SMASH: Sparse Matrix Atomic Scratchpad Hashing" (thesis, 2021).

    Example:
        >>> layer = SparseSparseLinear(4, 2, pattern=[[0, 3], [1]])
        >>> x = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 1.0], [0, 0, 1.0, 0]]).to_sparse_csr()
        >>> layer(x).crow_indices()
        tensor([0, 1, 3, 3])
    """

    row: Tensor
    col: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: Tensor | Sequence[Sequence[int]],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name}: expected a number ≥ 1, got {size}")
        self.in_features = in_features
        self.out_features = out_features
        device = torch.get_default_device() if device is None else device
        row, col = _transposed_entries(pattern, in_features, out_features)
        self.register_buffer("row", row.to(device))
        self.register_buffer("col", col.to(device))
        self.weight = nn.Parameter(torch.empty(row.numel(), device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√(inputs that an output reads), as `nn.Linear` starts."""
        with torch.no_grad():
            ones = torch.ones_like(self.weight)
            reads = ones.new_zeros(self.out_features).index_add(0, self.col, ones).clamp(min=1)
            self.weight.uniform_(-1, 1).div_(reads.sqrt()[self.col])
            if self.bias is not None:
                self.bias.uniform_(-1, 1).div_(reads.sqrt())

    @classmethod
    def from_linear(cls, linear: nn.Linear, threshold: float = 0.0) -> Self:
        """The layer with those weights of a linear layer whose size is above a threshold."""
        dense = linear.weight.detach()
        kept = dense.abs() > threshold
        layer = cls(
            linear.in_features,
            linear.out_features,
            pattern=[row.nonzero().squeeze(1).tolist() for row in kept],
            bias=linear.bias is not None,
            device=dense.device,
            dtype=dense.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(dense[layer.col, layer.row])
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def to_dense(self) -> Tensor:
        """The weight with its zeros, `(O, F)`."""
        empty = self.weight.new_zeros(self.out_features, self.in_features)
        return empty.index_put((self.col, self.row), self.weight)

    def to_csr(self) -> Tensor:
        """The transposed weight, sparse CSR `(F, O)`: the right factor of x Wᵀ."""
        inputs = torch.arange(self.in_features + 1, device=self.row.device)
        crow = torch.searchsorted(self.row, inputs)
        size = (self.in_features, self.out_features)
        return torch.sparse_csr_tensor(crow, self.col, self.weight, size, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected last dimension {self.in_features}, got shape {tuple(x.shape)}"
            )
        if x.layout == torch.strided:
            return F.linear(x, self.to_dense(), self.bias)
        y = spgemm(x, self.to_csr())
        if self.bias is None:
            return y
        crow, col = y.crow_indices(), y.col_indices()
        values = y.values() + self.bias[col]
        return torch.sparse_csr_tensor(crow, col, values, y.shape, check_invariants=False)

    def extra_repr(self) -> str:
        density = self.weight.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"density={density:.3g}, bias={self.bias is not None}"
        )


def _transposed_entries(
    pattern: Tensor | Sequence[Sequence[int]], inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Input and output of each weight, sorted by input, then by output."""
    if isinstance(pattern, Tensor):
        if pattern.shape != (outputs, inputs):
            raise ValueError(
                f"pattern: expected shape ({outputs}, {inputs}), got {tuple(pattern.shape)}"
            )
        row, col = pattern.detach().to_dense().t().nonzero().unbind(1)
        return row.contiguous(), col.contiguous()
    if len(pattern) != outputs:
        raise ValueError(f"pattern: expected a list for each of {outputs}, got {len(pattern)}")
    entries = [(int(k), o) for o, reads in enumerate(pattern) for k in reads]
    for k, _ in entries:
        if not 0 <= k < inputs:
            raise ValueError(f"pattern: expected inputs in [0, {inputs}), got {k}")
    if len(set(entries)) != len(entries):
        raise ValueError(f"pattern: an output reads an input twice, got {entries}")
    table = torch.tensor(sorted(entries), dtype=torch.long, device="cpu").reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()
