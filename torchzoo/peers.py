"""What layers of the zoo compete with: torch's layers for the same job, built from their arguments.

Cards name them for `torchzoo bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Peers = Mapping[str, Callable[..., nn.Module]]

BASES = ("BSplineBasis(grid_size=5)",)
"""Eight functions of each input."""
BOUNDED = ("torch.nn.ReLU6", "torch.nn.ReLU")
ACTIVATIONS: Peers = {
    "ReLU": lambda **_: nn.ReLU(),
    "GELU": lambda **_: nn.GELU(),
    "SiLU": lambda **_: nn.SiLU(),
}
NORM_ACTIVATIONS: Peers = {
    "BatchNorm2d, ReLU": lambda num_features, **_: nn.Sequential(
        nn.BatchNorm2d(num_features), nn.ReLU()
    ),
    "GroupNorm, SiLU": lambda num_features, **_: nn.Sequential(
        nn.GroupNorm(min(32, num_features), num_features), nn.SiLU()
    ),
}
LINEAR: Peers = {
    "Linear": lambda in_features, out_features, **_: nn.Linear(in_features, out_features)
}
"""Maps features to features."""
HEADS: Peers = {"Linear": lambda in_features, num_classes, **_: nn.Linear(in_features, num_classes)}
SEGMENTS: Peers = {"Linear": lambda n, num_segments, **_: nn.Linear(n, num_segments)}
CONVOLUTION: Peers = {
    "Conv2d": lambda in_channels, out_channels, kernel_size, padding, **_: nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=padding
    )
}
SEQUENCES: Peers = {
    "LSTM": lambda **kwargs: nn.LSTM(_width(kwargs), _width(kwargs), batch_first=True),
    "TransformerEncoderLayer": lambda **kwargs: nn.TransformerEncoderLayer(
        _width(kwargs), 8, 4 * _width(kwargs), dropout=0.0, batch_first=True, norm_first=True
    ),
}
"""Map sequences `(N, L, D)` to sequences."""


def _width(kwargs: Mapping[str, Any]) -> int:
    return int(kwargs["d_model"] if "d_model" in kwargs else kwargs["dim"])


def feed_forward(dim: int, hidden_dim: int, **_: Any) -> nn.Module:
    """The plain network that sparse ones replace."""
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))


class SelfAttention(nn.Module):
    """Softmax attention of a sequence to itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


SELF_ATTENTION: Peers = {
    "MultiheadAttention": lambda dim, num_heads=8, **_: SelfAttention(dim, num_heads)
}


class LastState(nn.Module):
    """Recurrent layers and a linear head on the last step."""

    def __init__(self, d_input: int, d_output: int, d_model: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.LSTM(d_input, d_model, depth, batch_first=True)
        self.head = nn.Linear(d_model, d_output)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[0][:, -1])
        return logits


SEQUENCE_MODELS: Peers = {"LSTM": LastState}


class ExpertLoop(nn.Module):
    """Experts called one after the other, each on its own rows."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(feed_forward(dim, hidden_dim) for _ in range(num_experts))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        groups = x.tensor_split(offs[:-1].long().cpu())
        return torch.cat([f(rows) for f, rows in zip(self.experts, groups, strict=True)])


EXPERTS: Peers = {"loop over experts": ExpertLoop}


def one_view() -> tuple[Tensor, Tensor]:
    """Extrinsics and intrinsics of a camera 3 units before the origin, for 128 x 96 pixels."""
    view = torch.eye(4)
    view[2, 3] = 3.0
    return view[None], torch.tensor([[[100.0, 0, 64], [0, 100, 48], [0, 0, 1]]])


def _mlp(widths: Sequence[int], **_: Any) -> nn.Module:
    from torchvision.ops import MLP as Perceptron

    return Perceptron(widths[0], list(widths[1:]))


MLP: Peers = {"MLP": _mlp}
FEED_FORWARD: Peers = {"Linear, ReLU, Linear": feed_forward}
