"""A small ray tracer for scenes whose every pixel is known: area integrals, depths, visibility.

Rays go from outside into a world of closed solids, over a black and empty background:

    radiance = albedo (ambient + (1 - ambient) lit max(0, n·l)) + shine lit max(0, n·h)^exponent,

Lambert and Blinn-Phong under one sun in direction l with hard shadows (`lit` is 0 or 1); n is the
normal and h the direction half-way between sun and eye. Radiance is clipped to [0, 1] before it is
averaged over a pixel's square. Points and directions are `(3, R)`, components first, so that sums
over components run along contiguous rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from einops import rearrange, reduce
from torch import Tensor

from torchzoo.splatting.cameras import Cameras

Texture = Callable[[Tensor], Tensor]
"""Albedo `(3, R)` of local points `(3, R)`."""

_SKIN = 1e-3  # how far off a surface a ray starts that must not meet it again
_TINY = 1e-9


class Shape(Protocol):
    """A closed surface around the origin of its own frame; all points are in that frame."""

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        """Where the ray `o + t d` from outside enters, `(R,)`: t > 0, or infinity."""
        ...

    def normal(self, p: Tensor) -> Tensor:
        """Unit normals `(3, R)`, outwards, at points of the surface."""
        ...

    def distance(self, p: Tensor) -> Tensor:
        """Signed distance `(R,)` from the surface, negative inside."""
        ...


@dataclass(frozen=True)
class Ellipsoid:
    """Semi-axes along x, y and z; its `distance` is exact for a sphere, else to first order."""

    radii: tuple[float, float, float]

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        axes = o.new_tensor(self.radii)[:, None]
        o, d = o / axes, d / axes
        squared = d.square().sum(0)
        nearest = -(o * d).sum(0) / squared  # from there on nothing large cancels
        inside = 1 - (o + nearest * d).square().sum(0)
        t = nearest - (inside.clamp(min=0) / squared).sqrt()
        return torch.where((inside > 0) & (t > 0), t, torch.inf)

    def normal(self, p: Tensor) -> Tensor:
        return _unit(p / p.new_tensor(self.radii)[:, None].square())

    def distance(self, p: Tensor) -> Tensor:
        axes = p.new_tensor(self.radii)[:, None]
        level, slope = _length(p / axes), _length(p / axes.square())
        return level * (level - 1) / slope.clamp(min=_TINY)


@dataclass(frozen=True)
class Box:
    """Half of its sides."""

    half: tuple[float, float, float]

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        enter, leave = _slab(o, d, o.new_tensor(self.half)[:, None])
        return _first(enter.amax(0), leave.amin(0))

    def normal(self, p: Tensor) -> Tensor:
        face = (p.abs() - p.new_tensor(self.half)[:, None]).argmax(0)
        return torch.nn.functional.one_hot(face, 3).T * p.sign()

    def distance(self, p: Tensor) -> Tensor:
        q = p.abs() - p.new_tensor(self.half)[:, None]
        return _length(q.clamp(min=0)) + q.amax(0).clamp(max=0)


@dataclass(frozen=True)
class Cylinder:
    """Closed at both ends; its axis is z."""

    radius: float
    half_height: float

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        return _first(*self.span(o, d))

    def span(self, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Where the ray's line enters and leaves, `(R,)`; the first is larger where it misses."""
        squared = d[:2].square().sum(0).clamp(min=_TINY)
        nearest = -(o[:2] * d[:2]).sum(0) / squared
        inside = self.radius**2 - (o[:2] + nearest * d[:2]).square().sum(0)
        reach = (inside.clamp(min=0) / squared).sqrt()
        enter, leave = _slab(o[2], d[2], self.half_height)
        leave = torch.where(inside > 0, torch.minimum(leave, nearest + reach), -torch.inf)
        return torch.maximum(enter, nearest - reach), leave

    def normal(self, p: Tensor) -> Tensor:
        q = self._outside(p)
        side = torch.cat([_unit(p[:2]), torch.zeros_like(p[:1])])
        cap = torch.cat([torch.zeros_like(p[:2]), p[2:].sign()])
        return torch.where(q[0] > q[1], side, cap)

    def distance(self, p: Tensor) -> Tensor:
        q = self._outside(p)
        return _length(q.clamp(min=0)) + q.amax(0).clamp(max=0)

    def _outside(self, p: Tensor) -> Tensor:
        """How far outside of the wall and of the ends, `(2, R)`."""
        return torch.stack([_length(p[:2]) - self.radius, p[2].abs() - self.half_height])


@dataclass(frozen=True)
class Torus:
    """Radius of the ring, which lies in the plane z = 0, and of its tube; found by its distance."""

    ring: float
    tube: float
    steps: int = 32

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        enter, leave = Cylinder(self.ring + self.tube, self.tube).span(o, d)
        near = ((enter < leave) & (leave > 0)).nonzero()[:, 0]
        o, d, t = o[:, near], d[:, near], enter[near].clamp(min=0)
        speed = _length(d)
        for _ in range(self.steps):
            t = t + self.distance(o + t * d) / speed
        t = torch.where(self.distance(o + t * d) < 0.3 * _SKIN, t, torch.inf)
        return torch.full_like(enter, torch.inf).index_put((near,), t)

    def normal(self, p: Tensor) -> Tensor:
        across = _length(p[:2]).clamp(min=_TINY)
        return _unit(torch.cat([p[:2] * (1 - self.ring / across), p[2:]]))

    def distance(self, p: Tensor) -> Tensor:
        return _length(torch.stack([_length(p[:2]) - self.ring, p[2]])) - self.tube


@dataclass(frozen=True)
class Solid:
    """A shape in its place, with its material.

    Attributes:
        shape: The surface.
        texture: Albedo of local points.
        center: Where the shape's origin is.
        rotation: Rows are the shape's axes in the world, `(3, 3)`; None: the world's.
        gloss: Strength and exponent of the highlight.
        glass: Whether only `0.1 + 0.8 (1 - cos)^3` of the surface is seen, by the angle between
            eye and normal; glass casts no shadow and has no depth.
    """

    shape: Shape
    texture: Texture
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: Tensor | None = None
    gloss: tuple[float, float] = (0.0, 1.0)
    glass: bool = False

    def local(self, p: Tensor) -> Tensor:
        """World points in the shape's frame."""
        return self.turned(p - p.new_tensor(self.center)[:, None])

    def turned(self, d: Tensor) -> Tensor:
        """World directions in the shape's frame."""
        return d if self.rotation is None else self.rotation.to(d) @ d

    def enter(self, o: Tensor, d: Tensor) -> Tensor:
        """Where the ray enters, `(R,)`, or infinity."""
        return self.shape.enter(self.local(o), self.turned(d))

    def normal(self, p: Tensor) -> Tensor:
        """Normals in the world."""
        n = self.shape.normal(self.local(p))
        return n if self.rotation is None else self.rotation.to(n).T @ n


@dataclass(frozen=True)
class Fog:
    """An even fog in a ball around the origin: transmits `exp(-density · length)`."""

    density: float
    radius: float
    color: tuple[float, float, float]


class Rays(NamedTuple):
    """What rays see: light `(3, R)` over black, how much they are stopped, where, glints; `(R,)`.

    `t` is infinite where no opaque surface is met; `glint` is 1 on glass and in highlights.
    """

    color: Tensor
    alpha: Tensor
    t: Tensor
    glint: Tensor


class Views(NamedTuple):
    """Images `(V, H, W, 3)` over black; coverage, depth and glints `(V, H, W)`."""

    images: Tensor
    alpha: Tensor
    depth: Tensor
    glint: Tensor


@dataclass(frozen=True)
class World:
    """Solids under a sun.

    Attributes:
        solids: The solids; one glass at most in front of another on any ray.
        sun: Direction towards the sun; need not be a unit vector.
        ambient: Light in the shadow.
        fog: Fog, if any.
    """

    solids: Sequence[Solid]
    sun: tuple[float, float, float] = (0.5, -0.35, 1.0)
    ambient: float = 0.35
    fog: Fog | None = None

    def trace(self, o: Tensor, d: Tensor) -> Rays:
        """Follow rays `o + t d`, both `(3, R)`, from outside of all solids."""
        opaque = [solid for solid in self.solids if not solid.glass]
        t, color, glint = self._surface(opaque, o, d)
        alpha = t.isfinite().to(t.dtype)
        for solid in self.solids:
            if solid.glass:
                near, own, _ = self._surface([solid], o, d)
                cosine = (solid.normal(o + near.nan_to_num(posinf=0) * d) * _unit(d)).sum(0).abs()
                seen = torch.where(near < t, 0.1 + 0.8 * (1 - cosine).clamp(min=0) ** 3, 0)
                color, alpha = seen * own + (1 - seen) * color, seen + (1 - seen) * alpha
                glint = torch.where(near < t, 1.0, glint)
        if self.fog is not None:
            clear = torch.exp(-self.fog.density * self._way_in_fog(self.fog, o, d, t))
            haze = color.new_tensor(self.fog.color)[:, None]
            color, alpha = clear * color + (1 - clear) * haze, 1 - clear * (1 - alpha)
        return Rays(color, alpha, t, glint)

    def hidden(self, o: Tensor, d: Tensor, reach: Tensor | float = torch.inf) -> Tensor:
        """Whether an opaque solid is on the ray before `t = reach`, `(R,)` bool."""
        found = torch.zeros(o.shape[1], dtype=torch.bool)
        for solid in self.solids:
            if not solid.glass:
                found |= solid.enter(o, d) < reach
        return found

    def distance(self, points: Tensor) -> Tensor:
        """Distance of points `(..., 3)` from the nearest surface, `(...)`, negative inside."""
        p = points.reshape(-1, 3).T
        each = torch.stack([solid.shape.distance(solid.local(p)) for solid in self.solids])
        return each.amin(0).view(points.shape[:-1])

    def render(self, cameras: Cameras, *, supersample: int = 4) -> Views:
        """Render views: a pixel is the mean over its square, its depth that of its centre.

        Args:
            cameras: Pinhole cameras, outside of all solids.
            supersample: Rays a side of a pixel.

        Shape:
            - output: images `(V, H, W, 3)`; alpha, depth and glint `(V, H, W)`

        Returns:
            Float32 images over black, the part of each pixel that is covered, the camera's z of
            the surface behind the pixel's centre, 0 where there is none, and the part of each
            pixel that shows glass or a highlight.
        """
        views = [self._view(camera, supersample) for camera in cameras]
        return Views(*(torch.stack(parts) for parts in zip(*views, strict=True)))

    def _view(self, camera: Cameras, supersample: int) -> Views:
        rays = self.trace(*pixel_rays(camera, supersample))
        split = {"h": camera.height, "i": supersample, "j": supersample}
        image = reduce(rays.color, "c (h i w j) -> h w c", "mean", **split)
        alpha, glint = (
            reduce(part, "(h i w j) -> h w", "mean", **split) for part in (rays.alpha, rays.glint)
        )
        o, d = pixel_rays(camera)
        opaque = [solid for solid in self.solids if not solid.glass]
        t = torch.stack([solid.enter(o, d) for solid in opaque]).amin(0).nan_to_num(posinf=0.0)
        return Views(image, alpha, rearrange(t, "(h w) -> h w", h=camera.height), glint)

    def _surface(self, solids: Sequence[Solid], o: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """Where rays meet the first of the solids, its light and glints, 0 where there is none."""
        t, which = torch.stack([solid.enter(o, d) for solid in solids]).min(0)
        hit = t.isfinite().nonzero()[:, 0]
        which, p = which[hit], o[:, hit] + t[hit] * d[:, hit]
        n, albedo = torch.empty_like(p), torch.empty_like(p)
        for k, solid in enumerate(solids):
            mine = (which == k).nonzero()[:, 0]
            n[:, mine] = solid.normal(p[:, mine])
            albedo[:, mine] = solid.texture(solid.local(p[:, mine]))
        gloss = p.new_tensor([solid.gloss for solid in solids])[which].T
        light, highlight = self._light(p, n, _unit(d[:, hit]), gloss)
        color, glint = torch.zeros_like(o), torch.zeros_like(t)
        color[:, hit] = (albedo * light + highlight).clamp(0, 1)
        glint[hit] = (highlight > 0.05).to(t.dtype)
        return t, color, glint

    def _light(self, p: Tensor, n: Tensor, view: Tensor, gloss: Tensor) -> tuple[Tensor, Tensor]:
        """What falls on points and what they mirror, `(R,)`, against unit directions of view."""
        sun = _unit(p.new_tensor(self.sun)[:, None])
        slope = (n * sun).sum(0).clamp(min=0)
        up = (slope > 0).nonzero()[:, 0]  # the rest has its own back to the sun
        start = (p + _SKIN * n)[:, up]
        lit = torch.zeros_like(slope)
        lit[up] = (~self.hidden(start, sun.expand_as(start))).to(p.dtype)
        half = (n * _unit(sun - view)).sum(0).clamp(min=0)
        return self.ambient + (1 - self.ambient) * lit * slope, gloss[0] * lit * half ** gloss[1]

    def _way_in_fog(self, fog: Fog, o: Tensor, d: Tensor, t: Tensor) -> Tensor:
        """Length of the rays in the fog's ball before they are stopped."""
        speed = _length(d)
        nearest = -(o * d).sum(0) / speed.square()
        inside = fog.radius**2 - (o + nearest * d).square().sum(0)
        reach = inside.clamp(min=0).sqrt() / speed
        enter = (nearest - reach).clamp(min=0)
        return (torch.minimum(t, nearest + reach) - enter).clamp(min=0) * speed


def pixel_rays(camera: Cameras, supersample: int = 1) -> tuple[Tensor, Tensor]:
    """Origins and directions `(3, H·s·W·s)` of one camera's rays, a grid of s·s in each pixel.

    Directions have 1 along the optical axis, so that t is the camera's z.
    """
    K, turn, eye = camera.Ks[0], camera.viewmats[0, :3, :3], camera.centers[0]
    x, y = (
        (torch.arange(n * supersample) + 0.5) / supersample for n in (camera.width, camera.height)
    )
    v, u = torch.meshgrid((y - K[1, 2]) / K[1, 1], (x - K[0, 2]) / K[0, 0], indexing="ij")
    d = turn.T @ torch.stack([u.flatten(), v.flatten(), torch.ones(u.numel())])
    return eye[:, None].expand_as(d), d


def _length(v: Tensor) -> Tensor:
    """Lengths of columns, several times faster than `norm` is along the first dimension."""
    return v.square().sum(0).sqrt()


def _unit(v: Tensor) -> Tensor:
    return v / _length(v).clamp(min=_TINY)


def _slab(o: Tensor, d: Tensor, half: Tensor | float) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves abs(x) <= half, coordinate by coordinate."""
    d = torch.where(d.abs() < _TINY, _TINY, d)
    a, b = (-half - o) / d, (half - o) / d
    return torch.minimum(a, b), torch.maximum(a, b)


def _first(enter: Tensor, leave: Tensor) -> Tensor:
    return torch.where((enter < leave) & (enter > 0), enter, torch.inf)
