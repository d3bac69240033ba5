"""Sums over the blocks of edges that pruning left, so that work follows what is left.

Weights `(F, O, K)` are cut in blocks of `b_out` sums by `b_in` inputs. A row of blocks reads the
inputs of those blocks only that hold an edge: `block_sparse_log_einsum_exp`, whose folds are here
the blocks of inputs of all folds.
"""

from __future__ import annotations

from copy import deepcopy
from math import gcd
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from torchzoo.ops.block_log_einsum_exp import block_sparse_log_einsum_exp

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["BlockSums", "compact", "cut"]


def cut(weight: Tensor, block_size: int) -> Tensor:
    """`(F, O / b_out, K / b_in, b_out, b_in)`, weights in blocks as large as sizes can be divided.

    Args:
        weight: `(F, O, K)`.
        block_size: Sums and inputs of a block; of either the common divisor with their number.
    """
    out, into = (gcd(block_size, size) for size in weight.shape[1:])
    return rearrange(weight, "f (r o) (c k) -> f r c o k", o=out, k=into)


class BlockSums(nn.Module):
    """The sums of a layer over the blocks that hold an edge.

    Args:
        weight: `(F, O, K)`, linear weights, 0 where there is no edge.
        block_size: See `cut`.

    Shape:
        - products: `(F, B, K)`
        - weight: `(F, O, K)`
        - output: `(F, B, O)`

    Attributes:
        kept: `(F, O / b_out, K / b_in)` bool, which blocks hold an edge.
        places: `(N,)`, the numbers of these blocks.
        row_ptr: `(F O / b_out + 1,)`, where each row of blocks begins among them.
        col_idx: `(N,)`, which block of inputs each reads, numbered over all folds.
    """

    kept: Tensor
    places: Tensor
    row_ptr: Tensor
    col_idx: Tensor

    def __init__(self, weight: Tensor, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        kept = reduce(cut(weight, block_size) > 0, "f r c o k -> f r c", "any")
        zero = torch.zeros(1, dtype=torch.int64, device=weight.device)
        fold, _, column = kept.nonzero().unbind(1)
        for name, value in (
            ("kept", kept),
            ("places", kept.flatten().nonzero()[:, 0]),
            ("row_ptr", torch.cat([zero, kept.sum(2).flatten().cumsum(0)])),
            ("col_idx", fold * kept.shape[2] + column),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, products: Tensor, weight: Tensor) -> Tensor:
        """The sums."""
        w_blocks = cut(weight, self.block_size).flatten(0, 2).index_select(0, self.places)
        a = rearrange(products, "f n (c k) -> (f c) n k", k=w_blocks.shape[2])
        out = block_sparse_log_einsum_exp(a, w_blocks, self.row_ptr, self.col_idx)
        return rearrange(out, "(f r) n o -> f n (r o)", f=len(products))

    def extra_repr(self) -> str:
        """Share of the blocks that is left."""
        return f"block_size={self.block_size}, kept={int(self.kept.sum())}/{self.kept.numel()}"


@torch.no_grad()
def compact(circuit: Circuit, *, block_size: int = 8) -> Circuit:
    """A copy of a pruned circuit that is evaluated on the blocks of edges that are left.

    Its values and gradients are those of the circuit, and all queries and learning go on as before.
    What was pruned stays so; where weights are drawn anew or loaded, a layer goes back to all of
    its edges. Files don't hold the blocks: a circuit that was loaded is compacted again.

    Args:
        circuit: The circuit, as `prune` leaves it, best with the same `block_size`.
        block_size: Sums and inputs of a block.

    Returns:
        The copy.

    Raises:
        ValueError: `block_size` below 1, or weights that are tied or over pairs of units.

    Source:
        Dang, Liu and Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing", 2022;
        blocks as in A. Liu, Ahmed and Van den Broeck, "Scaling Tractable Probabilistic Circuits: A
        Systems Perspective", 2024.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced, prune
        >>> circuit, x = Circuit(balanced(4), CategoricalLeaf(3)), torch.randint(0, 3, (50, 4))
        >>> _ = prune(circuit, x, fraction=0.5, block_size=4)
        >>> smaller = compact(circuit, block_size=4)
        >>> torch.allclose(smaller(x), circuit(x))
        True
    """
    if block_size < 1:
        raise ValueError(f"block_size: got {block_size}, expected at least 1")
    if circuit.sum != "cp" or circuit.tie in ("sums", "all"):
        got = f"sum={circuit.sum!r}, tie={circuit.tie!r}"
        raise ValueError(f"circuit: got {got}, expected sum='cp' and sums that are not tied")
    found = deepcopy(circuit)
    for layer in found.layers:
        blocks = BlockSums(layer.weight(), block_size)
        layer.blocks = None if blocks.kept.all() else blocks
    return found
