"""A meter of how many neurons of a model's feed-forward layers are active.

For what goes into a down-projection, h (..., f), a neuron is active for a token where abs(h_i) is
above a bound, 0 by default: the share of active neurons is what Li et al., "The Lazy Neuron
Phenomenon", 2023, report as the percentage of non-zeros, and one minus it is the sparsity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.sparsity.ffn import on_hidden
from torchzoo.sparsity.hosts import Watch, find_ffns
from torchzoo.surgery import Match, find

RARE, FREQUENT = 0.01, 0.5


def activation_ratio(a: Tensor, eps: float = 0.0) -> Tensor:
    """The share of active neurons of each token: where abs(a) > eps.

    Args:
        a: Activations.
        eps: The bound.

    Shape:
        - a: `(..., f)`
        - output: `(...)`, float32

    Example:
        >>> activation_ratio(torch.tensor([0.0, -1.0, 0.2, 3.0]), 0.5)
        tensor(0.5000)
    """
    return _active(a, eps).float().mean(-1)


class LayerActivity(NamedTuple):
    """How active one layer's neurons were.

    Attributes:
        name: Name of the layer.
        tokens: Tokens seen.
        neurons: Neurons of the layer.
        active: Share of active neurons, the mean over tokens.
        union: Share of neurons active for some token of a window, the mean over windows; NaN where
            there was no whole window.
        dead: Share of neurons active for no token.
        rare: Share of neurons active for less than 1 % of the tokens, dead ones included.
        frequent: Share of neurons active for more than half of the tokens.
    """

    name: str
    tokens: int
    neurons: int
    active: float
    union: float
    dead: float
    rare: float
    frequent: float


class ActivityReport(NamedTuple):
    """What a meter saw; printed, it is a table.

    Attributes:
        layers: A row a layer, in the model's order.
        active: Share of active neurons of all layers and tokens.
        window: Tokens in a window.
    """

    layers: tuple[LayerActivity, ...]
    active: float
    window: int

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.layers)
        union = f"in {self.window}"
        lines = [f"{'layer':{width}}  tokens  neurons  active  {union:>6}    dead    <1 %   >50 %"]
        for row in self.layers:
            shares = (row.active, row.union, row.dead, row.rare, row.frequent)
            text = "  ".join(f"{100 * share:5.1f}%" for share in shares)
            lines.append(f"{row.name:{width}}  {row.tokens:6d}  {row.neurons:7d}  {text}")
        return "\n".join(lines)


class ActivationMeter(Watch):
    """Counts active neurons of each feed-forward layer, while it is entered.

    Every call of a layer is a step of the history. Counts stay on the model's device and nothing
    waits for it until a figure is read. Compiled models run eagerly while the meter is open.

    Args:
        model: The model to watch.
        match: Modules whose outputs are the activations, as for `torchzoo.surgery.find`; None: what
            goes into the down-projections of the layers that `find_ffns` finds.
        eps: A neuron is active where the absolute value is above this.
        window: Tokens of a window, for the share of neurons that any of them needs.

    Raises:
        ValueError: No layer, `eps` < 0 or `window` < 1.

    Source:
        Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in
        Transformers", 2023, section 2.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with ActivationMeter(mlp) as meter:
        ...     _ = mlp(torch.randn(100, 2))
        >>> 0.2 < meter.active < 0.8, meter.shares.shape
        (True, torch.Size([1]))
    """

    def __init__(
        self, model: nn.Module, match: Match | None = None, *, eps: float = 0.0, window: int = 16
    ):
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"eps: expected a number ≥ 0, got {eps}")
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.eps, self.window = eps, window
        self._ffns = find_ffns(model) if match is None else {}
        self._modules = {} if match is None else find(model, match)
        if not (self._ffns or self._modules):
            raise ValueError(
                f"match: expected a rule that selects a module, got none for {match!r}"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._counts = {name: _Counts() for name in (*self._ffns, *self._modules)}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that ran, in the model's order."""
        return tuple(name for name, counts in self._counts.items() if counts.tokens)

    @property
    def active(self) -> float:
        """Share of active neurons of all layers and tokens."""
        ran = [self._counts[name] for name in self.names]
        total = sum(counts.tokens * len(counts.frequency) for counts in ran)
        return sum(int(counts.frequency.sum()) for counts in ran) / max(total, 1)

    @property
    def shares(self) -> Tensor:
        """Share of active neurons of each layer, `(L,)`, float64."""
        return torch.tensor([row.active for row in self.report().layers], dtype=torch.float64)

    @property
    def history(self) -> Tensor:
        """Share of active neurons of each call and layer, `(steps, L)`.

        Raises:
            ValueError: The layers were not called equally often.
        """
        columns = [torch.stack(self._counts[name].steps).cpu() for name in self.names]
        if len({len(column) for column in columns}) > 1:
            raise ValueError("history: expected layers called equally often; read each by itself")
        return torch.stack(columns, -1) if columns else torch.zeros(0, 0)

    @property
    def frequencies(self) -> dict[str, Tensor]:
        """For each layer the share of tokens for which a neuron was active, `(f,)`, float64."""
        return {
            name: self._counts[name].frequency.cpu().double() / self._counts[name].tokens
            for name in self.names
        }

    def report(self) -> ActivityReport:
        """All figures, a row a layer."""
        rows = []
        for name, frequency in self.frequencies.items():
            counts = self._counts[name]
            rows.append(
                LayerActivity(
                    name,
                    counts.tokens,
                    len(frequency),
                    float(frequency.mean()),
                    float(counts.union) / counts.windows if counts.windows else float("nan"),
                    float((frequency == 0).double().mean()),
                    float((frequency < RARE).double().mean()),
                    float((frequency > FREQUENT).double().mean()),
                )
            )
        return ActivityReport(tuple(rows), self.active, self.window)

    def _hooks(self) -> list[Callable[[], None]]:
        ends = [
            on_hidden(ffn.module, ffn.down, partial(self._see, name))
            for name, ffn in self._ffns.items()
        ]
        for name, module in self._modules.items():
            handle = module.register_forward_hook(partial(self._see_output, name))
            ends.append(handle.remove)
        return ends

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.ndim:
            raise ValueError(f"match: expected {name} to put out a tensor (..., f), got {output!r}")
        self._see(name, output)

    @torch.no_grad()
    def _see(self, name: str, h: Tensor) -> None:
        self._counts[name].add(_active(h, self.eps).reshape(-1, h.shape[-1]), self.window)


class _Counts:
    """Counts of one layer, on its device."""

    def __init__(self) -> None:
        self.tokens = 0
        self.windows = 0
        self.frequency = torch.zeros(0, dtype=torch.int64)
        self.union = torch.zeros((), dtype=torch.float64)
        self.steps: list[Tensor] = []

    def add(self, active: Tensor, window: int) -> None:
        """Take in tokens `(N, f)`, bool."""
        if not len(active):
            return
        counts = active.sum(0)
        if not self.tokens:
            self.frequency, self.union = torch.zeros_like(counts), self.union.to(counts.device)
        self.frequency += counts
        self.tokens += len(active)
        self.steps.append(counts.sum() / active.numel())
        whole = len(active) // window
        tiles = active[: whole * window].unflatten(0, (whole, window))
        self.union += tiles.any(1).double().mean(-1).sum()
        self.windows += whole


def _active(h: Tensor, eps: float) -> Tensor:
    """Where a neuron is active; NaN is, so that it is seen."""
    return ~(h.abs() <= eps)
