"""`torchzoo splat train`: a scene of Gaussians from pictures with known cameras."""

from __future__ import annotations

import os
from contextlib import contextmanager
from enum import StrEnum
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
    from torchzoo.splatting.protocol import DensifyStrategy, TrainStep


class Strategy(StrEnum):
    """How Gaussians come and go."""

    default = "default"
    mcmc = "mcmc"
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
        Strategy, typer.Option(help="How Gaussians come and go.")
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
    shows there, and the checkpoints.

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
            strategy=_strategy(strategy, cap or found.images[0, ..., 0].numel(), absgrad),
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


def _strategy(kind: Strategy, cap: int, absgrad: bool) -> DensifyStrategy | None:
    from torchzoo.splatting.strategy import DefaultStrategy, MCMCStrategy

    if absgrad and kind is not Strategy.default:
        raise typer.BadParameter("--absgrad belongs to --strategy default")
    if kind is Strategy.mcmc:
        return MCMCStrategy(cap_max=cap)
    return DefaultStrategy(cap_max=cap, absgrad=absgrad) if kind is Strategy.default else None


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
            scores = trainer.evaluate(self.views.cameras[held], self.views.images[held])
            row |= {"test_psnr": scores["psnr"], "test_ssim": scores["ssim"]}
        self.rows = [old for old in self.rows if old["step"] < step.number] + [row]
        from torchzoo.finetuning import log

        log.write(self.out, self.rows)

    def _before(self) -> list[dict[str, float]]:
        """The rows that an interrupted run has written."""
        import csv

        try:
            with (self.out / "log.csv").open(encoding="utf-8") as file:
                return [
                    {key: float(value) for key, value in row.items()}
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
    table = new_table()
    for column in ("step", "loss", "train PSNR", "held-out PSNR", "SSIM", "splats", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['step']:.0f}",
            f"{row['loss']:.4f}",
            f"{row['train_psnr']:.2f}",
            f"{row['test_psnr']:.2f}" if "test_psnr" in row else "–",
            f"{row['test_ssim']:.4f}" if "test_ssim" in row else "–",
            f"{row['splats']:,.0f}",
            f"{row['seconds']:.1f}",
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
