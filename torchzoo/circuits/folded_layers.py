"""Layers of a circuit, each one folded: all regions of a depth are computed at once.

Values are logarithms, `(F, B, K)`: folds, batch, units. A layer reads earlier values by slot (see
`torchzoo.circuits.schedule`), multiplies the parts of each partition, and takes sums over units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.circuits.block_sparse import BlockSums
from torchzoo.circuits.schedule import LayerPlan, Schedule
from torchzoo.ops.log_einsum_exp import log_einsum_exp, log_einsum_exp2

__all__ = ["CPSum", "Hadamard", "Mixing", "SumLayer", "TuckerSum"]

Weights = tuple[Tensor, Tensor | None]
"""Linear weights of a layer: of its sums over units, and of its mixing where it has one."""


class Hadamard(nn.Module):
    """Unit by unit products of any number of parts: sums of their logarithms.

    Args:
        parts: For each fold the places `(slot, row)` of its parts.
        rows: Number of rows of each slot.
        device: Device of the indices.

    Shape:
        - values: for each slot `(R, B, K)`
        - output: `(F, B, K)`
    """

    def __init__(
        self,
        parts: Sequence[Sequence[tuple[int, int]]],
        rows: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_folds = len(parts)
        reads: dict[int, list[tuple[int, int, int]]] = {}
        for fold, places in enumerate(parts):
            for position, (slot, row) in enumerate(places):
                reads.setdefault(slot, []).append((position, fold, row))
        self.slots: list[tuple[int, bool, bool]] = []
        found = []
        for slot, entries in reads.items():
            entries.sort()
            folds = [fold for _, fold, _ in entries]
            children = [row for _, _, row in entries]
            as_it_lies = children == list(range(rows[slot]))
            even = folds == list(range(self.num_folds)) * (len(folds) // self.num_folds)
            found.append(((slot, as_it_lies, even), children, folds))
        found.sort(key=lambda item: not item[0][2])
        for index, (how, children, folds) in enumerate(found):
            self.slots.append(how)
            for name, numbers in (("children", children), ("folds", folds)):
                buffer = torch.tensor(numbers, device=device, dtype=torch.int64)
                self.register_buffer(f"{name}_{index}", buffer, persistent=False)

    def reads(self) -> list[tuple[int, Tensor, Tensor]]:
        """For each slot that is read: slot, rows read, and the folds that they are part of."""
        return [
            (slot, self.get_buffer(f"children_{i}"), self.get_buffer(f"folds_{i}"))
            for i, (slot, _, _) in enumerate(self.slots)
        ]

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """The products."""
        out: Tensor | None = None
        for (slot, as_it_lies, even), (_, children, folds) in zip(
            self.slots, self.reads(), strict=True
        ):
            part = values[slot] if as_it_lies else values[slot].index_select(0, children)
            if even and len(part) > self.num_folds:
                part = rearrange(part, "(n f) b k -> n f b k", f=self.num_folds).sum(0)
            if even:
                out = part if out is None else out + part
            else:
                if out is None:
                    out = part.new_zeros(self.num_folds, *part.shape[1:])
                out = out.index_add(0, folds, part)
        assert out is not None  # a partition has parts
        return out


class Mixing(nn.Module):
    """Weighted sums over the partitions of each region, unit by unit.

    Args:
        plan: The layer.
        num_units: Units `K`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - folds: `(F, B, K)`
        - weight: `(R, K, P)`, with `P` the largest number of partitions
        - output: `(R, B, K)`
    """

    index: Tensor
    missing: Tensor

    def __init__(
        self,
        plan: LayerPlan,
        num_units: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        folds = [
            [index for index, fold in enumerate(plan.folds) if fold.row == row]
            for row in range(len(plan.regions))
        ]
        most = max(map(len, folds))
        index = [own + own[:1] * (most - len(own)) for own in folds]
        missing = [[False] * len(own) + [True] * (most - len(own)) for own in folds]
        self.register_buffer("index", torch.tensor(index, device=device), persistent=False)
        self.register_buffer("missing", torch.tensor(missing, device=device), persistent=False)
        size = (len(folds), num_units, most)
        self.log_weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def weight(self) -> Tensor:
        """`(R, K, P)`, linear weights, 0 where a region has fewer partitions."""
        return self.log_weight.masked_fill(self.missing[:, None], -torch.inf).softmax(-1)

    def choices(self, folds: Tensor) -> Tensor:
        """`(R, B, K, P)`, values of the partitions of each region."""
        found = folds.index_select(0, self.index.flatten())
        return rearrange(found, "(r p) b k -> r b k p", r=len(self.index))

    def forward(self, folds: Tensor, weight: Tensor, contract: Contract) -> Tensor:
        """The mixtures."""
        choices = rearrange(self.choices(folds), "r b k p -> (r k) b p")
        mixed = contract(choices.contiguous(), rearrange(weight, "r k p -> (r k) 1 p"))
        return rearrange(mixed, "(r k) b 1 -> r b k", r=len(self.index))


Contract = Callable[[Tensor, Tensor], Tensor]
"""`log_einsum_exp`, or another way to combine `(F, B, K)` values with `(F, O, K)` weights."""


class SumLayer(nn.Module):
    """A layer of regions: products of parts, sums over their units, mixing of partitions.

    Args:
        plan: The layer.
        order: The whole schedule.
        num_in: Units of every part.
        num_out: Units of every region.
        tied: Whether all folds share one weight.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        plan: The layer.
        log_weight: Logarithms of the weights up to a constant for each sum.
        mixing: The mixing, where regions have several partitions.
        blocks: What sums over the blocks of edges that pruning left; None sums over all edges.
    """

    blocks: BlockSums | None
    num_operands: int
    operands: Sequence[Hadamard]

    def __init__(
        self,
        plan: LayerPlan,
        order: Schedule,
        num_in: int,
        num_out: int,
        *,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.num_out = plan, num_out
        parts = [[order.place[child] for child in fold.parts] for fold in plan.folds]
        rows = [len(regions) for regions in order.chunks]
        rows += [len(layer.regions) for layer in order.layers]
        operands = nn.ModuleList(Hadamard(own, rows, device) for own in self.split(parts))
        self.operands = cast("Sequence[Hadamard]", operands)
        folds = 1 if tied else len(plan.folds)
        size = (folds, num_out, *[num_in] * self.num_operands)
        self.log_weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        mixes = len(plan.folds) > len(plan.regions)
        self.mixing = Mixing(plan, num_out, device=device, dtype=dtype) if mixes else None
        self.blocks = None

    @staticmethod
    def split(
        parts: list[list[tuple[int, int]]],
    ) -> Sequence[Sequence[Sequence[tuple[int, int]]]]:
        """For each operand of the sum the parts of every fold that are multiplied in it."""
        return [parts]

    def log_weights(self) -> list[nn.Parameter]:
        """The parameters: of the sums, and of the mixing where there is one."""
        return [self.log_weight] + ([] if self.mixing is None else [self.mixing.log_weight])

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw each row of weights from Dirichlet(1)."""
        self.blocks = None
        for parameter in self.parameters():
            parameter.exponential_(generator=generator).log_()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.blocks = None  # the weights that came may have other edges

    def weight(self) -> Tensor:
        """`(F, O, K)` or `(F, O, K, K)`, linear weights; of one fold where all share it."""
        return self.log_weight.flatten(2).softmax(-1).view_as(self.log_weight)

    def products(self, values: Sequence[Tensor]) -> Tensor:
        """`(F, B, K)`, values of what the sums are over; pairs of units are numbered row-major."""
        return self.operands[0](values)

    def sums(self, values: Sequence[Tensor], weight: Tensor) -> Tensor:
        """`(F, B, O)`, values of the partitions."""
        products = self.products(values)
        if self.blocks is None:
            return log_einsum_exp(products, weight)
        return cast(Tensor, self.blocks(products, weight))

    def forward(
        self, values: Sequence[Tensor], weights: Weights, contract: Contract | None = None
    ) -> Tensor:
        """`(R, B, O)`, values of the regions; `contract` takes the place of `log_einsum_exp`."""
        weight, mix = weights
        weight = weight.expand(len(self.plan.folds), *weight.shape[1:])
        if contract is None:
            folds = self.sums(values, weight)
        else:
            folds = contract(self.products(values), weight.flatten(2))
        if self.mixing is None or mix is None:
            return folds
        return self.mixing(folds, mix, contract or log_einsum_exp)

    def extra_repr(self) -> str:
        """Sizes in short."""
        sizes = "x".join(map(str, self.log_weight.shape[1:]))
        return f"regions={len(self.plan.regions)}, folds={len(self.plan.folds)}, weights={sizes}"


class CPSum(SumLayer):
    """Sums over units that the parts share: `log sum_k w_ok exp(sum_parts v_k)`.

    With leaves and sums below it is the canonical polyadic form of a partition; with several parts
    it is the step of a hidden tree model.
    """

    num_operands = 1


class TuckerSum(SumLayer):
    """Sums over pairs of units of two parts: `log sum_ij w_oij exp(a_i + b_j)`."""

    num_operands = 2

    @staticmethod
    def split(
        parts: list[list[tuple[int, int]]],
    ) -> Sequence[Sequence[Sequence[tuple[int, int]]]]:
        """See `SumLayer.split`."""
        return [[places[:1] for places in parts], [places[1:] for places in parts]]

    def products(self, values: Sequence[Tensor]) -> Tensor:
        """See `SumLayer.products`."""
        left, right = (operand(values) for operand in self.operands)
        return (left[..., :, None] + right[..., None, :]).flatten(-2)

    def sums(self, values: Sequence[Tensor], weight: Tensor) -> Tensor:
        """See `SumLayer.sums`."""
        left, right = (operand(values) for operand in self.operands)
        return log_einsum_exp2(left, right, weight)
