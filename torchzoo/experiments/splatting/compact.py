"""Paper 26: is a scene whose masks, colours and geometry learn to be small a tenth of the bytes?

A textured scene is fitted as plain 3D Gaussian splatting and as a compact scene, on the same views,
points, cap and steps. What is measured of the compact scene was written to a file and read again.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchzoo import ops
from torchzoo.data.splat_scenes import SyntheticScene, make_scene
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.splatting import Cameras, DefaultStrategy, GaussianScene, SplatTrainer
from torchzoo.splatting.compact import Compact3DGS
from torchzoo.splatting.compact_training import CompactStrategy, compact_rates

PLAIN, COMPACT, PRUNED = "3DGS", "compact", "3DGS cut by opacity"
FLOATS = 59
"""Numbers of a splat of degree 3, without normals."""
FULL = 3_800
"""Splats of the baseline below which the fixed part of the file decides, and not the method."""
REPEATS = 15
VIEW = ("viewmats", "Ks", "width", "height")


def train(scene: GaussianScene, views: SyntheticScene, steps: int, cap: int, seed: int) -> float:
    """Fit a scene in place; the seconds it took."""
    compact = isinstance(scene, Compact3DGS)
    trainer = SplatTrainer(
        scene,
        views.cameras[views.train_ids],
        views.images[views.train_ids],
        steps=steps,
        strategy=(CompactStrategy if compact else DefaultStrategy)(cap_max=cap),
        rates=compact_rates(steps) if compact else None,
        seed=seed,
    )
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def quality(scene: GaussianScene, views: SyntheticScene) -> dict[str, float]:
    """PSNR and SSIM of the held-out views."""
    cameras, images = views.cameras[views.test_ids], views.images[views.test_ids]
    found = SplatTrainer(scene, cameras, images, steps=1, rates=_no_rates(scene))
    return found.evaluate(cameras, images)


def _no_rates(scene: GaussianScene) -> dict[str, float]:
    """Rates that let a trainer, which measures only, take any scene."""
    return {name: 0.0 for name, p in scene.named_parameters() if p.requires_grad}


def cut(scene: GaussianScene, count: int) -> GaussianScene:
    """The scene's most opaque splats, in 16-bit floats."""
    rows = scene.opacity_logits.argsort(descending=True)[:count]
    small = GaussianScene(len(rows), sh_degree=scene.sh_degree)
    for name, parameter in small.named_parameters():
        parameter.data.copy_(scene.get_parameter(name).detach()[rows].half())
    return small


@torch.no_grad()
def milliseconds(scenes: dict[str, GaussianScene], camera: Cameras) -> dict[str, float]:
    """Median time of one picture from splats whose colours are there, scenes taking turns."""
    splats: dict[str, dict[str, Any]] = {}
    for name, scene in scenes.items():
        splats[name] = {
            "means": scene.means,
            "quats": scene.unit_quats,
            "scales": scene.scales,
            "opacities": scene.opacities,
            "features": _colors(scene, camera),
        }
    view: dict[str, Any] = {name: getattr(camera, name) for name in VIEW}
    seconds: dict[str, list[float]] = {name: [] for name in scenes}
    for _ in range(REPEATS):
        for name, tensors in splats.items():
            started = time.perf_counter()
            ops.rasterize(**tensors, **view)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _colors(scene: GaussianScene, camera: Cameras) -> Tensor:
    if isinstance(scene, Compact3DGS):
        return scene.colors(camera)[0]
    dirs = scene.means - camera.centers
    return ops.sh_to_rgb(ops.spherical_harmonics(scene.sh_degree, dirs, scene.sh))


@torch.no_grad()
def color_milliseconds(scene: Compact3DGS, camera: Cameras) -> float:
    """Median time of all colours for one picture."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        scene.colors(camera)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def trial(context: Context) -> dict[str, float]:
    """Quality, splats, bytes and times of both scenes, and of the baseline cut to the same size."""
    options, seed = context.options, context.seed
    views = make_scene(
        "texture", options["views"], options["size"], seed, n_points=options["points"]
    )
    limits = (options["steps"], options["points"], seed)
    context.progress(PLAIN)
    plain = GaussianScene.from_points(views.points, views.colors)
    figures = {f"{PLAIN}: seconds": train(plain, views, *limits)}
    context.progress(COMPACT)
    compact = Compact3DGS.from_points(views.points, views.colors, field=options["field"])
    figures[f"{COMPACT}: seconds"] = train(compact, views, *limits)
    with tempfile.TemporaryDirectory() as folder:
        stored = {}
        for name, huffman in ((COMPACT, False), (f"{COMPACT}, entropy-coded", True)):
            path = Path(folder) / f"{huffman}.tzc"
            compact.save(path, huffman=huffman)
            stored[name] = Compact3DGS.load(path)
            figures[f"{name}: bytes"] = path.stat().st_size
    rivals = {PLAIN: plain, PRUNED: cut(plain, stored[COMPACT].num_gaussians), **stored}
    figures |= {f"{PLAIN}: bytes": 4 * FLOATS * plain.num_gaussians}
    figures |= {f"{PRUNED}: bytes": 2 * FLOATS * rivals[PRUNED].num_gaussians}
    for name, scene in rivals.items():
        found = quality(scene, views)
        figures |= {f"{name}: PSNR": found["psnr"], f"{name}: SSIM": found["ssim"]}
        figures[f"{name}: splats"] = scene.num_gaussians
    camera = views.cameras[views.test_ids[:1]]
    times = milliseconds({PLAIN: plain, COMPACT: stored[COMPACT]}, camera)
    figures |= {f"{name}: ms a picture": value for name, value in times.items()}
    figures["ms for the field's colours"] = color_milliseconds(stored[COMPACT], camera)
    return figures


def ratio(measured: Measurements, figure: str) -> Measurement:
    """The compact scene's figure over the baseline's, seed by seed."""
    pairs = zip(
        measured[f"{COMPACT}: {figure}"].values, measured[f"{PLAIN}: {figure}"].values, strict=True
    )
    return Measurement(f"ratio of {figure}", tuple(a / b for a, b in pairs))


def loss(measured: Measurements) -> Measurement:
    """PSNR that the compact scene is behind."""
    return measured[f"{PLAIN}: PSNR"] - measured[f"{COMPACT}: PSNR"]


def _is_full(measured: Measurements) -> bool:
    return min(measured[f"{PLAIN}: splats"].values) >= FULL


def _small(measured: Measurements) -> tuple[bool | None, str]:
    size, behind = ratio(measured, "bytes"), loss(measured)
    text = f"1/{1 / size.mean:.1f} of the bytes, {behind} dB behind"
    if not _is_full(measured):
        return None, f"{text}; void, as the baseline has fewer than {FULL} splats"
    return size.mean <= 0.1 and behind.mean <= 0.8, text


def _half(measured: Measurements) -> tuple[bool | None, str]:
    size = 2 * ratio(measured, "bytes").mean
    return (size <= 0.25) if _is_full(measured) else None, f"1/{1 / size:.1f}"


def _masked(measured: Measurements) -> tuple[bool, str]:
    share = ratio(measured, "splats")
    return share.mean <= 0.75, f"{share}"


def _mask_beats_cut(measured: Measurements) -> tuple[bool, str]:
    gain = measured[f"{COMPACT}: PSNR"] - measured[f"{PRUNED}: PSNR"]
    return min(gain.values) > 0, f"{gain} dB; least {min(gain.values):.2f}"


def _faster(measured: Measurements) -> tuple[bool, str]:
    names = (COMPACT, PLAIN)
    ours, theirs = (measured[f"{name}: ms a picture"] for name in names)
    field = measured["ms for the field's colours"]
    return ours.mean <= theirs.mean, f"{ours} ms against {theirs}; the colours take {field} ms"


def plot(measured: Measurements, figure: Any) -> None:
    """Quality against bytes, what is left of the splats, and the time of a picture."""
    quality, splats, times = figure.subplots(1, 3, width_ratios=(1.7, 0.8, 0.8))
    styles = {
        PLAIN: ("0.45", "o"),
        PRUNED: ("tab:orange", "s"),
        COMPACT: ("tab:blue", "o"),
        f"{COMPACT}, entropy-coded": ("tab:green", "^"),
    }
    for name, (color, marker) in styles.items():
        size = [b / 1000 for b in measured[f"{name}: bytes"].values]
        values = measured[f"{name}: PSNR"].values
        quality.plot(size, values, marker, ms=6, color=color, alpha=0.75, label=name)
    quality.set_xscale("log")
    quality.set_xlabel("kilobytes")
    quality.set_ylabel("PSNR of held-out views (dB)")
    quality.legend(fontsize=8)
    quality.grid(alpha=0.3)
    quality.set_title("quality and size", fontsize=10)
    panels = ((splats, "splats", "splats"), (times, "ms a picture", "milliseconds a picture"))
    for panel, what, title in panels:
        bars = [measured[f"{name}: {what}"] for name in (PLAIN, COMPACT)]
        errors = [bar.std_error for bar in bars]
        panel.bar([0, 1], [bar.mean for bar in bars], yerr=errors, color=["0.6", "tab:blue"])
        panel.set_xticks([0, 1], (PLAIN, COMPACT))
        panel.set_title(title, fontsize=10)


EXPERIMENT = Experiment(
    paper=26,
    claim=Claim(
        statement=(
            "A learned mask, a grid-based colour field and codebooks for geometry make a splat "
            "scene more than ten times smaller and faster to render, at the same quality."
        ),
        figure="more than 10 times less storage than 3DGS, higher speed, quality kept",
        source="abstract",
    ),
    setup=(
        "A ray-traced scene of noise textures, another one a seed: 20 views of 64 x 64 pixels, "
        "every eighth held out, 4,000 initial points, which are the cap too. 400 steps at the "
        "rates of short runs, codebooks in the last tenth; mask rate 0.1 and weight 1.5 / steps. "
        "The grid is cut to 6 levels of 1,024 entries and the network to 32 hidden units, so that "
        "the fixed part is about 40 KB; at full size it is about 25 MB and pays from about a "
        "million splats on. The compact scene is measured as its file gives it. Bytes of 3DGS are "
        "those of 59 32-bit floats a splat, without normals."
    ),
    baseline=(
        "3DGS of degree 3 from the same points, with the same cap, steps and rates; and its most "
        "opaque splats, as many as the compact scene has, in 16-bit floats"
    ),
    criteria=(
        Criterion(
            "file at most 1/10 of the 32-bit baseline, at a PSNR not more than 0.8 dB below its; "
            f"void if the baseline has fewer than {FULL:,} splats",
            _small,
        ),
        Criterion("file at most 1/4 of the baseline in 16-bit floats; void as above", _half),
        Criterion("splats at most 0.75 times the baseline's", _masked),
        Criterion(
            "PSNR above that of the baseline's most opaque splats at equal number, in every seed",
            _mask_beats_cut,
        ),
        Criterion("a picture, colours given, takes no longer than the baseline's", _faster),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "views": 20,
            "size": 64,
            "points": 4000,
            "steps": 400,
            "field": {"levels": 6, "log2_table": 10, "hidden": 32},
        },
        "smoke": {
            "seeds": 1,
            "views": 6,
            "size": 16,
            "points": 150,
            "steps": 10,
            "field": {"levels": 2, "log2_table": 6, "hidden": 8},
        },
    },
    trial=trial,
    plot=plot,
)
