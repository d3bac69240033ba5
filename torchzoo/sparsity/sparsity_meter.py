"""One report on what a model could leave out: inactive and negligible neurons, unchanged inputs."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchzoo.sparsity.activation_meter import ActivationMeter, LayerActivity
from torchzoo.sparsity.ffn import SparseFFN
from torchzoo.sparsity.hosts import FFN
from torchzoo.sparsity.meters import DeltaMeter
from torchzoo.sparsity.tail_error import cett, cett_thresholds, importance

_DELTA = "delta steps"


class LayerSparsity(NamedTuple):
    """What one feed-forward layer could leave out.

    Attributes:
        activity: Its neurons, see `LayerActivity`.
        needed: Share of neurons that the layer needs at the meter's CETT, in the sample.
        cett: The CETT that is reached with these.
        dense_macs: Multiplications of its projections for all tokens seen.
        macs: What is left of them when rows of inactive neurons are skipped.
    """

    activity: LayerActivity
    needed: float
    cett: float
    dense_macs: int
    macs: int


class SparsitySummary(NamedTuple):
    """What a meter saw; printed, it is a table.

    Attributes:
        layers: A row a feed-forward layer, in the model's order.
        target: The CETT allowed.
        dense_delta_macs: Multiplications of delta steps, had every input changed.
        delta_macs: Those that were done.
    """

    layers: tuple[LayerSparsity, ...]
    target: float
    dense_delta_macs: int
    delta_macs: int

    @property
    def skipped(self) -> float:
        """Share of all multiplications counted that could be left out, or were by delta steps."""
        dense = self.dense_delta_macs + sum(row.dense_macs for row in self.layers)
        left = self.delta_macs + sum(row.macs for row in self.layers)
        return 1 - left / max(dense, 1)

    def __str__(self) -> str:
        width = max([len(row.activity.name) for row in self.layers] + [len(_DELTA)])
        needed = f"at CETT {self.target:g}"
        lines = [f"{'layer':{width}}  active  {needed:>11}    dead  dense MACs  left"]
        for row in self.layers:
            activity = row.activity
            shares = f"{_percent(activity.active)}  {_percent(row.needed):>11}  "
            shares += _percent(activity.dead)
            lines.append(f"{activity.name:{width}}  {shares}  {_macs(row.dense_macs, row.macs)}")
        if self.dense_delta_macs:
            macs = _macs(self.dense_delta_macs, self.delta_macs)
            lines.append(f"{_DELTA:{width}}  {'':27}  {macs}")
        return "\n".join([*lines, f"{100 * self.skipped:.1f} % of these multiplications are idle"])


class SparsityMeter(ActivationMeter):
    """One report on a model's sparsity, of whatever kind: see `summary` and `plot`.

    While it is entered it counts active neurons as `ActivationMeter` does, keeps a sample of tokens
    from which it finds how many neurons each layer needs at a given CETT (so that layers with SiLU
    or GELU, none of whose neurons is ever exactly 0, have a figure too), and counts what delta
    steps multiply as `DeltaMeter` does.

    Args:
        model: The model to watch; feed-forward layers are those that `find_ffns` finds.
        target: The CETT that neurons left out may cost, a relative error of a layer's output.
        sample: How many tokens of each layer to keep, the first ones.
        eps: A neuron is active where the absolute value is above this.
        window: As for `ActivationMeter`.

    Raises:
        ValueError: No feed-forward layer, `target` not in [0, 1), or another option out of its
            range.

    Source:
        CETT: Zhang et al., "ReLU² wins: discovering efficient activation functions for sparse
        LLMs", 2024, whose target of 0.2 is the default.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2))
        >>> with SparsityMeter(mlp) as meter:
        ...     _ = mlp(torch.randn(100, 2))
        >>> row = meter.summary().layers[0]
        >>> row.activity.active, row.needed < 1, row.cett <= 0.2
        (1.0, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target: float = 0.2,
        sample: int = 512,
        eps: float = 0.0,
        window: int = 16,
    ):
        if not 0 <= target < 1:
            raise ValueError(f"target: expected a number in [0, 1), got {target}")
        if sample < 1:
            raise ValueError(f"sample: expected at least 1, got {sample}")
        self.target, self.sample = target, sample
        self._delta = DeltaMeter()
        super().__init__(model, eps=eps, window=window)

    def reset(self) -> None:
        """Forget all counts and samples."""
        super().reset()
        self._samples: dict[str, list[Tensor]] = {name: [] for name in self._ffns}
        self._delta_before = self._delta.macs, self._delta.dense_macs

    def __enter__(self) -> Self:
        super().__enter__()
        self._open.enter_context(self._delta)
        return self

    @torch.no_grad()
    def _see(self, name: str, h: Tensor) -> None:
        super()._see(name, h)
        missing = self.sample - sum(map(len, self._samples[name]))
        if missing > 0:
            self._samples[name].append(h.detach().reshape(-1, h.shape[-1])[:missing].float())

    @property
    def samples(self) -> dict[str, Tensor]:
        """What the neurons of each layer gave for the tokens kept, `(n, f)`, float32."""
        return {name: torch.cat(self._samples[name]) for name in self.names}

    def summary(self) -> SparsitySummary:
        """All figures; `report` has those of the neurons alone."""
        activities = {row.name: row for row in self.report().layers}
        return SparsitySummary(
            tuple(
                _layer(activities[name], self._ffns[name], h, self.target)
                for name, h in self.samples.items()
            ),
            self.target,
            self._delta.dense_macs - self._delta_before[1],
            self._delta.macs - self._delta_before[0],
        )

    def plot(self, figure: Any = None) -> Any:
        """Draw shares, multiplications, and histograms of neurons' values and frequencies.

        Args:
            figure: A matplotlib figure to draw on; None: a new one.

        Returns:
            The figure.
        """
        from torchzoo.sparsity.sparsity_plot import draw

        return draw(figure, self.summary(), self.samples, self.frequencies)


def _layer(activity: LayerActivity, ffn: FFN, h: Tensor, target: float) -> LayerSparsity:
    w_down = ffn.w_down.to(h)
    needed, error = 0.0, 0.0
    if bool((h @ w_down.mT).any()):
        keep = importance(h, w_down) > cett_thresholds(h, w_down, target, num_candidates=4096)
        needed, error = float(keep.float().mean()), float(cett(h, w_down, keep).nanmean())
    on_product = isinstance(ffn.module, SparseFFN) and ffn.module.threshold_on == "product"
    matrices = 3 if ffn.gated else 2
    spared = 1 if on_product else matrices - 1  # rows that an inactive neuron saves
    pairs = activity.tokens * activity.neurons
    inactive = pairs - round(activity.active * pairs)
    dense = matrices * pairs * len(w_down)
    return LayerSparsity(activity, needed, error, dense, dense - spared * inactive * len(w_down))


def _percent(share: float) -> str:
    return f"{100 * share:5.1f}%"


def _macs(dense: int, left: int) -> str:
    return f"{dense:10.4g}  {left:.4g} ({100 * left / max(dense, 1):.1f}%)"
