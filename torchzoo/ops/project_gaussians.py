"""Projection of Gaussian splats onto the images of cameras."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchzoo.ops._splat_checks import check_splats, common_dtype, per_camera
from torchzoo.ops._splat_kernels import KERNELS, Kernel
from torchzoo.ops._splat_project import CAMERAS, CameraModel, project

ALPHA_MIN = 1 / 255


class PackedProjection(NamedTuple):
    """The pairs of a camera and a splat that it sees, V of them, by camera and then by splat.

    Attributes:
        camera_ids: `(V,)`, int64.
        gaussian_ids: `(V,)`, int64.
        radii: `(V, 2)`; the rest as in `Projected`, with V in place of C, N.
    """

    camera_ids: Tensor
    gaussian_ids: Tensor
    radii: Tensor
    means2d: Tensor
    depths: Tensor
    conics: Tensor
    covs2d: Tensor
    compensations: Tensor


class Projected(NamedTuple):
    """Splats on the images of C cameras; all zeros where a camera can't see a splat.

    Attributes:
        radii: Half-sides of the boxes in which they can be seen, in pixels, `(C, N, 2)` int32.
        means2d: Centres in pixels, the first pixel's at (0.5, 0.5), `(C, N, 2)`.
        depths: z in the camera, `(C, N)`.
        conics: Inverse covariances, entries xx, xy, yy, `(C, N, 3)`; zeros for the analytic kernel.
        covs2d: Covariances in square pixels, entries xx, xy, yy, `(C, N, 3)`.
        compensations: Factors of the opacity that make up for the blur, `(C, N)`; 1 unless asked
            for.
    """

    radii: Tensor
    means2d: Tensor
    depths: Tensor
    conics: Tensor
    covs2d: Tensor
    compensations: Tensor

    def pack(self) -> PackedProjection:
        """Only what can be seen; its size depends on the data."""
        camera, splat = (self.radii > 0).all(-1).nonzero().unbind(1)
        return PackedProjection(camera, splat, *(x[camera, splat] for x in self))


def project_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    opacities: Tensor | None = None,
    kernel: Kernel = "gaussian",
    beta: Tensor | None = None,
    eps2d: float = 0.3,
    near: float = 0.01,
    far: float = 1e10,
    radius_clip: float = 0.0,
    antialiased: bool = False,
    camera_model: CameraModel = "pinhole",
) -> Projected:
    """Project 3-D Gaussians onto images, to first order around their means.

    Differentiable in `means`, `quats`, `scales` and `viewmats`, not in `Ks`; `opacities` and `beta`
    only say how far a splat can be seen. A splat with a number that is not finite, with a
    quaternion of zero, in front of `near`, behind `far` or outside the image is not seen: it has
    zeros everywhere, and zero gradients.

    Args:
        means: Centres in the world.
        quats: Rotations wxyz, of any length but zero.
        scales: Standard deviations along the axes.
        viewmats: World to camera: x right, y down, z forward.
        Ks: Intrinsics in pixels; without skew.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        opacities: From 0 to 1; default 1.
        kernel: What the splats will be drawn with.
        beta: Exponents of the generalised exponential kernel.
        eps2d: Square pixels, added to the variances; the analytic kernel adds none.
        near: Least depth.
        far: Largest depth.
        radius_clip: Splats with a box of no larger half-sides are left out.
        antialiased: Compute compensations: square roots of the areas without and with the blur,
            0.005 at least.
        camera_model: Of the orthographic one, focal lengths are pixels per unit of length; the
            fisheye is equidistant.

    Shape:
        - means: `(N, 3)`
        - quats: `(N, 4)`
        - scales: `(N, 3)`
        - viewmats: `(C, 4, 4)`
        - Ks: `(C, 3, 3)`
        - opacities: `(N,)` or `(C, N)`
        - beta: `(N,)`

    Returns:
        What `Projected` lists, in the widest dtype of the inputs, float32 at least.

    Raises:
        ValueError: Shapes, dtypes, devices or options that don't fit.
        NotImplementedError: An input has a forward-mode tangent.

    Source:
        Zwicker, Pfister, van Baar, Gross, EWA Splatting, 2002, as in Kerbl, Kopanas, Leimkühler,
        Drettakis, 3D Gaussian Splatting, 2023, equation 5.

    Example:
        >>> K = torch.tensor([[[100.0, 0.0, 32.0], [0.0, 100.0, 32.0], [0.0, 0.0, 1.0]]])
        >>> found = project_gaussians(
        ...     torch.tensor([[0.0, 0.1, 2.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        ...     torch.full((1, 3), 0.02), torch.eye(4)[None], K, 64, 64,
        ... )
        >>> found.means2d.tolist(), found.radii.tolist()
        ([[[32.0, 37.0]]], [[[4, 4]]])
    """
    check_splats(
        "project_gaussians",
        means,
        quats,
        scales,
        viewmats,
        Ks,
        opacities,
        beta,
        kernel,
        camera_model,
        width,
        height,
    )
    dtype = common_dtype(means, quats, scales, viewmats, Ks, opacities, beta)
    if opacities is None:
        opacities = means.new_ones(means.shape[0])
    found = project(
        *(x.to(dtype).contiguous() for x in (means, quats, scales)),
        per_camera(opacities.detach().to(dtype), viewmats.shape[0], 1).contiguous(),
        None if beta is None else beta.detach().to(dtype).contiguous(),
        *(x.to(dtype).contiguous() for x in (viewmats, Ks)),
        width,
        height,
        KERNELS[kernel],
        CAMERAS[camera_model],
        eps2d,
        near,
        far,
        radius_clip,
        ALPHA_MIN,
        antialiased,
        False,
    )
    return Projected(*found)
