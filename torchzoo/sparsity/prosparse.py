"""ProSparse: from a trained SiLU or GELU transformer to one whose neurons are mostly zero.

Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within large
language models", 2024. In three steps:

1. the activation of every feed-forward layer becomes relu (`prosparse_convert`);
2. training goes on with loss + λ(t) Σ_layers ‖x1‖₁, x1 = relu(W_g x) · (W_u x) (`ActivationL1`),
   where λ climbs in stages with ends T_1 < … < T_n (`SineSparsityScheduler`): λ_1 up to T_1, then

       η = (t − T_{i−1}) / (T_i − T_{i−1}),
       λ(t) = λ_{i−1} + (λ_i − λ_{i−1}) (sin(π (η − 1/2)) + 1) / 2;

3. relu becomes FATReLU: z where z > t, else 0; the value is not shifted.

Deviations: FATReLU drops z = t (the formula of the paper keeps it), as the kernels do that serve
the published models; the norm is a mean over tokens and neurons, as the paper's λ up to 0.2 suggest
but its text does not say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.ops import bounded_relu
from torchzoo.registry import Comparison, Example, register
from torchzoo.sparsity.ffn import SparseFFN, on_hidden
from torchzoo.sparsity.hosts import find_ffns
from torchzoo.sparsity.layouts import is_mlp
from torchzoo.surgery import Match, Replaced, replace

_PUBLISHED = {
    "llama2-7b": (
        (5_000, 6_000, 10_000, 12_000, 16_000, 16_500),
        (0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1),
    ),
    "llama2-13b": (
        (5_500, 6_750, 10_750, 11_000, 15_000, 16_000),
        (0.0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2),
    ),
    "minicpm-1b": ((10_000, 15_000, 20_000, 25_000, 35_000), (0.0, 1e-3, 5e-3, 5e-3, 5e-2)),
}


def fatrelu(x: Tensor, threshold: float | Tensor = 0.01) -> Tensor:
    """Drop values up to a threshold: x where x > threshold, else 0.

    Args:
        x: Values.
        threshold: One number, or one for each of the last dimension, >= 0.

    Shape:
        - x: `(..., H)`
        - threshold: a number, `()` or `(H,)`
        - output: `(..., H)`; the gradient is 1 where a value is kept and 0 elsewhere

    Raises:
        ValueError: A negative number.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024, section on threshold shifting.

    Example:
        >>> fatrelu(torch.tensor([-1.0, 0.25, 0.5, 0.75]), 0.5).tolist()
        [0.0, 0.0, 0.0, 0.75]
    """
    if not isinstance(threshold, Tensor) and not threshold >= 0:
        raise ValueError(f"threshold: expected a number >= 0, got {threshold}")
    return bounded_relu(x, threshold, kind="above")


@register(
    paper=122,
    example=lambda: Example(
        {"threshold": 0.3}, (torch.randn(3, 5),), bad_options={"threshold": -0.1}
    ),
    compare=lambda: Comparison({"threshold": 0.01}, (torch.randn(512, 4096),), peers.ACTIVATIONS),
)
class FATReLU(ZooModel):
    """Relu that also drops small positive values, and leaves the others as they are.

    Args:
        threshold: The largest value that is dropped, >= 0; with `per_neuron` one a neuron.
        per_neuron: Whether there is a threshold for each neuron.
        device: Device of the buffer `threshold`.
        dtype: Dtype of the buffer.

    Shape:
        x: (..., H); output the same.

    Returns:
        The kept values, 0 for the others.

    Raises:
        ValueError: A negative threshold, or several without `per_neuron`.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024, section on threshold shifting.

    Example:
        >>> FATReLU(0.5)(torch.tensor([0.25, 0.5, 0.75])).tolist()
        [0.0, 0.0, 0.75]
    """

    threshold: Tensor

    def __init__(
        self,
        threshold: float | Sequence[float] = 0.01,
        *,
        per_neuron: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        values = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
        if isinstance(threshold, (int, float)) is per_neuron:
            expected = "a sequence of numbers" if per_neuron else "one number"
            raise ValueError(
                f"threshold: expected {expected} with per_neuron={per_neuron}, got {threshold}"
            )
        if not all(value >= 0 for value in values):
            raise ValueError(f"threshold: expected numbers >= 0, got {threshold}")
        value = torch.tensor(values if per_neuron else values[0], device=device, dtype=dtype)
        self.register_buffer("threshold", value)

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold.ndim and x.shape[-1:] != self.threshold.shape:
            raise ValueError(
                f"x: expected last dimension {len(self.threshold)}, got shape {tuple(x.shape)}"
            )
        return fatrelu(x, self.threshold)

    def extra_repr(self) -> str:
        return f"per_neuron={bool(self.threshold.ndim)}"


class SineSparsityScheduler:
    """The weight of the penalty over training steps: constant, then half a sine wave a stage.

    Equal neighbours give a plateau; after the last stage the weight stays.

    Args:
        stages: Last step and weight of each stage, `(T, λ)`; steps increase, weights are >= 0.

    Raises:
        ValueError: No stages, steps that don't increase, or a negative weight.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024, section on progressive sparsity regularisation.

    Example:
        >>> schedule = SineSparsityScheduler([(10, 0.0), (20, 1.0)])
        >>> [round(schedule.value_at(t), 4) for t in (0, 10, 12.5, 15, 20, 30)]
        [0.0, 0.0, 0.1464, 0.5, 1.0, 1.0]
    """

    def __init__(self, stages: Sequence[tuple[float, float]]):
        self.stages = [(float(end), float(weight)) for end, weight in stages]
        ends = [end for end, _ in self.stages]
        if not ends or ends[0] < 0 or any(b <= a for a, b in pairwise(ends)):
            raise ValueError(f"stages: expected steps that increase from 0 on, got {ends}")
        if not all(weight >= 0 for _, weight in self.stages):
            raise ValueError(f"stages: expected weights >= 0, got {[w for _, w in self.stages]}")
        self.last_step = 0

    @classmethod
    def published(cls, name: str) -> SineSparsityScheduler:
        """The schedule of a model of the paper: `"llama2-7b"`, `"llama2-13b"`, `"minicpm-1b"`.

        Raises:
            ValueError: Another name.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name: expected one of {', '.join(_PUBLISHED)}, got {name!r}")
        return cls(list(zip(*_PUBLISHED[name], strict=True)))

    def scaled(self, steps: float, weight: float) -> SineSparsityScheduler:
        """The same stages, brought to another last step and last weight, from the start.

        Example:
            >>> SineSparsityScheduler.published("llama2-7b").scaled(33, 0.4).stages[:2]
            [(10.0, 0.0), (12.0, 0.01)]
        """
        last, final = self.stages[-1]
        return SineSparsityScheduler(
            [(end * steps / last, value * weight / final) for end, value in self.stages]
        )

    @property
    def value(self) -> float:
        """The weight at the present step."""
        return self.value_at(self.last_step)

    def value_at(self, t: float) -> float:
        """The weight after `t` steps."""
        if t <= self.stages[0][0]:
            return self.stages[0][1]
        for (start, low), (end, high) in pairwise(self.stages):
            if t <= end:
                eta = (t - start) / (end - start)
                return low + (high - low) * 0.5 * (math.sin(math.pi * (eta - 0.5)) + 1)
        return self.stages[-1][1]

    def step(self) -> float:
        """Go on by a step, and give the weight there."""
        self.last_step += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"stages": list(self.stages), "last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stages = [(float(end), float(weight)) for end, weight in state["stages"]]
        self.last_step = int(state["last_step"])


class ActivationL1:
    """The penalty on a model's neurons: the L1 norm of x1, summed over its feed-forward layers.

    From when it is made until `remove` (or the end of a `with`) every forward of the model is
    recorded; `SparseFFN` layers compute densely meanwhile. Activation checkpointing has to be the
    kind that is not reentrant.

    Args:
        model: The model whose forward is called; see `mlp_parts` for the layers that are known.
        reduction: `"mean"` over tokens and neurons, or `"token_mean"`: summed over neurons.

    Raises:
        ValueError: The model has no feed-forward layer that is known.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024, section on progressive sparsity regularisation.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with ActivationL1(model) as penalty:
        ...     loss = model(torch.ones(4, 2)).mean() + 0.1 * penalty.value()
        >>> loss.backward()
    """

    def __init__(self, model: nn.Module, *, reduction: Literal["mean", "token_mean"] = "mean"):
        if reduction not in ("mean", "token_mean"):
            raise ValueError(f"reduction: expected mean or token_mean, got {reduction!r}")
        self.reduction = reduction
        self._terms: list[Tensor] = []
        self._running = False
        ends: list[Callable[[], None]] = [
            on_hidden(ffn.module, ffn.down, self._record) for ffn in find_ffns(model).values()
        ]
        ends.append(model.register_forward_pre_hook(self._start).remove)
        ends.append(model.register_forward_hook(self._stop, always_call=True).remove)
        self._ends = ends

    def value(self) -> Tensor:
        """The penalty of the last forward, a scalar with its graph.

        Raises:
            ValueError: No forward has run, or one whose gradients were recorded elsewhere, as
                reentrant checkpointing does.
        """
        if not self._terms:
            raise ValueError("value: no forward of the model has been recorded yet")
        total = torch.stack(self._terms).sum()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise ValueError(
                "value: the last forward was recorded without gradients; run it with gradients, "
                "and checkpoint with use_reentrant=False"
            )
        return total

    def remove(self) -> None:
        """Stop recording."""
        while self._ends:
            self._ends.pop()()
        self._terms = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _start(self, *_: Any) -> None:
        self._terms, self._running = [], True

    def _stop(self, *_: Any) -> None:
        self._running = False

    def _record(self, x1: Tensor) -> None:
        size = x1.abs().mean()
        if self.reduction == "token_mean":
            size = size * x1.shape[-1]
        if self._running:  # when checkpointing runs a layer again the forward is over
            self._terms.append(size)


def prosparse_convert(
    model: nn.Module, *, threshold: float | None = None, match: Match | None = None
) -> Replaced:
    """Make every feed-forward layer of a model a `SparseFFN` with relu, in place.

    Parameters are shared with the old layers, not copied. A `hidden_act` in the configuration of a
    transformers model is set to what the layers now compute, so that it is saved with them.

    Args:
        model: A model with layers that `mlp_parts` knows.
        threshold: None: relu, the first step of the recipe; a number: FATReLU, the last.
        match: Which modules to convert, as for `torchzoo.surgery.find`; None: all that are known.

    Returns:
        The names of the converted layers.

    Raises:
        ValueError: No layer is known, or one of those selected is not, or has dropout.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 2))
        >>> model = nn.Sequential(mlp, nn.LayerNorm(2))
        >>> prosparse_convert(model).names, model[0].activation
        (('0',), 'relu')
    """
    activation = "relu" if threshold is None else "fatrelu"

    def converted(old: nn.Module) -> SparseFFN:
        return SparseFFN.from_mlp(old, activation=activation, threshold=threshold or 0.0)

    report = replace(
        model, match or (lambda name, module: name != "" and is_mlp(module)), converted
    )
    config: Any = getattr(model, "config", None)
    if hasattr(config, "hidden_act"):
        config.hidden_act = activation
        if threshold is not None:
            config.hidden_act_param = threshold
    return report


def load_prosparse_config(config: Any) -> dict[str, Any]:
    """The options of `SparseFFN` that a published configuration asks for.

    Args:
        config: A transformers configuration, or its JSON as a mapping, with `hidden_act` and for
            `"fatrelu"` with `hidden_act_param`.

    Returns:
        `activation` and `threshold`.

    Raises:
        ValueError: Another activation, or FATReLU without its threshold.

    Example:
        >>> load_prosparse_config({"hidden_act": "fatrelu", "hidden_act_param": 0.01})
        {'activation': 'fatrelu', 'threshold': 0.01}
    """
    values = config if isinstance(config, Mapping) else vars(config)
    name, parameter = values.get("hidden_act"), values.get("hidden_act_param")
    known = {"relu": "relu", "silu": "silu", "swish": "silu", "fatrelu": "fatrelu"}
    if name not in known:
        raise ValueError(f"hidden_act: expected one of {', '.join(known)}, got {name!r}")
    activation = known[name]
    if activation != "fatrelu":
        return {"activation": activation, "threshold": 0.0}
    if not isinstance(parameter, (int, float)) or parameter < 0:
        raise ValueError(f"hidden_act_param: expected a number >= 0, got {parameter!r}")
    return {"activation": activation, "threshold": float(parameter)}
