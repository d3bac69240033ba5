"""The worlds of the splatting experiments: what stands in each, built from a seed.

All stand on a round slab whose upper side is z = -0.5 and fit in a ball of radius 1.6 around the
origin; z is up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchzoo.data.raytracing import Box, Cylinder, Ellipsoid, Fog, Solid, Texture, Torus, World

GROUND = -0.5
CODE = 6
"""Numbers of an avatar's code."""

_PALETTE = torch.tensor(
    [
        [0.86, 0.26, 0.22],
        [0.20, 0.48, 0.84],
        [0.95, 0.74, 0.20],
        [0.24, 0.66, 0.40],
        [0.58, 0.34, 0.72],
        [0.92, 0.52, 0.24],
        [0.22, 0.70, 0.74],
    ]
)

Color = Tensor | Sequence[float]


def world(name: str, seed: int = 0, *, code: Sequence[float] | Tensor | None = None) -> World:
    """A world by name.

    Args:
        name: One of `WORLDS`.
        seed: Seed of colours, places and textures.
        code: For `"avatar"`: six numbers in [-1, 1], the jaw (1 wide open), the left and right eye
            (1 shut), the sun's azimuth and elevation, and the brows (1 up). None: all 0.

    Raises:
        ValueError: Another name, or a code that is not an avatar's.

    Example:
        >>> len(world("checker").solids)
        6
    """
    if name not in WORLDS:
        raise ValueError(f"name: expected one of {tuple(WORLDS)}, got {name!r}")
    random = torch.Generator().manual_seed(seed)
    if name == "avatar":
        return _avatar(random, torch.zeros(CODE) if code is None else torch.as_tensor(code).float())
    if code is not None:
        raise ValueError(f"code: expected None for {name!r}, got {code!r}")
    return WORLDS[name](random)


# ---- textures


def flat(color: Color) -> Texture:
    """One colour."""
    albedo = torch.as_tensor(color)[:, None]
    return lambda p: albedo.expand_as(p)


def checker(a: Color, b: Color, side: float) -> Texture:
    """Squares of the local plane z = 0, or cubes."""
    return _either(a, b, lambda p: (p / side).floor().sum(0).remainder(2) < 1)


def stripes(a: Color, b: Color, width: float, way: Sequence[float]) -> Texture:
    """Bars across the direction `way`."""
    across = torch.tensor(way) / torch.tensor(way).norm() / width
    return _either(a, b, lambda p: (across @ p).floor().remainder(2) < 1)


def noise(random: torch.Generator, low: float, high: float, waves: int = 24) -> Texture:
    """Smooth colours: plane waves of `low` to `high` cycles a unit of length, any direction."""
    way = torch.randn(waves, 3, generator=random)
    cycles = low * (high / low) ** torch.rand(waves, 1, generator=random)
    phase = 2 * math.pi * torch.rand(waves, 1, generator=random)
    mix = torch.randn(3, waves, generator=random) * 0.2 * (2 / waves) ** 0.5
    k = 2 * math.pi * cycles * way / way.norm(dim=1, keepdim=True)
    return lambda p: (0.5 + mix @ (k @ p + phase).cos()).clamp(0.02, 0.98)


def _either(a: Color, b: Color, choose: Callable[[Tensor], Tensor]) -> Texture:
    first, second = torch.as_tensor(a)[:, None], torch.as_tensor(b)[:, None]
    return lambda p: torch.where(choose(p), first, second)


# ---- places


def _slab(texture: Texture, radius: float = 1.5) -> Solid:
    return Solid(Cylinder(radius, 0.05), texture, (0.0, 0.0, GROUND - 0.05))


def _ball(
    x: float,
    y: float,
    radius: float,
    texture: Texture,
    *,
    gloss: tuple[float, float] = (0.0, 1.0),
    glass: bool = False,
) -> Solid:
    """A ball that lies on the ground."""
    place = (x, y, GROUND + radius)
    return Solid(Ellipsoid((radius,) * 3), texture, place, gloss=gloss, glass=glass)


def _turn(angle: float, axis: str = "z") -> Tensor:
    """Frame turned by an angle in degrees about one of its axes."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rows = {
        "x": [[1, 0, 0], [0, c, s], [0, -s, c]],
        "y": [[c, 0, -s], [0, 1, 0], [s, 0, c]],
        "z": [[c, s, 0], [-s, c, 0], [0, 0, 1]],
    }
    return torch.tensor(rows[axis], dtype=torch.float32)


def _ring(random: torch.Generator, count: int, radius: float) -> list[tuple[float, float]]:
    """Places around the origin, evenly spread but for a jitter and a common turn."""
    start, *jitter = (torch.rand(count + 1, generator=random) - 0.5).tolist()
    angles = [2 * math.pi * (i + start + 0.3 * j) / count for i, j in enumerate(jitter)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _colors(random: torch.Generator, count: int) -> Tensor:
    order = torch.randperm(len(_PALETTE), generator=random)
    return _PALETTE[order[torch.arange(count) % len(_PALETTE)]]


# ---- worlds


def _checker(random: torch.Generator) -> World:
    places, colors = _ring(random, 4, 0.85), _colors(random, 5)
    sizes = (0.28 + 0.12 * torch.rand(4, generator=random)).tolist()
    balls = [
        _ball(x, y, r, flat(c)) for (x, y), r, c in zip(places, sizes, colors[1:], strict=True)
    ]
    floor = checker((0.92, 0.92, 0.90), (0.16, 0.18, 0.24), 0.3)
    return World([_slab(floor), _ball(0.0, 0.0, 0.5, flat(colors[0])), *balls])


def _boxes(random: torch.Generator) -> World:
    colors = _colors(random, 7)
    sizes = (0.16 + 0.16 * torch.rand(6, 3, generator=random)).tolist()
    turns = (90 * torch.rand(6, generator=random)).tolist()
    places = [(0.0, 0.0), *_ring(random, 5, 0.95)]
    sizes[0] = [0.32, 0.32, 0.55]
    solids = [
        Solid(Box((a, b, c)), flat(color), (x, y, GROUND + c), _turn(turn))
        for (x, y), (a, b, c), turn, color in zip(places, sizes, turns, colors, strict=False)
    ]
    plate = Solid(Box((1.15, 1.15, 0.05)), flat((0.82, 0.80, 0.76)), (0.0, 0.0, GROUND - 0.05))
    return World([plate, *solids])


def _stripes(random: torch.Generator) -> World:
    white, black = (0.96, 0.96, 0.94), (0.05, 0.05, 0.08)
    turn = 60 * float(torch.rand((), generator=random))
    colors, places = _colors(random, 3), _ring(random, 3, 0.8)
    floor = stripes(white, black, 0.06, (math.cos(turn), math.sin(turn), 0.0))
    (x, y), (u, v), (p, q) = places
    return World(
        [
            _slab(floor),
            _ball(x, y, 0.45, stripes(white, colors[0], 0.07, (0.2, 0.1, 1.0))),
            Solid(
                Box((0.32, 0.32, 0.4)),
                checker(white, colors[1], 0.08),
                (u, v, GROUND + 0.4),
                _turn(turn),
            ),
            Solid(
                Cylinder(0.3, 0.45),
                stripes(white, colors[2], 0.06, (0.0, 0.6, 0.8)),
                (p, q, GROUND + 0.45),
            ),
        ]
    )


def _glossy(random: torch.Generator) -> World:
    colors, places = 0.7 * _colors(random, 6), _ring(random, 4, 0.85)
    gloss = (0.8, 60.0)
    balls = [
        _ball(x, y, 0.32, flat(c), gloss=gloss) for (x, y), c in zip(places, colors, strict=False)
    ]
    ring = Solid(Torus(0.42, 0.16), flat(colors[4]), (0, 0, GROUND + 0.16), gloss=gloss)
    top = Solid(Ellipsoid((0.34,) * 3), flat(colors[5]), (0, 0, GROUND + 0.42), gloss=gloss)
    floor = Solid(
        Cylinder(1.5, 0.05), flat((0.35, 0.36, 0.40)), (0, 0, GROUND - 0.05), gloss=(0.5, 60.0)
    )
    return World([floor, ring, top, *balls])


def _glass(random: torch.Generator) -> World:
    colors, places = _colors(random, 4), _ring(random, 3, 1.05)
    floor = checker((0.92, 0.90, 0.86), (0.20, 0.28, 0.36), 0.3)
    balls = [_ball(x, y, 0.26, flat(c)) for (x, y), c in zip(places, colors, strict=False)]
    clear = _ball(0.0, 0.0, 0.62, flat((0.55, 0.80, 1.00)), gloss=(0.6, 60.0), glass=True)
    return World([_slab(floor), *balls, clear])


def _smooth_surfaces(random: torch.Generator) -> World:
    (x, y), (u, v) = _ring(random, 2, 0.7)
    pale = 0.35 + 0.5 * _colors(random, 4)
    return World(
        [
            _slab(flat(pale[0])),
            Solid(Ellipsoid((0.75, 0.5, 0.6)), flat(pale[1]), (x, y, GROUND + 0.35), _turn(40 * x)),
            Solid(Torus(0.45, 0.2), flat(pale[2]), (u, v, GROUND + 0.2)),
            Solid(Ellipsoid((0.28,) * 3), flat(pale[3]), (u, v, GROUND + 0.5)),
        ]
    )


def _texture(random: torch.Generator) -> World:
    places = _ring(random, 3, 0.8)
    floor, *rest = (noise(random, 1.0, 4.0) for _ in range(4))
    (x, y), (u, v), (p, q) = places
    return World(
        [
            _slab(floor),
            _ball(x, y, 0.46, rest[0]),
            Solid(Box((0.34, 0.34, 0.34)), rest[1], (u, v, GROUND + 0.34), _turn(50 * u)),
            Solid(Cylinder(0.32, 0.5), rest[2], (p, q, GROUND + 0.5)),
        ]
    )


def _thin(random: torch.Generator) -> World:
    colors, places = _colors(random, 7), _ring(random, 7, 0.95)
    rods = [
        Solid(Cylinder(0.03, 0.5), flat(c), (x, y, GROUND + 0.5))
        for (x, y), c in zip(places, colors, strict=True)
    ]
    hoops = [
        Solid(Torus(0.55, 0.025), flat(c), (0.0, 0.0, 0.05), _turn(90, "x") @ _turn(a))
        for a, c in zip((0, 60, 120), colors, strict=False)
    ]
    rail = Solid(Torus(0.95, 0.025), flat((0.9, 0.9, 0.9)), (0.0, 0.0, 0.5))
    return World([_slab(flat((0.55, 0.56, 0.60)), 1.3), *rods, *hoops, rail])


def _fog(random: torch.Generator) -> World:
    return World(_checker(random).solids, fog=Fog(0.35, 1.7, (0.75, 0.78, 0.82)))


def _avatar(random: torch.Generator, code: Tensor) -> World:
    """A head that faces -y; the jaw turns about an axis between the ears."""
    if code.shape != (CODE,):
        raise ValueError(f"code: expected {CODE} numbers, got {tuple(code.shape)}")
    jaw, left, right, azimuth, elevation, brows = code.clamp(-1, 1).tolist()
    tone = float(torch.rand((), generator=random))
    skin = torch.tensor([0.92, 0.70, 0.56]) * (1 - 0.35 * tone)
    dress, hair = _colors(random, 1)[0], torch.tensor([0.28, 0.18, 0.12]) * (0.5 + tone)
    glow = (0.25, 25.0)

    opened = 11 * (1 + jaw)  # degrees
    hinge = torch.tensor([0.0, 0.05, 0.0])
    frame = _turn(opened, "x")

    def on_jaw(x: float, y: float, z: float) -> tuple[float, float, float]:
        """Where a point of the closed jaw is."""
        a, b, c = (hinge + frame.T @ (torch.tensor([x, y, z]) - hinge)).tolist()
        return a, b, c

    def lid(shut: float) -> Texture:
        """Skin above the lid's edge, then white, iris and pupil around the axis of sight."""
        edge = 0.115 - 0.105 * (1 + shut)  # of a ball of radius 0.13

        def albedo(p: Tensor) -> Tensor:
            off = p[[0, 2]].norm(dim=0)
            ink = torch.tensor([[0.03, 0.03, 0.04], [0.20, 0.42, 0.62], [0.96, 0.96, 0.96]])
            eye = ink[(off > 0.028).long() + (off > 0.065).long()].T
            return torch.where(p[2] > edge, 0.9 * skin[:, None], eye)

        return albedo

    eyes = [
        Solid(Ellipsoid((0.13,) * 3), lid(shut), (x, -0.47, 0.2), gloss=(0.5, 80.0))
        for x, shut in ((0.21, left), (-0.21, right))
    ]
    lifted = [
        Solid(Box((0.11, 0.03, 0.022)), flat(hair), (x, -0.60, 0.385 + 0.05 * brows), _turn(a, "z"))
        for x, a in ((0.21, 14), (-0.21, -14))
    ]
    rims = [
        Solid(
            Torus(0.165, 0.016),
            flat((0.08, 0.08, 0.10)),
            (x, -0.63, 0.2),
            _turn(90, "x"),
            (0.6, 60.0),
        )
        for x in (0.21, -0.21)
    ]
    bridge = Solid(
        Cylinder(0.014, 0.05), flat((0.08, 0.08, 0.10)), (0.0, -0.63, 0.22), _turn(90, "y")
    )
    temples = [
        Solid(Cylinder(0.014, 0.33), flat((0.08, 0.08, 0.10)), (x, -0.31, 0.23), _turn(90, "x"))
        for x in (0.375 + 0.18, -0.375 - 0.18)
    ]
    sun = (math.sin(1.0 * azimuth), -math.cos(1.0 * azimuth), 0.7 + 0.5 * elevation)
    return World(
        [
            Solid(Ellipsoid((0.56, 0.62, 0.60)), flat(skin), (0.0, 0.0, 0.25), gloss=glow),
            Solid(Ellipsoid((0.60, 0.62, 0.60)), flat(hair), (0.0, 0.10, 0.36), gloss=(0.3, 30.0)),
            Solid(Ellipsoid((0.42, 0.46, 0.36)), flat(skin), on_jaw(0, -0.06, -0.22), frame, glow),
            Solid(Ellipsoid((0.36, 0.38, 0.30)), flat((0.32, 0.06, 0.08)), (0.0, -0.08, -0.16)),
            Solid(Box((0.1, 0.02, 0.035)), flat((0.97, 0.96, 0.92)), (0.0, -0.47, -0.13)),
            Solid(Ellipsoid((0.075, 0.13, 0.12)), flat(skin), (0.0, -0.62, 0.04), gloss=glow),
            *[
                Solid(Ellipsoid((0.06, 0.11, 0.15)), flat(skin), (x, 0.02, 0.15))
                for x in (0.58, -0.58)
            ],
            Solid(Cylinder(0.24, 0.3), flat(0.9 * skin), (0.0, 0.08, -0.6)),
            Solid(Ellipsoid((0.85, 0.42, 0.35)), flat(dress), (0.0, 0.1, -1.0)),
            *eyes,
            *lifted,
            *rims,
            bridge,
            *temples,
        ],
        sun=sun,
    )


WORLDS: dict[str, Callable[[torch.Generator], World]] = {
    "checker": _checker,
    "boxes": _boxes,
    "stripes": _stripes,
    "glossy": _glossy,
    "glass": _glass,
    "smooth_surfaces": _smooth_surfaces,
    "texture": _texture,
    "avatar": lambda random: _avatar(random, torch.zeros(CODE)),
    "thin": _thin,
    "fog": _fog,
}
"""What `world` builds, by name."""
