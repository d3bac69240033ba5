"""Convolutions that compute, for each image, only the filters that a small head predicts to fire.

S. Elkerdawy, M. Elhoushi, H. Zhang and N. Ray, "Fire Together Wire Together: A Dynamic Pruning
Approach with Self-Supervised Mask Prediction", 2022. With out = act(bn(conv(x)) [+ residual]),

    e_c = max over space of |out_c|,   p_c = e_c / sum e               how strongly a filter fires
    target_c = 1 while p, summed from the largest down to p_c, is at most tau
    g = linear(pool(x)),   mask_c = 1[sigmoid(g_c) > 1/2],   y_c = mask_c out_c

The head learns target_c by binary cross-entropy, without a sparsity loss to balance, and sees the
gradient of the task through mask_c as if it were sigmoid(g_c). It is decoupled by default: neither
gradient goes on from the head into x.

Deviations from the authors' code: the strongest filter is kept where it alone has more than tau of
the mass (`min_keep=1`), and an image without any activity keeps that one only; filters that are
masked are not computed (`policy="gather"`), nor are input channels read that are zero everywhere,
whatever made them so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register


def heatmap_mass_mask(out: Tensor, tau: float, *, delta: float = 1e-5, min_keep: int = 1) -> Tensor:
    """Which filters hold the first tau of the mass of an image's activations.

    Args:
        out: Activations of a layer.
        tau: Share of the mass, at most 1. At 1 all but dead filters are kept, those with at most
            `delta` of the mass; below 0 all are.
        delta: Mass by which tau may be exceeded.
        min_keep: Filters that are kept in any case, the strongest.

    Shape:
        - out: `(B, C, H, W)`
        - output: `(B, C)`, bool

    Raises:
        ValueError: tau above 1, or an input that is no image.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the mass criterion.

    Example:
        >>> out = torch.tensor([5.0, 3.0, 1.0, 1.0]).reshape(1, 4, 1, 1)
        >>> heatmap_mass_mask(out, 0.8), heatmap_mass_mask(out, 0.79)
        (tensor([[ True,  True, False, False]]), tensor([[ True, False, False, False]]))
    """
    _check_threshold("tau", "mass", tau)
    heat = _heat(out)
    if tau < 0:
        return torch.ones_like(heat, dtype=torch.bool)
    largest, order = heat.sort(stable=True, dim=-1, descending=True)
    share = largest / heat.sum(-1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    keep = share > delta if tau == 1 else (share.cumsum(-1) - tau <= delta) & (share > 0)
    keep = keep | (torch.arange(heat.shape[-1], device=heat.device) < min_keep)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def uniform_mask(out: Tensor, ratio: float, *, delta: float = 1e-5) -> Tensor:
    """All but an image's weakest filters, the same number for each image, and the dead ones.

    Args:
        out: Activations of a layer.
        ratio: Share of the filters that are dropped, rounded down to a whole number of them.
        delta: A filter is dead where its largest activation is at most this.

    Shape:
        - out: `(B, C, H, W)`
        - output: `(B, C)`, bool

    Raises:
        ValueError: ratio not in [0, 1), or an input that is no image.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the uniform criterion.

    Example:
        >>> out = torch.tensor([5.0, 3.0, 0.0, 1.0]).reshape(1, 4, 1, 1)
        >>> uniform_mask(out, 0.5)
        tensor([[ True,  True, False, False]])
    """
    _check_threshold("ratio", "uniform", ratio)
    heat = _heat(out)
    dropped = math.floor(ratio * heat.shape[-1] + 1e-9)  # so that 0.29 of 100 is 29
    weakest = heat.argsort(stable=True, dim=-1)[..., :dropped]
    return (heat > delta).scatter(-1, weakest, False)


@register(
    paper=43,
    example=lambda: Example(
        {"in_channels": 3, "out_channels": 4, "pool_target": 12, "softmax": True},
        (torch.randn(2, 3, 5, 4),),
        bad_options={"in_channels": 0, "out_channels": 0, "pool_target": 0},
    ),
    exempt={"fixed-rank": "images are (B, C, H, W)"},
    compare="a part of FTWTConv2d, which has peers",
)
class MaskPredictor(ZooModel):
    """The head: average pooling and one linear layer, a logit for each filter.

    Args:
        in_channels: Channels of the images.
        out_channels: Filters.
        pool_target: Features to pool to, about: the images become squares of side
            round(sqrt(pool_target / in_channels)), at least 1. -1: one feature a channel.
        softmax: Softmax over the pooled features.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - x: `(B, in_channels, H, W)`
        - output: `(B, out_channels)`

    Returns:
        Logits; a filter is computed where its logit is above 0.

    Raises:
        ValueError: An option out of its range, or an input of another shape.

    Source:
        Elkerdawy et al., "Fire Together Wire Together", 2022, the mask prediction head.

    Example:
        >>> MaskPredictor(3, 8)(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pool_target: int = -1,
        softmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if pool_target < 1 and pool_target != -1:
            raise ValueError(f"pool_target: expected at least 1, or -1, got {pool_target}")
        self.in_channels = in_channels
        self.softmax = softmax
        self.side = 1 if pool_target == -1 else max(1, round(math.sqrt(pool_target / in_channels)))
        features = in_channels * self.side**2
        self.linear = nn.Linear(features, out_channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Uniform in ±1/√features, as `nn.Linear` starts."""
        self.linear.reset_parameters()

    @property
    def macs(self) -> int:
        """Multiplications for an image, without those of the pooling."""
        return self.linear.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_channels)
        pooled = F.adaptive_avg_pool2d(x, self.side).flatten(1)
        return self.linear(pooled.softmax(-1) if self.softmax else pooled)

    def extra_repr(self) -> str:
        return f"side={self.side}, softmax={self.softmax}"


class GateRecord(NamedTuple):
    """What a layer did in its last call.

    Attributes:
        logits: Of the head, `(B, C_out)`, with their graph.
        target: The filters that fired, `(B, C_out)`, bool.
        mask: The filters that were let through, `(B, C_out)`, bool.
        macs: Multiplications that the masks leave for each image, `(B,)`, without the head's.
        dense: Multiplications of the convolution for an image.
    """

    logits: Tensor
    target: Tensor
    mask: Tensor
    macs: Tensor
    dense: int


@register(
    paper=43,
    # so bright that the sigmoid is flat: finite differences can't see a straight-through gradient
    example=lambda: Example(
        {
            "conv": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1},
            "bn": {"num_features": 4},
        },
        (1e4 * (1 + torch.rand(3, 2, 5, 4)),),
        bad_options={
            "bn": {"num_features": 3},
            "act": "tanh",
            "criterion": "largest",
            "threshold": 1.1,
            "mode": "both",
            "policy": "skip",
        },
    ),
    exempt={"fixed-rank": "images are (B, C, H, W)"},
    compare=lambda: Comparison(
        {
            "conv": {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1},
            "bn": {"num_features": 64},
        },
        (torch.rand(8, 64, 32, 32),),
        {
            "Conv2d, BatchNorm2d, ReLU": lambda conv, bn, **_: nn.Sequential(
                nn.Conv2d(**conv), nn.BatchNorm2d(**bn), nn.ReLU()
            )
        },
    ),
)
class FTWTConv2d(ZooModel):
    """Convolution, batch norm and activation with a mask over the filters for each image.

    Args:
        conv: The convolution, which becomes part of this layer, or keyword arguments for one.
        bn: The batch norm after it, or keyword arguments for one; None: none.
        act: The activation, elementwise; `"relu"`, or None: none.
        criterion: `"mass"` (`heatmap_mass_mask`) or `"uniform"` (`uniform_mask`).
        threshold: Mass that is kept, at most 1; with `"uniform"` the share of filters that is
            dropped, in [0, 1).
        pool_target: Features that the head pools to; see `MaskPredictor`.
        softmax: Softmax over the pooled features.
        mode: `"decoupled"`: no gradient goes from the head to `x`; `"joint"`: it does.
        policy: In evaluation, `"mask"` computes all filters and multiplies by the mask;
            `"gather"` computes, image by image, the predicted filters from the input channels
            that are not zero. It is for few images at a time, and can't be compiled.
        device: Device of what is made here; None: the one of `conv`.
        dtype: Dtype of what is made here; None: the one of `conv`.

    Shape:
        - x: `(B, C_in, H, W)`
        - residual: `(B, C_out, H', W')`, added before the activation, optional
        - output: `(B, C_out, H', W')`

    Attributes:
        gate: What masks the output: `"predicted"`, `"target"` (the filters that fired) or
            `"open"` (nothing).
        logits, target, mask: Of the last call inside `ftwt_recording`, else None.

    Returns:
        The activations, zero for masked filters.

    Raises:
        ValueError: An option out of its range, a batch norm of other features or without running
            statistics, a padding other than zeros, or an input of another shape.

    Source:
        Elkerdawy et al., "Fire Together Wire Together: A Dynamic Pruning Approach with
        Self-Supervised Mask Prediction", 2022.

    Example:
        >>> layer = FTWTConv2d(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), threshold=0.8)
        >>> y = layer(torch.randn(2, 3, 6, 6))
        >>> y.shape, bool((y.amax((2, 3)) == 0).any())
        (torch.Size([2, 8, 6, 6]), True)
    """

    bn: nn.BatchNorm2d | None

    def __init__(
        self,
        conv: nn.Conv2d | Mapping[str, Any],
        bn: nn.BatchNorm2d | Mapping[str, Any] | None = None,
        act: nn.Module | Literal["relu"] | None = "relu",
        *,
        criterion: Literal["mass", "uniform"] = "mass",
        threshold: float = 0.9,
        pool_target: int = -1,
        softmax: bool = False,
        mode: Literal["decoupled", "joint"] = "decoupled",
        policy: Literal["mask", "gather"] = "mask",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _choice("criterion", criterion, ("mass", "uniform"))
        _choice("mode", mode, ("decoupled", "joint"))
        _choice("policy", policy, ("mask", "gather"))
        _check_threshold("threshold", criterion, threshold)
        if not (isinstance(act, nn.Module) or act in ("relu", None)):
            raise ValueError(f"act: expected a module, 'relu' or None, got {act!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(**conv, **factory) if isinstance(conv, Mapping) else conv
        if self.conv.padding_mode != "zeros":
            raise ValueError(f"conv: expected padding by zeros, got {self.conv.padding_mode}")
        weight = self.conv.weight
        factory = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        self.bn = nn.BatchNorm2d(**bn, **factory) if isinstance(bn, Mapping) else bn
        if self.bn is not None and (
            self.bn.num_features != self.conv.out_channels or self.bn.running_mean is None
        ):
            raise ValueError(
                f"bn: expected running statistics of {self.conv.out_channels} features, "
                f"got {self.bn}"
            )
        self.act = nn.ReLU() if act == "relu" else act
        self.predictor = MaskPredictor(
            self.conv.in_channels,
            self.conv.out_channels,
            pool_target=pool_target,
            softmax=softmax,
            **factory,
        )
        self.criterion = criterion
        self.threshold = threshold
        self.mode = mode
        self.policy = policy
        self.gate: Literal["predicted", "target", "open"] = "predicted"
        self.recording = False
        self.record: GateRecord | None = None

    def reset_parameters(self) -> None:
        """Reset convolution, batch norm and head, each as it starts by itself."""
        self.conv.reset_parameters()
        if self.bn is not None:
            self.bn.reset_parameters()
        self.predictor.reset_parameters()

    def set_threshold(self, threshold: float) -> None:
        """Change the threshold that the targets are made with."""
        _check_threshold("threshold", self.criterion, threshold)
        self.threshold = self._zoo_config["threshold"] = threshold

    @property
    def logits(self) -> Tensor | None:
        return None if self.record is None else self.record.logits

    @property
    def target(self) -> Tensor | None:
        return None if self.record is None else self.record.target

    @property
    def mask(self) -> Tensor | None:
        return None if self.record is None else self.record.mask

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        _check_images(x, self.conv.in_channels)
        size = (x.shape[0], self.conv.out_channels, *self.out_size(x))
        if residual is not None and residual.shape != size:
            raise ValueError(f"residual: expected {size}, got {tuple(residual.shape)}")
        logits = self.predictor(x.detach() if self.mode == "decoupled" else x)
        predicted = self.gate == "predicted"
        if self.policy == "gather" and predicted and not (self.training or self.recording):
            return self._gathered(x, residual, logits > 0)
        out = self.dense(x, residual)
        target = self.fires(out) if self.recording or self.gate == "target" else None
        mask = {"predicted": logits > 0, "target": target, "open": torch.ones_like(logits) > 0}[
            self.gate
        ]
        assert mask is not None
        if self.recording:
            assert target is not None
            self.record = GateRecord(logits, target, mask, self._macs(x, mask), self._dense_macs(x))
        factor = mask.to(out.dtype)
        if predicted:  # straight through the threshold; the value is the mask's to the last bit
            soft = torch.sigmoid(logits).to(out.dtype)
            factor = soft - soft.detach() + factor
        return out * factor[..., None, None]

    def dense(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """All filters: act(bn(conv(x)) [+ residual])."""
        out = self.conv(x)
        if self.bn is not None:
            out = self.bn(out)
        if residual is not None:
            out = out + residual
        return out if self.act is None else self.act(out)

    def fires(self, out: Tensor) -> Tensor:
        """The mask that the head is to learn, `(B, C_out)`, bool, from all filters' activations."""
        if self.criterion == "mass":
            return heatmap_mass_mask(out, self.threshold)
        return uniform_mask(out, self.threshold)

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        conv, found = self.conv, []
        if conv.padding == "same":
            return x.shape[-2], x.shape[-1]
        for axis, length in enumerate(x.shape[-2:]):
            padding = 0 if isinstance(conv.padding, str) else conv.padding[axis]
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            found.append((length + 2 * padding - reach - 1) // conv.stride[axis] + 1)
        return found[0], found[1]

    def _gathered(self, x: Tensor, residual: Tensor | None, mask: Tensor) -> Tensor:
        """Compute the filters of the mask and no others, image by image."""
        images = []
        for image, row in enumerate(mask):
            added = None if residual is None else residual[image : image + 1]
            images.append(self._gathered_image(x[image : image + 1], added, row))
        if not images:
            return x.new_zeros(0, self.conv.out_channels, *self.out_size(x))
        return torch.cat(images)

    def _gathered_image(self, x: Tensor, residual: Tensor | None, mask: Tensor) -> Tensor:
        out = x.new_zeros(1, self.conv.out_channels, *self.out_size(x))
        rows = mask.nonzero().squeeze(-1)
        if not len(rows):
            return out
        y = self._gathered_conv(x, rows)
        if self.bn is not None:
            bn = self.bn
            mean, var, weight, bias = (
                None if tensor is None else tensor[rows]
                for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            )
            y = F.batch_norm(y, mean, var, weight, bias, eps=bn.eps)
        if residual is not None:
            y = y + residual[:, rows]
        if self.act is not None:
            y = self.act(y)
        return out.to(y.dtype).index_copy(1, rows, y)

    def _gathered_conv(self, x: Tensor, rows: Tensor) -> Tensor:
        """Some filters of the convolution of one image, from its channels that are not zero."""
        conv = self.conv
        live = _live(x)[0]
        filters, channels = (c // conv.groups for c in (conv.out_channels, conv.in_channels))
        parts = []
        for group in range(conv.groups):
            own = rows[rows // filters == group]
            if not len(own):
                continue
            columns = live[group * channels : (group + 1) * channels].nonzero().squeeze(-1)
            if not len(columns):
                columns = rows.new_zeros(1)  # one channel of zeros, as a convolution needs one
            weight = conv.weight.index_select(0, own).index_select(1, columns)
            bias = None if conv.bias is None else conv.bias[own]
            seen = x.index_select(1, columns + group * channels)
            parts.append(F.conv2d(seen, weight, bias, conv.stride, conv.padding, conv.dilation))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def _macs(self, x: Tensor, mask: Tensor) -> Tensor:
        kept, live = (
            used.unflatten(-1, (self.conv.groups, -1)).sum(-1) for used in (mask, _live(x))
        )
        return (
            (kept * live).sum(-1) * math.prod(self.conv.kernel_size) * math.prod(self.out_size(x))
        )

    def _dense_macs(self, x: Tensor) -> int:
        return self.conv.weight.numel() * math.prod(self.out_size(x))

    def extra_repr(self) -> str:
        return (
            f"criterion={self.criterion!r}, threshold={self.threshold:g}, mode={self.mode!r}, "
            f"policy={self.policy!r}"
        )


def _heat(out: Tensor) -> Tensor:
    if out.ndim != 4:
        raise ValueError(f"out: expected (B, C, H, W), got {tuple(out.shape)}")
    return out.detach().abs().amax((-2, -1)).to(torch.promote_types(out.dtype, torch.float32))


def _live(x: Tensor) -> Tensor:
    """The channels of each image that are not zero everywhere, `(B, C)`, bool."""
    return (x != 0).flatten(-2).any(-1)


def _check_images(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected (B, {channels}, H, W), got {tuple(x.shape)}")


def _check_threshold(name: str, criterion: str, value: float) -> None:
    if criterion == "mass" and not value <= 1:
        raise ValueError(f"{name}: expected at most 1, got {value}")
    if criterion == "uniform" and not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
