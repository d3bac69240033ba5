"""Top-k activation of transformer MLPs.

Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo and Kumar, "The Lazy Neuron Phenomenon:
On Emergence of Activation Sparsity in Transformers", 2023. With K (f, d) and V (d, f), an MLP of
few active neurons, and one of at most k for each token, are

    y = V relu(K x),        y = V Top_k(relu(K x)),

Top_k keeping the k largest entries. Why training makes neurons lazy is in `lazy_gradient`.

Deviations: ties, which the paper leaves open, go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register
from torchzoo.sparsity.ffn import SparseFFN
from torchzoo.sparsity.hosts import find_ffns
from torchzoo.surgery import Replaced

Activation = str | Callable[[Tensor], Tensor]
_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "silu": F.silu,
    "gelu": F.gelu,
}


def topk_activation(
    x: Tensor,
    k: int,
    *,
    activation: Activation = "relu",
    sorted_ties: bool = True,
    return_indices: bool = False,
) -> Any:
    """Apply an activation and keep the k largest entries of each token; the others become 0.

    With relu min(k, number of positive entries) are left. Which entries are kept is a constant of
    the derivative.

    Args:
        x: Pre-activations.
        k: Entries to keep.
        activation: `"relu"`, `"relu2"` (its square), `"silu"`, `"gelu"`, or any function of one
            tensor.
        sorted_ties: Give ties to the lowest index, on every device; False: to any of them.
        return_indices: Return the kept values and their indices instead, the largest first.

    Shape:
        - x: `(..., f)`
        - output: `(..., f)`, or values and int64 indices, both `(..., k)`

    Returns:
        The activations, or `(values, indices)`. A NaN is kept, so that it is seen.

    Raises:
        ValueError: `k` not in 1..f, `x` without dimensions or not of floating point, or an unknown
            activation.

    Source:
        Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in
        Transformers", 2023, the Top-k transformer of section 4.

    Example:
        >>> topk_activation(torch.tensor([1.0, -2.0, 3.0, 3.0]), 2)
        tensor([0., 0., 3., 3.])
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., f), got a scalar")
    _check_k(k, x.shape[-1], "the last dimension of x")
    a = _function(activation)(x)
    if return_indices:
        if sorted_ties:
            indices = a.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
        else:
            indices = a.detach().topk(k).indices
        return a.gather(-1, indices), indices
    return torch.where(_kept(a.detach(), k, sorted_ties), a, 0.0)


def _kept(a: Tensor, k: int, sorted_ties: bool) -> Tensor:
    """Mask of the k largest, by the k-th value: a stable sort of all f costs several times that."""
    largest = a.topk(k)
    if not sorted_ties:
        return torch.zeros_like(a, dtype=torch.bool).scatter(-1, largest.indices, True)
    value = largest.values[..., -1:]
    above, tied = ~(a <= value), a == value
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


@register(
    paper=149,
    example=lambda: Example(
        {"k": 3}, (torch.randn(4, 8),), bad_options={"k": 0, "activation": "tanh"}
    ),
    compare=lambda: Comparison({"k": 128}, (torch.randn(512, 4096),), peers.ACTIVATIONS),
)
class TopKActivation(ZooModel):
    """An activation of which the k largest entries of each token are kept.

    Args:
        k: Entries to keep; the paper's 128 is for 3072 neurons.
        activation: A name as for `topk_activation`, or a module or function to apply first.
        sorted_ties: Give ties to the lowest index; False: to any of them.

    Shape:
        x: (..., f) with f >= k; output the same.

    Returns:
        The activations, all but k of each token 0.

    Raises:
        ValueError: `k` < 1, an unknown activation, or an input of fewer than `k` features or not of
            floating point.

    Source:
        Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in
        Transformers", 2023, the Top-k transformer of section 4.

    Example:
        >>> TopKActivation(1)(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
        tensor([[0., 2.],
                [0., 0.]])
    """

    def __init__(
        self, k: int = 128, *, activation: Activation = "relu", sorted_ties: bool = True
    ) -> None:
        super().__init__()
        _check_k(k)
        _function(activation)
        self.k, self.activation, self.sorted_ties = k, activation, sorted_ties

    def forward(self, x: Tensor) -> Tensor:
        return topk_activation(x, self.k, activation=self.activation, sorted_ties=self.sorted_ties)

    def extra_repr(self) -> str:
        named = f", activation={self.activation!r}" if isinstance(self.activation, str) else ""
        return f"k={self.k}{named}"


@register(
    paper=149,
    example=lambda: Example(
        {"dim": 6, "hidden_dim": 10, "k": 4},
        (torch.randn(3, 6),),
        bad_options={"dim": 0, "hidden_dim": 0, "k": 11, "activation": "gelu", "policy": "fast"},
    ),
    compare=lambda: Comparison(
        {"dim": 1024, "hidden_dim": 4096, "k": 128}, (torch.randn(1, 1024),), peers.FEED_FORWARD
    ),
)
class TopKFFN(SparseFFN):
    """A plain feed-forward layer in which each token uses its k most active neurons.

    The paper's MLP `y = V Top_k(relu(K x))`: a `SparseFFN` with `top_k` and the paper's choices for
    its options. A token reads K whole, and k rows of V.

    Args:
        dim: Features d of a token.
        hidden_dim: Neurons f.
        k: Neurons that a token uses; the paper's 128 is for f = 3072.
        gated: Whether there is a gate, which the paper's MLP has not.
        activation: As for `SparseFFN`.
        threshold: As for `SparseFFN`.
        threshold_on: As for `SparseFFN`.
        bias: Whether the linear layers have biases.
        policy: `"sparse"`: the rows of the others are never read; `"dense"`: matrix products;
            `"auto"`: whichever is faster.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: (..., d); output the same.

    Returns:
        The layer's output, in the dtype of `x`.

    Raises:
        ValueError: `k` not in 1..hidden_dim, another option out of its range, or an input of other
            features.

    Source:
        Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in
        Transformers", 2023, the Top-k transformer of section 4.

    Example:
        >>> layer = TopKFFN(4, 16, 2)
        >>> (layer.hidden(torch.randn(3, 4)) > 0).sum(-1).max().item() <= 2
        True
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        k: int = 128,
        *,
        gated: bool = False,
        activation: str = "relu",
        threshold: float | Tensor = 0.0,
        threshold_on: Literal["act", "product"] = "act",
        bias: bool = True,
        policy: Literal["auto", "sparse", "dense"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if hidden_dim > 0:
            _check_k(k, hidden_dim, "hidden_dim")
        super().__init__(
            dim,
            hidden_dim,
            gated=gated,
            activation=activation,
            threshold=threshold,
            threshold_on=threshold_on,
            top_k=k,
            bias=bias,
            policy=policy,
            device=device,
            dtype=dtype,
        )


def convert_topk(model: nn.Module, k: int) -> Replaced:
    """Let every feed-forward layer of a model keep k neurons a token, in place.

    The activation of each layer that `find_ffns` finds is wrapped in a `TopKActivation`; a gated
    layer keeps the k largest values of its gate. A `SparseFFN` gets its `top_k`.

    Args:
        model: The model to change.
        k: Neurons that a token may use.

    Returns:
        The names of the activations, or of the `SparseFFN`, that were changed.

    Raises:
        ValueError: `k` < 1, or more than a layer has neurons, or there is no layer; the model then
            is as it was.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 2))
        >>> convert_topk(mlp, 3).names, mlp[1].k
        (('1',), 3)
    """
    ffns = find_ffns(model)
    for name, ffn in ffns.items():
        _check_k(k, ffn.w_down.shape[1], f"the neurons of {name}")
    names = []
    for name, ffn in ffns.items():
        if isinstance(ffn.module, SparseFFN):
            ffn.module.top_k = k
            ffn.module._zoo_config |= {"k" if isinstance(ffn.module, TopKFFN) else "top_k": k}
            names.append(name)
            continue
        path, _, attribute = ffn.activation.rpartition(".")
        owner = ffn.module.get_submodule(path)
        old = getattr(owner, attribute)
        setattr(owner, attribute, TopKActivation(k, activation=old).train(owner.training))
        if hasattr(owner, "activation_relu_or_gelu"):  # torch's fused path, which has its own relu
            owner.activation_relu_or_gelu = 0  # type: ignore[assignment]
        names.append(f"{name}.{ffn.activation}".lstrip("."))
    return Replaced(tuple(names))


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str) and activation in _NAMED:
        return _NAMED[activation]
    if isinstance(activation, str) or not callable(activation):
        raise ValueError(
            f"activation: expected one of {', '.join(_NAMED)} or a function, got {activation!r}"
        )
    return activation


def _check_k(k: int, f: int | None = None, what: str = "") -> None:
    if k < 1 or (f is not None and k > f):
        most = "at least 1" if f is None else f"1 to f = {f}, {what}"
        raise ValueError(f"k: expected {most}, got {k}")
