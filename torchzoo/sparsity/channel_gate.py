"""Convolutions that compute, for each image, only the filters that a small head predicts to fire.

S. Elkerdawy, M. Elhoushi, H. Zhang and N. Ray, "Fire Together Wire Together: A Dynamic Pruning
Approach with Self-Supervised Mask Prediction", 2022. With out = act(bn(conv(x)) [+ residual]),

    target = the filters that fire, as `channel_masks` finds them
    g = linear(pool(x)),   mask_c = 1[sigmoid(g_c) > 1/2],   y_c = mask_c out_c

The head learns target_c by binary cross-entropy, without a sparsity loss to balance, and sees the
gradient of the task through mask_c as if it were sigmoid(g_c). It is decoupled by default: neither
gradient goes on from the head into x.

Deviations from the authors' code: filters that are masked are not computed (`policy="gather"`), nor
are input channels read that are zero everywhere, whatever made them so.
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
from torchzoo.sparsity.channel_masks import check_threshold, heatmap_mass_mask, uniform_mask
from torchzoo.sparsity.mask_predictor import MaskPredictor, check_images


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
        check_threshold("threshold", criterion, threshold)
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
        check_threshold("threshold", self.criterion, threshold)
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
        check_images(x, self.conv.in_channels)
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


def _live(x: Tensor) -> Tensor:
    """The channels of each image that are not zero everywhere, `(B, C)`, bool."""
    return (x != 0).flatten(-2).any(-1)


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
