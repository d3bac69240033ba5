"""Time, memory and operations of modules, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchzoo.benchmark import measure, peak_bytes
from torchzoo.files import atomic_path
from torchzoo.flops import count_flops

WARM_UP = 0.3  # seconds a call


def time_modules(
    modules: Mapping[str, nn.Module],
    inputs: Sequence[Tensor],
    *,
    rounds: int = 9,
    backward: bool = True,
    compiled: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Measure a forward, and a training step, of each module, all taking turns.

    Args:
        modules: The modules by name, on the device of the inputs; their gradients are cleared.
        inputs: What each is called with. Gradients of those that require them are computed too.
        rounds: Calls of each.
        backward: Also measure forward and backward together, as `step`.
        compiled: Also measure them compiled.
        progress: Called with what is measured next.

    Returns:
        For each module `parameters`, `flops` of a forward, and for `forward` and `step` (and
        `compiled forward`, `compiled step`) the seconds and the peak of memory in bytes.

    Example:
        >>> found = time_modules({"linear": nn.Linear(3, 4)}, [torch.randn(5, 3)], rounds=3)
        >>> found["linear"]["parameters"], found["linear"]["flops"]
        (16, 120)
    """
    found: dict[str, dict[str, Any]] = {
        name: {
            "parameters": sum(p.numel() for p in module.parameters()),
            "flops": count_flops(module, [x.detach() for x in inputs]),
        }
        for name, module in modules.items()
    }
    kinds: dict[str, dict[str, Any]] = {"": dict(modules)}
    if compiled:
        kinds["compiled "] = {name: torch.compile(module) for name, module in modules.items()}
    makers = {"forward": _forward} | ({"step": _step} if backward else {})
    for kind, ready in kinds.items():
        for what, maker in makers.items():
            progress(kind + what)
            calls = {name: maker(module, inputs) for name, module in ready.items()}
            device = inputs[0].device
            seconds = measure(calls, device, rounds, warm_up=WARM_UP)
            for name, call in calls.items():
                memory = peak_bytes(call, device)
                found[name][kind + what] = {"seconds": seconds[name], "peak_bytes": memory}
    _clear(modules.values(), inputs)
    return found


def _forward(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return module.eval()(*inputs)

    return call


def _step(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        _clear([module], inputs)
        outputs = tree_leaves(module.train()(*inputs))
        loss = next(t for t in outputs if isinstance(t, Tensor) and t.requires_grad)
        loss = loss.float().square().mean()
        loss.backward()
        return loss.detach()

    return call


def _clear(modules: Any, inputs: Sequence[Tensor]) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)
    for tensor in inputs:
        tensor.grad = None


def save_plot(found: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw what `time_modules` found as bars, one picture of time and one of memory (PNG)."""
    from matplotlib.figure import Figure

    kinds = [key for key in next(iter(found.values())) if key not in ("parameters", "flops")]
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(kinds) * len(found)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(found)
    for index, (name, row) in enumerate(found.items()):
        place = [k + (index - (len(found) - 1) / 2) * height for k in range(len(kinds))]
        spread = [row[kind]["seconds"] for kind in kinds]
        median = [1e3 * s["median"] for s in spread]
        error = [[1e3 * (s["median"] - s["low"]) for s in spread]]
        error += [[1e3 * (s["high"] - s["median"]) for s in spread]]
        time.barh(place, median, height, xerr=error, label=name)
        peaks = [(row[kind]["peak_bytes"] or 0) / 2**20 for kind in kinds]
        memory.barh(place, peaks, height, label=name)
    time.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="ms (median and quartiles)")
    time.invert_yaxis()
    memory.set(xlabel="peak memory (MiB)")
    memory.legend(frameon=False)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
