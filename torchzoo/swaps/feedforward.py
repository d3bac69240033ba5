"""Feed-forward layers that skip inactive neurons in the place of dense ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchzoo.sparsity import SparseFFN, mlp_parts
from torchzoo.surgery import Init, Match, Swapped, find, swap
from torchzoo.swaps.selectors import WORDS


def swap_sparse_ffn(
    model: nn.Module,
    match: Match = WORDS["mlp"],
    *,
    activation: str | None = "relu",
    init: Init = "match",
    inputs: Any = None,
    **options: Any,
) -> Swapped:
    """Make feed-forward layers `SparseFFN` on the same weights, in place.

    Args:
        model: The model to change.
        match: As for `torchzoo.surgery.find`; by default every layer that `mlp_parts` knows.
        activation: The new activation, `"relu"` for sparsity; None keeps a layer's, and with it
            what the layer computes.
        init: As for `torchzoo.surgery.swap`.
        inputs: As there.
        **options: More options of `SparseFFN`.

    Returns:
        What changed, with a note where the activation is another, so that training has to follow.

    Raises:
        UnknownNameError: Nothing is selected.
        ValueError: A layer of another layout, with dropout, or of an activation that is not known.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 2))
        >>> print(swap_sparse_ffn(nn.Sequential(mlp)))
        parameters 32 → 32
          0: Sequential → SparseFFN  32 → 32
        note: gelu became relu: fine-tune the model
    """
    was = {mlp_parts(module).activation for module in find(model, match).values()}
    report = swap(
        model,
        match,
        lambda old: SparseFFN.from_mlp(old, activation=activation, **options),
        init=init,
        inputs=inputs,
    )
    changed = sorted(was - {activation}) if activation else []
    notes = [f"{old} became {activation}: fine-tune the model" for old in changed]
    return report.with_notes(*notes)
