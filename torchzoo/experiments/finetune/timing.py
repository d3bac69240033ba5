"""Time, memory and operations of whole models, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.benchmark import measure, peak_bytes
from torchzoo.finetuning import logits_of
from torchzoo.flops import count_flops

WARM_UP = 0.3  # seconds a call; models run long enough to be warm soon


def time_models(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    rounds: int = 9,
    compiled: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Measure a forward and a training step of each model, all taking turns.

    Args:
        models: The models by name, on the device of the images; their gradients are cleared.
        images: A batch `(N, 3, S, S)`.
        rounds: Calls of each.
        compiled: Also measure them compiled.
        progress: Called with what is measured next.

    Returns:
        For each model `parameters`, `flops` of a forward, and for `forward` and `step` (and
        `compiled forward`, `compiled step`) the seconds and the peak of memory in bytes.
    """
    found: dict[str, dict[str, Any]] = {
        name: {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": count_flops(model, images),
        }
        for name, model in models.items()
    }
    kinds: dict[str, dict[str, Any]] = {"": dict(models)}
    if compiled:
        kinds["compiled "] = {name: torch.compile(model) for name, model in models.items()}
    for kind, ready in kinds.items():
        for what, maker in (("forward", _forward), ("step", _step)):
            progress(kind + what)
            calls = {name: maker(model, images) for name, model in ready.items()}
            seconds = measure(calls, images.device, rounds, warm_up=WARM_UP)
            for name, call in calls.items():
                memory = peak_bytes(call, images.device)
                found[name][kind + what] = {"seconds": seconds[name], "peak_bytes": memory}
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return found


def _forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return logits_of(model.eval()(images))

    return call


def _step(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = logits_of(model.train()(images)).float().logsumexp(-1).mean()
        loss.backward()
        return loss.detach()

    return call
