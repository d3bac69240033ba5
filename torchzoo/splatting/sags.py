"""Scenes whose splats are decoded from points that know their surroundings.

E. Ververas, R. A. Potamias, J. Song, J. Deng and S. Zafeiriou, "SAGS: Structure-Aware 3D Gaussian
Splatting", 2024; several unrelated methods have the same initials. Points p are where they were
found and never move. From the code c of a point (`StructureAwareEncoder`) and the unit vector d and
distance r to it from the camera, small networks decode its splat:

    mu = p + exp(l) D(c),      e = (c, d, r),
    o = max(0, tanh O(e)),   colour = sigmoid(C(e)),
    s = exp(l') sigmoid(S(e)),   q = Q(e) / norm(Q(e)),

with three log scales l and three l' of its own for each point. The lite scene stores some points
only. Midpoints of its neighbours, with the mean of their codes, are made when it is drawn.

Deviations: codes are those of the whole graph, which makes places the same for all cameras; the
authors' code encodes the part of it that a camera sees. Voxels are replaced by the mean of their
points. All splats begin with an opacity of 0.1: where a network that is drawn at random hides all
of them, as it may, no gradient would bring them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import ops, peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting import sags_file
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.outputs import joined
from torchzoo.splatting.rotations import matrix_to_quat, quat_to_matrix
from torchzoo.splatting.sags_encoder import StructureAwareEncoder, knn_edges
from torchzoo.splatting.sags_points import curvature_densify, voxel_means
from torchzoo.splatting.scene import SH_C0, GaussianScene
from torchzoo.splatting.scene import _example as _plain_example

if TYPE_CHECKING:
    from torchzoo.ops import RasterOutput

__all__ = ["SAGS_RATES", "SAGSScene", "SAGSView"]

_OPACITY = 0.1
"""Of all splats at first."""

SAGS_RATES = {
    "features": 7.5e-3,
    "log_scales": 7e-3,
    "encoder": 5e-3,
    "displacement": 5e-3,
    "opacity": 2e-3,
    "color": 8e-3,
    "covariance": 4e-3,
}
"""Learning rates for `SplatTrainer`: those that the authors' code starts with."""


class SAGSView(NamedTuple):
    """N splats as C cameras see them.

    Attributes:
        means: `(N, 3)`, the same for all.
        quats: `(C, N, 4)`, of length one.
        scales: `(C, N, 3)`.
        opacities: `(C, N)`, 0 for what a camera does not see.
        colors: `(C, N, 3)`, from 0 to 1.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor


def _example() -> Example:
    plain = _plain_example()
    encoder = StructureAwareEncoder(4, k=3, levels=1, log2_table=6)
    return Example(
        {
            "num_gaussians": 10,
            "image_size": (8, 12),
            "encoder": encoder,
            "feature_std": 1.0,  # where all features are 0, maxima have no gradient
        },
        plain.inputs,
        bad_options={"num_gaussians": 2, "image_size": (0, 8), "feature_std": -1.0},
    )


def _comparison() -> Comparison:
    size = {"num_gaussians": 2000, "image_size": (96, 128)}
    return Comparison(size, peers.one_view(), ("GaussianScene",))


@register(paper=134, example=_example, compare=_comparison)
class SAGSScene(GaussianScene):
    """N fixed points whose splats a graph network and four small networks decode.

    `SplatTrainer(scene, ..., rates=SAGS_RATES)` trains it, without a strategy. Of the edits there
    are `keep`, `clone` and `append`, after which the graph is made anew when it is next needed;
    who changes `means` otherwise calls `connect`. `bake` makes a plain scene for files and viewers.

    Args:
        num_gaussians: N at first.
        encoder: Makes the codes; hidden layers are as wide as its features. None: the default.
        feature_std: Standard deviation of the features at first.
        image_size: Height and width of the pictures that `forward` makes.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Attributes:
        means: `(N, 3)`, the points, which get no gradient.
        features: `(N, D)`.
        log_scales: `(N, 6)`, three for the displacement and three for the covariance.
        edges: `(2, E)`, the graph.
        encoder: The `StructureAwareEncoder`.
        displacement: The linear network D.
        opacity: The network O.
        color: The network C.
        covariance: The network of S, its first three outputs, and Q.

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size out of its range, fewer points than the encoder has neighbours, or
            inputs of the wrong shape.

    Source:
        Ververas et al., "SAGS: Structure-Aware 3D Gaussian Splatting", 2024, and sizes and rates
        of the authors' code.

    Example:
        >>> scene = SAGSScene.from_points(torch.randn(50, 3))
        >>> cameras = Cameras.orbit(2, radius=4.0, width=32, height=24)
        >>> scene.render(cameras).image.shape, scene.num_gaussians > 50
        (torch.Size([2, 24, 32, 3]), True)
    """

    features: nn.Parameter
    edges: Tensor

    def __init__(
        self,
        num_gaussians: int,
        *,
        encoder: StructureAwareEncoder | None = None,
        feature_std: float = 0.0,
        image_size: Sequence[int] = (64, 64),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        encoder = encoder or StructureAwareEncoder(**factory)
        dim, code = encoder.dim, encoder.code_dim
        super().__init__(
            num_gaussians, sh_degree=0, num_features=dim, image_size=image_size, **factory
        )
        if num_gaussians < encoder.k:
            expected = f"at least {encoder.k} as the encoder has neighbours"
            raise ValueError(f"num_gaussians: got {num_gaussians}, expected {expected}")
        if not feature_std >= 0:
            raise ValueError(f"feature_std: got {feature_std}, expected at least 0")
        for name in ("quats", "opacity_logits", "sh0", "shN"):
            delattr(self, name)
        self.means.requires_grad_(False)
        self.log_scales = nn.Parameter(torch.empty(num_gaussians, 6, **factory))
        self.feature_std, self.encoder = feature_std, encoder
        self.displacement = nn.Sequential(
            nn.Linear(code, 2 * dim, **factory), nn.Linear(2 * dim, 3, **factory)
        )
        self.opacity = _network(code + 4, dim, 1, factory)
        self.color = _network(code + 4, dim, 3, factory)
        self.covariance = _network(code + 4, dim, 7, factory)
        edges = torch.empty(2, 0, dtype=torch.int64, device=self.means.device)
        self.register_buffer("edges", edges, persistent=False)
        self.start(torch.empty_like(self.means).uniform_(-1, 1))
        self.register_load_state_dict_post_hook(_reconnect)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Points spread evenly over the cube from -1 to 1, and all else as at first."""
        if "encoder" in self._modules:  # the base class calls this before it is there
            self.encoder.reset_parameters()
            self.start(torch.empty_like(self.means).uniform_(-1, 1))

    @torch.no_grad()
    def start(self, points: Tensor) -> None:
        """Begin at `(N, 3)` points, with scales of the distance to the nearest other."""
        self.means.copy_(points)
        self.features.normal_(0, self.feature_std)
        for network in (self.displacement, self.opacity, self.color, self.covariance):
            for layer in network:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        last = self.opacity[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.atanh(_OPACITY))
        self.log_scales.zero_()
        if len(points) > 1 and not points.is_meta:
            nearest, _ = ops.knn(points, points, 1, exclude_self=True)
            self.log_scales.copy_(nearest.square().clamp_min(1e-7).log() / 2)
        self.connect()

    @torch.no_grad()
    def connect(self) -> None:
        """Make the graph of the points as they are now."""
        k = self.encoder.k
        if self.means.is_meta:
            self.edges = self.edges.new_empty(2, k * self.num_gaussians)
        else:
            self.edges = knn_edges(self.means, k)

    @classmethod
    def from_points(  # type: ignore[override]
        cls,
        points: Tensor,
        *,
        densify: bool = True,
        lite: bool = False,
        feat_dim: int = 32,
        voxel_size: float = 0.0,
        encoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SAGSScene:
        """A scene that begins at points.

        Args:
            points: `(P, 3)`.
            densify: Whether to add the midpoints of `curvature_densify`.
            lite: Whether the midpoints are not stored, which is what a `SAGSLite` does.
            feat_dim: Features of a point.
            voxel_size: Side of the voxels in which points are merged first; 0: the median distance
                to the nearest other.
            encoder: Further options of the `StructureAwareEncoder`.
            **options: Those of the constructor.

        Raises:
            ValueError: Points that are not `(P, 3)`, not finite or too few, an option out of its
                range, or `lite` without `densify`.
        """
        if lite and not densify:
            raise ValueError("densify: got False with lite=True, expected True")
        factory: dict[str, Any] = {"device": points.device, "dtype": points.dtype, **options}
        made = StructureAwareEncoder(
            feat_dim, **{key: factory[key] for key in ("device", "dtype")} | dict(encoder or {})
        )
        knn_edges(points, made.k)  # refuses what can't be points
        points = voxel_means(points, voxel_size)
        if densify and not lite:
            points, _ = curvature_densify(points)
        scene = (_lite() if lite else cls)(len(points), encoder=made, **factory)
        scene.start(points)
        return scene

    def decode(self, cameras: Cameras) -> SAGSView:
        """The splats as cameras see them."""
        points, codes, log_scales = self._nodes()
        ways = points - cameras.centers[:, None].to(points)
        distance = ways.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        many = codes.expand(len(ways), *codes.shape)
        inputs = torch.cat([many, ways / distance, distance], -1)
        offset_scales, scales = log_scales.exp().split(3, -1)
        shape = self.covariance(inputs).to(points)
        return SAGSView(
            points + offset_scales * self.displacement(codes).to(points),
            F.normalize(shape[..., 3:], dim=-1),
            scales * shape[..., :3].sigmoid(),
            self.opacity(inputs).to(points).squeeze(-1).tanh().clamp_min(0),
            self.color(inputs).to(points).sigmoid(),
        )

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points, codes and log scales of the splats."""
        if not self.edges.shape[1]:
            self.connect()
        return self.means, self.encoder(self.means, self.features, self.edges), self.log_scales

    def render(self, cameras: Cameras, **options: Any) -> RasterOutput:
        """Pictures of the scene.

        Args:
            cameras: Where from.
            **options: Those of `torchzoo.ops.rasterize`, the same for all cameras.

        Returns:
            What `rasterize` returns; the picture is `.image`, `(C, H, W, 3)`.
        """
        view = self.decode(cameras)
        if not len(cameras):  # any splats will do
            blank = [rows.new_ones(rows.shape[1:]) for rows in view[1:]]
            return _drawn(cameras, [view.means, *blank], options)
        each = zip(cameras, *view[1:], strict=True)
        outputs = [_drawn(camera, [view.means, *rows], options) for camera, *rows in each]
        return outputs[0] if len(outputs) == 1 else joined(outputs)

    @torch.no_grad()
    def bake(self, cameras: Cameras) -> GaussianScene:
        """A plain scene, of degree 0, that looks to all cameras much as this one does.

        A splat's opacity is its mean over the cameras, its colour and covariance are means weighted
        by opacity; what none of them sees is left out. For one camera pictures are the same.

        Raises:
            ValueError: There is no camera.
        """
        if not len(cameras):
            raise ValueError("cameras: got none, expected at least one")
        view = self.decode(cameras)
        total = view.opacities.sum(0)
        seen = total > 0
        weights = (view.opacities[:, seen] / total[seen])[..., None]
        half = quat_to_matrix(view.quats[:, seen]) * view.scales[:, seen, None]
        covariances = (weights[..., None] * (half @ half.mT)).sum(0).double()
        squares, axes = torch.linalg.eigh(covariances)
        axes = axes * torch.linalg.det(axes).sign()[:, None, None]
        colors = (weights * view.colors[:, seen]).sum(0)
        return GaussianScene.from_tensors(
            view.means[seen],
            matrix_to_quat(axes).to(colors),
            (squares.clamp_min(1e-20).log() / 2).to(colors),
            view.opacities.mean(0)[seen].logit(eps=1e-6),
            ((colors - 0.5) / SH_C0)[:, None],
            image_size=self.image_size,
        )

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float16) -> int:
        """Write what is stored, points, features and networks, to one safetensors file.

        Args:
            path: The file.
            dtype: Type of the numbers in it.

        Returns:
            Bytes of the file.

        Raises:
            TorchzooError: The file can't be written.
        """
        return sags_file.write(path, self, dtype)

    @classmethod
    def load(cls, path: str | Path) -> SAGSScene:
        """The scene in a file, in float32 on the CPU.

        Raises:
            ValueError: It is no such file, or damaged.
            OSError: The file can't be read.
        """
        return sags_file.read(path)

    def _note_size(self) -> None:
        super()._note_size()
        self.edges = self.edges.new_empty(2, 0)  # of other points


def _network(width: int, hidden: int, out: int, factory: Mapping[str, Any]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden, **factory),
        nn.ReLU(),
        nn.Linear(hidden, hidden, **factory),
        nn.ReLU(),
        nn.Linear(hidden, out, **factory),
    )


def _drawn(cameras: Cameras, splats: Sequence[Tensor], options: Mapping[str, Any]) -> RasterOutput:
    names = ("means", "quats", "scales", "opacities", "features")
    seen: dict[str, Any] = {
        "viewmats": cameras.viewmats,
        "Ks": cameras.Ks,
        "width": cameras.width,
        "height": cameras.height,
        "camera_model": cameras.camera_model,
    }
    return ops.rasterize(**dict(zip(names, splats, strict=True)) | seen | dict(options))


def _lite() -> type[SAGSScene]:
    from torchzoo.splatting.sags_lite import SAGSLite  # which is made of this module

    return SAGSLite


def _reconnect(scene: Any, _: Any) -> None:
    """Called after a state was loaded."""
    scene.connect()
