"""ProAct: clipped ReLUs that keep bit flips from spreading, and how their bounds are found.

S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct: Progressive
Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs", 2024. With a bound
λ that learns and κ = 20,

    HyReLU(x) = max(0, x − x σ(κ (x − λ))) = max(0, x) σ(κ (λ − x)),

so that what is far above λ becomes 0. λ is one number a layer, but one a neuron in the last
activation layer ("hybrid"): bounds are stored too, and the more there are the more flips hit them.
They start at the largest activation on training data; `ProActTrainer` then makes them smaller.

Deviations: NaN gives 0 in all activations here, so that a flip that makes a NaN is stopped as one
that makes an infinity is; a bound is never below 1e-6, which a neuron that was never active gets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.base import ActivationBase
from torchzoo.ops import hyrelu
from torchzoo.registry import Comparison, Example, register
from torchzoo.surgery import Replaced, find, replace

__all__ = [
    "ClipAct",
    "FitAct",
    "HybridClippedReLU",
    "Ranger",
    "convert_clipped",
    "hyrelu",
    "range_bounds",
]

SMALLEST_BOUND = 1e-6
Bound = float | list[Any] | Tensor


class _Clipped(ActivationBase):
    """A rectifier with a bound; `bound` is a parameter where it learns, else a buffer."""

    bound: Tensor

    def __init__(
        self,
        bound: Bound,
        learnable: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        start = torch.as_tensor(bound, dtype=torch.float64, device="cpu").detach().clone()
        if not start.numel() or not (start > 0).all():
            shown = bound if isinstance(bound, (int, float)) else f"the smallest {start.min()}"
            raise ValueError(f"bound: expected numbers > 0, got {shown}")
        super().__init__("bound", start, learnable, device, dtype)

    def _check(self, x: Tensor) -> None:
        """Raise for an input whose features the bound does not broadcast to."""
        bound, trailing = self.bound.shape, x.shape[max(x.ndim - self.bound.ndim, 0) :]
        if len(bound) != len(trailing) or any(
            b not in (1, n) for b, n in zip(bound, trailing, strict=True)
        ):
            raise ValueError(
                f"x: expected last dimensions that fit bound, {tuple(bound)}, got {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return f"features={tuple(self.bound.shape)}"


def _example(options: dict[str, Any], bad: dict[str, Any]) -> Callable[[], Example]:
    return lambda: Example(
        {"bound": [0.9, 1.1, 0.4, 2.0], **options},
        (torch.randn(3, 4),),
        bad_options={"bound": -1.0, **bad},
    )


@register(
    paper=121,
    example=_example({"sharpness": 5.0}, {"sharpness": 0.0}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class HybridClippedReLU(_Clipped):
    """ReLU that falls smoothly to zero above a bound which learns.

    Args:
        bound: First value of the bound λ, > 0: one number, or of a shape that broadcasts to the
            features of one sample.
        sharpness: κ, how steeply the output falls at the bound.
        learnable: Whether the bound is a parameter; else it is a buffer.
        hard: Compare exactly, x where 0 < x ≤ λ and else 0, for inference: the bound then gets no
            gradient.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        max(0, x) σ(κ (λ − x)), which is at most W(exp(κ λ − 1)) / κ, with Lambert's W; 0 for NaN
        and infinity.

    Raises:
        ValueError: The bound or κ is not positive, or x does not fit the bound.

    Source:
        S. Mousavi, M. H. Ahmadilivani, J. Raik, M. Jenihhin and M. Daneshtalab, "ProAct:
        Progressive Training for Hybrid Clipped Activation Function to Enhance Resilience of DNNs",
        2024 (hybrid clipped activation); the function is that of the authors' code.

    Example:
        >>> HybridClippedReLU(2.0)(torch.tensor([-1.0, 1.0, 2.0, 3e30])).detach()
        tensor([0., 1., 1., 0.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        sharpness: float = 20.0,
        learnable: bool = True,
        hard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not sharpness > 0:
            raise ValueError(f"sharpness: expected a number > 0, got {sharpness}")
        super().__init__(bound, learnable, device, dtype)
        self.sharpness, self.hard = sharpness, hard

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.hard:
            return _clipped(x, self.bound)
        return hyrelu(x, self.bound, sharpness=self.sharpness)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, sharpness={self.sharpness:g}"
        return text + (", hard=True" if self.hard else "")


@register(
    paper=121,
    example=_example({"sharpness": 5.0}, {"sharpness": 0.0}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class FitAct(HybridClippedReLU):
    """The same smooth function with a bound for each neuron of every layer: a baseline.

    Args:
        bound: First values of the bounds, of the shape of one sample's features.
        sharpness: As for `HybridClippedReLU`.
        learnable: As for `HybridClippedReLU`.
        hard: As for `HybridClippedReLU`.
        device: Where the bounds are held.
        dtype: Their type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        max(0, x) σ(κ (λ − x)).

    Raises:
        ValueError: As for `HybridClippedReLU`.

    Source:
        B. Ghavami, M. Sadati, Z. Fang and L. Shannon, "FitAct: Error Resilient Deep Neural Networks
        via Fine-Grained Post-Trainable Activation Functions", 2022.

    Example:
        >>> FitAct([1.0, 2.0])(torch.tensor([[1.0, 1.0]])).detach()
        tensor([[0.5000, 1.0000]])
    """


@register(
    paper=121,
    example=_example({}, {}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class Ranger(_Clipped):
    """ReLU that saturates at a bound: a baseline.

    Args:
        bound: The bound λ, > 0: one number, or of a shape that broadcasts to the features.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        min(max(0, x), λ); 0 for NaN.

    Raises:
        ValueError: The bound is not positive, or x does not fit it.

    Source:
        Z. Chen, G. Li and K. Pattabiraman, "A Low-cost Fault Corrector for Deep Neural Networks
        through Range Restriction", 2021.

    Example:
        >>> Ranger(2.0)(torch.tensor([-1.0, 1.0, 3e30]))
        tensor([0., 1., 2.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(bound, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return torch.where(x > 0, x, 0.0).minimum(self.bound.to(x.dtype))


@register(
    paper=121,
    example=_example({}, {}),
    compare=lambda: Comparison({"bound": [6.0] * 4096}, (torch.randn(512, 4096),), peers.BOUNDED),
)
class ClipAct(_Clipped):
    """ReLU that gives zero above a bound, by comparison: a baseline.

    Args:
        bound: The bound λ, > 0: one number, or of a shape that broadcasts to the features.
        device: Where the bound is held.
        dtype: Its type.

    Shape:
        - x: `(..., *features)`
        - output: `(..., *features)`

    Returns:
        x where 0 < x ≤ λ, else 0.

    Raises:
        ValueError: The bound is not positive, or x does not fit it.

    Source:
        L.-H. Hoang, M. A. Hanif and M. Shafique, "FT-ClipAct: Resilience Analysis of Deep Neural
        Networks and Improving their Fault Tolerance using Clipped Activation", 2020.

    Example:
        >>> ClipAct(2.0)(torch.tensor([-1.0, 1.0, 3e30]))
        tensor([0., 1., 0.])
    """

    def __init__(
        self,
        bound: Bound,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(bound, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return _clipped(x, self.bound)


def _clipped(x: Tensor, bound: Tensor) -> Tensor:
    return torch.where((x > 0) & (x <= bound), x, 0.0)


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
