"""Training a scene of Gaussians on pictures with known cameras.

A run can be killed at any moment and goes on to the very same scene: its checkpoints hold the
parameters, Adam's averages, the strategy's statistics and the states of the random generators, in
safetensors and JSON. On several processes each takes a share of every step's views; gradients are
summed, and all keep the same scene.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from torchzoo.common.images import psnr, ssim
from torchzoo.errors import TorchzooError
from torchzoo.finetuning import checkpoints
from torchzoo.splatting import processes
from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.fit_state import load_tensors, tensors_of
from torchzoo.splatting.losses import photometric_loss
from torchzoo.splatting.protocol import DensifyStrategy, TrainStep
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.schedules import (
    FULL_RATES,
    Rates,
    adam,
    base_rates,
    means_decay,
    scaled_steps,
    set_rates,
)

__all__ = ["SplatTrainer"]

Loss = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int, str], None]

FINAL_SHARE = 0.1
"""Share of the steps, the last ones, that take `final_batch` views."""


class SplatTrainer:
    """Trains a scene with Adam, in place.

    Args:
        scene: The scene; its parameters are on the device that trains.
        cameras: V cameras.
        images: What they see, `(V, H, W, 3)`: floating point in [0, 1], or uint8.
        steps: Steps of the run.
        strategy: Adds and removes Gaussians; None leaves them as they are.
        loss: Called with rendered and true pictures `(C, H, W, 3)`, gives a scalar, a mean over the
            C; None: 0.8 L1 + 0.2 (1 - SSIM).
        rates: Learning rates; `"full"`, `"short"`, or None, which takes `"short"` below 3,000
            steps. A mapping gives rates by name to what else the scene learns.
        sh_every: Steps until the degree of the colours rises by one; None: 1,000 of 30,000, at
            least 10.
        background: Colour `(3,)` behind the scene; None: black.
        batch: Views a step, of all processes.
        dilation: Render every so many-th pixel in each direction, from a random one on.
        final_batch: Views a step in the last tenth, where that is more than `batch`.
        seed: Seed of the order of the views and of all that the strategy draws.
        callbacks: Called with a `TrainStep` after each step.
        render_options: Further options of `GaussianScene.render`.

    Attributes:
        step: Steps done.
        queue: The views that come next.
        history: For each step done the `loss`, the `psnr` of its pictures before the step, the
            number of `splats` after it, and the `seconds` since the run began.

    Raises:
        ValueError: Pictures that don't fit the cameras, a count below 1, a batch that has no view
            for some process, rates that don't fit the scene.

    Example:
        >>> from torchzoo.splatting import Cameras, GaussianScene
        >>> gray = torch.full((1, 3), 0.5)
        >>> scene = GaussianScene.from_points(torch.zeros(1, 3), gray, sh_degree=0)
        >>> cameras = Cameras.orbit(3, radius=4.0, width=16, height=16)
        >>> trainer = SplatTrainer(scene, cameras, torch.ones(3, 16, 16, 3), steps=20)
        >>> history = trainer.fit()
        >>> history["psnr"][-1] > history["psnr"][0]
        True
    """

    def __init__(
        self,
        scene: GaussianScene,
        cameras: Cameras,
        images: Tensor,
        *,
        steps: int,
        strategy: DensifyStrategy | None = None,
        loss: Loss | None = None,
        rates: Rates = None,
        sh_every: int | None = None,
        background: Tensor | Sequence[float] | None = None,
        batch: int = 1,
        dilation: int = 1,
        final_batch: int = 1,
        seed: int = 0,
        callbacks: Sequence[Callable[[TrainStep], None]] = (),
        render_options: Mapping[str, Any] | None = None,
    ) -> None:
        counts = {"steps": steps, "batch": batch, "final_batch": final_batch, "dilation": dilation}
        for name, value in {**counts, "sh_every": 1 if sh_every is None else sh_every}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        _check_images(cameras, images)
        if dilation > min(cameras.width, cameras.height):
            size = (cameras.height, cameras.width)
            raise ValueError(f"dilation: got {dilation}, expected at most the pictures' {size}")
        self.scene, self.steps, self.batch, self.final_batch = scene, steps, batch, final_batch
        self.dilation, self.seed, self.callbacks = dilation, seed, tuple(callbacks)
        self.rank, self.processes = processes.rank(), processes.count()
        if batch < self.processes:
            raise ValueError(f"batch: got {batch}, expected at least {self.processes}, a process 1")
        self.device = scene.means.device
        self.cameras = cameras.to(self.device, scene.means.dtype)
        self.images = images.to(self.device)
        self.strategy = strategy or DensifyStrategy()
        self.loss = loss or photometric_loss
        self.sh_every = sh_every or scaled_steps(1000, steps, 10)
        self.background = _color(background, scene.means)
        self.render_options = dict(render_options or {})
        self.scene_scale = self.cameras.scene_scale
        names = [name for name, value in scene.named_parameters() if value.requires_grad]
        self.rates = base_rates(names, rates, steps=steps, scene_scale=self.scene_scale)
        self.step = 0
        self.history: dict[str, list[float]] = {
            k: [] for k in ("loss", "psnr", "splats", "seconds")
        }
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = adam(scene)
        self.strategy.begin(scene, steps)
        self.queue = torch.empty(0, dtype=torch.long)
        processes.broadcast(scene.state_dict().values())

    @property
    def progress(self) -> float:
        """The share of the steps that is done."""
        return self.step / self.steps

    def fit(
        self,
        *,
        out: str | Path | None = None,
        save_every: int | None = None,
        resume: bool = False,
        progress: Progress = lambda done, total, text: None,
    ) -> dict[str, list[float]]:
        """Do the steps that are left.

        Args:
            out: Folder of the checkpoints; None writes none.
            save_every: Steps between checkpoints; None: a tenth of the run.
            resume: Go on from the last checkpoint in `out`; without one start.
            progress: Called after each step with steps done, steps in all, and a line.

        Returns:
            The history.

        Raises:
            ValueError: `save_every` is below 1.
            TorchzooError: `out` holds a run where none is resumed, or a run of another kind; a loss
                that is not finite.
        """
        if save_every is not None and save_every < 1:
            raise ValueError(f"save_every: got {save_every}, expected at least 1")
        save_every = save_every or max(1, math.ceil(self.steps / 10))
        folder = Path(out) if out is not None else None
        if folder and resume:
            self._load(folder)
        elif folder and checkpoints.steps(folder):
            raise TorchzooError(f"{folder} holds a run; resume it, or take another folder")
        start = time.perf_counter() - (self.history["seconds"] or [0.0])[-1]
        smooth = math.nan
        while self.step < self.steps:
            done = self._train_step()
            self.history["seconds"].append(time.perf_counter() - start)
            for callback in self.callbacks:
                callback(done)
            if folder and (self.step % save_every == 0 or self.step == self.steps):
                self._save(folder)
            shown = self.history["psnr"][-1]
            smooth = shown if math.isnan(smooth) else 0.95 * smooth + 0.05 * shown
            progress(
                self.step, self.steps, f"PSNR {smooth:.2f}  {self.scene.num_gaussians:,} splats"
            )
        return self.history

    @torch.no_grad()
    def evaluate(
        self, cameras: Cameras, images: Tensor, *, more: Mapping[str, Loss] | None = None
    ) -> dict[str, float]:
        """Means over views of what the scene's pictures, clamped to [0, 1], are worth.

        Args:
            cameras: V cameras.
            images: What they see, `(V, H, W, 3)`.
            more: Further measures, called as the loss is, with one view at a time.

        Returns:
            `psnr`, in dB, `ssim`, and `more` by their names.
        """
        _check_images(cameras, images)
        cameras = cameras.to(self.device, self.scene.means.dtype)
        scores: dict[str, list[float]] = {}
        for camera, image in zip(cameras, images, strict=True):
            found = self._render(camera, {}).image.clamp(0, 1)
            truth = self._as_float(image[None].to(self.device))
            channels_first = (rearrange(x, "c h w f -> c f h w") for x in (found, truth))
            row = {"psnr": psnr(found, truth), "ssim": ssim(*channels_first)}
            row |= {name: measure(found, truth) for name, measure in (more or {}).items()}
            for name, value in row.items():
                scores.setdefault(name, []).append(value.item())
        return {name: math.fsum(values) / len(values) for name, values in scores.items()}

    def _train_step(self) -> TrainStep:
        """Do one step, and note it in the history."""
        views, (x, y) = self._draw_views(), self._draw_offset()
        mine, d = views[self.rank :: self.processes], self.dilation
        options: dict[str, Any] = {"absgrad": True} if self.strategy.absgrad else {}
        if d > 1:
            options |= {"dilation": d, "offset": (x, y)}
        degree = self.step // self.sh_every
        if degree < self.scene.sh_degree:
            options["sh_degree"] = degree
        output = self._render(self.cameras[mine], options)
        target = self._as_float(self.images[mine.to(self.device)][:, y::d, x::d])
        decay = means_decay(self.step, self.steps)
        step = TrainStep(
            number=self.step + 1,
            scene=self.scene,
            optimizer=self.optimizer,
            views=views,
            output=output,
            target=target,
            size=(self.cameras.height, self.cameras.width),
            scene_scale=self.scene_scale,
            means_rate=FULL_RATES["means"] * self.scene_scale * decay * len(views) ** 0.5,
            generator=self.generator,
            total=processes.total,
        )
        self.strategy.before_backward(step)
        share = len(mine) / len(views)
        loss = (self.loss(output.image, target) + self.strategy.penalty(self.scene)) * share
        step.loss, quality = self._noted(loss.detach(), output.image.detach(), target, share)
        loss.backward()
        processes.sum_gradients(self.scene.parameters())
        self.strategy.after_backward(step)
        set_rates(self.optimizer, self.rates, decay, len(views))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.strategy.after_step(step)
        self.step += 1
        row = {"loss": step.loss, "psnr": quality, "splats": float(self.scene.num_gaussians)}
        for name, value in row.items():
            self.history[name].append(value)
        return step

    def _render(self, cameras: Cameras, options: Mapping[str, Any]) -> Any:
        if self.background is not None:
            options = {"backgrounds": self.background, **options}
        return self.scene.render(cameras, **{**self.render_options, **options})

    def _as_float(self, images: Tensor) -> Tensor:
        images = images / 255 if images.dtype == torch.uint8 else images
        return images.to(self.scene.means.dtype)

    def _draw_views(self) -> Tensor:
        """The next views of a shuffled stack, which is filled again when it is empty."""
        late = self.step >= (1 - FINAL_SHARE) * self.steps
        batch = max(self.batch, self.final_batch) if late else self.batch
        while len(self.queue) < batch:
            more = torch.randperm(len(self.images), generator=self.generator, device=self.device)
            self.queue = torch.cat([self.queue, more.cpu()])
        views, self.queue = self.queue[:batch], self.queue[batch:]
        return views

    def _draw_offset(self) -> tuple[int, int]:
        """From which pixel on, in x and y, the step's pictures are rendered."""
        if self.dilation == 1:
            return 0, 0
        x, y = torch.randint(
            self.dilation, (2,), generator=self.generator, device=self.device
        ).tolist()
        return x, y

    def _noted(
        self, loss: Tensor, image: Tensor, target: Tensor, share: float
    ) -> tuple[float, float]:
        """Loss and mean PSNR over the views of all processes."""
        error = (image.clamp(0, 1) - target).square().flatten(1).mean(-1)
        quality = -10 * error.clamp_min(1e-10).log10().mean() * share
        value, mean = processes.total(torch.stack([loss, quality])).tolist()
        if not math.isfinite(value):
            raise TorchzooError(f"the loss is {value} in step {self.step + 1}; try lower rates")
        return value, mean

    def _config(self) -> dict[str, Any]:
        """By what a run is told from another."""
        return {
            "steps": self.steps,
            "batch": self.batch,
            "final_batch": self.final_batch,
            "dilation": self.dilation,
            "seed": self.seed,
            "sh_every": self.sh_every,
            "rates": self.rates,
            "background": None if self.background is None else self.background.tolist(),
            "images": list(self.images.shape),
            **self.strategy.config(),
        }

    def _save(self, folder: Path) -> None:
        """Write a checkpoint, which `_load` goes on from."""
        if self.rank == 0:
            checkpoints.save(folder, self.step, tensors_of(self), {"config": self._config()})

    def _load(self, folder: Path) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        found = checkpoints.load_last(folder)
        if found is None:
            return
        mine, theirs = self._config(), found.state.get("config", {})
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise TorchzooError(
                    f"{folder} was made with {key} = {theirs.get(key)}, got {mine.get(key)}; "
                    "resume with the same options, or take another folder"
                )
        try:
            load_tensors(self, found.tensors)
        except (RuntimeError, KeyError) as error:
            raise TorchzooError(f"{folder} holds another scene: {error}") from error
        self.step = found.step


def _check_images(cameras: Cameras, images: Tensor) -> None:
    expected = (len(cameras), cameras.height, cameras.width, 3)
    if not len(cameras):
        raise ValueError("cameras: got none, expected at least one")
    if tuple(images.shape) != expected:
        raise ValueError(f"images: got {tuple(images.shape)}, expected {expected} as the cameras")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images: got {images.dtype}, expected floating point or uint8")


def _color(background: Tensor | Sequence[float] | None, like: Tensor) -> Tensor | None:
    if background is None:
        return None
    color = torch.as_tensor(background).to(like)
    if color.shape != (3,):
        raise ValueError(f"background: got {tuple(color.shape)}, expected (3,)")
    return color
