"""AF-KAN: pairs of activations as a basis, reduced by attention before one ordinary linear map.

H.-T. Ta and A. Tran, AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for
Efficient Representation Learning, 2025. With the K pair functions
phi_ij = phi_j(x_i) of `PairBasis`, scaled to [0, 1] (`func_norm`):

    global_attn    s_i = v . phi_i + b,  a = softmax_i(s / max(tau, 1)),   r_i = a_i sum_j phi_ij
    multistep                                                              r_i = v . phi_i + b
    spatial_attn   a = softmax_j(conv(phi)_ij / max(tau, 1)),              r_i = sum_j a_ij phi_ij

    y = W act(norm(r))

so that the weights are those of a linear layer, D O, and not K times as many.

Deviations: the scaling to [0, 1] is over the inputs and functions of each sample; the authors' code
takes the whole batch, so that a sample's output depends on the others (`func_norm="batch"`). Its
division by the norm before has no effect and is left out. Reductions with attention over windows or
over functions, which that code has too, are not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import ACTIVATIONS, check_choice, check_count
from torchzoo.activations.kan import compute_type, in_tiles
from torchzoo.activations.pair_basis import SCALINGS, PairBasis
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

__all__ = ["AFKAN", "AFKANLayer", "PairBasis"]

REDUCTIONS = ("global_attn", "multistep", "spatial_attn")
NORMS = ("layer", "batch", "none")
BRANCH_COMBINES = ("sum", "product", "sum_product", "quadratic")

_UPSTREAM = {
    "phase_low": "basis.low",
    "phase_high": "basis.high",
    "temperature": "temperature",
    "base_weight": "weight",
    "gk_linear.weight": "score.weight",
    "gk_linear.bias": "score.bias",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
}


def _input(width: int) -> tuple[Tensor]:
    return (torch.rand(3, width, generator=torch.Generator().manual_seed(0)),)


@register(
    paper=8,
    example=lambda: Example(
        {"in_features": 5, "out_features": 3},
        _input(5),
        bad_options={
            "in_features": 0,
            "out_features": 0,
            "grid_size": 0,
            "order": -1,
            "activation": "sine",
            "combine": "quad3",
            "reduction": "self_attn",
            "norm": "group",
            "func_norm": "layer",
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 64, "out_features": 64}, (torch.randn(256, 64),), peers.LINEAR
    ),
)
class AFKANLayer(ZooModel):
    """A layer on pairs of activations, whose K functions of an input attention reduces to one.

    Args:
        in_features: Number of inputs D.
        out_features: Number of outputs O.
        grid_size: Cells g of the grid on [0, 1], the range that inputs should have.
        order: Order k; K = g + k pairs.
        activation: softplus, sigmoid, silu, relu, leaky_relu, elu, gelu, selu or tanh; of the
            pairs, and before the weights.
        combine: What a pair becomes: quad1, quad2, sum, prod, sum_prod, cubic1 or cubic2.
        reduction: `"global_attn"`, `"multistep"` or `"spatial_attn"`; several names give a layer
            that has the parameters of all, of which each call takes one, else the first.
        norm: Of the reduced features: `"layer"`, `"batch"` or `"none"`.
        func_norm: Scaling of the functions to [0, 1]: over each `"sample"`, over the whole
            `"batch"` as in the authors' code, or `"none"`.
        train_grid: Whether the pairs' shifts learn.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`
        - output: `(..., O)`
        - weight: `(O, D)`; with global_attn there are D O + 2 D + (K + 1) + 2 K + 1 parameters

    Returns:
        The outputs.

    Raises:
        ValueError: A count out of range, an unknown name (the message lists the known ones), or x
            of another width.

    Source:
        Ta and Tran, AF-KAN, 2025, section 3, and the authors' published
        code.

    Example:
        >>> layer = AFKANLayer(784, 64)
        >>> layer(torch.rand(8, 784)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([8, 64]), 51770)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid_size: int = 5,
        order: int = 3,
        activation: str = "silu",
        combine: str = "quad1",
        reduction: str | Sequence[str] = "global_attn",
        norm: str = "layer",
        func_norm: str = "sample",
        train_grid: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        self.reductions = (reduction,) if isinstance(reduction, str) else tuple(reduction)
        if not self.reductions:
            raise ValueError("reduction: expected at least one name, got none")
        for name in self.reductions:
            check_choice("reduction", name, REDUCTIONS)
        check_choice("norm", norm, NORMS)
        check_choice("func_norm", func_norm, SCALINGS)
        self.in_features, self.out_features, self.func_norm = in_features, out_features, func_norm
        factory = {"device": device, "dtype": dtype}
        self.basis = PairBasis(
            grid_size, order, activation, combine, train_grid=train_grid, device=device, dtype=dtype
        )
        k = self.basis.num_basis
        used = set(self.reductions)
        self.score = nn.Linear(k, 1, **factory) if used - {"spatial_attn"} else None  # type: ignore[arg-type]
        self.conv = None
        if "spatial_attn" in used:
            self.conv = nn.Conv1d(k, k, 3, padding=1, groups=k, **factory)  # type: ignore[arg-type]
        self.temperature: nn.Parameter | None = None
        if used - {"multistep"}:
            self.temperature = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.norm = norms[norm](in_features, **factory) if norm in norms else nn.Identity()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The grid, tau = sqrt(D), and PyTorch's starts of linear, convolution and norm."""
        for module in self.children():
            if isinstance(module, (PairBasis, nn.Linear, nn.Conv1d, nn.LayerNorm, nn.BatchNorm1d)):
                module.reset_parameters()
        if self.temperature is not None:
            nn.init.constant_(self.temperature, math.sqrt(self.in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, reduction: str | None = None) -> Tensor:
        r = self.reduce(x, reduction).to(self.weight.dtype)
        r = self.norm(r.reshape(-1, self.in_features)).reshape(x.shape)
        return F.linear(ACTIVATIONS[self.basis.activation](r), self.weight)

    def reduce(self, x: Tensor, reduction: str | None = None) -> Tensor:
        """The reduced features r of x, both (..., D).

        Args:
            x: Inputs, `(..., D)`.
            reduction: One of the layer's reductions, by default its first.

        Raises:
            ValueError: x of another width, or a reduction that the layer doesn't have.
        """
        reduction = reduction or self.reductions[0]
        check_choice("reduction", reduction, self.reductions)
        if x.ndim == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., {self.in_features}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        function = {
            "global_attn": self._global_attention,
            "multistep": self._multistep,
            "spatial_attn": self._spatial_attention,
        }[reduction]
        rows = compute_type(x).reshape(-1, self.in_features)
        held = self.basis.num_basis * self.in_features
        # rows that act on each other can't be tiled, and the operator has no need of it
        operator = reduction != "spatial_attn" and self.basis.has_operator()
        whole = operator or self.func_norm == "batch"
        return in_tiles(function, rows, held, fused=not whole).reshape(x.shape)

    def _functions(self, x: Tensor) -> Tensor:
        """The scaled pair functions of x (n, D), with the functions first: (n, K, D)."""
        return self.basis.scaled(x, self.func_norm)

    def _multistep(self, x: Tensor) -> Tensor:
        assert self.score is not None
        (mixed,) = self._mixtures(x, self.score.weight).unbind(-2)
        return mixed + self.score.bias

    def _global_attention(self, x: Tensor) -> Tensor:
        assert self.score is not None
        weight = torch.cat([self.score.weight, torch.ones_like(self.score.weight)])
        score, total = self._mixtures(x, weight).unbind(-2)
        weights = ((score + self.score.bias) / self._sharpness()).softmax(-1)  # over the inputs
        return weights * total

    def _spatial_attention(self, x: Tensor) -> Tensor:
        assert self.conv is not None
        phi = self._functions(x)
        weights = (self.conv(phi) / self._sharpness()).softmax(-2)  # over the functions
        return (weights * phi).sum(-2)

    def _mixtures(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of the scaled pair functions of x (n, D), times weights (M, K): (n, M, D)."""
        return self.basis.scaled_mixtures(x, weight, self.func_norm)

    def _sharpness(self) -> Tensor:
        assert self.temperature is not None
        return self.temperature.clamp_min(1)

    def load_all_kan_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of a layer of the authors' published code.

        That layer has weights for every reduction; those which this one doesn't have are left out.
        It scales over the whole batch: build this one with `func_norm="batch"` for equal outputs.

        Args:
            state: The state of that layer.

        Raises:
            ValueError: A name is missing, or a shape differs.
        """
        names = dict(_UPSTREAM) | {f"norm.{key}": f"norm.{key}" for key in self.norm.state_dict()}
        taken = {}
        for theirs, ours in names.items():
            own = self.state_dict().get(ours)
            if own is None:
                continue
            if theirs not in state or state[theirs].shape != own.shape:
                got = tuple(state[theirs].shape) if theirs in state else "nothing"
                raise ValueError(f"state: expected {theirs} of shape {tuple(own.shape)}, got {got}")
            taken[ours] = state[theirs]
        self.load_state_dict(taken)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, reduction={', '.join(self.reductions)}, "
            f"func_norm={self.func_norm!r}"
        )


@register(
    paper=8,
    example=lambda: Example(
        {"widths": (5, 4, 3), "branches": ("global_attn", "spatial_attn")},
        _input(5),
        bad_options={
            "widths": (5,),
            "branches": ("global_attn", "attn"),
            "branch_combine": "mean",
            "grid_size": 0,
        },
    ),
    compare=lambda: Comparison({"widths": (64, 64, 10)}, (torch.randn(256, 64),), peers.MLP),
)
class AFKAN(ZooModel):
    """A network of AF-KAN layers, run once for each of several reductions on the same weights.

    Args:
        widths: Numbers of inputs, hidden units and outputs.
        branches: Reductions; each goes through the whole network as a stream of its own.
        branch_combine: How the streams' outputs become one: `"sum"`, `"product"`, `"sum_product"`
            (their sum and product added) or `"quadratic"` (sum, product and sum of squares added).
        device: Device of the parameters.
        dtype: Type of the parameters.
        **layer: Options of `AFKANLayer`.

    Shape:
        - x: `(..., widths[0])`
        - output: `(..., widths[-1])`

    Returns:
        The outputs.

    Raises:
        ValueError: Fewer than two widths, an unknown name, or what `AFKANLayer` refuses.

    Source:
        Ta and Tran, AF-KAN, 2025, section 3, and the authors' published
        code.

    Example:
        >>> AFKAN((64, 32, 10))(torch.rand(8, 64)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        branches: Sequence[str] = ("global_attn",),
        branch_combine: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: object,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least two numbers, got {tuple(widths)}")
        if not branches or not set(branches) <= set(REDUCTIONS):
            raise ValueError(
                f"branches: expected names out of {', '.join(REDUCTIONS)}, got {tuple(branches)}"
            )
        check_choice("branch_combine", branch_combine, BRANCH_COMBINES)
        self.widths, self.branches = tuple(widths), tuple(branches)
        self.branch_combine = branch_combine
        self.layers = nn.ModuleList(
            AFKANLayer(a, b, reduction=self.branches, device=device, dtype=dtype, **layer)  # type: ignore[arg-type]
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            h = x
            for layer in self.layers:
                h = layer(h, branch)
            outputs.append(h)
        return combine_branches(torch.stack(outputs), self.branch_combine)

    def load_all_kan_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of a network of the authors' published code, layer by layer.

        Args:
            state: The state of that network.

        Raises:
            ValueError: A name is missing, or a shape differs.
        """
        for index, layer in enumerate(self.layers):
            prefix = f"rk_layers.{index}."
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            assert isinstance(layer, AFKANLayer)
            layer.load_all_kan_state_dict(part)

    def extra_repr(self) -> str:
        return f"{self.widths}, branches={self.branches}, branch_combine={self.branch_combine!r}"


def combine_branches(outputs: Tensor, how: str) -> Tensor:
    """Combine the outputs of the streams, `(branches, ...)`, into one; see `AFKAN`."""
    total = outputs.sum(0)
    if how == "sum":
        return total
    product = outputs.prod(0)
    if how == "product":
        return product
    both = total + product
    return both if how == "sum_product" else both + outputs.square().sum(0)
