"""Scenes whose splats move, turn, grow and change colour with a code.

G. Serifi and M. C. Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
Animatable Face Avatars", 2025. From a code e, such as the expression of a face, a network makes an
embedding z_n of each splat; each attribute gets the offset that its `HyperGaussian` expects given
z_n:

    mu = mu_n + E[position | z_n],    q = (q_n + E[rotation | z_n]) / its length,
    s = exp(log s_n + E[scale | z_n])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import _config
from torchzoo.hub import ZooModel
from torchzoo.ops import RasterOutput
from torchzoo.registry import Example, register
from torchzoo.splatting import edits
from torchzoo.splatting.hyper import HyperGaussian
from torchzoo.splatting.hyper_embedding import SplatEmbedding
from torchzoo.splatting.outputs import joined
from torchzoo.splatting.scene import GaussianScene

if TYPE_CHECKING:
    from torchzoo.splatting.cameras import Cameras

__all__ = ["AnimatableScene", "HyperGaussianHead"]

ATTRIBUTES = {"position": 3, "rotation": 4, "scale": 3, "opacity": 1, "color": 3}
"""What a head may give offsets of, and how many numbers each has."""


@register(
    paper=63,
    example=lambda: Example(
        {"num": 5, "latent_dim": 4, "opacity": True, "color": True},
        (torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"num": -1, "latent_dim": 0},
    ),
    exempt={"fixed-rank": "the axis before the last is a batch, or the items, by the rank"},
    compare="a part of AnimatableScene; its rivals are measured in the paper's experiment",
)
class HyperGaussianHead(ZooModel):
    """Offsets of splats' attributes from embeddings: a `HyperGaussian` for each attribute.

    It takes the place of the linear layer with which a deformation network ends. At first all
    offsets are 0. Offsets are added to what a `GaussianScene` stores: to quaternions before they
    are normalised, to logarithms of scales, to logits of opacities, to harmonics of degree 0.

    Args:
        num: Number N of splats.
        latent_dim: Size d of the embeddings.
        position: Whether places get offsets, of 3 numbers.
        rotation: Whether rotations do, of 4.
        scale: Whether scales do, of 3.
        opacity: Whether opacities do, of 1.
        color: Whether colours do, of 3.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - z: `(d,)`, `(B, d)` or `(B, N, d)`; with `per_item` `(..., N, d)`
        - outputs: those of `HyperGaussian` as `mean`

    Attributes:
        parts: The `HyperGaussian` of each attribute, by the names of the options.

    Returns:
        Offsets by the names of the options.

    Raises:
        ValueError: A size out of its range, no attribute, or inputs of the wrong shape.

    Source:
        Serifi and Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
        Animatable Face Avatars", 2025, its use in a model of avatars.

    Example:
        >>> head = HyperGaussianHead(100, latent_dim=8)
        >>> {name: tuple(offset.shape) for name, offset in head(torch.randn(2, 100, 8)).items()}
        {'position': (2, 100, 3), 'rotation': (2, 100, 4), 'scale': (2, 100, 3)}
    """

    def __init__(
        self,
        num: int,
        latent_dim: int,
        *,
        position: bool = True,
        rotation: bool = True,
        scale: bool = True,
        opacity: bool = False,
        color: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wanted = dict(zip(ATTRIBUTES, (position, rotation, scale, opacity, color), strict=True))
        if not any(wanted.values()):
            raise ValueError(f"position: got no attribute at all, expected one of {[*ATTRIBUTES]}")
        self.parts = nn.ModuleDict(
            {
                name: HyperGaussian(num, latent_dim, size, device=device, dtype=dtype)
                for name, size in ATTRIBUTES.items()
                if wanted[name]
            }
        )
        self.register_load_state_dict_post_hook(_note_size)

    def reset_parameters(self) -> None:
        """No offsets."""
        for part in self._parts():
            part.reset_parameters()

    @property
    def num(self) -> int:
        """N."""
        return self._parts()[0].num

    def forward(self, z: Tensor, *, per_item: bool = False) -> dict[str, Tensor]:
        """Offsets given embeddings, which are as in `HyperGaussian.forward`."""
        found = zip(self.parts, self._parts(), strict=True)
        return {name: part.conditional_mean(z, per_item=per_item) for name, part in found}

    def keep(self, rows: Tensor, optimizers: edits.Optimizers = ()) -> None:
        """Keep some splats, as `HyperGaussian.keep` does."""
        for part in self._parts():
            part.keep(rows, optimizers)
        self._note_size()

    def duplicate(self, rows: Tensor, optimizers: edits.Optimizers = ()) -> None:
        """Append copies of some splats, as `HyperGaussian.duplicate` does."""
        for part in self._parts():
            part.duplicate(rows, optimizers)
        self._note_size()

    def _parts(self) -> list[HyperGaussian]:
        return [part for part in self.parts.values() if isinstance(part, HyperGaussian)]

    def _note_size(self) -> None:
        """Let the saved config say how many splats there are now."""
        if "num" in self._zoo_config:
            self._zoo_config["num"] = self.num


def _note_size(module: Any, _: Any) -> None:
    """Called after a state was loaded, perhaps one of another number of splats."""
    module._note_size()


def _scene_example() -> Example:
    embed = SplatEmbedding(5, 2, 3, hidden=4, layers=1, frequencies=1)
    return Example(
        {
            "base": GaussianScene(5, sh_degree=1),
            "embed": embed,
            "head": HyperGaussianHead(5, 3, opacity=True, color=True),
        },
        (torch.tensor([[0.5, -0.2], [0.1, 0.9]]),),
        batch_dims=0,  # outputs are a list, one for each code
        bad_options={"head": HyperGaussianHead(4, 3)},
    )


@register(
    paper=63,
    example=_scene_example,
    compare="a scene that follows a code; its rivals are measured in the paper's experiment",
)
class AnimatableScene(ZooModel):
    """A scene of Gaussians that follows a code.

    Args:
        base: The scene at rest.
        embed: Takes codes `(B, e)` to embeddings `(B, N, d)`, or `(B, d)` for all splats alike.
        head: Takes embeddings to offsets `(B, N, size)` by name; the names are those of
            `HyperGaussianHead`.

    Shape:
        - cond: `(B, e)`
        - means, scales: `(N, 3)` of each code
        - quats: `(N, 4)`
        - opacities: `(N,)`
        - features: `(N, K, 3)`

    Returns:
        For each code what `torchzoo.ops.rasterize` takes, by its names; `features` are the
        coefficients of the harmonics of the base's degree.

    Raises:
        ValueError: A head for another number of splats, codes of the wrong shape, or offsets of an
            unknown name or the wrong shape.

    Source:
        Serifi and Bühler, "HyperGaussians: High-Dimensional Gaussian Splatting for High-Fidelity
        Animatable Face Avatars", 2025.

    Example:
        >>> from torchzoo.splatting import Cameras
        >>> base = GaussianScene.from_points(torch.randn(50, 3), torch.rand(50, 3))
        >>> embed = SplatEmbedding(50, 6, 8, anchors=base.means.detach())
        >>> scene = AnimatableScene(base, embed, HyperGaussianHead(50, 8))
        >>> cameras = Cameras.orbit(3, radius=4.0, width=32, height=24)
        >>> scene.render(cameras, torch.zeros(6)).image.shape
        torch.Size([3, 24, 32, 3])
    """

    def __init__(self, base: GaussianScene, embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if isinstance(head, HyperGaussianHead) and head.num != base.num_gaussians:
            got, expected = head.num, base.num_gaussians
            raise ValueError(f"head: got num={got}, expected {expected} as base has splats")
        self.base, self.embed, self.head = base, embed, head
        self.register_load_state_dict_post_hook(_note_size)

    def forward(self, cond: Tensor) -> list[dict[str, Tensor]]:
        """What to render for each of B codes; see the class."""
        if cond.dim() != 2:
            raise ValueError(f"cond: got {tuple(cond.shape)}, expected (B, e)")
        offsets = self.head(self.embed(cond))
        self._check(offsets, len(cond))
        base, count = self.base, self.base.num_gaussians
        full = {
            name: offsets.get(name, base.means.new_zeros(len(cond), count, size))
            for name, size in ATTRIBUTES.items()
        }
        sh0 = base.sh0 + full["color"][:, :, None]
        splats = {
            "means": base.means + full["position"],
            "quats": F.normalize(base.quats + full["rotation"], dim=-1),
            "scales": (base.log_scales + full["scale"]).exp(),
            "opacities": (base.opacity_logits + full["opacity"].squeeze(-1)).sigmoid(),
            "features": torch.cat([sh0, base.shN.expand(len(cond), *base.shN.shape)], 2),
        }
        return [{name: rows[b] for name, rows in splats.items()} for b in range(len(cond))]

    def _check(self, offsets: Mapping[str, Tensor], codes: int) -> None:
        for name, offset in offsets.items():
            if name not in ATTRIBUTES:
                raise ValueError(f"head: got offsets of {name!r}, expected {[*ATTRIBUTES]}")
            expected = (codes, self.base.num_gaussians, ATTRIBUTES[name])
            if offset.shape != expected:
                got = tuple(offset.shape)
                raise ValueError(f"head: got {name} offsets of shape {got}, expected {expected}")

    def render(self, cameras: Cameras, cond: Tensor, **options: Any) -> RasterOutput:
        """Pictures of the scene under a code for all cameras, or one for each.

        Args:
            cameras: C cameras.
            cond: Codes, `(e,)` or `(C, e)`.
            **options: Those of `GaussianScene.render`.

        Returns:
            What `torchzoo.ops.rasterize` returns, for the C cameras. With a code for each camera,
            `info["means2d"]` gets no gradient.

        Raises:
            ValueError: `cond` of another shape.
        """
        options = {"sh_degree": self.base.sh_degree} | options
        if cond.dim() == 1:
            (splats,) = self(cond[None])
            return self.base.render(cameras, **splats | options)
        if cond.dim() != 2 or len(cond) != len(cameras):
            got, count = tuple(cond.shape), len(cameras)
            raise ValueError(f"cond: got {got}, expected (e,) or (C, e) with C={count}")
        shown = zip(cameras, self(cond), strict=True)
        return joined([self.base.render(camera, **splats | options) for camera, splats in shown])

    def keep(self, rows: Tensor, optimizers: edits.Optimizers = ()) -> None:
        """Keep some splats, in the scene, the head and, where it has them, the embedding.

        Args:
            rows: A mask `(N,)` or indices `(M,)`.
            optimizers: Those that hold the parameters.
        """
        self.base.keep(rows, optimizers)
        for part in (self.head, self.embed):
            if callable(keep := getattr(part, "keep", None)):
                keep(rows, optimizers)
        self._note_size()

    def duplicate(self, rows: Tensor, optimizers: edits.Optimizers = ()) -> None:
        """Append copies of some splats, likewise."""
        self.base.clone(rows, optimizers)
        for part in (self.head, self.embed):
            if callable(duplicate := getattr(part, "duplicate", None)):
                duplicate(rows, optimizers)
        self._note_size()

    def _note_size(self) -> None:
        """Let the saved config say how many splats the parts have now."""
        for name in ("base", "embed", "head"):
            if name in self._zoo_config:
                self._zoo_config[name] = _config.encode(getattr(self, name))
