"""Paper 135: is a sparse product faster row by row with a hash table than by other dataflows?

Power-law graphs, a band and a uniformly random matrix are squared three ways on the same threads:
by inner products, by storing, sorting and summing all terms (expand-sort-compress, ESC), and row by
row with terms merged in a hash table as they are made.
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.experiments.ops.spgemm import banded, rmat, to_torch, uniform
from torchzoo.ops import _spgemm
from torchzoo.ops.library import backend
from torchzoo.ops.spgemm import spgemm, spgemm_stats

THREADS = 2
MATRICES = ("small R-MAT", "large R-MAT", "band", "uniform")
TOLERANCE = 1e-5
COLUMN_BYTES = 4  # of a column in the kernels


def matrices(seed: int, scale: int) -> dict[str, scipy.sparse.csr_matrix]:
    """Two power-law graphs, the second twice as large, and two matrices of the second's size."""
    large = 2 ** (scale + 1)
    return {
        "small R-MAT": rmat(scale, 8 * 2**scale, seed),
        "large R-MAT": rmat(scale + 1, 8 * large, seed),
        "band": banded(large, 8),
        "uniform": uniform(large, 8, seed),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def trial(context: Context) -> dict[str, float]:
    """Square each matrix each way; logarithms of ratios of times, bytes, and the error."""
    native = backend("spgemm")[0] == "native"
    repeats = context.options["repeats"]
    figures = {"native": float(native)}
    for name, matrix in matrices(context.seed, context.options["scale"]).items():
        context.progress(name)
        a = to_torch(matrix)
        methods = ["hash", "esc", "auto"] + ["inner"] * (name == "small R-MAT")
        with threads(THREADS):
            figures |= {f"{key}, {name}": value for key, value in memory(a, native).items()}
            figures[f"error, {name}"] = error(a, matrix)
            time_of = {
                method: seconds(
                    partial(spgemm, a, a, _method=method), 1 if method == "inner" else repeats
                )
                for method in methods
                if native
            }
        time_of["scipy"] = seconds(partial(operator.matmul, matrix, matrix), repeats)
        for method in [*methods[1:], "scipy"]:
            ratio = time_of[method] / time_of["hash"] if native else 1.0
            figures[f"log {method} / hash, {name}"] = math.log(ratio)
        with threads(1):
            one = seconds(partial(spgemm, a, a, _method="hash" if native else "auto"), repeats)
        figures[f"log scipy / hash on one thread, {name}"] = math.log(time_of["scipy"] / one)
    return figures


def memory(a: Tensor, native: bool) -> dict[str, float]:
    """Compression, and bytes of intermediates: ESC's over the row-wise kernel's.

    The row-wise kernel holds where each row of C and of the factors lies, how much work it is, and
    on each thread a table and a list of a row's columns.
    """
    stats = spgemm_stats(a, a)
    c = spgemm(a, a)
    terms, entries = int(stats.terms.sum()), c.values().numel()
    widest = int(stats.terms.clamp(max=a.shape[1]).max())
    tables = THREADS * (int(stats.table_bytes.max()) + COLUMN_BYTES * widest)
    rows = 32 * len(stats.terms) + tables
    expanded = terms * (COLUMN_BYTES + a.values().element_size())
    if native:
        pattern = [a.crow_indices(), a.col_indices()] * 2
        *_, held = _spgemm.dataflow(pattern, a.values(), a.values(), a.shape[1], "esc")
        expanded = int(held)
    return {"compression": terms / entries, "bytes ESC / hash": expanded / rows}


def error(a: Tensor, matrix: scipy.sparse.csr_matrix) -> float:
    """The largest difference from scipy in float64, relative to the same entry of |A||A|."""
    c = spgemm(a, a)
    parts = (c.values().double(), c.col_indices(), c.crow_indices())
    ours = scipy.sparse.csr_matrix(tuple(t.numpy() for t in parts), matrix.shape)
    wide = matrix.astype("f8")
    size = (abs(wide) @ abs(wide)).power(-1.0)
    return float(abs(ours - wide @ wide).multiply(size).max())


def faster(measured: Measurements) -> tuple[bool | None, str]:
    """The headline: both logarithms above 0 by more than their standard errors."""
    against = [
        ("inner", measured["log inner / hash, small R-MAT"]),
        ("ESC", measured["log esc / hash, large R-MAT"]),
    ]
    text = ", ".join(f"{name} / hash {spread(log)}" for name, log in against)
    if not native(measured):
        return None, "the kernels are not loaded"
    return all(
        log.mean > log.std_error for _, log in against
    ), f"{text}; largest {largest(measured)}"


def spread(log: Measurement) -> str:
    """A geometric mean with the bounds of one standard error."""
    low, high = log.mean - log.std_error, log.mean + log.std_error
    return f"{math.exp(log.mean):.3g}x ({math.exp(low):.3g}-{math.exp(high):.3g})"


def largest(measured: Measurements) -> str:
    ratios = {
        name.removeprefix("log "): math.exp(max(m.values))
        for name, m in measured.items()
        if name.startswith(("log inner", "log esc"))
    }
    name = max(ratios, key=lambda key: ratios[key])
    return f"{ratios[name]:.3g}x ({name}) against the paper's 9.4x"


def native(measured: Measurements) -> bool:
    return min(measured["native"].values) == 1


def lean(measured: Measurements) -> tuple[bool | None, str]:
    found = []
    for name in MATRICES:
        ratio = measured[f"bytes ESC / hash, {name}"]
        compression = measured[f"compression, {name}"]
        found.append((ratio.mean, compression.mean, name))
    text = ", ".join(f"{r:.3g}x at compression {c:.3g} ({name})" for r, c, name in found)
    return all(ratio >= 0.8 * compression for ratio, compression, _ in found), text


def right(measured: Measurements) -> tuple[bool | None, str]:
    worst = max(max(measured[f"error, {name}"].values) for name in MATRICES)
    return worst <= TOLERANCE, f"largest relative difference from scipy {worst:.2g}"


WAYS = (
    ("inner", "inner products"),
    ("esc", "expand-sort-compress"),
    ("auto", "row-wise, sums in an array"),
    ("scipy", "scipy, one thread, unsorted"),
)


def plot(measured: Measurements, figure: Any) -> None:
    """Times of the other ways over row-wise hashing's, by matrix."""
    axes = figure.subplots()
    width = 0.2
    for shift, (way, label) in enumerate(WAYS):
        found = {
            place + (shift - 1.5) * width: measured[name]
            for place, matrix in enumerate(MATRICES)
            if (name := f"log {way} / hash, {matrix}") in measured
        }
        ratios = [math.exp(log.mean) for log in found.values()]
        spreads = [
            [
                abs(math.exp(log.mean + sign * log.std_error) - math.exp(log.mean))
                for log in found.values()
            ]
            for sign in (-1, 1)
        ]
        heights = [ratio - 1 for ratio in ratios]
        axes.bar(list(found), heights, width, bottom=1, yerr=spreads, capsize=3, label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(9.4, color="gray", linestyle="--", linewidth=1, label="the paper's largest, 9.4x")
    axes.set_yscale("log")
    axes.set_ylim(0.03, 40)
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_xticks(range(len(MATRICES)), MATRICES)
    axes.set_ylabel("time / time of row-wise hashing")
    axes.set_title(f"Squaring sparse matrices on {THREADS} threads")
    axes.legend(frameon=False, loc="lower left")


EXPERIMENT = Experiment(
    paper=135,
    claim=Claim(
        "Row-wise products whose terms are merged by atomics in a hash table are faster than "
        "competing approaches on one machine, and need no partial-product matrices",
        "up to 9.4x",
        "the abstract; on a simulator of Intel's PIUMA",
    ),
    setup=(
        "squares of R-MAT graphs (2^12 and 2^13 nodes, degree 8), a band and a uniform matrix, "
        "float32, two CPU threads, median of 5 calls, inner products 1 call on 2^12 only; "
        "geometric means over seeds. ESC sorts within rows. Bytes of row-wise hashing are counted "
        "from its tables and lists."
    ),
    baseline="inner products and expand-sort-compress, native, on the same threads",
    criteria=[
        Criterion(
            "hash faster than inner products (2^12) and than ESC (2^13) on R-MAT, in geometric "
            "mean, by more than its standard error",
            faster,
        ),
        Criterion("bytes of intermediates, ESC / hash >= 0.8 compression, on every matrix", lean),
        Criterion(f"relative difference from scipy <= {TOLERANCE:g}", right),
    ],
    budgets={
        "full": {"seeds": 3, "scale": 12, "repeats": 5},
        "smoke": {"seeds": 2, "scale": 7, "repeats": 2},
    },
    trial=trial,
    plot=plot,
)
