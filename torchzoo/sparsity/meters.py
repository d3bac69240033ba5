"""Meters: how sparse activations are, and how many multiplications are left to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchzoo.ops.delta_conv2d import reach
from torchzoo.sparsity.delta import DeltaActivation, L1Activation


@dataclass
class Density:
    """Counts of one layer's activations over all sequences seen.

    Attributes:
        nonzero: Activations that are not zero.
        total: All activations.
        changed: Activations that differ from the frame before, first frames left out.
        total_changes: All activations but those of first frames.
    """

    nonzero: Tensor | int = 0
    total: int = 0
    changed: Tensor | int = 0
    total_changes: int = 0

    @property
    def spatial(self) -> float:
        """Share of activations that are not zero."""
        return float(self.nonzero) / max(self.total, 1)

    @property
    def temporal(self) -> float:
        """Share of activations that changed from one frame to the next."""
        return float(self.changed) / max(self.total_changes, 1)

    def __add__(self, other: Density) -> Density:
        return Density(
            self.nonzero + other.nonzero,
            self.total + other.total,
            self.changed + other.changed,
            self.total_changes + other.total_changes,
        )


class DeltaMeter:
    """Counts, while it is entered, what a zero-skipping machine would have to do.

    Two kinds of figures: for sequences that run through `model`, the share of its activations that
    are not zero (spatial) and that change between frames (temporal); for every `delta_linear_step`
    and `delta_conv2d_step`, whoever calls it, the multiplications that the step does: Σ nnz(Δ) ·
    outputs, where an input of a convolution has as many outputs as its kernel carries it to, those
    beyond the frame's edge left out. Nothing waits for the device until a figure is read. Compiled
    graphs keep their steps to themselves, so that their multiplications are not counted.

    Args:
        model: Whose activations are watched: `DeltaActivation`, `L1Activation` and `nn.ReLU` layers
            with inputs `(B, T, ...)`; None: only steps are counted.

    Attributes:
        layers: The counts of each watched layer that ran, by name.
        dense_macs: Multiplications that the steps would have done had every input changed.

    Raises:
        ValueError: `model` has no layer to watch, or a watched input has fewer than 3 dimensions.

    Example:
        >>> model = nn.Sequential(DeltaActivation(2, step_init=0.5))
        >>> with DeltaMeter(model) as meter:
        ...     _ = model(torch.tensor([[[1.0, 0.0], [1.1, 0.0], [2.0, 0.0]]]))
        >>> meter.spatial, meter.temporal
        (0.5, 0.25)
    """

    def __init__(self, model: nn.Module | None = None):
        self._watched = {
            name: layer
            for name, layer in (model.named_modules() if model is not None else ())
            if isinstance(layer, (DeltaActivation, L1Activation, nn.ReLU))
        }
        if model is not None and not self._watched:
            raise ValueError(
                "model: expected DeltaActivation, L1Activation or nn.ReLU layers, got none"
            )
        self.layers: dict[str, Density] = {}
        self.dense_macs = 0
        self._macs: Tensor | int = 0
        self._handles: list[Any] = []
        self._mode = _StepCounter(self._count_step)

    def __enter__(self) -> Self:
        self._handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in self._watched.items()
        ]
        self._mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    @property
    def macs(self) -> int:
        """Multiplications that the counted steps did."""
        return int(self._macs)

    @property
    def spatial(self) -> float:
        """Share of all watched activations that are not zero."""
        return self._all().spatial

    @property
    def temporal(self) -> float:
        """Share of all watched activations that changed from one frame to the next."""
        return self._all().temporal

    def _all(self) -> Density:
        return sum(self.layers.values(), Density())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        @torch.no_grad()
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            level = layer.levels(inputs[0]) if isinstance(layer, DeltaActivation) else output
            if level.ndim < 3:
                raise ValueError(f"{name}: expected (B, T, ..., C), got {tuple(level.shape)}")
            changes = level[:, 1:] != level[:, :-1]
            self.layers[name] = self.layers.get(name, Density()) + Density(
                level.count_nonzero(), level.numel(), changes.sum(), changes.numel()
            )

        return count

    def _count_step(self, changed: Tensor, fan_out: Tensor) -> None:
        """Add a step's multiplications; `fan_out` is how many an input costs, (1,) or (H, W, 1)."""
        per_place = changed.sum(-1, keepdim=True)
        self._macs = self._macs + (per_place * fan_out.to(changed.device, non_blocking=True)).sum()
        self.dense_macs += int(fan_out.sum()) * (changed.numel() // fan_out.numel())


class _StepCounter(TorchDispatchMode):
    """Sees every call of a step operator below autograd, whichever kernel runs it."""

    def __init__(self, count: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        steps = torch.ops.torchzoo
        if func is steps.delta_linear_step.default:
            self._count(result[1] != args[1], torch.tensor([args[3].shape[1]]))
        elif func is steps.delta_conv2d_step.default:
            x_ref, weight_t, pairs = args[1], args[3], args[6:9]
            axes = zip(x_ref.shape[-3:-1], weight_t.shape[1:3], *pairs, strict=True)
            rows, columns = (reach(*axis) for axis in axes)
            fan_out = rows[:, None, None] * columns[:, None] * weight_t.shape[3]
            self._count(result[1] != x_ref, fan_out)
        return result
