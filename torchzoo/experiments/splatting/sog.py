"""Paper 27: do Gaussians that keep themselves on a smooth grid make small files of good pictures?

A textured scene is trained with plain densification and with the grid sorted and smoothed, and all
of them are written by the same image codec.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from torchzoo.data.splat_scenes import SyntheticScene, make_scene
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.splatting import (
    DefaultStrategy,
    GaussianScene,
    GridCodec,
    SelfOrganizingScene,
    SelfOrganizingStrategy,
    SplatTrainer,
)

ARMS = ("plain, shuffled", "plain, sorted at the end", "sorted in training", "full method")
SHUFFLED, LATE, SORTED, FULL = ARMS
PLY_BYTES, PLY_BYTES_0 = 236, 56
"""Bytes of a Gaussian in a float32 PLY file without normals, with colours of degree 3 and 0."""


def start(data: SyntheticScene, seed: int) -> SelfOrganizingScene:
    """What every arm begins with."""
    torch.manual_seed(seed)
    return SelfOrganizingScene.from_points(data.points, data.colors, sh_degree=3)


def train(data: SyntheticScene, arm: str, context: Context) -> tuple[SelfOrganizingScene, float]:
    """A trained scene, and the processor seconds of its sorts and steps."""
    options = context.options
    scene, ids = start(data, context.seed), data.train_ids
    shared: dict[str, Any] = {"refine_every": options["every"], "cap_max": options["points"]}
    random = torch.Generator().manual_seed(context.seed)
    started = time.process_time()
    strategy: DefaultStrategy
    if arm == SHUFFLED:
        strategy = DefaultStrategy(**shared)
    else:
        strategy = SelfOrganizingStrategy(smoothness=1.0 if arm == FULL else 0.0, **shared)
        scene.to_square_()
        scene.sort_(generator=random)
    SplatTrainer(
        scene,
        data.cameras[ids],
        data.images[ids],
        steps=options["steps"],
        strategy=strategy,
        seed=context.seed,
    ).fit()
    return scene, time.process_time() - started


def quality(scene: GaussianScene, data: SyntheticScene) -> dict[str, float]:
    """PSNR and SSIM of held-out views."""
    cameras, images = data.cameras[data.test_ids], data.images[data.test_ids]
    return SplatTrainer(scene, cameras, images, steps=1).evaluate(cameras, images)


def encoded(scene: GaussianScene, folder: Path) -> tuple[int, GaussianScene]:
    """Bytes of the scene's files, and what these hold."""
    total = GridCodec().encode(scene, folder)["total"]
    assert total == sum(file.stat().st_size for file in folder.iterdir())
    return total, GridCodec.decode(folder)


def without_directions(scene: GaussianScene) -> GaussianScene:
    """The scene with colours of degree 0."""
    return GaussianScene.from_tensors(
        *(scene.get_parameter(n) for n in ("means", "quats", "log_scales", "opacity_logits")),
        scene.sh0,
    )


def trial(context: Context) -> dict[str, float]:
    """Bytes, quality and time of all arms."""
    options = context.options
    data = make_scene(
        "texture", options["views"], options["size"], context.seed, n_points=options["points"]
    )
    random = torch.Generator().manual_seed(context.seed)
    figures: dict[str, float] = {}

    def note(arm: str, scene: SelfOrganizingScene, seconds: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            size, decoded = encoded(scene, Path(folder) / "all")
            flat, _ = encoded(without_directions(scene), Path(folder) / "flat")
        found = quality(decoded, data)
        figures[f"{arm}: bytes"] = size
        figures[f"{arm}: bytes, degree 0"] = flat
        figures[f"{arm}: Gaussians"] = scene.num_gaussians
        figures[f"{arm}: PSNR"], figures[f"{arm}: SSIM"] = found["psnr"], found["ssim"]
        figures[f"{arm}: seconds"] = seconds

    train(data, FULL, replace(context, options={**options, "steps": 2}))  # first calls take longer
    context.progress(SHUFFLED)
    scene, seconds = train(data, SHUFFLED, context)
    figures["uncompressed: PSNR"] = quality(scene, data)["psnr"]
    figures["uncompressed: Gaussians"] = scene.num_gaussians
    scene.to_square_()
    scene.keep(torch.randperm(scene.num_gaussians, generator=random))
    note(SHUFFLED, scene, seconds)
    started = time.process_time()
    scene.sort_(generator=random)
    note(LATE, scene, seconds + time.process_time() - started)
    for arm in (SORTED, FULL):
        context.progress(arm)
        scene, seconds = train(data, arm, context)
        figures[f"{arm}: PSNR before"] = quality(scene, data)["psnr"]
        note(arm, scene, seconds)
    return figures


def _seedwise(name: str, fold: Callable[..., float], *parts: Measurement) -> Measurement:
    return Measurement(name, tuple(fold(*v) for v in zip(*(p.values for p in parts), strict=True)))


def ratio(measured: Measurements, arm: str = FULL, *, flat: bool = False) -> Measurement:
    """How many times smaller than the plain scene's PLY file an arm's files are, seed by seed."""
    each = PLY_BYTES_0 if flat else PLY_BYTES
    size = measured[f"{arm}: bytes{', degree 0' if flat else ''}"]
    count = measured["uncompressed: Gaussians"]
    return _seedwise(f"{arm}: ratio", lambda n, b: each * n / b, count, size)


def _small(measured: Measurements) -> tuple[bool, str]:
    found, flat = ratio(measured), ratio(measured, flat=True)
    seeds = ", ".join(f"{value:.2f}" for value in found.values)
    text = f"{found} ({seeds}) times smaller than PLY; colours of degree 0: {flat}"
    return min(found.values) >= 8, text


def _ordered(*arms: str) -> Callable[[Measurements], tuple[bool, str]]:
    def test(measured: Measurements) -> tuple[bool, str]:
        sizes = [measured[f"{arm}: bytes"].values for arm in arms]
        holds = all(all(a < b for a, b in pairwise(seed)) for seed in zip(*sizes, strict=True))
        means = [sum(values) / len(values) / 1000 for values in sizes]
        text = ", ".join(f"{arm} {kb:.1f} kB" for arm, kb in zip(arms, means, strict=True))
        return holds, text

    return test


def _good(measured: Measurements) -> tuple[bool, str]:
    loss = measured[f"{FULL}: PSNR"] - measured["uncompressed: PSNR"]
    return loss.mean >= -0.5, f"{loss} dB"


def _quick(measured: Measurements) -> tuple[bool, str]:
    full, plain = measured[f"{FULL}: seconds"], measured[f"{SHUFFLED}: seconds"]
    found = _seedwise("time", lambda a, b: a / b, full, plain)
    return found.mean <= 1.25, f"{found} times {plain.mean:.1f} s"


def plot(measured: Measurements, figure: Any) -> None:
    """Bytes and quality of each seed, an arm a colour, and the time of an arm."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    colors = ("0.6", "tab:orange", "tab:green", "tab:blue")
    for arm, color in zip(ARMS, colors, strict=True):
        size = [value / 1000 for value in measured[f"{arm}: bytes"].values]
        left.plot(size, measured[f"{arm}: PSNR"].values, "o", ms=7, color=color, label=arm)
    plain = measured["uncompressed: PSNR"]
    ply = PLY_BYTES * measured["uncompressed: Gaussians"].mean / 1000
    left.axhline(plain.mean, color="0.4", ls="--", lw=1, label=f"PLY of {ply:.0f} kB")
    left.axvline(ply / 8, color="tab:red", ls=":", lw=1, label="an eighth of it")
    left.set_xlabel("kB on disk")
    left.set_ylabel("PSNR of held-out views (dB)")
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    seconds = [measured[f"{arm}: seconds"].mean for arm in ARMS]
    right.barh(range(4), seconds, color=colors)
    right.set_yticks(range(4), [arm.replace(", ", ",\n").replace(" in ", "\nin ") for arm in ARMS])
    right.invert_yaxis()
    right.set_xlabel("processor seconds")
    right.set_title("training and sorting")


EXPERIMENT = Experiment(
    paper=27,
    claim=Claim(
        statement=(
            "Gaussians that are sorted on a 2D grid, which a loss keeps smooth while they are "
            "trained, compress far better as images, at the same quality and training time."
        ),
        figure="8 to 26 times smaller than 3D Gaussian Splatting",
        source="abstract",
    ),
    setup=(
        "A ray-traced scene of noise textures, another one a seed, in 20 views of 64 x 64 pixels, "
        "17 or 18 of them trained on; 2,500 Gaussians at most with colours of degree 3, 300 steps "
        "of one view with the rates of short runs, densified every 60 steps. All arms are written "
        "by one codec: 14 bits for positions, 8 for base colours, 5 for other colours, 6 for the "
        "rest, lossless WebP or PNG, manifest included. Time is processor time. The paper's "
        "scenes have millions of Gaussians, which lie closer together, and JPEG XL."
    ),
    baseline=(
        "plain densification of the same engine with the same steps and as many Gaussians: as "
        "float32 PLY, and by the same codec shuffled and sorted once at the end"
    ),
    criteria=(
        Criterion("files of the full method at least 8 times smaller than PLY, all seeds", _small),
        Criterion(
            "bytes: full method < sorted in training < plain and shuffled, all seeds",
            _ordered(FULL, SORTED, SHUFFLED),
        ),
        Criterion("bytes: full method < plain, sorted at the end, all seeds", _ordered(FULL, LATE)),
        Criterion("PSNR of the decoded full method at least that of PLY - 0.5 dB, mean", _good),
        Criterion("time of the full method at most 1.25 times that of plain training", _quick),
    ),
    budgets={
        "full": {"seeds": 3, "views": 20, "size": 64, "points": 2500, "steps": 300, "every": 60},
        "smoke": {"seeds": 1, "views": 4, "size": 16, "points": 120, "steps": 4, "every": 2},
    },
    trial=trial,
    plot=plot,
)
