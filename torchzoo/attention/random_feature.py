"""Attention with frozen random query-key weights, whose values are fitted by ridge regression.

H. Fu, T. Guo, Y. Bai and S. Mei, What can a Single Attention Layer Learn? A Study Through the
Random Features Lens, 2023. A query x_0 and keys x_1..x_N in R^d, each written x~ = [x; 1], give

    f(x_0:N; v) = sum_m (1/N) sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>,   W_m frozen, m = 1..M,

with iid entries N(0, 1/4) in W_m, or N(W_0, 1/4) with W_0 = [[I, 0], [0, 0]] for biased random
features. f is linear in v, so that fitting it is a convex problem with a closed form. W_m stands
for the product of a head's query and key matrices. As M grows, Phi Phi^T / M for the features Phi
tends to the kernel

    K(x, x') = (1/(N N')) sum_ij <x~_i, x~'_j> E relu(<W, u_i>) relu(<W, u'_j>),
    u_i = x~_0 x~_i^T,

an expectation over a bivariate normal. Nothing here approximates softmax attention, as does the
"random feature attention" of linear-time transformers.

Deviations: the paper bounds norms of v; here they are penalised, which is the same set of
solutions. Several outputs share the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.attention.random_feature_model import RandomFeatureModel, check_counts, check_inputs
from torchzoo.registry import Comparison, Example, register

Activation = Literal["relu", "gelu", "tanh"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

_HEADS_AT_ONCE = 512  # bounds the scores, (..., heads, N), that exist at one time


def rfa_features(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    activation: Activation = "relu",
) -> Tensor:
    """Features of random-feature attention: for each head the mean of the keys, weighted by score.

    Args:
        query: Queries x_0.
        keys: Keys x_1..x_N.
        weight: Weights W_m.
        mask: True for real keys; the others count as absent.
        activation: `"relu"`, the paper's, `"gelu"` or `"tanh"`.

    Shape:
        - query: `(..., d)`
        - keys: `(..., N, d)`
        - weight: `(M, d + 1, d + 1)`
        - mask: `(..., N)`, bool
        - output: `(..., M, d + 1)`

    Returns:
        `(1/N) sum_i act(x~_0^T W_m x~_i) x~_i`, 0 for a row without any real key.

    Raises:
        ValueError: Shapes that don't fit, no keys, or an unknown activation.

    Source:
        Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, 2023, the random-feature attention layer of section 3.

    Example:
        >>> weight = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> rfa_features(torch.tensor([2.0]), torch.tensor([[1.0], [-1.0]]), weight)
        tensor([[1., 1.]])
    """
    check_inputs(query, keys, mask, weight.shape[-1] - 1)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(_ACTIVATIONS)}, got {activation!r}")
    act = _ACTIVATIONS[activation]
    query, (keys, mean) = F.pad(query, (0, 1), value=1.0), homogeneous(keys, mask)
    parts = []
    for heads in weight.split(_HEADS_AT_ONCE):
        projected = torch.einsum("...a,mab->...mb", query, heads)
        scores = act(projected @ keys.mT)  # (..., M, N)
        parts.append((scores * mean.unsqueeze(-2)) @ keys)
    return torch.cat(parts, -2)


def homogeneous(keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys as [x; 1], or 0 where masked, and each key's share 1/N of the mean."""
    if mask is None:
        share = keys.new_full(keys.shape[-2:-1], 1 / keys.shape[-2])
        return F.pad(keys, (0, 1), value=1.0), share.expand(keys.shape[:-1])
    real = mask.to(keys.dtype)
    keys = torch.cat([keys.where(mask.unsqueeze(-1), 0), real.unsqueeze(-1)], -1)
    return keys, real / real.sum(-1, keepdim=True).clamp_min(1)


def rfa_target(
    query: Tensor,
    keys: Tensor,
    beta: Tensor,
    *,
    power: int,
    kind: Literal["mean", "correlation"] = "mean",
) -> Tensor:
    """Targets that do not depend on the order of the keys, of the kinds that the paper studies.

    Args:
        query: Queries x_0.
        keys: Keys x_1..x_N.
        beta: Direction.
        power: Power p, at least 1.
        kind: `"mean"` for `(1/N) sum_i <beta, x_i>^p`, `"correlation"` for
            `(1/N) sum_i <x_0, x_i>^p <beta, x_i>`.

    Shape:
        - query: `(..., d)`
        - keys: `(..., N, d)`
        - beta: `(d,)`
        - output: `(...)`

    Raises:
        ValueError: Shapes that don't fit, no keys, a power below 1 or an unknown kind.

    Source:
        Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, 2023, the examples of section 3.

    Example:
        >>> query, keys = torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> beta = torch.tensor([0.0, 1.0])
        >>> rfa_target(query, keys, beta, power=2), rfa_target(
        ...     query, keys, beta, power=2, kind="correlation"
        ... )
        (tensor(4.5000), tensor(13.5000))
    """
    check_inputs(query, keys, None)
    check_counts(power=power)
    if beta.shape != query.shape[-1:]:
        raise ValueError(f"beta: expected {tuple(query.shape[-1:])}, got {tuple(beta.shape)}")
    along = keys @ beta
    if kind == "mean":
        return along.pow(power).mean(-1)
    if kind != "correlation":
        raise ValueError(f"kind: expected 'mean' or 'correlation', got {kind!r}")
    similarity = torch.einsum("...d,...nd->...n", query, keys)
    return (similarity.pow(power) * along).mean(-1)


@register(
    paper=168,
    example=lambda: Example(
        {"dim": 4, "num_heads": 6, "out_features": 2},
        (torch.randn(3, 4), torch.randn(3, 5, 4)),
        bad_options={
            "dim": 0,
            "num_heads": 0,
            "out_features": 0,
            "bias_mean": "ones",
            "weight_std": 0.0,
            "activation": "softmax",
        },
    ),
    compare=lambda: Comparison(
        {"dim": 32, "num_heads": 256},
        (
            torch.randn(256, 32),
            torch.randn(256, 64, 32),
        ),
        ("RandomFeatureMLP(num_keys=64, width=8448)",),
    ),
)
class RandomFeatureAttention(RandomFeatureModel):
    """Regress on a query and a set of keys by attention heads with frozen random weights.

    Only the values learn, by `fit` in closed form or by gradient descent. The output does not
    depend on the order of the keys. There is no softmax.

    Args:
        dim: Dimension d of query and keys.
        num_heads: Number of heads M.
        out_features: Number of outputs.
        bias_mean: Mean W_0 of the weights: None for 0, `"identity"` for the identity on the
            coordinates of x and 0 on the constant one, or a tensor `(d + 1, d + 1)`.
        weight_std: Standard deviation of the weights' entries.
        activation: `"relu"`, the paper's, `"gelu"` or `"tanh"`.
        seed: Seed of the weights; by default they come from PyTorch's global generator.
        device: Device of the weights.
        dtype: Type of the weights.

    Shape:
        - query: `(..., d)`
        - keys: `(..., N, d)`
        - mask: `(..., N)`, bool, True for real keys
        - output: `(..., out_features)`
        - weight: `(M, d + 1, d + 1)`, frozen; value: `(M, d + 1, out_features)`, starts at 0

    Returns:
        The outputs, 0 for a row without any real key.

    Raises:
        ValueError: An option out of range, shapes that don't fit, or no keys.

    Source:
        Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, 2023, section 3.

    Example:
        >>> query, keys = torch.randn(200, 4), torch.randn(200, 8, 4)
        >>> layer = RandomFeatureAttention(4, num_heads=100, seed=0)
        >>> y = rfa_target(query, keys, torch.ones(4), power=1)
        >>> bool((layer.fit(query, keys, y)(query, keys)[:, 0] - y).abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_features: int = 1,
        *,
        bias_mean: Literal["identity"] | Tensor | None = None,
        weight_std: float = 0.5,
        activation: Activation = "relu",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_heads=num_heads, out_features=out_features)
        check_std(weight_std)
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {list(_ACTIVATIONS)}, got {activation!r}"
            )
        self.dim, self.num_heads, self.out_features = dim, num_heads, out_features
        self.weight_std, self.activation, self.seed = weight_std, activation, seed
        self._mean = mean_weight(bias_mean, dim)
        self.register_buffer(
            "weight", torch.empty(num_heads, dim + 1, dim + 1, device=device, dtype=dtype)
        )
        self.value = nn.Parameter(
            torch.empty(num_heads, dim + 1, out_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew from N(W_0, weight_std^2), and set the values to 0."""
        with torch.no_grad():
            self.weight.copy_(self.weight_std * self._normal_weight())
            if self._mean is not None:
                self.weight.add_(self._mean.to(self.weight))
        nn.init.zeros_(self.value)

    def features(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features `(..., M, d + 1)` in which the layer is linear, see `rfa_features`."""
        return rfa_features(query, keys, self.weight, mask, activation=self.activation)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.features(query, keys, mask)
        return torch.einsum("...ma,mao->...o", features, self.value.to(features.dtype))

    def extra_repr(self) -> str:
        mean = "" if self._mean is None else ", biased"
        return f"{self.dim}, num_heads={self.num_heads}, out_features={self.out_features}{mean}"


@register(
    paper=168,
    example=lambda: Example(
        {"dim": 4, "num_heads": 6},
        (torch.randn(3, 4), torch.randn(3, 5, 4)),
        bad_options={"num_heads": 0, "weight_std": -1.0},
    ),
    compare=lambda: Comparison(
        {"dim": 32, "num_heads": 256},
        (
            torch.randn(256, 32),
            torch.randn(256, 64, 32),
        ),
        ("RandomFeatureMLP(num_keys=64, width=8448)",),
    ),
)
class BiasedRandomFeatureAttention(RandomFeatureAttention):
    """Random-feature attention whose weights have the identity as their mean.

    It needs fewer samples than zero-mean weights for targets in which the similarity of query and
    key matters.

    Args:
        dim: Dimension d of query and keys.
        num_heads: Number of heads M.
        out_features: Number of outputs.
        weight_std: Standard deviation of the weights' entries around their mean.
        activation: `"relu"`, the paper's, `"gelu"` or `"tanh"`.
        seed: Seed of the weights; by default they come from PyTorch's global generator.
        device: Device of the weights.
        dtype: Type of the weights.

    Shape:
        - as `RandomFeatureAttention`

    Returns:
        The outputs, 0 for a row without any real key.

    Raises:
        ValueError: As `RandomFeatureAttention`.

    Source:
        Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random
        Features Lens, 2023, biased random-feature attention.

    Example:
        >>> layer = BiasedRandomFeatureAttention(2, num_heads=1000, seed=0)
        >>> layer.weight.mean(0).diag()[:2].round()
        tensor([1., 1.])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        out_features: int = 1,
        *,
        weight_std: float = 0.5,
        activation: Activation = "relu",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            out_features,
            bias_mean="identity",
            weight_std=weight_std,
            activation=activation,
            seed=seed,
            device=device,
            dtype=dtype,
        )


def mean_weight(bias_mean: str | Tensor | None, dim: int) -> Tensor | None:
    """The mean W_0, `(d + 1, d + 1)`, or None for 0."""
    if bias_mean is None:
        return None
    if isinstance(bias_mean, Tensor):
        if bias_mean.shape != (dim + 1, dim + 1):
            raise ValueError(
                f"bias_mean: expected ({dim + 1}, {dim + 1}), got {tuple(bias_mean.shape)}"
            )
        return bias_mean.detach().clone()
    if bias_mean != "identity":
        raise ValueError(f"bias_mean: expected None, 'identity' or a tensor, got {bias_mean!r}")
    return torch.diag(torch.tensor([1.0] * dim + [0.0], device="cpu"))


def check_std(weight_std: float) -> None:
    if not 0 < weight_std < math.inf:
        raise ValueError(f"weight_std: expected a finite number above 0, got {weight_std!r}")
