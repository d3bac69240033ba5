"""Paper 159: does a third of the steps do, and does rendering a quarter of the pixels pay?

A textured scene is fitted by adaptive density control, by Turbo-GS in a third of the steps, and by
adaptive density control whose intervals are a third too, from the points that Turbo-GS begins
with. Then a fixed number of splats is fitted to larger pictures, whole and dilated.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torchzoo.data.splat_scenes import SyntheticScene, make_scene
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.splatting import (
    ConvergenceBudget,
    DefaultStrategy,
    DensifyStrategy,
    GaussianScene,
    SplatTrainer,
    TurboStrategy,
    densify_points,
)
from torchzoo.splatting.schedules import scaled_steps

PLAIN, TURBO, CONTROL = "all steps", "Turbo-GS, a third", "plain, a third"
ARMS = (PLAIN, TURBO, CONTROL)
ABLATIONS = ("without colours", "linear budget", "seen rarely too", "four views at the end")
FULL_PIXELS, DILATED, SAME_TIME = "d = 1", "d = 2", "d = 2, same time"
SCENE = "texture"
LEAST_GAIN = 0.3
"""Decibels that three times the steps must bring, or there is nothing to save."""


def schedule(steps: int, share: int) -> dict[str, int]:
    """The densification of a run of so many steps, for one that takes a `share`-th of them."""
    found = {
        "refine_start": scaled_steps(500, steps, 25),
        "refine_stop": scaled_steps(15_000, steps),
        "refine_every": scaled_steps(100, steps, 25),
    }
    return {name: max(1, value // share) for name, value in found.items()}


def strategy(arm: str, steps: int, cap: int, splats: int) -> DensifyStrategy:
    """How an arm densifies; `steps` are the baseline's."""
    if arm == PLAIN:
        return DefaultStrategy(cap_max=cap, reset_every=0, **schedule(steps, 1))
    third = schedule(steps, 3)
    if arm == CONTROL:
        return DefaultStrategy(cap_max=cap, reset_every=0, **third)
    changes: dict[str, dict[str, Any]] = {
        ABLATIONS[0]: {"color_prob": 0.0},
        ABLATIONS[1]: {"budget": ConvergenceBudget(splats, cap, lam=0.0)},
        ABLATIONS[2]: {"visit_quantile": 0.0},
    }
    return TurboStrategy(cap_max=cap, **third | changes.get(arm, {}))


def fit(
    arm: str, views: SyntheticScene, steps: int, cap: int, seed: int
) -> tuple[GaussianScene, dict[str, float]]:
    """Train an arm; the scene, and what it comes to on held-out views."""
    points, colors = views.points, views.colors
    if arm != PLAIN:
        points, colors = densify_points(points, colors)
    scene = GaussianScene.from_points(points, colors)
    trainer = SplatTrainer(
        scene,
        views.cameras[views.train_ids],
        views.images[views.train_ids],
        steps=steps if arm == PLAIN else steps // 3,
        strategy=strategy(arm, steps, max(cap, scene.num_gaussians), scene.num_gaussians),
        final_batch=4 if arm == ABLATIONS[3] else 1,
        seed=seed,
    )
    seen: list[int] = []
    trainer.callbacks = (lambda step: seen.append(len(step.views)),)
    seconds = trainer.fit()["seconds"][-1]
    found = trainer.evaluate(views.cameras[views.test_ids], views.images[views.test_ids])
    return scene, {
        "PSNR": found["psnr"],
        "SSIM": found["ssim"],
        "splats": scene.num_gaussians,
        "views": sum(seen),
        "seconds": seconds,
    }


def fewer_steps(name: str, context: Context) -> dict[str, float]:
    """Figures of all arms on a scene; the cap of all others is what the baseline ends with."""
    options, figures = context.options, dict[str, float]()
    views = make_scene(
        name, options["views"], options["size"], context.seed, n_points=options["points"]
    )
    cap = options["cap"]
    for arm in (*ARMS, *(ABLATIONS if options["ablations"] else ())):
        context.progress(f"{name}: {arm}")
        scene, found = fit(arm, views, options["steps"], cap, context.seed)
        cap = scene.num_gaussians if arm == PLAIN else cap
        figures |= {f"{name}, {arm}: {what}": value for what, value in found.items()}
    return figures


def fewer_pixels(context: Context) -> dict[str, float]:
    """Times of steps and PSNR of the training views: every pixel, and every second both ways."""
    options, figures = context.options["dilation"], dict[str, float]()
    views = make_scene(
        SCENE, options["views"], options["size"], context.seed, n_points=options["splats"]
    )
    cameras, images = views.cameras[views.train_ids], views.images[views.train_ids]
    steps, medians = options["steps"], dict[str, float]()
    for arm in (FULL_PIXELS, DILATED, SAME_TIME):
        context.progress(arm)
        if arm == SAME_TIME:
            steps = round(steps * medians[FULL_PIXELS] / medians[DILATED])
        scene = GaussianScene.from_points(views.points, views.colors)
        trainer = SplatTrainer(
            scene,
            cameras,
            images,
            steps=steps,
            dilation=1 if arm == FULL_PIXELS else 2,
            seed=context.seed,
        )
        ends = [0.0, *trainer.fit()["seconds"]]
        seconds = [end - start for start, end in pairwise(ends)]
        medians[arm] = statistics.median(seconds)
        figures |= {
            f"{arm}: steps": steps,
            f"{arm}: ms a step": 1000 * medians[arm],
            f"{arm}: PSNR": trainer.evaluate(cameras, images)["psnr"],
        }
    return figures


def trial(context: Context) -> dict[str, float]:
    """Figures of both parts."""
    figures = dict[str, float]()
    for name in context.options["scenes"]:
        figures |= fewer_steps(name, context)
    return figures | fewer_pixels(context)


def _psnrs(measured: Measurements) -> dict[str, Any]:
    return {arm: measured[f"{SCENE}, {arm}: PSNR"] for arm in ARMS}


def _pays(measured: Measurements) -> bool:
    """Whether three times the steps bring something, so that a third is not enough anyway."""
    found = _psnrs(measured)
    return (found[PLAIN] - found[CONTROL]).mean > LEAST_GAIN


def _third(measured: Measurements) -> tuple[bool | None, str]:
    found = _psnrs(measured)
    gap = found[TURBO] - found[PLAIN]
    text = f"{gap} dB; " + "; ".join(f"{arm} {value} dB" for arm, value in found.items())
    return gap.mean >= -0.3 if _pays(measured) else None, text


def _control(measured: Measurements) -> tuple[bool | None, str]:
    found = _psnrs(measured)
    gain = found[TURBO] - found[CONTROL]
    text = ", ".join(f"{value:+.2f}" for value in gain.values) + " dB"
    return min(gain.values) > 0 if _pays(measured) else None, text


def _faster(measured: Measurements) -> tuple[bool, str]:
    full, part = (measured[f"{arm}: ms a step"] for arm in (FULL_PIXELS, DILATED))
    ratio = part.mean / full.mean
    return ratio <= 0.6, f"{ratio:.2f} of the time: {part} against {full} ms"


def _same_time(measured: Measurements) -> tuple[bool, str]:
    gain = measured[f"{SAME_TIME}: PSNR"] - measured[f"{FULL_PIXELS}: PSNR"]
    same = measured[f"{DILATED}: PSNR"] - measured[f"{FULL_PIXELS}: PSNR"]
    return gain.mean >= 0.2, f"{gain} dB; after as many steps {same} dB"


def plot(measured: Measurements, figure: Any) -> None:
    """PSNR of each arm and seed, against views rendered, and against time for the dilated."""
    steps, pixels = figure.subplots(1, 2)
    styles = {PLAIN: ("0.4", "o"), TURBO: ("tab:blue", "o"), CONTROL: ("tab:orange", "s")}
    for arm, (color, marker) in styles.items():
        seen, values = (measured[f"{SCENE}, {arm}: {what}"].values for what in ("views", "PSNR"))
        steps.plot(seen, values, marker, color=color, alpha=0.7, label=arm)
    steps.set_xlim(left=0)
    steps.set_xlabel("views rendered in training")
    steps.set_ylabel("PSNR of held-out views (dB)")
    steps.set_title("a third of the steps", fontsize=10)
    colors = {FULL_PIXELS: "0.4", DILATED: "tab:green", SAME_TIME: "tab:blue"}
    for arm, color in colors.items():
        count, each, values = (
            measured[f"{arm}: {what}"].values for what in ("steps", "ms a step", "PSNR")
        )
        seconds = [n * ms / 1000 for n, ms in zip(count, each, strict=True)]
        pixels.plot(seconds, values, "o", color=color, alpha=0.7, label=arm)
    pixels.set_xlim(left=0)
    pixels.set_xlabel("seconds of training")
    pixels.set_ylabel("PSNR of training views (dB)")
    pixels.set_title("one pixel in d x d", fontsize=10)
    for panel in (steps, pixels):
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)


def _budget(**options: Any) -> Mapping[str, Any]:
    return {"seeds": 3, "scenes": [SCENE], "views": 24, "ablations": False} | options


EXPERIMENT = Experiment(
    paper=159,
    claim=Claim(
        statement=(
            "Densification by gradients of place and colour, under a budget that follows the "
            "convergence, fits scenes in a third of the steps at equal or better quality, and "
            "rendering a subset of the pixels makes steps on large images faster."
        ),
        figure="one third of the optimisation steps, novel views as good or better; up to 4K",
        source="abstract",
    ),
    setup=(
        "A ray-traced scene of noise textures, another one a seed. Fewer steps: 24 views of "
        "64 x 64 of which every eighth is held out, 800 points, at most 3,000 splats, 600 steps; "
        "Turbo-GS takes 200, begins with midpoints added to the points, and its cap is what the "
        "baseline ends with. Short-run rates and no resets of opacities for all, one view a step. "
        "Fewer pixels: 6 views of 384 x 384, 4,000 splats, 40 steps with all pixels and with one "
        "in four, and as many of the latter as take the same time; PSNR of the views trained on, "
        "whole."
    ),
    baseline=(
        "adaptive density control with three times the steps; and, as control, with a third of "
        "them, all its intervals a third, from the points and with the cap of Turbo-GS"
    ),
    criteria=(
        Criterion(
            "held-out PSNR: a third of the steps within 0.3 dB of all in the mean (void if all "
            f"are not {LEAST_GAIN} dB better than the control)",
            _third,
        ),
        Criterion("held-out PSNR: above the control in every seed (void as above)", _control),
        Criterion("one pixel in four: at most 0.6 of the time of a step", _faster),
        Criterion("one pixel in four: at least 0.2 dB better after the same time", _same_time),
    ),
    budgets={
        "full": _budget(
            size=64,
            points=800,
            cap=3000,
            steps=600,
            dilation={"views": 7, "size": 384, "splats": 4000, "steps": 40},
        ),
        "large": _budget(
            scenes=[SCENE, "smooth_surfaces"],
            size=96,
            points=800,
            cap=3000,
            steps=1800,
            ablations=True,
            dilation={"views": 7, "size": 1024, "splats": 4000, "steps": 40},
        ),
        "smoke": _budget(
            seeds=1,
            views=6,
            size=16,
            points=40,
            cap=120,
            steps=30,
            dilation={"views": 4, "size": 24, "splats": 50, "steps": 3},
        ),
    },
    trial=trial,
    plot=plot,
)
