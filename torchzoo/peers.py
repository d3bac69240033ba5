"""What layers of the zoo compete with: torch's layers for the same job, built from their arguments.

Cards name them for `torchzoo bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Peers = Mapping[str, Callable[..., nn.Module]]

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


FEED_FORWARD: Peers = {"Linear, ReLU, Linear": feed_forward}
