"""`torchzoo splat train`: a scene of Gaussians from pictures with known cameras."""

from __future__ import annotations

import os
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchzoo.cli._models import training_progress
from torchzoo.cli._output import Json, new_table, print_json, stderr, stdout, working
from torchzoo.cli._where import Device, check_folder, resolve_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchzoo.experiments.splatting.scenes import Views
    from torchzoo.splatting.fitting import SplatTrainer
    from torchzoo.splatting.perceptual import Measure
    from torchzoo.splatting.protocol import DensifyStrategy, TrainStep


_COLUMNS = {
    "step": ("step", ".0f"),
    "loss": ("loss", ".4f"),
    "train_psnr": ("train PSNR", ".2f"),
    "test_psnr": ("held-out PSNR", ".2f"),
    "test_ssim": ("SSIM", ".4f"),
    "splats": ("splats", ",.0f"),
    "seconds": ("seconds", ".1f"),
}
"""Title and format of what the log says, by its key."""


class Strategy(StrEnum):
    """How Gaussians come and go."""

    default = "default"
    mcmc = "mcmc"
    turbo = "turbo"
    none = "none"


def train(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A capture: a COLMAP model or transforms.json, with its images.",
            show_default=False,
        ),
    ] = None,
    scene: Annotated[
        str | None,
        typer.Option(help="A built-in, ray-traced scene instead.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all files.")] = Path(
        "torchzoo-splat"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Steps; 30,000 are a run of full size.")] = 2000,
    strategy: Annotated[
        Strategy,
        typer.Option(help="How Gaussians come and go; turbo adds them as the loss converges."),
    ] = Strategy.default,
    cap: Annotated[
        int | None,
        typer.Option(min=1, help="Gaussians at most.", show_default="a picture's pixels"),
    ] = None,
    sh_degree: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="Degree of the colours.", show_default="3, built-in 1"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Longer side of the pictures.", show_default="64 or the images'"),
    ] = None,
    views: Annotated[int, typer.Option(min=2, help="Views of a built-in scene.")] = 60,
    points: Annotated[
        int | None, typer.Option(min=1, help="Points to begin with, at most.", show_default="all")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Views a step.", show_default="one a process")
    ] = None,
    dilation: Annotated[int, typer.Option(min=1, help="Render every so many-th pixel.")] = 1,
    absgrad: Annotated[bool, typer.Option("--absgrad", help="Grow by absolute gradients.")] = False,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between checkpoints.", show_default="a tenth of them"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes CUDA.")] = Device.auto,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, bit for bit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a scene of 3-D Gaussians on pictures; every eighth is held out to measure it.

    In the folder are scene.ply, log.csv, preview.png with held-out pictures above what the scene
    shows there, and the checkpoints. LPIPS is measured too, of pictures of 32 pixels and more, if
    lpips or torchmetrics is installed and torch's cache has the weights of torchvision's VGG16 or
    AlexNet; nothing is downloaded.

    On several processes: torchrun --nproc-per-node 2 -m torchzoo splat train …

    Example: [bold]torchzoo splat train --scene checker -o checker[/bold]
    """
    if (path is None) == (scene is None):
        raise typer.BadParameter("expected a PATH or --scene NAME, one of them")
    check_folder(out)
    with working("importing torch"):
        target = resolve_device(device)
        from torchzoo.experiments.splatting import scenes
        from torchzoo.splatting.fitting import SplatTrainer
        from torchzoo.splatting.scene import GaussianScene
    with working("reading pictures"):
        if scene is not None:
            found = scenes.built_in(scene, views=views, size=size or 64, points=points, seed=seed)
        else:
            assert path is not None
            found = scenes.captured(path, size=size, points=points, seed=seed)
    with _processes(target) as (rank, count, place):
        mcmc = strategy is Strategy.mcmc
        splats = GaussianScene.from_points(
            found.points,
            found.colors,
            sh_degree=(1 if scene else 3) if sh_degree is None else sh_degree,
            init_opacity=0.5 if mcmc else 0.1,
            init_scale=0.1 if mcmc else 1.0,
            image_size=found.images.shape[1:3],
        ).to(place)
        measured = _Measured(found, steps, out, resume, quiet=rank > 0)
        trainer = SplatTrainer(
            splats,
            found.cameras[found.train_ids],
            found.images[found.train_ids],
            steps=steps,
            strategy=_strategy(strategy, cap, absgrad, found),
            batch=batch or count,
            dilation=dilation,
            seed=seed,
            callbacks=(measured,),
        )
        measured.trainer = trainer
        with training_progress(scene or str(path)) as tick:
            trainer.fit(
                out=out / "checkpoints", save_every=save_every, resume=resume, progress=tick
            )
        if rank == 0:
            _finish(trainer, found, measured.rows, out, as_json)


def _strategy(
    kind: Strategy, cap: int | None, absgrad: bool, views: Views
) -> DensifyStrategy | None:
    from torchzoo.splatting.strategy import DefaultStrategy, MCMCStrategy
    from torchzoo.splatting.turbo import TurboStrategy

    if absgrad and kind is not Strategy.default:
        raise typer.BadParameter("--absgrad belongs to --strategy default")
    pixels, points = views.images[0, ..., 0].numel(), len(views.points)
    most = cap or pixels
    match kind:
        case Strategy.mcmc:
            return MCMCStrategy(cap_max=most)
        case Strategy.turbo:
            if cap is not None and cap < points:
                raise typer.BadParameter(
                    f"--cap: --strategy turbo begins with {points} points, got {cap}; "
                    "raise it, or take fewer --points"
                )
            return TurboStrategy(cap_max=max(most, points))
        case Strategy.default:
            return DefaultStrategy(cap_max=most, absgrad=absgrad)
    return None


class _Measured:
    """Measures the held-out views eight times in a run, and keeps the rows in `log.csv`.

    Not ten times: there opacities have just been reset.
    """

    def __init__(self, views: Views, steps: int, out: Path, resume: bool, *, quiet: bool) -> None:
        self.views, self.out, self.quiet = views, out, quiet
        self.every = max(1, steps // 8)
        self.trainer: SplatTrainer | None = None
        self.rows: list[dict[str, float]] = self._before() if resume else []

    def __call__(self, step: TrainStep) -> None:
        trainer = self.trainer
        assert trainer is not None
        if self.quiet or (step.number % self.every and step.number != trainer.steps):
            return
        history, held = trainer.history, self.views.test_ids
        row = {
            "step": step.number,
            "loss": step.loss,
            "train_psnr": sum(history["psnr"][-100:]) / len(history["psnr"][-100:]),
            "splats": trainer.scene.num_gaussians,
            "seconds": round(history["seconds"][-1], 3),
        }
        if len(held):
            scores = trainer.evaluate(
                self.views.cameras[held], self.views.images[held], more=self.perceptual
            )
            row |= {f"test_{name}": value for name, value in scores.items()}
        self.rows = [old for old in self.rows if old["step"] < step.number] + [row]
        from torchzoo.finetuning import log

        log.write(self.out, self.rows)

    @cached_property
    def perceptual(self) -> dict[str, Measure]:
        """LPIPS, where it can be had."""
        from torchzoo.splatting.perceptual import find_lpips

        assert self.trainer is not None
        return find_lpips(*self.views.images.shape[1:3], device=self.trainer.device)

    def _before(self) -> list[dict[str, float]]:
        """The rows that an interrupted run has written."""
        import csv

        try:
            with (self.out / "log.csv").open(encoding="utf-8") as file:
                return [
                    {key: float(value) for key, value in row.items() if value}
                    for row in csv.DictReader(file)
                ]
        except (OSError, ValueError):
            return []


@contextmanager
def _processes(device: str) -> Iterator[tuple[int, int, str]]:
    """Join the processes that torchrun started; yields this one's number, how many, its device."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1, device
        return
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank(), count, f"cuda:{local}" if device == "cuda" else device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _finish(
    trainer: SplatTrainer, views: Views, rows: list[dict[str, float]], out: Path, as_json: bool
) -> None:
    """Write the scene and a preview, and say how good it is."""
    from torchzoo.splatting import formats

    _preview(trainer, views, out / "preview.png")
    path = formats.save(trainer.scene.cpu(), out / "scene.ply")
    if as_json:
        print_json({"scene": str(path), "splats": trainer.scene.num_gaussians, "log": rows})
        return
    columns = _COLUMNS | {
        key: (key.removeprefix("test_").replace("_", " ").upper(), ".4f")
        for key in dict.fromkeys(key for row in rows for key in row)
        if key.startswith("test_lpips")
    }
    table = new_table()
    for title, _ in columns.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            *(format(row[key], kind) if key in row else "–" for key, (_, kind) in columns.items())
        )
    stdout().print(table)
    stdout().print(f"{trainer.scene.num_gaussians:,} Gaussians in {path}", soft_wrap=True)
    stderr().print(f"look at it: torchzoo splat view {path}", soft_wrap=True, style="dim")


def _preview(trainer: SplatTrainer, views: Views, path: Path) -> None:
    """Up to four held-out pictures, and below each what the scene shows there."""
    import torch
    from PIL import Image

    from torchzoo.files import atomic_path

    chosen = (views.test_ids if len(views.test_ids) else views.train_ids)[:4]
    truth = views.images[chosen]
    truth = truth.float() / 255 if truth.dtype == torch.uint8 else truth
    with torch.no_grad():
        shown = trainer.scene.render(views.cameras[chosen].to(trainer.device)).image
    assert shown is not None
    columns = [torch.cat(pair) for pair in zip(truth, shown.cpu(), strict=True)]
    pixels = (torch.cat(columns, 1).clamp(0, 1) * 255).round().byte().numpy()
    with atomic_path(path) as part:
        Image.fromarray(pixels).save(part, "PNG")
