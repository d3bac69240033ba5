"""GPCIS: click segmentation as Gaussian process classification of pixels.

Each image is a classification problem of its own, whose data are the clicks. With z a pixel's
features (of length 1), c its colour, x both, and Z the m clicks with labels y = +-1,

    k(x, x') = exp(-sum_d e^(s_d) (z_d - z'_d)^2 / 2) + w exp(-norm(c - c')^2 / 2),
    q(u) = N(mu, 0.01^2 I),        mu_i = softplus(MLP(x_i)) y_i,
    f(.) = phi(.)^T omega + k(., Z) (K_ZZ + eps^2 I)^-1 (u - phi(Z)^T omega),
    phi(x) = sqrt(2 / L) sin(Theta x + b),        omega ~ N(omega_bar, t^2 I).

f is a logit for every pixel, linear in their number. As mu has the sign of its label, so has f at
the clicks: f(Z) - u = -eps^2 (K_ZZ + eps^2 I)^-1 (u - phi(Z)^T omega). The waves phi learn, so
the prior's covariance is not k.

M. Zhou, H. Wang, Q. Zhao, Y. Li, Y. Huang, D. Meng and Y. Zheng, "Interactive segmentation as
Gaussian process classification", 2023, section 3. Deviations: the terms of the loss at
the clicks are means for each image, not for the batch; the full divergence can be had; systems
of the clicks are solved in float64, and clicks on one pixel act as one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.gp.gpcis_clicks import Segmentation
from torchzoo.gp.pathwise import padded_cholesky
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast, values_readable
from torchzoo.registry import Example, register

CLICK_STD = 0.01
OMEGA_STD = (0.01, 0.025, 0.05)  # least, at the start, most


class _Pixels(NamedTuple):
    """Images and clicks as points: x `(B, N, D)`, z `(B, M, D)`; the rest `(B, M)`."""

    x: Tensor
    z: Tensor
    labels: Tensor
    valid: Tensor
    place: Tensor


@register(
    paper=67,
    example=lambda: Example(
        {"feature_dim": 4, "num_basis": 6, "hidden": 5, "kl": "full"},
        (
            torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)),
            torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1)),
            torch.tensor([[[0, 1], [3, 4], [2, 5]], [[4, 0], [1, 2], [0, 0]]]),
            torch.tensor([[1, -1, 1], [1, -1, 0]]),
        ),
        bad_options={
            "feature_dim": 0,
            "extra_dim": 0,
            "num_basis": 0,
            "hidden": 0,
            "jitter_train": 0.0,
            "jitter_eval": 1e-12,
            "kl": "half",
        },
    ),
    compare="other heads see clicks as maps, all through the network; the experiment has one",
)
class GPCISHead(ZooModel):
    """Segments from features, image and clicks, and obeys the clicks.

    Goes on any backbone that gives features for pixels. In training omega and u are drawn; in
    evaluation they are their means.

    Args:
        feature_dim: Channels C of the features.
        extra_dim: Channels of the image.
        num_basis: Waves L of the prior.
        hidden: Width of the network that says how much a click weighs.
        jitter_train: eps squared in training.
        jitter_eval: eps squared in evaluation.
        kl: `"official"`: mu^T K^-1 mu / m with K held, as the authors train; `"full"`: all of
            KL(q(u), N(0, K)).
        channels_last: Channels come last: `(..., H, W, C)`, in logits too.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - features: `(..., C, h, w)`, resampled bilinearly to the image's size
        - image: `(..., 3, H, W)`, standardised
        - points: `(..., M, 2)`, row and column
        - labels: `(..., M)`, 1 in the object, -1 outside, 0 for no click
        - output: logits `(..., 1, H, W)`, the rest `(...)`

    Returns:
        A `Segmentation`.

    Raises:
        ValueError: An option out of its range; shapes that don't fit; other labels, or a click
            outside the image. A compiled head leaves such clicks out.

    Source:
        M. Zhou and others, "Interactive segmentation as Gaussian process classification", 2023,
        section 3.

    Example:
        >>> head = GPCISHead(feature_dim=16).eval()
        >>> features, image = torch.randn(1, 16, 8, 8), torch.randn(1, 3, 32, 32)
        >>> points, labels = torch.tensor([[[4, 7], [20, 9]]]), torch.tensor([[1, -1]])
        >>> found = head(features, image, points, labels)
        >>> found.logits.shape
        torch.Size([1, 1, 32, 32])
        >>> bool(found.logits[0, 0, 4, 7] > 0), bool(found.logits[0, 0, 20, 9] > 0)
        (True, False)
    """

    def __init__(
        self,
        feature_dim: int = 48,
        extra_dim: int = 3,
        *,
        num_basis: int = 256,
        hidden: int = 96,
        jitter_train: float = 1e-2,
        jitter_eval: float = 1e-7,
        kl: Literal["official", "full"] = "official",
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = (("feature_dim", feature_dim), ("extra_dim", extra_dim))
        for name, size in (*sizes, ("num_basis", num_basis), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        for name, value in (("jitter_train", jitter_train), ("jitter_eval", jitter_eval)):
            if not 1e-10 <= value < math.inf:  # what float64 can factor
                raise ValueError(f"{name}: expected at least 1e-10, got {value}")
        if kl not in ("official", "full"):
            raise ValueError(f"kl: expected 'official' or 'full', got {kl!r}")
        super().__init__()
        self.feature_dim, self.extra_dim, self.num_basis = feature_dim, extra_dim, num_basis
        self.jitter_train, self.jitter_eval, self.kl = jitter_train, jitter_eval, kl
        self.channels_last = channels_last
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.theta = nn.Linear(feature_dim + extra_dim, num_basis, **options)
        self.omega_mean = nn.Parameter(torch.empty(num_basis, **options))
        self.raw_omega_std = nn.Parameter(torch.empty((), **options))
        self.log_precision = nn.Parameter(torch.empty(feature_dim, **options))
        self.raw_weight = nn.Parameter(torch.empty((), **options))
        self.click_mlp = nn.Sequential(
            nn.Linear(feature_dim + extra_dim, hidden, **options),
            nn.ReLU(),
            nn.Linear(hidden, 1, **options),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' start: s = 1, w = softplus(0), omega ~ N(0.25 N(0, I), 0.025^2 I)."""
        for layer in (self.theta, self.click_mlp[0], self.click_mlp[2]):
            cast(nn.Linear, layer).reset_parameters()
        nn.init.normal_(self.omega_mean, std=0.25)
        nn.init.constant_(self.raw_omega_std, OMEGA_STD[1])
        nn.init.ones_(self.log_precision)
        nn.init.zeros_(self.raw_weight)

    @property
    def omega_std(self) -> Tensor:
        """Standard deviation t of omega, within 0.01 and 0.05."""
        return self.raw_omega_std.clamp(OMEGA_STD[0], OMEGA_STD[2])

    @property
    def weight(self) -> Tensor:
        """Weight w of the kernel of colours."""
        return F.softplus(self.raw_weight)

    def forward(
        self, features: Tensor, image: Tensor, points: Tensor, labels: Tensor
    ) -> Segmentation:
        lead, grid = self._check(features, image, points, labels)
        with no_autocast(features):
            pixels = self._read(features, image, points, labels)
            mu = self.click_means(pixels.z, pixels.labels)
            omega, u = self.omega_mean[:, None], mu[..., None]
            if self.training:
                omega = omega + self.omega_std * torch.randn_like(omega)
                u = u + CLICK_STD * torch.randn_like(u)
            factor = self._factor(pixels)
            logits = self._values(pixels, factor, omega, u)[..., 0]
            kl = self._divergence(factor, mu, pixels.valid)
            loss = _click_loss(u[..., 0], pixels)
        return Segmentation(logits.reshape(*lead, *grid), kl.reshape(lead), loss.reshape(lead))

    def sample(
        self,
        features: Tensor,
        image: Tensor,
        points: Tensor,
        labels: Tensor,
        n: int = 16,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw logits from the posterior, in evaluation too.

        Args:
            features: As for the head, like what follows.
            image: The image.
            points: The clicks.
            labels: Their labels.
            n: Draws.
            generator: Draws on the device of the parameters.

        Shape:
            - output: `(n, ..., 1, H, W)`

        Raises:
            ValueError: No draws, or inputs that don't fit.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        lead, grid = self._check(features, image, points, labels)
        with no_autocast(features):
            pixels = self._read(features, image, points, labels)
            mu = self.click_means(pixels.z, pixels.labels)[..., None]
            options: dict[str, Any] = {"device": mu.device, "dtype": mu.dtype}
            options["generator"] = generator
            noise = torch.randn((self.num_basis, n), **options)
            omega = self.omega_mean[:, None] + self.omega_std * noise
            u = mu + CLICK_STD * torch.randn((*mu.shape[:-1], n), **options)
            drawn = self._values(pixels, self._factor(pixels), omega, u)
        return drawn.movedim(-1, 0).reshape(n, *lead, *grid)

    def variance(
        self,
        features: Tensor,
        image: Tensor,
        points: Tensor,
        labels: Tensor,
        n: int = 16,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Variance of the logits over n draws: where the next click would say most.

        Shape:
            - output: `(..., 1, H, W)`
        """
        if n < 2:
            raise ValueError(f"n: expected at least 2, got {n}")
        return self.sample(features, image, points, labels, n, generator=generator).var(0)

    def kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The kernel of pixels, in their dtype.

        Shape:
            - x1: `(..., n, C + 3)`
            - x2: `(..., m, C + 3)`
            - output: `(..., n, m)`
        """
        scale = (self.log_precision.to(x1) / 2).exp()
        c = self.feature_dim
        near = _gauss(x1[..., :c] * scale, x2[..., :c] * scale)
        return near + self.weight.to(x1) * _gauss(x1[..., c:], x2[..., c:])

    def basis(self, x: Tensor) -> Tensor:
        """The prior's waves phi.

        Shape:
            - x: `(..., n, C + 3)`
            - output: `(..., n, L)`
        """
        return math.sqrt(2 / self.num_basis) * self.theta(x).sin()

    def click_means(self, z: Tensor, labels: Tensor) -> Tensor:
        """mu, of the labels' signs.

        Shape:
            - z: `(..., m, C + 3)`
            - labels: `(..., m)`
            - output: `(..., m)`
        """
        return F.softplus(self.click_mlp(z)[..., 0]) * labels

    def embed(self, features: Tensor, image: Tensor) -> Tensor:
        """What the kernel sees of each pixel: features of length 1 on the image's grid, and colour.

        Shape:
            - features: `(B, C, h, w)`
            - image: `(B, 3, H, W)`
            - output: `(B, H W, C + 3)`
        """
        kind = self.omega_mean.dtype
        unit = F.normalize(features.to(kind), dim=1)
        if unit.shape[-2:] != image.shape[-2:]:
            unit = F.interpolate(unit, image.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat([unit, image.to(kind)], 1).flatten(2).mT

    def extra_repr(self) -> str:
        return f"feature_dim={self.feature_dim}, num_basis={self.num_basis}, kl={self.kl}"

    @property
    def _jitter(self) -> float:
        return self.jitter_train if self.training else self.jitter_eval

    def _check(
        self, features: Tensor, image: Tensor, points: Tensor, labels: Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leading dimensions, and the shape of one image's logits."""
        last = self.channels_last
        for name, x, c in (
            ("features", features, self.feature_dim),
            ("image", image, self.extra_dim),
        ):
            if x.ndim < 3 or x.shape[-1 if last else -3] != c:
                form = f"(..., H, W, {c})" if last else f"(..., {c}, H, W)"
                raise ValueError(f"{name}: expected {form}, got {tuple(x.shape)}")
        lead = tuple(image.shape[:-3])
        if features.shape[:-3] != lead:
            raise ValueError(f"features: expected ({lead}, ...), got {tuple(features.shape)}")
        if labels.shape[:-1] != lead or labels.ndim == 0:
            raise ValueError(f"labels: expected ({lead}, M), got {tuple(labels.shape)}")
        if points.shape != (*labels.shape, 2):
            expected = (*labels.shape, 2)
            raise ValueError(f"points: expected {expected}, got {tuple(points.shape)}")
        height, width = image.shape[-3:-1] if last else image.shape[-2:]
        if values_readable(labels) and values_readable(points):
            if not ((labels == 0) | (labels.abs() == 1)).all():
                raise ValueError(f"labels: expected 1, -1 or 0, got {labels.unique().tolist()}")
            if not (_inside(points, height, width) | (labels == 0)).all():
                raise ValueError(
                    f"points: expected rows below {height} and columns below {width} where labels "
                    "are not 0, got a click outside"
                )
        return lead, ((height, width, 1) if last else (1, height, width))

    def _read(self, features: Tensor, image: Tensor, points: Tensor, labels: Tensor) -> _Pixels:
        if self.channels_last:
            features, image = features.movedim(-1, -3), image.movedim(-1, -3)
        count = math.prod(image.shape[:-3])
        features, image, points, labels = (
            t.reshape(count, *t.shape[t.ndim - kept :])
            for t, kept in ((features, 3), (image, 3), (points, 2), (labels, 1))
        )
        height, width = image.shape[-2:]
        x = self.embed(features, image)
        valid = (labels != 0) & _inside(points, height, width)
        row, column = points.long().unbind(-1)
        place = torch.where(valid, row * width + column, 0)
        z = x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
        return _Pixels(x, z, labels.to(x) * valid, valid, place)

    def _factor(self, pixels: _Pixels) -> Tensor:
        """The Cholesky factor of K_ZZ + eps^2 I, in float64."""
        z = pixels.z.double()
        return padded_cholesky(self.kernel(z, z), self._jitter, pixels.valid)

    def _values(self, pixels: _Pixels, factor: Tensor, omega: Tensor, u: Tensor) -> Tensor:
        """The logits of all pixels, `(B, N, n)`, for omega `(L, n)` and u `(B, M, n)`."""
        gap = (u - self.basis(pixels.z) @ omega) * pixels.valid[..., None]
        v = torch.cholesky_solve(gap.double(), factor)
        # weights of clicks that contradict each other on a pixel are huge and cancel: in float64
        same = (pixels.place[:, :, None] == pixels.place[:, None, :]) & pixels.valid[:, None, :]
        first = ~same.tril(-1).any(-1, keepdim=True)
        v = torch.where(first & pixels.valid[..., None], same.to(v) @ v, 0).to(u)
        return self.basis(pixels.x) @ omega + self.kernel(pixels.x, pixels.z) @ v

    def _divergence(self, factor: Tensor, mu: Tensor, valid: Tensor) -> Tensor:
        m = valid.double().sum(-1)
        right = mu.double()[..., None]
        if self.kl == "official":
            misfit = torch.cholesky_solve(right, factor.detach()) * right
            return (misfit.sum((-2, -1)) / m.clamp_min(1)).to(mu)
        misfit = torch.cholesky_solve(right, factor) * right
        inverse = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        spread = CLICK_STD**2 * (inverse * valid).sum(-1) - m * (1 + math.log(CLICK_STD**2))
        return ((misfit.sum((-2, -1)) + spread + log_det) / 2).to(mu)


def _gauss(x1: Tensor, x2: Tensor) -> Tensor:
    """exp(-norm(x1 - x2)^2 / 2) of all pairs, none of the differences kept."""
    square = x1.square().sum(-1)[..., :, None] + x2.square().sum(-1)[..., None, :]
    return (x1 @ x2.mT - square / 2).clamp_max(0).exp()


def _inside(points: Tensor, height: int, width: int) -> Tensor:
    row, column = points.unbind(-1)
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def _click_loss(u: Tensor, pixels: _Pixels) -> Tensor:
    """Mean cross entropy of the clicks of each image, 0 without clicks."""
    lost = F.softplus(-pixels.labels * u) * pixels.valid
    return lost.sum(-1) / pixels.valid.sum(-1).clamp_min(1)
