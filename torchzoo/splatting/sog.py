"""Scenes whose Gaussians lie on a square grid with like beside like, kept smooth in training.

W. Morgenstern, F. Barthel, A. Hilsmann and P. Eisert, "Compact 3D Scene Representation via
Self-Organizing Gaussian Grids", 2024. The attributes of N = H^2 Gaussians are pictures of H x H
pixels. `plas_sort` arranges the Gaussians by vectors w_a (a - mean) / std of some attributes a;
training adds

    sum over a of w_a Huber(blur(stop_gradient(A)), A) / sum of w_a

for pictures A of raw attributes, the blur a Gaussian of 5 x 5 pixels and standard deviation 3,
around the border in x and mirrored in y, the Huber loss with delta 1 averaged over all values.
Smooth pictures are what `GridCodec` makes small files of.

Deviations from the authors' code: none in the sort and the loss. The paper shows the loss on all
attributes; `RELEASED_WEIGHTS` are those of the authors' configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.optim import Optimizer

from torchzoo import ops, peers
from torchzoo.registry import Comparison, Example, register
from torchzoo.splatting.protocol import TrainStep
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import scaled_steps
from torchzoo.splatting.strategy import DefaultStrategy

__all__ = ["ATTRIBUTES", "GridSmoothnessLoss", "SelfOrganizingScene", "SelfOrganizingStrategy"]

ATTRIBUTES = {
    "xyz": "means",
    "sh_dc": "sh0",
    "sh_rest": "shN",
    "scaling": "log_scales",
    "rotation": "quats",
    "opacity": "opacity_logits",
}
"""The paper's names of the attributes, and the parameters of a scene that hold them."""

SORT_WEIGHTS = {"xyz": 1.0, "sh_dc": 1.0, "scaling": 1.0}
"""What scenes are sorted by."""

RELEASED_WEIGHTS = {"opacity": 1.0, "rotation": 10.0}
"""Weights of the loss in the authors' configuration."""


def _example() -> Example:
    viewmats = torch.eye(4).expand(2, 4, 4).clone()
    viewmats[:, 0, 3], viewmats[:, 2, 3] = torch.tensor([0.0, 0.4]), 4.0
    K = torch.tensor([[16, 0, 6], [0, 16, 4], [0, 0, 1]])  # integers: no gradient reaches it
    return Example(
        kwargs={"num_gaussians": 9, "sh_degree": 1, "image_size": (8, 12)},
        inputs=(viewmats, K.expand(2, 3, 3)),
        bad_options={"num_gaussians": -1, "sh_degree": 4, "image_size": (0, 8)},
    )


def _picture(scene: GaussianScene, name: str, *, activated: bool = False) -> Tensor:
    """The values of an attribute, `(N, C)`, one column a channel."""
    parameter = ATTRIBUTES.get(name, name)
    if parameter not in dict(scene.named_parameters(recurse=False)):
        known = sorted({*ATTRIBUTES, *(n for n, _ in scene.named_parameters(recurse=False))})
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(known)}")
    views = {"log_scales": "scales", "opacity_logits": "opacities", "quats": "unit_quats"}
    view = views.get(parameter, parameter) if activated else parameter
    return getattr(scene, view).reshape(scene.num_gaussians, -1)


def _side(scene: GaussianScene) -> int:
    side = math.isqrt(scene.num_gaussians)
    if side * side != scene.num_gaussians:
        raise ValueError(
            f"scene: got {scene.num_gaussians} Gaussians, expected a square number; "
            "SelfOrganizingScene.to_square_ removes some"
        )
    return side


@register(
    paper=27,
    example=_example,
    compare=lambda: Comparison(
        {"num_gaussians": 2000, "image_size": (96, 128)}, peers.one_view(), ("GaussianScene",)
    ),
)
class SelfOrganizingScene(GaussianScene):
    """A scene that can lie on a square grid, row by row: Gaussian i is in row i // H.

    Args:
        num_gaussians: N at first; to be on a grid it must be a square, see `to_square_`.
        sh_degree: Degree of the spherical harmonics of the colours, 0 to 3.
        num_features: Size F of the optional `features`.
        image_size: Height and width of the pictures that `forward` makes.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - viewmats: `(..., 4, 4)`
        - Ks: `(..., 3, 3)`
        - output: `(..., height, width, 3)`

    Returns:
        Pictures on black; `render` has the options.

    Raises:
        ValueError: A size or degree out of its range, or inputs of the wrong shape.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024, section 3.

    Example:
        >>> scene = SelfOrganizingScene.from_points(torch.randn(110, 3), torch.rand(110, 3))
        >>> scene.to_square_()
        10
        >>> perm = scene.sort_(generator=torch.manual_seed(0))
        >>> scene.as_grid("xyz").shape
        torch.Size([3, 10, 10])
    """

    @torch.no_grad()
    def to_square_(self, optimizers: Optimizer | Iterable[Optimizer] = ()) -> int:
        """Remove the least opaque Gaussians until a square number is left, in its order.

        Args:
            optimizers: Those that hold the scene's parameters.

        Returns:
            How many were removed.
        """
        excess = self.num_gaussians - math.isqrt(self.num_gaussians) ** 2
        if excess:
            order = self.opacity_logits.argsort(stable=True)
            self.keep(order[excess:].sort().values, optimizers)
        return excess

    @torch.no_grad()
    def sort_(
        self,
        optimizers: Optimizer | Iterable[Optimizer] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        improvement_break: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move like Gaussians next to each other; no picture changes.

        Args:
            optimizers: Those that hold the scene's parameters; their moments move along.
            weights: Weight of each attribute, by its name, after it is normalised to mean 0 and
                standard deviation 1 over all its values; scales, opacities and rotations as they
                are in use. None: 1 for positions, base colours and scales.
            shuffle: Whether to start from a random order.
            improvement_break: See `torchzoo.ops.plas_sort`.
            generator: What is random draws from it.

        Returns:
            `(N,)`, the old place of each Gaussian.

        Raises:
            ValueError: The number of Gaussians is no square, an attribute is unknown or not
                finite, a weight is negative, or none is positive.
        """
        _side(self)
        given = SORT_WEIGHTS if weights is None else weights
        _check_weights(given)
        columns = [
            weight * _normalised(_picture(self, name, activated=True).detach().double())
            for name, weight in given.items()
        ]
        features = torch.cat(columns, 1)
        start = torch.arange(self.num_gaussians, device=features.device)
        if shuffle:
            where = generator.device if generator is not None else None
            start = torch.randperm(len(start), generator=generator, device=where).to(start.device)
        found = ops.plas_sort(
            features[start], improvement_break=improvement_break, generator=generator
        )
        assert isinstance(found, Tensor)  # without statistics
        perm = start[found]
        self.keep(perm, () if optimizers is None else optimizers)
        return perm

    def as_grid(self, name: str) -> Tensor:
        """The raw values of an attribute as a picture `(C, H, W)`.

        Args:
            name: A parameter, or `"xyz"`, `"sh_dc"`, `"sh_rest"`, `"scaling"`, `"rotation"` or
                `"opacity"`. Coefficients of a degree come before those of the next, each with its
                three colours.

        Raises:
            ValueError: An unknown name, or a number of Gaussians that is no square.
        """
        return rearrange(_picture(self, name), "(h w) c -> c h w", h=_side(self))


class GridSmoothnessLoss:
    """How far the pictures of a scene's raw attributes are from their own blurs.

    The blur is a target: it gets no gradient.

    Args:
        weights: Weight of each attribute, by its name; they are divided by their sum.
        kernel: Side of the blur, odd.
        sigma: Its standard deviation, in pixels.
        loss: `"huber"` (delta 1), `"l1"` or `"mse"`.

    Shape:
        - output: scalar

    Raises:
        ValueError: An option out of its range, no positive weight; when called, an unknown
            attribute or a grid that is no larger than half the blur.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024, section 3.2.

    Example:
        >>> loss = GridSmoothnessLoss({"opacity": 1.0, "rotation": 10.0})
        >>> scene = SelfOrganizingScene(100)
        >>> loss(scene) < 1e-12  # all alike
        tensor(True)
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        kernel: int = 5,
        sigma: float = 3.0,
        loss: str = "huber",
    ) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel: got {kernel}, expected an odd number")
        if not sigma > 0:
            raise ValueError(f"sigma: got {sigma}, expected a number > 0")
        if loss not in _LOSSES:
            raise ValueError(f"loss: got {loss!r}, expected one of {sorted(_LOSSES)}")
        _check_weights(weights)
        self.weights, self.kernel, self.sigma, self.loss = dict(weights), kernel, sigma, loss

    def __call__(self, scene: SelfOrganizingScene) -> Tensor:
        total = scene.means.new_zeros(())
        for name, weight in self.weights.items():
            if weight:
                picture = scene.as_grid(name)
                blurred = self._blurred(picture.detach())
                total = total + weight * _LOSSES[self.loss](picture, blurred)
        return total / sum(self.weights.values())

    def _blurred(self, picture: Tensor) -> Tensor:
        """`(C, H, W)` blurred, around the border in x and mirrored in y."""
        reach = self.kernel // 2
        if picture.shape[-1] <= reach:
            raise ValueError(
                f"scene: got a grid of side {picture.shape[-1]}, expected more than {reach} for a "
                f"blur of {self.kernel} pixels"
            )
        taps = torch.arange(-reach, reach + 1, device=picture.device, dtype=picture.dtype)
        taps = torch.softmax(-taps.square() / (2 * self.sigma**2), 0)
        wide = F.pad(picture[:, None], (reach, reach, 0, 0), mode="circular")
        along = F.conv2d(wide, taps[None, None, None])
        tall = F.pad(along, (0, 0, reach, reach), mode="reflect")
        return F.conv2d(tall, taps[None, None, :, None])[:, 0]

    def __repr__(self) -> str:
        options = f"kernel={self.kernel}, sigma={self.sigma}, loss={self.loss!r}"
        return f"{type(self).__name__}({self.weights}, {options})"


@dataclass(kw_only=True, eq=False)
class SelfOrganizingStrategy(DefaultStrategy):
    """Adaptive density control that keeps a `SelfOrganizingScene` on a sorted grid.

    After each refinement the least opaque Gaussians go until the others fill a square, and these
    are sorted; the loss gets `smoothness` times a `GridSmoothnessLoss`. Bring the scene onto its
    grid before training: `scene.to_square_()`, `scene.sort_()`.

    Args:
        smoothness: Weight of the loss.
        loss_weights: Weights of the attributes in it; None: those of the authors.
        sort_weights: Weights of the attributes in the sort; None: those of `sort_`.
        refine_every: Steps between refinements; None: 1,000, scaled, at least 25.
        grow_grad2d: Mean gradient above which a Gaussian grows.
        grow_scale3d: Largest scale, relative to the scene, of what is cloned rather than split.
        prune_opacity: Opacity below which Gaussians are removed.
        reset_every: Steps between resets of opacities, 0 for none.

    Raises:
        ValueError: An option out of its range; at the start of a run, a scene that is no
            `SelfOrganizingScene` or has no square number of Gaussians.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024, section 3, with the settings of the authors' configuration.

    Example:
        >>> SelfOrganizingStrategy().is_due(1000)
        True
    """

    smoothness: float = 1.0
    loss_weights: Mapping[str, float] | None = None
    sort_weights: Mapping[str, float] | None = None
    grow_grad2d: float | None = 7e-5
    grow_scale3d: float = 0.1
    prune_opacity: float = 0.1
    reset_every: int | None = 0
    _loss: GridSmoothnessLoss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.smoothness >= 0:
            raise ValueError(f"smoothness: got {self.smoothness}, expected at least 0")
        given = RELEASED_WEIGHTS if self.loss_weights is None else self.loss_weights
        self._loss = GridSmoothnessLoss(given)

    def begin(self, scene: GaussianScene, steps: int) -> None:
        if not isinstance(scene, SelfOrganizingScene):
            raise ValueError(f"scene: got {type(scene).__name__}, expected a SelfOrganizingScene")
        _side(scene)
        super().begin(scene, steps)

    def schedule(self) -> tuple[int, int, int]:
        start, stop, every = super().schedule()
        if self.refine_every is None:
            every = scaled_steps(1000, self._steps, 25)
        return start, stop, every

    def penalty(self, scene: GaussianScene) -> Tensor | float:
        if not self.smoothness:
            return 0.0
        assert isinstance(scene, SelfOrganizingScene)  # seen to in begin
        return self.smoothness * self._loss(scene)

    @torch.no_grad()
    def after_step(self, step: TrainStep) -> None:
        super().after_step(step)
        if self.is_due(step.number):
            scene = step.scene
            assert isinstance(scene, SelfOrganizingScene)  # seen to in begin
            scene.to_square_(step.optimizer)
            scene.sort_(step.optimizer, weights=self.sort_weights, generator=step.generator)
            self.grad2d = self.count = self.grad2d.new_zeros(scene.num_gaussians)

    def config(self) -> dict[str, Any]:
        sort = SORT_WEIGHTS if self.sort_weights is None else self.sort_weights
        return super().config() | {"loss_weights": self._loss.weights, "sort_weights": dict(sort)}


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": F.huber_loss,
    "l1": F.l1_loss,
    "mse": F.mse_loss,
}


def _check_weights(weights: Mapping[str, float]) -> None:
    values = weights.values()
    if min(values, default=0.0) < 0 or not 0 < sum(values) < math.inf:
        raise ValueError(f"weights: got {dict(weights)}, expected numbers ≥ 0, one above")


def _normalised(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all values; zeros where they are all the same."""
    spread = values.std(correction=0)
    return (values - values.mean()) / torch.where(spread > 0, spread, 1.0)
