"""Dendritic segments: detectors of sparse patterns that fire from a few coincident synapses.

Ahmad and Hawkins, "How do neurons operate on sparse distributed representations? A mathematical
theory of sparsity, neurons and active dendrites", 2016. Segment i has synapses onto a set D_i of
cells, and for an input of active cells x

    overlap_i = size of (D_i and x),    fires_i = overlap_i >= theta,

and a neuron is predicted when any of its segments fires. `torchzoo.sparsity.sdr` says how often
that goes wrong. With `surrogate="ste"` inputs are numbers, overlap_i is their sum over D_i, and
gradients pass as if the output were sigmoid(overlap_i - theta + 1/2).

Deviations: none.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.sparsity.sdr_patterns import SDR


@register(
    paper=60,
    example=lambda: Example(
        {
            "n": 6,
            "num_segments": 4,
            "max_synapses": 3,
            "threshold": 2,
            "segments_per_neuron": 2,
            "surrogate": "ste",
        },
        (torch.rand(3, 6),),
        bad_options={
            "n": 0,
            "num_segments": 0,
            "max_synapses": 0,
            "threshold": 0,
            "segments_per_neuron": 3,
            "surrogate": "relu",
        },
    ),
    compare=lambda: Comparison(
        {"n": 1024, "num_segments": 256, "max_synapses": 32, "threshold": 8, "surrogate": "ste"},
        ((torch.rand(256, 1024) < 0.02).float(),),
        peers.SEGMENTS,
    ),
)
class DendriteSegments(ZooModel):
    """Segments that fire when at least `threshold` of their synapses are active.

    Args:
        n: Cells of an input.
        num_segments: Segments S.
        max_synapses: Synapses a segment has room for.
        threshold: Overlap theta from which a segment fires.
        segments_per_neuron: Consecutive segments that make up a neuron; divides S.
        grow: Make room for more synapses instead of raising an error where a segment is full.
        surrogate: None: inputs are bool; `"ste"`: inputs are floating-point and get gradients, the
            slope of a sigmoid around the threshold.
        device: Where the synapses are.

    Shape:
        - x: `(..., n)`, bool or floating-point, or an `SDR` of shape `(...)`
        - output: `(..., S)`

    Returns:
        Which segments fire: bool, or 0 and 1 in the dtype of a floating-point `x`.

    Raises:
        ValueError: An option out of its range, or an input of other cells or of a dtype that
            `surrogate` does not go with.

    Source:
        Ahmad and Hawkins, "How do neurons operate on sparse distributed representations? A
        mathematical theory of sparsity, neurons and active dendrites", 2016.

    Example:
        >>> pattern = SDR(1000, torch.arange(0, 1000, 25))
        >>> segments = DendriteSegments(1000, 2, 20, 10)
        >>> segments.store(pattern, 1, 20)
        >>> segments(pattern), segments.overlaps(pattern)
        (tensor([False,  True]), tensor([ 0, 20]))
    """

    synapses: Tensor

    def __init__(
        self,
        n: int,
        num_segments: int,
        max_synapses: int,
        threshold: int,
        *,
        segments_per_neuron: int = 1,
        grow: bool = False,
        surrogate: Literal["ste"] | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        sizes = {"n": n, "num_segments": num_segments, "max_synapses": max_synapses}
        for name, size in {**sizes, "threshold": threshold}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if segments_per_neuron < 1 or num_segments % segments_per_neuron:
            raise ValueError(
                f"segments_per_neuron: expected a divisor of {num_segments}, "
                f"got {segments_per_neuron}"
            )
        if surrogate not in (None, "ste"):
            raise ValueError(f"surrogate: expected None or 'ste', got {surrogate!r}")
        self.n = n
        self.num_segments = num_segments
        self.max_synapses = max_synapses
        self.threshold = threshold
        self.segments_per_neuron = segments_per_neuron
        self.grow = grow
        self.surrogate = surrogate
        places = torch.empty(num_segments, max_synapses, dtype=torch.int32, device=device)
        self.register_buffer("synapses", places)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all patterns: every place is free, which is written as the cell n."""
        self.synapses.fill_(self.n)

    @torch.no_grad()
    def store(
        self,
        sdr: SDR,
        segment: int,
        s: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Give a segment synapses onto a random s cells of a pattern, besides those it has.

        Args:
            sdr: The pattern, or several, each of which is stored.
            segment: The segment.
            s: Synapses onto each pattern, at least `threshold`, so that it is recognised.
            generator: Draws the cells.

        Raises:
            ValueError: A pattern of other cells or of fewer than s, s below the threshold, no such
                segment, or more synapses than the segment has room for (without `grow`).
        """
        if sdr.n != self.n:
            raise ValueError(f"sdr: expected patterns of {self.n} cells, got {sdr.n}")
        if not 0 <= segment < self.num_segments:
            raise ValueError(f"segment: expected 0 to {self.num_segments - 1}, got {segment}")
        if s < self.threshold:
            raise ValueError(f"s: expected at least threshold = {self.threshold}, got {s}")
        chosen = sdr.subsample(s, generator).indices.flatten().to(self.synapses.device)
        cells = torch.cat([self.synapses[segment].long(), chosen]).unique()
        cells = cells[cells < self.n]
        if len(cells) > self.max_synapses:
            if not self.grow:
                raise ValueError(
                    f"sdr: expected at most max_synapses = {self.max_synapses} synapses in segment "
                    f"{segment}, got {len(cells)}"
                )
            self._make_room(len(cells))
        self.synapses[segment] = self.n
        self.synapses[segment, : len(cells)] = cells.to(self.synapses.dtype)

    def _make_room(self, size: int) -> None:
        more = self.synapses.new_full((self.num_segments, size - self.max_synapses), self.n)
        self.synapses = torch.cat([self.synapses, more], -1)
        self.max_synapses = self._zoo_config["max_synapses"] = size

    def overlaps(self, x: SDR | Tensor) -> Tensor:
        """Active synapses of each segment, `(..., S)`: int64, or sums of a floating-point x."""
        cells = self._cells(x)
        padded = torch.cat([cells, torch.zeros_like(cells[..., :1])], -1)
        reached = padded.index_select(-1, self.synapses.flatten())
        return rearrange(reached, "... (s k) -> ... s k", s=self.num_segments).sum(-1)

    def forward(self, x: SDR | Tensor) -> Tensor:
        overlap = self.overlaps(x)
        fires = overlap >= self.threshold
        if not overlap.is_floating_point():
            return fires
        soft = torch.sigmoid(overlap - self.threshold + 0.5)
        return soft - soft.detach() + fires.to(overlap.dtype)

    def neurons(self, x: SDR | Tensor) -> Tensor:
        """Which neurons have a segment that fires, `(..., S / segments_per_neuron)`."""
        fires = rearrange(self(x), "... (n j) -> ... n j", j=self.segments_per_neuron)
        return fires.amax(-1) if fires.is_floating_point() else fires.any(-1)

    def _cells(self, x: SDR | Tensor) -> Tensor:
        if isinstance(x, SDR):
            x = x.to_dense()
            x = x if self.surrogate is None else x.to(torch.get_default_dtype())
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise ValueError(f"x: expected (..., {self.n}), got {tuple(x.shape)}")
        fitting = x.is_floating_point() if self.surrogate else x.dtype == torch.bool
        if not fitting:
            kind = "floating-point" if self.surrogate else "bool"
            raise ValueError(f"x: expected {kind} with surrogate={self.surrogate!r}, got {x.dtype}")
        return x

    def extra_repr(self) -> str:
        return (
            f"{self.n}, num_segments={self.num_segments}, max_synapses={self.max_synapses}, "
            f"threshold={self.threshold}"
        )
