"""A training loop over any data set that can be killed at any moment and goes on exactly.

It runs on accelerate: on a CPU, a GPU, or many processes that `torchrun` or `accelerate launch`
started, in mixed precision. Whatever is random in a step is seeded by the step's number, and the
learning rate is a function of it, so that a checkpoint holds no more than weights, the
optimizer's averages and the number. The gradient of a step is that of the mean over the batch,
however many parts and processes the batch is cut into.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchzoo.errors import TorchzooError
from torchzoo.files import write_json
from torchzoo.finetuning import checkpoints, log
from torchzoo.finetuning.preparing import accelerator_for, average_of, freeze
from torchzoo.finetuning.recipe import Recipe, Run, Task
from torchzoo.finetuning.state import load_tensors, tensors_of, weights_of

Progress = Callable[[int, int, str], None]


def finetune(
    model: nn.Module,
    task: Task,
    train: Dataset[Any],
    test: Dataset[Any],
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    fsdp: bool = False,
    progress: Progress = lambda done, total, text: None,
) -> Run:
    """Train a model with AdamW, a warm-up and a cosine, in place.

    In `out` are `log.csv`, a row an epoch, `best.safetensors` and `last.safetensors`, weights of
    the model (of their average with `ema`), `recipe.json`, `checkpoints`, and events for
    TensorBoard where that is installed.

    Args:
        model: The model; it is left in evaluation mode, with the weights of the last step.
        task: Loss and metric.
        train: Rows to train on, each a tuple of tensors.
        test: Rows to evaluate on after each epoch.
        recipe: How to train.
        out: Folder for all files; None writes none.
        resume: Go on from the last checkpoint in `out`, bit for bit where operators are
            deterministic; without one start.
        device: `"cpu"` or None, which takes an accelerator where there is one.
        fsdp: Shard parameters and the optimizer's averages over the processes (FSDP2).
        progress: Called after each step with steps done, steps in all, and a line.

    Raises:
        ValueError: `resume` without `out`.
        UnknownNameError: A glob of `freeze` fits no parameter.
        TorchzooError: No rows; a folder that holds a run where none is resumed, or one of another
            recipe or model; a batch that doesn't fit into memory; a loss that is not finite.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from torchzoo.finetuning import classification
        >>> x = torch.randn(32, 3)
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> run = finetune(nn.Linear(3, 2), classification(), data, data, Recipe(lr=0.1))
        >>> run.step, run.best > 0.8
        (10, True)
    """
    if resume and out is None:
        raise ValueError("out: expected the folder of the run to resume, got None")
    return Loop(model, task, train, test, recipe or Recipe(), out, device, fsdp).run(
        resume, progress
    )


class Loop:
    """One run of `finetune`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train: Dataset[Any],
        test: Dataset[Any],
        recipe: Recipe,
        out: str | Path | None,
        device: str | None,
        fsdp: bool,
    ) -> None:
        self.task, self.train, self.test, self.recipe = task, train, test, recipe
        self.rows, self.test_rows = (len(data) for data in (train, test))  # type: ignore[arg-type]
        if not self.rows or not self.test_rows:
            raise TorchzooError("expected rows to train on and to test on, got none")
        if fsdp and recipe.ema:
            raise TorchzooError("ema: an average of sharded weights is not kept; expected none")
        self.out = Path(out) if out is not None else None
        self.accelerator = accelerator_for(recipe.precision, device, fsdp)
        freeze(model, recipe.freeze)
        self.plain = model.to(self.accelerator.device)
        self.ema = average_of(self.plain, recipe.ema) if recipe.ema else None
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        self.epoch_steps = math.ceil(self.rows / recipe.batch_size)
        self.steps = recipe.epochs * self.epoch_steps
        self.state = Run()

    def run(self, resume: bool, progress: Progress) -> Run:
        if self.out:
            self._load() if resume else self._check_new(self.out)
        with self._memory():
            self._train(progress)
        self.accelerator.wait_for_everyone()
        self._finish()
        return self.state

    def _train(self, progress: Progress) -> None:
        """Do the steps that are left, with an evaluation after each epoch."""
        state, start = self.state, time.perf_counter()
        save_every = self.recipe.save_every or self.epoch_steps
        while state.step < self.steps:
            epoch = state.step // self.epoch_steps
            for loss in self._epoch(epoch, state.step % self.epoch_steps):
                state.step += 1
                if state.step % self.epoch_steps == 0:
                    self._end_epoch(epoch, time.perf_counter() - start)
                if self.out and (state.step % save_every == 0 or state.step == self.steps):
                    self._save()
                metric = self.task.metric
                text = f"  {metric} {state.history[-1][metric]:.3f}" if state.history else ""
                progress(state.step, self.steps, f"loss {loss:.3g}{text}")

    def _epoch(self, epoch: int, done: int) -> Iterator[float]:
        """Do the steps of an epoch that are left, each when its loss is asked for."""
        recipe, accelerator = self.recipe, self.accelerator
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        # Batches of equal size, so that no tiny one is left over.
        batches = torch.randperm(self.rows, generator=generator).tensor_split(self.epoch_steps)
        batches = batches[done:]
        parts = [self._mine(part) for batch in batches for part in self._cut(batch)]
        loader = iter(self._loader(self.train, parts))
        self.model.train()
        for batch in batches:
            self._seed(self.state.step)
            self.task.start(self.state.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.rate(self.state.step, self.steps)
            total, cuts = 0.0, self._cut(batch)
            for index, cut in enumerate(cuts):
                share = self._rows(cut) * accelerator.num_processes / len(batch)
                last = index == len(cuts) - 1
                with nullcontext() if last else accelerator.no_sync(self.model):
                    total += self._backward(next(loader), share)
            if recipe.clip is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update_parameters(self.plain)
            total = float(self._mean(torch.tensor([total]))[0])
            if not math.isfinite(total):
                raise TorchzooError(
                    f"the loss is {total} at step {self.state.step}; try a lower lr"
                )
            self.state.loss_sum += total * len(batch)
            yield total

    def _backward(self, batch: Sequence[Tensor], share: float) -> float:
        """Add the gradient of a part's loss times its share; gives that."""
        batch = [value.to(self.accelerator.device) for value in batch]
        loss = self.task.loss(self.model, *batch) * share
        self.accelerator.backward(loss)
        return float(loss.detach())

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Say what to do where memory runs out."""
        size, parts = self.recipe.batch_size, self.recipe.accumulate
        try:
            yield
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise TorchzooError(
                f"out of memory with a batch size of {size} in {parts} part(s); try {2 * parts} "
                f"parts (accumulate), which learn the same, or a batch size of {max(size // 2, 1)}"
            ) from error

    def _cut(self, batch: Tensor) -> tuple[Tensor, ...]:
        return batch.tensor_split(min(self.recipe.accumulate, len(batch)))

    def _rows(self, rows: Tensor) -> int:
        """How many of these rows are this process's."""
        return len(rows[self.accelerator.process_index :: self.accelerator.num_processes])

    def _mine(self, rows: Tensor) -> list[int]:
        """This process's rows; the first one, which then has no share, where there are none."""
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        return (mine if len(mine) else rows[:1]).tolist()

    def _loader(self, data: Dataset[Any], batches: Sequence[list[int]]) -> Any:
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=self.recipe.workers,
            generator=torch.Generator().manual_seed(self.recipe.seed),
        )

    def _seed(self, step: int) -> None:
        """Seed all generators for a step, each process otherwise."""
        from accelerate.utils import set_seed

        mixed = (self.recipe.seed * 1_000_003 + step) * self.accelerator.num_processes
        set_seed((mixed + self.accelerator.process_index) % 2**32)

    def _mean(self, sums: Tensor) -> Tensor:
        """The mean of the processes' values."""
        return self.accelerator.reduce(sums.to(self.accelerator.device), "mean")

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and metric over the test rows, of the averaged weights where there are some."""
        model = self.plain if self.ema is None else self.ema.module
        model.eval()
        order = torch.arange(self.test_rows).split(self.recipe.batch_size)
        loader = self._loader(self.test, [self._mine(part) for part in order])
        sums = torch.zeros(3, dtype=torch.float64)
        for part, batch in zip(order, loader, strict=True):
            rows = self._rows(part)
            batch = [value.to(self.accelerator.device) for value in batch]
            loss, score = self.task.loss(model, *batch), self.task.score(model, *batch)
            row = (float(loss) * rows, float(score.sum()) * (rows > 0), rows)
            sums += torch.tensor(row, dtype=torch.float64)
        loss_sum, score_sum, count = self._mean(sums).tolist()
        return loss_sum / count, score_sum / count

    def _end_epoch(self, epoch: int, seconds: float) -> None:
        """Evaluate, note a row, and keep the weights if they are the best so far."""
        state, metric = self.state, self.task.metric
        test_loss, score = self.evaluate()
        row = {
            "epoch": epoch + 1,
            "step": state.step,
            "loss": state.loss_sum / self.rows,
            "test_loss": test_loss,
            metric: score,
            "rate": self.recipe.rate(state.step - 1, self.steps),
            "seconds": round(seconds, 3),
        }
        state.history.append(row)
        state.loss_sum = 0.0
        best, higher = state.best, self.task.higher
        if best is None or (score > best if higher else score < best):
            state.best = score
            self._write_weights("best")
        if self.out and self.accelerator.is_main_process:
            log.write(self.out, state.history)

    def _write_weights(self, name: str) -> None:
        """Write the weights that are evaluated."""
        if self.out is None:
            return
        ema = self.ema
        tensors = weights_of(self.model) if ema is None else ema.module.state_dict()
        if self.accelerator.is_main_process:
            checkpoints.save_tensors(self.out / f"{name}.safetensors", tensors)

    def _finish(self) -> None:
        self._write_weights("last")
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()
        if self.out and self.accelerator.is_main_process:
            write_json(self.out / "recipe.json", self._recipe())
            log.plot(self.out, self.state.history, self.task.metric)

    def _recipe(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self.recipe)))

    def _save(self) -> None:
        """Write a checkpoint, which `_load` goes on from."""
        assert self.out is not None
        scaler = self.accelerator.scaler
        state = {
            "recipe": self._recipe(),
            "run": asdict(self.state),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        tensors = tensors_of(self.model, self.optimizer.optimizer, self.ema)
        if self.accelerator.is_main_process:
            checkpoints.save(self.out / "checkpoints", self.state.step, tensors, state)

    def _check_new(self, out: Path) -> None:
        if checkpoints.steps(out / "checkpoints"):
            raise TorchzooError(f"{out} holds a run; resume it, or take another folder")

    def _load(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        assert self.out is not None
        found = checkpoints.load_last(self.out / "checkpoints")
        if found is None:
            return
        mine, theirs = self._recipe(), found.state["recipe"]
        if other := [key for key in mine if mine[key] != theirs.get(key)]:
            key = other[0]
            raise TorchzooError(
                f"{self.out} was made with {key} = {theirs.get(key)}, got {mine[key]}; resume "
                "with the same recipe, or take another folder"
            )
        try:
            load_tensors(found.tensors, self.model, self.optimizer.optimizer, self.ema)
        except (RuntimeError, KeyError) as error:
            raise TorchzooError(f"{self.out} holds another model: {error}") from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.state = Run(**found.state["run"] | {"resumed": found.step})


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, for which only accelerators have a class."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
