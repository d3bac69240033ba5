"""Where the bounds of clipped activations start, and putting them into a model.

S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct: Progressive
Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs", 2024. A bound starts
at the largest activation on training data, of a layer or of each of its neurons.

Deviations: a bound is never below 1e-6, which a neuron that was never active gets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchzoo.activations.proact import ClipAct, FitAct, HybridClippedReLU, Ranger
from torchzoo.surgery import Replaced, find, replace

SMALLEST_BOUND = 1e-6


def range_bounds(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    per_neuron: Collection[str] = ("last",),
    types: type[nn.Module] | tuple[type[nn.Module], ...] = nn.ReLU,
) -> dict[str, Tensor]:
    """The largest activations on some data: where bounds start.

    Args:
        model: A trained model; it is run in evaluation mode and left in its own.
        loader: Batches, `(x, ...)` or x alone, batch first.
        per_neuron: The activations that get a bound for each neuron, a value for each feature of
            one sample: names, `"last"` for the last one to be called, or `"all"`.
        types: What counts as an activation.

    Returns:
        Bounds by name, in the order in which the activations are called, at least 1e-6.

    Raises:
        ValueError: No activation is called, `per_neuron` has an unknown name, or asks for neurons
            of one that is called with inputs of several shapes.

    Example:
        >>> model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity(), nn.ReLU())
        >>> range_bounds(model, [torch.tensor([[1.0, -1.0], [0.5, 2.0]])])
        {'1': tensor(2.), '3': tensor([1., 2.])}
    """
    peaks = _watch_peaks(model, loader, types)
    if not peaks:
        raise ValueError("model: expected an activation of types that is called, got none")
    names = list(peaks)
    if unknown := sorted(set(per_neuron) - {*names, "last", "all"}):
        raise ValueError(f"per_neuron: expected last, all or names of {names}, got {unknown[0]!r}")
    bounds = {}
    for name, peak in peaks.items():
        wanted = {name, "all"} | ({"last"} if name == names[-1] else set())
        neurons = bool(wanted & set(per_neuron))
        if neurons and peak.ndim == 0:
            raise ValueError(f"per_neuron: expected one shape of {name}, got several")
        bounds[name] = (peak if neurons else peak.amax()).clamp_min(SMALLEST_BOUND)
    return bounds


def called_in_order(model: nn.Module, x: Tensor, types: Any) -> list[str]:
    """Names of the activations, in the order of their last calls on one batch.

    Example:
        >>> called_in_order(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.ones(1), nn.ReLU)
        ['0', '1']
    """
    return list(_watch_peaks(model, [x], types))


@torch.no_grad()
def _watch_peaks(model: nn.Module, loader: Iterable[Any], types: Any) -> dict[str, Tensor]:
    """Largest output of each neuron, by activation, in the order of their last calls."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            peak, known = output.amax(0), peaks.pop(name, None)
            if known is not None:
                if known.shape != peak.shape:
                    known, peak = known.amax(), peak.amax()
                peak = torch.maximum(known, peak)
            peaks[name] = peak

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in find(model, types).items()]
    training = model.training
    model.eval()
    try:
        for batch in loader:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return peaks


def convert_clipped(
    model: nn.Module,
    bounds: Mapping[str, Tensor],
    kind: Literal["proact", "ranger", "clipact", "fitact"] = "proact",
) -> Replaced:
    """Put clipped activations in a model, in place.

    Args:
        model: The model.
        bounds: First bounds by the name of the activation, as `range_bounds` gives them.
        kind: `"proact"` and `"fitact"` take the bounds as they are; `"ranger"` and `"clipact"` take
            the largest one of each layer.

    Returns:
        What was replaced: `.count` and `.names`.

    Raises:
        ValueError: An unknown kind, or the model has no module of such a name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
        >>> bounds = range_bounds(model, [torch.randn(8, 2)])
        >>> convert_clipped(model, bounds).names, model[3].bound.shape
        (('1', '3'), torch.Size([3]))
    """
    kinds: dict[str, Callable[[Tensor], nn.Module]] = {
        "proact": lambda bound: HybridClippedReLU(bound.tolist()),
        "fitact": lambda bound: FitAct(bound.tolist()),
        "ranger": lambda bound: Ranger(bound.max().item()),
        "clipact": lambda bound: ClipAct(bound.max().item()),
    }
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}")
    modules = dict(model.named_modules())
    if unknown := [name for name in bounds if name not in modules]:
        raise ValueError(f"bounds: expected names of modules, got {unknown[0]!r}")
    names = {id(modules[name]): name for name in bounds}
    return replace(
        model,
        lambda name, module: name in bounds,
        lambda old: kinds[kind](bounds[names[id(old)]]),
    )
