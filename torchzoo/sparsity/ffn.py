"""A feed-forward layer whose inactive neurons cost nothing, as a drop-in module.

    gated:  h = act(W_g x) · (W_u x)        plain:  h = act(W_u x)        y = W_d h

where neuron i counts for a token if abs(a_i), or abs(h_i), is above its threshold; `sparse_ffn`
then leaves out the rows of W_u (gated) and the columns of W_d that belong to the others. Parameters
have the names of the usual gated layer, so that checkpoints fit as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.ops import sparse_ffn
from torchzoo.ops.calling import values_readable
from torchzoo.registry import Comparison, Example, register
from torchzoo.sparsity.layouts import linear_weight, mlp_parts

ACTIVATIONS = {
    "relu": F.relu,
    "fatrelu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "silu": F.silu,
}


class _Kept:
    """What a forward leaves behind; copies and pickles of the module start without it."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.of: tuple[Any, ...] = ()
        self.l1: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@register(
    paper=122,
    example=lambda: Example(
        {"dim": 6, "hidden_dim": 10, "bias": True},
        (torch.randn(3, 6),),
        bad_options={
            "dim": 0,
            "hidden_dim": 0,
            "activation": "gelu",
            "threshold": -1.0,
            "threshold_on": "input",
            "top_k": 11,
            "policy": "fast",
        },
    ),
    compare=lambda: Comparison(
        {"dim": 1024, "hidden_dim": 4096}, (torch.randn(1, 1024),), peers.FEED_FORWARD
    ),
)
class SparseFFN(ZooModel):
    """A gated or plain feed-forward layer that reads the weights of active neurons only.

    For inference a copy of `down_proj.weight` with one neuron a row is kept in evaluation mode. It
    is renewed when the parameter changes, and dropped by `train` and `eval`; only a change in place
    through `parameter.data` goes unseen until then.

    Args:
        dim: Features D of a token.
        hidden_dim: Neurons H.
        gated: Whether there is a gate.
        activation: `"relu"`, `"fatrelu"` (relu whose values up to `threshold` are dropped),
            `"relu2"` (the square of relu) or `"silu"`.
        threshold: A neuron counts where the compared value is strictly above this, >= 0; one
            number or one a neuron `(H,)`. At 0 the layer equals the dense one.
        threshold_on: What is compared: `"act"`, abs(a), or `"product"`, abs(h), after the gate.
        top_k: Of the neurons that count keep the k largest a for each token, on ties the lowest.
        bias: Whether the linear layers have biases.
        policy: `"sparse"`: never read weights of inactive neurons; `"dense"`: matrix products
            through the linear layers; `"auto"`: whichever is faster for the tokens at hand.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (..., D); output the same.

    Returns:
        The layer's output, in the dtype of `x`.

    Raises:
        ValueError: An option out of its range, or an input of other features.

    Source:
        Song et al., "ProSparse: introducing and enhancing intrinsic activation sparsity within
        large language models", 2024.

    Example:
        >>> layer = SparseFFN(4, 16, activation="fatrelu", threshold=0.01)
        >>> layer(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    threshold: Tensor

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        gated: bool = True,
        activation: str = "relu",
        threshold: float | Tensor = 0.0,
        threshold_on: Literal["act", "product"] = "act",
        top_k: int | None = None,
        bias: bool = False,
        policy: Literal["auto", "sparse", "dense"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        _choice("activation", activation, tuple(ACTIVATIONS))
        _choice("policy", policy, ("auto", "sparse", "dense"))
        if top_k is not None and not 1 <= top_k <= hidden_dim:
            raise ValueError(f"top_k: expected 1 to hidden_dim = {hidden_dim}, got {top_k}")
        self.dim, self.hidden_dim, self.gated = dim, hidden_dim, gated
        self.activation, self.top_k, self.policy = activation, top_k, policy
        self.track = False
        self._watchers = 0
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden_dim, **factory) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, **factory)
        self.down_proj = nn.Linear(hidden_dim, dim, **factory)
        self.register_buffer("threshold", torch.zeros(hidden_dim, device=device, dtype=dtype))
        self.set_threshold(threshold, on=threshold_on)
        self._kept = _Kept()

    def reset_parameters(self) -> None:
        """Draw the linear layers anew, each as `torch.nn.Linear` does; thresholds stay."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            if layer is not None:
                layer.reset_parameters()

    def set_threshold(
        self, threshold: float | Tensor, *, on: Literal["act", "product"] = "act"
    ) -> None:
        """Set the thresholds, which `state_dict` keeps.

        Args:
            threshold: One number or one a neuron `(H,)`, >= 0; infinity drops a neuron.
            on: What is compared with it, as `threshold_on`.

        Raises:
            ValueError: A negative number, or another shape.
        """
        _choice("threshold_on", on, ("act", "product"))
        value = threshold.detach() if isinstance(threshold, Tensor) else _on_cpu(threshold)
        if value.shape not in (torch.Size([]), torch.Size([self.hidden_dim])):
            raise ValueError(
                f"threshold: expected a number or shape ({self.hidden_dim},), "
                f"got {tuple(value.shape)}"
            )
        if values_readable(value) and not bool((value >= 0).all()):
            raise ValueError(f"threshold: expected numbers >= 0, got {float(value.min())}")
        if not self.threshold.is_meta:
            self.threshold.copy_(value.expand(self.hidden_dim))
        self.threshold_on = on
        self._zoo_config |= {"threshold": 0.0, "threshold_on": on}  # the buffer has the values

    @classmethod
    def from_mlp(cls, module: nn.Module, *, activation: str | None = None, **options: Any) -> Self:
        """Take over the weights of a feed-forward layer, whose parameters are shared, not copied.

        Args:
            module: A layer of one of the layouts that `mlp_parts` knows.
            activation: The new activation; None keeps the layer's.
            **options: More options of the constructor.

        Raises:
            ValueError: A layout or an activation that is not known, or a layer with dropout.

        Example:
            >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
            >>> x = torch.randn(3, 2)
            >>> torch.testing.assert_close(SparseFFN.from_mlp(mlp)(x), mlp(x))
        """
        parts = mlp_parts(module)
        if activation is None:
            activation = parts.activation
            if parts.threshold is not None:
                options = {"threshold": parts.threshold, "threshold_on": parts.on} | options
        if isinstance(module, SparseFFN):
            options = {"top_k": module.top_k, "policy": module.policy} | options
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"module: expected an activation of {', '.join(ACTIVATIONS)}, got {activation} "
                f"in {type(module).__name__}; pass another as activation="
            )
        layers = {"gate_proj": parts.gate, "up_proj": parts.up, "down_proj": parts.down}
        weights = {n: linear_weight(layer) for n, layer in layers.items() if layer is not None}
        hidden, dim = weights["up_proj"].shape
        biases = {n: getattr(layers[n], "bias", None) for n in weights}
        made = cls(
            dim,
            hidden,
            gated=parts.gate is not None,
            activation=activation,
            bias=any(bias is not None for bias in biases.values()),
            device=weights["up_proj"].device,
            dtype=weights["up_proj"].dtype,
            **options,
        )
        for name, weight in weights.items():
            layer = getattr(made, name)
            layer.weight = weight
            if biases[name] is not None:
                layer.bias = biases[name]
            elif layer.bias is not None:
                nn.init.zeros_(layer.bias)
        return made.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected last dimension {self.dim}, got shape {tuple(x.shape)}")
        if self.track or self._watchers or self.policy == "dense":
            h = self.hidden(x)
            if self.track:
                self._kept.l1 = h.abs().mean()
            return self.down_proj(h)
        return sparse_ffn(x, policy=self.policy, **self._arguments())

    def hidden(self, x: Tensor) -> Tensor:
        """What `down_proj` is applied to `(..., H)`: the values h, zero for neurons left out."""
        act = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            a = h = act(self.up_proj(x))
        else:
            a = act(self.gate_proj(x))
            h = a * self.up_proj(x)
        active = ~((h if self.threshold_on == "product" else a).abs() <= self.threshold)
        if self.top_k is not None:
            candidates = torch.where(active, a, -torch.inf)
            order = candidates.sort(dim=-1, descending=True, stable=True).indices
            largest = torch.zeros_like(active).scatter(-1, order[..., : self.top_k], True)
            active = active & largest
        return torch.where(active, h, 0.0)

    @torch.no_grad()
    def macs(self, x: Tensor) -> int:
        """Multiplications that the tokens `(..., D)` cost when inactive neurons are skipped.

        Gated N D H + 2 D Σ abs(S_n), plain N D H + D Σ abs(S_n), for N tokens of which token n has
        the set S_n of active neurons; with thresholds on the product 2 N D H + D Σ abs(S_n).
        """
        _, stats = sparse_ffn(x, return_stats=True, **self._arguments())
        active, tokens = int(stats.active.sum()), stats.active.numel()
        of_all = 2 if self.gated and self.threshold_on == "product" else 1
        of_active = (3 if self.gated else 2) - of_all
        return self.dim * (of_all * tokens * self.hidden_dim + of_active * active)

    @property
    def last_x1_l1(self) -> Tensor:
        """Mean of abs(h) in the last forward, with its graph; kept while `track` is set.

        Raises:
            ValueError: No forward has run since `track` was set.
        """
        if self._kept.l1 is None:
            raise ValueError("last_x1_l1: none yet; set track = True and call forward first")
        return self._kept.l1

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what the last forward left behind."""
        self._kept = _Kept()
        return super().train(mode)

    def _arguments(self) -> dict[str, Any]:
        gate = self.gate_proj
        return {
            "w_up": self.up_proj.weight,
            "w_down_t": self._down_rows(),
            "w_gate": None if gate is None else gate.weight,
            "b_up": self.up_proj.bias,
            "b_gate": None if gate is None else gate.bias,
            "b_down": self.down_proj.bias,
            "activation": self.activation,
            "threshold": self.threshold,
            "threshold_on": self.threshold_on,
            "top_k": self.top_k,
        }

    def _down_rows(self) -> Tensor:
        """The down-projection with one contiguous row a neuron, in the graph if there is one."""
        weight = self.down_proj.weight
        recorded = torch.is_grad_enabled() and weight.requires_grad
        if self.training or recorded or weight.is_inference() or not values_readable(weight):
            return weight.mT.contiguous()
        of = (
            *(weight._version, weight.data_ptr(), weight.dtype),
            torch.is_inference_mode_enabled(),  # what is made there can't be saved for a derivative
        )
        kept = self._kept
        if kept.rows is None or kept.of[0]() is not weight or kept.of[1:] != of:
            kept.rows = weight.detach().mT.contiguous()
            kept.of = (weakref.ref(weight), *of)
        return kept.rows

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        """Checkpoints of dense layers have no thresholds: then the module keeps its own."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + "threshold" in missing:
            missing.remove(prefix + "threshold")

    def extra_repr(self) -> str:
        shown = f"{self.dim}, {self.hidden_dim}, gated={self.gated}, activation={self.activation!r}"
        return f"{shown}, policy={self.policy!r}" + (f", top_k={self.top_k}" if self.top_k else "")


def on_hidden(
    layer: nn.Module, down: nn.Module, see: Callable[[Tensor], Tensor | None]
) -> Callable[[], None]:
    """Show what a feed-forward layer's neurons give, in each of its forwards.

    Args:
        layer: The layer; a `SparseFFN` computes densely meanwhile.
        down: Its down-projection.
        see: Called with the values h `(..., H)`; a tensor that it returns takes their place.

    Returns:
        Call this to end it.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        changed = see(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    handle = down.register_forward_pre_hook(hook)
    if isinstance(layer, SparseFFN):
        layer._watchers += 1

    def end() -> None:
        handle.remove()
        if isinstance(layer, SparseFFN):
            layer._watchers -= 1

    return end


def _on_cpu(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
