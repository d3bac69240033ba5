"""Embeddings of splats from where they are and a code."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register
from torchzoo.splatting import edits

__all__ = ["SplatEmbedding"]


@register(
    paper=63,
    example=lambda: Example(
        {"num": 5, "cond_dim": 3, "latent_dim": 4, "hidden": 6, "frequencies": 2},
        (torch.tensor([[0.1, -0.4, 0.9], [0.7, 0.2, -0.3]]),),
        bad_options={
            "num": -1,
            "cond_dim": 0,
            "latent_dim": 0,
            "hidden": 0,
            "layers": -1,
            "frequencies": -1,
            "anchors": torch.zeros(4, 3),
        },
    ),
    compare="a part of AnimatableScene: a plain network behind an encoding of places",
)
class SplatEmbedding(ZooModel):
    """A network that takes a splat's anchor and a code to its embedding.

    An anchor p comes as itself and as `sin(2^k pi p)` and `cos(2^k pi p)` of each coordinate, for
    k from 0. Anchors don't learn. They have one row for each splat; `keep` and `duplicate` edit
    them, and `load_state_dict` takes over their number.

    Args:
        num: Number N of splats.
        cond_dim: Size e of the code.
        latent_dim: Size d of the embeddings.
        anchors: Where the splats are at rest, `(N, 3)`; None: anywhere in the cube from -1 to 1.
        hidden: Width of the hidden layers.
        layers: Number of hidden layers, each with ReLU.
        frequencies: Number of values of k.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - cond: `(..., e)`
        - output: `(..., N, d)`

    Attributes:
        anchors: `(N, 3)`.

    Returns:
        The embeddings.

    Raises:
        ValueError: A size out of its range, or inputs of the wrong shape.

    Source:
        Mildenhall et al., "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis",
        2020, equation 4, for the encoding.

    Example:
        >>> embed = SplatEmbedding(100, cond_dim=6, latent_dim=8)
        >>> embed(torch.randn(2, 6)).shape
        torch.Size([2, 100, 8])
    """

    anchors: nn.Parameter

    keep = edits.keep
    duplicate = edits.clone

    def __init__(
        self,
        num: int,
        cond_dim: int,
        latent_dim: int,
        *,
        anchors: Tensor | None = None,
        hidden: int = 64,
        layers: int = 2,
        frequencies: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num", num, 0),
            ("cond_dim", cond_dim, 1),
            ("latent_dim", latent_dim, 1),
            ("hidden", hidden, 1),
            ("layers", layers, 0),
            ("frequencies", frequencies, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        if anchors is not None and anchors.shape != (num, 3):
            raise ValueError(f"anchors: got {tuple(anchors.shape)}, expected {(num, 3)}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cond_dim, self.frequencies = cond_dim, frequencies
        self.anchors = nn.Parameter(torch.empty(num, 3, **factory), requires_grad=False)
        widths = [3 * (1 + 2 * frequencies) + cond_dim, *[hidden] * layers]
        inner = [
            part
            for before, after in itertools.pairwise(widths)
            for part in (nn.Linear(before, after, **factory), nn.ReLU())
        ]
        self.network = nn.Sequential(*inner, nn.Linear(widths[-1], latent_dim, **factory))
        self.reset_parameters(anchors)
        if "anchors" in self._zoo_config:  # saved as a parameter
            self._zoo_config["anchors"] = None

    @torch.no_grad()
    def reset_parameters(self, anchors: Tensor | None = None) -> None:
        """Torch's own network; anchors as given, or drawn."""
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        if anchors is None:
            self.anchors.uniform_(-1, 1)
        else:
            self.anchors.copy_(anchors)

    def encoded(self) -> Tensor:
        """What the network sees of the anchors, `(N, 3 + 6 frequencies)`."""
        waves = [
            wave(2**k * torch.pi * self.anchors)
            for k in range(self.frequencies)
            for wave in (torch.sin, torch.cos)
        ]
        return torch.cat([self.anchors, *waves], -1)

    def forward(self, cond: Tensor) -> Tensor:
        """Embeddings `(..., N, d)` for codes `(..., e)`."""
        if cond.dim() < 1 or cond.shape[-1] != self.cond_dim:
            raise ValueError(f"cond: got {tuple(cond.shape)}, expected (..., {self.cond_dim})")
        lead, places = cond.shape[:-1], self.encoded()
        codes = cond[..., None, :].expand(*lead, len(places), -1)
        found: Tensor = self.network(
            torch.cat([places.expand(*lead, *places.shape), codes.to(places.dtype)], -1)
        )
        return found

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over the number of anchors, then load."""
        edits.adopt_size(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _note_size(self) -> None:
        """Let the saved config say how many splats there are now."""
        if "num" in self._zoo_config:
            self._zoo_config["num"] = len(self.anchors)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.anchors)}, cond_dim={self.cond_dim}, frequencies={self.frequencies}"
