"""Benchmarks: contenders side by side in one process, interleaved, as medians with their spread.

Absolute times on a shared machine say little, so what counts is the ratio of medians in one run,
beside what the machine can do at all: a copy and a matrix product are measured in the same run.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchzoo.experiment import describe, versions
from torchzoo.files import atomic_path
from torchzoo.ops import library

OURS = "torchzoo"
WARM_UP = 1.0  # seconds a contender; memory that a process has never touched is slow for a while


@dataclass(frozen=True)
class Case:
    """One size of one operation.

    Attributes:
        name: What is measured, with its sizes.
        make: Builds the inputs on a device and returns the contenders, name to call; ours is
            `"torchzoo"`, all others are peers that compute the same.
        flops: Floating-point operations that the result needs, by our count.
        bytes: Bytes that have to move at the least.
        size: The place on the horizontal axis of the plot.
        bar: The ratio of a peer's median to ours that is asked for on a CPU, if any.
        against: Which peer's; None: the best one's.
        rounds: At most so many are run; None: as many as asked for. For peers that take long.
    """

    name: str
    make: Callable[[torch.device], Mapping[str, Callable[[], Any]]]
    flops: float
    bytes: float
    size: float
    bar: float | None = None
    against: str | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Bench:
    """The cases of one operator."""

    op: str
    cases: Sequence[Case]


def run(
    bench: Bench,
    *,
    device: str | torch.device = "cpu",
    rounds: int = 15,
    only: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Time every case of a benchmark and return one JSON-ready object.

    Args:
        bench: The benchmark.
        device: Where to run it.
        rounds: How many times each contender of a case is called, one after the other in turn.
        only: Substrings; a case is run if its name holds one of them (all, if there are none).
        progress: Called with cases done, cases in all, and the next case's name.
    """
    device = torch.device(device)
    cases = [c for c in bench.cases if not only or any(text in c.name for text in only)]
    limits = machine_limits(device)
    rows = []
    for done, case in enumerate(cases):
        progress(done, len(cases), case.name)
        rows.append(_case(case, device, rounds, limits))
    progress(len(cases), len(cases), "")
    return {
        "op": bench.op,
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rounds": rounds,
        "limits": limits,
        "cases": rows,
    }


def _case(
    case: Case, device: torch.device, rounds: int, limits: dict[str, float]
) -> dict[str, Any]:
    calls = dict(case.make(device))
    if case.rounds is not None:
        rounds = min(rounds, case.rounds)
    found = measure(calls, device, rounds, warm_up=WARM_UP)
    peers = {name: row["median"] for name, row in found.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name])
    ours = found[OURS]["median"]
    floor = max(case.bytes / limits["bytes_per_s"], case.flops / limits["flops_per_s"])
    return {
        "name": case.name,
        "size": case.size,
        "rounds": rounds,
        "seconds": found,
        "peak_bytes": {name: peak_bytes(call, device) for name, call in calls.items()},
        "best_peer": best,
        "ratio": peers[best] / ours,
        "bar": case.bar,
        "bar_peer": case.against or best,
        "bar_ratio": peers[case.against or best] / ours,
        "gflops_per_s": case.flops / ours / 1e9,
        "gbytes_per_s": case.bytes / ours / 1e9,
        "share_of_limit": floor / ours,
    }


def measure(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    *,
    warm_up: float,
) -> dict[str, dict[str, float]]:
    """Seconds of each call: median and quartiles over rounds in which all take turns.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        rounds: How many times each is called.
        warm_up: Seconds that each is called before, for allocations, caches, initialisation.
    """
    for call in calls.values():
        call()
        start = time.perf_counter()
        while time.perf_counter() - start < warm_up:
            _seconds(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, device))
    return {name: _spread(values) for name, values in times.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """How much more memory than before a call holds at its peak, its result included.

    On a CPU these are pages of this process, which Linux counts; None where it doesn't.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        library.release_memory()  # what is kept for later counts as free
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        kept = call()
        del kept
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def machine_limits(device: torch.device) -> dict[str, float]:
    """What the machine can do at all: bytes moved by a copy and float32 FLOPs of a product."""
    count = 2**25 if device.type == "cpu" else 2**28
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device)
    out = torch.empty_like(a)
    copy, product = (lambda: target.copy_(source)), (lambda: torch.mm(a, a, out=out))
    best = {}
    for name, call in (("copy", copy), ("product", product)):
        best[name] = min(_seconds(call, device) for _ in range(6))
    return {"bytes_per_s": 8 * count / best["copy"], "flops_per_s": 2 * n**3 / best["product"]}


def table(result: Mapping[str, Any]) -> Any:
    """A rich table of a result of `run`."""
    from rich.table import Table

    title = (
        f"{result['op']} on {result['device']}, medians of {result['rounds']} interleaved rounds"
    )
    shown = Table(title=title)
    columns = ("case", "torchzoo", "best peer", "ratio", "asked", "of the limit", "memory")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("case", "best peer") else "right")
    for row in result["cases"]:
        ours, best = row["seconds"][OURS], row["seconds"][row["best_peer"]]
        asked = "" if row["bar"] is None else f"{row['bar']:.3g}x"
        if row["bar_peer"] != row["best_peer"]:
            asked += f" {row['bar_peer']}: {row['bar_ratio']:.2f}x"
        met = row["bar"] is None or row["bar_ratio"] >= row["bar"]
        shown.add_row(
            row["name"],
            _milliseconds(ours),
            f"{row['best_peer']} {_milliseconds(best)}",
            f"[{'green' if met else 'red'}]{row['ratio']:.2f}x[/]",
            asked,
            f"{row['share_of_limit']:.0%}",
            _memory(row["peak_bytes"]),
        )
    return shown


def _memory(peaks: Mapping[str, int | None]) -> str:
    """Our peak against the smallest of the peers'."""
    ours = peaks[OURS]
    others = [peak for name, peak in peaks.items() if name != OURS and peak is not None]
    if ours is None or not others:
        return ""
    return f"{ours / 2**20:.0f} MiB, peers {min(others) / 2**20:.0f} MiB"


def _milliseconds(row: Mapping[str, float]) -> str:
    return f"{row['median'] * 1e3:.3g} ms ({row['low'] * 1e3:.3g}-{row['high'] * 1e3:.3g})"


def save_plot(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw time against size, log-log, a line a contender, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    rows = sorted(result["cases"], key=lambda row: row["size"])
    for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
        points = [(r["size"], r["seconds"][name]["median"]) for r in rows if name in r["seconds"]]
        x, y = zip(*points, strict=True)
        axes.loglog(x, y, "o-", label=name, linewidth=3 if name == OURS else 1.5)
    axes.set(xlabel="floating-point operations", ylabel="seconds (median)", title=result["op"])
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
