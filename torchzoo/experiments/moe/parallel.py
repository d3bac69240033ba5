"""Paper 56: does gathering the busiest experts pay where their loads fluctuate?

Two parts. Four gloo processes train for real: their weights are compared with those of one process,
and bytes and memory are counted (`parallel_ranks`). A cost model then simulates a cluster of 32
devices under drifting loads (`parallel_cluster`); its latencies are predictions, not measured
speeds.
"""

from __future__ import annotations

from typing import Any

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.experiments.moe.parallel_cluster import (
    CAPACITY,
    DECAY,
    DEVICES,
    EXPERTS,
    FSSDP,
    LAYERS,
    OVERLAP,
    REARRANGE_EVERY,
    REARRANGED,
    RESHARD_EVERY,
    SPREAD,
    SYSTEMS,
    TOKENS,
    TOP_K,
    WINDOW,
    ZIPF,
    simulate,
)
from torchzoo.experiments.moe.parallel_ranks import (
    RANKS,
    SMALL_EXPERTS,
    SMALL_LAYERS,
    STEPS,
    train_on_ranks,
)
from torchzoo.moe.simulate import CONSTANTS
from torchzoo.testing.ranks import run_ranks


def figure_name(system: str, what: str, loads: str = "skewed") -> str:
    """Name of a figure of the simulation."""
    return f"{system}: {what}, {loads} loads (simulated)"


DIFFERENCE = "weights after 20 AdamW steps: largest difference from one process"
BYTES = "bytes gathered, as a fraction of all-gathers"
MEMORY = {"FSSDP": "expert memory of a rank, KiB: FSSDP"}
MEMORY["replicated"] = "expert memory of a rank, KiB: EP with replicated optimizer"
LATENCY, STRAGGLER, COPIES = "latency, ms", "straggler ratio", "most copies a device and layer"
BOUND = "balanced bound"
PATIENCE = 600.0  # seconds for four processes that exchange much, where others want the cores too


def trial(context: Context) -> dict[str, float]:
    """Training on four processes, then the simulation with skewed and with uniform loads."""
    context.progress("training on four processes")
    ranks = run_ranks(train_on_ranks, RANKS, context.seed, STEPS, timeout=PATIENCE)
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    received, full = (sum(rank[key] for rank in ranks) for key in ("received", "all-gather"))
    figures = {
        DIFFERENCE: worst["difference"],
        BYTES: received / full,
        MEMORY["FSSDP"]: worst["memory"] / 1024,
        MEMORY["replicated"]: worst["replicated"] / 1024,
    }
    steps, tick = context.options["steps"], context.progress
    found = simulate(SYSTEMS, steps, context.seed, skewed=True, tick=tick)
    for system, values in found.items():
        figures[figure_name(system, LATENCY)] = 1e3 * values["latency"]
        figures[figure_name(system, STRAGGLER)] = values["straggler_ratio"]
        figures[figure_name(system, COPIES)] = values["copies"]
    figures[figure_name(BOUND, LATENCY)] = 1e3 * found["EP"]["balanced"]
    uniform_steps = context.options["uniform_steps"]
    uniform = simulate(("EP", *FSSDP), uniform_steps, context.seed, skewed=False, tick=tick)
    for system, values in uniform.items():
        figures[figure_name(system, LATENCY, "uniform")] = 1e3 * values["latency"]
    return figures


def latencies(measured: Measurements, system: str, loads: str = "skewed") -> tuple[float, ...]:
    """Latencies of a system, a value a seed."""
    return measured[figure_name(system, LATENCY, loads)].values


def _ratios(over: tuple[float, ...], under: tuple[float, ...]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


def _faster_than_ep(measured: Measurements) -> tuple[bool, str]:
    speed = {s: _ratios(latencies(measured, "EP"), latencies(measured, s)) for s in FSSDP}
    text = "; ".join(f"{system} {_span(ratios)} times as fast" for system, ratios in speed.items())
    return min(map(min, speed.values())) > 1.5, f"{text} (simulated)"


def _even_at_uniform(measured: Measurements) -> tuple[bool, str]:
    base = latencies(measured, "EP", "uniform")
    slow = {s: _ratios(latencies(measured, s, "uniform"), base) for s in FSSDP}
    text = "; ".join(f"{system} {_span(ratios)} of EP" for system, ratios in slow.items())
    return max(map(max, slow.values())) <= 1.05, f"{text} (simulated)"


def _faster_than_rearranged(measured: Measurements) -> tuple[bool, str]:
    best = tuple(map(min, *(latencies(measured, system) for system in REARRANGED)))
    speed = {s: _ratios(best, latencies(measured, s)) for s in FSSDP}
    text = "; ".join(f"{system} {_span(ratios)} times as fast" for system, ratios in speed.items())
    return min(map(min, speed.values())) > 1, f"{text} (simulated)"


def _above_bound(measured: Measurements) -> tuple[bool, str]:
    bound = latencies(measured, BOUND)
    ratios = {s: _ratios(latencies(measured, s), bound) for s in SYSTEMS}
    name = min(ratios, key=lambda system: min(ratios[system]))
    text = f"bound {measured[figure_name(BOUND, LATENCY)]} ms; nearest: {name}"
    return min(ratios[name]) >= 1, f"{text}, {_span(ratios[name])} of it (simulated)"


def _sharding_helps(measured: Measurements) -> tuple[bool, str]:
    speed = _ratios(latencies(measured, FSSDP[0]), latencies(measured, FSSDP[1]))
    return min(speed) >= 1, f"{_span(speed)} times as fast (simulated)"


def _few_copies(measured: Measurements) -> tuple[bool, str]:
    most = max(max(measured[figure_name(system, COPIES)].values) for system in FSSDP)
    return most <= CAPACITY, f"at most {most:g}"


def _equal_weights(measured: Measurements) -> tuple[bool, str]:
    most = max(measured[DIFFERENCE].values)
    return most < 1e-5, f"at most {most:.1e}"


def _fewer_bytes(measured: Measurements) -> tuple[bool, str]:
    return max(measured[BYTES].values) < 1, f"{measured[BYTES]} of them"


def _less_memory(measured: Measurements) -> tuple[bool, str]:
    ours, theirs = (measured[MEMORY[key]] for key in ("FSSDP", "replicated"))
    pairs = zip(ours.values, theirs.values, strict=True)
    return all(a < b for a, b in pairs), f"{ours} against {theirs} KiB"


def plot(measured: Measurements, figure: Any) -> None:
    """Latencies and straggler ratios of the systems, and what the processes measured."""
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    colours = ["0.6", "tab:orange", "tab:orange", "tab:blue", "tab:blue", "tab:blue"]
    means = [measured[figure_name(system, LATENCY)].mean for system in SYSTEMS]
    errors = [measured[figure_name(system, LATENCY)].std_error for system in SYSTEMS]
    left.barh(SYSTEMS, means, xerr=errors, color=colours)
    for row, system in enumerate(SYSTEMS):
        ratio = measured[figure_name(system, STRAGGLER)].mean
        left.text(means[row] + errors[row] + 0.01 * max(means), row, f"{ratio:.1f}", va="center")
    bound = measured[figure_name(BOUND, LATENCY)].mean
    left.axvline(bound, color="k", linestyle=":", label="balanced, no traffic")
    left.set_xlim(0, 1.2 * max(means))
    left.invert_yaxis()
    left.legend(loc="lower right", fontsize=8)
    left.set_title(f"{DEVICES} devices, skewed loads: simulated latency", fontsize=10)
    left.set_xlabel("ms a step (beside the bars: straggler ratio)")
    names = ["FSSDP", "EP, replicated\noptimizer"]
    memory = [measured[MEMORY[key]] for key in ("FSSDP", "replicated")]
    right.bar(names, [m.mean for m in memory], color=["tab:blue", "tab:orange"], width=0.6)
    right.set_ylabel("KiB of expert weights, gradients, optimizer states")
    right.set_title("4 processes, measured: a rank", fontsize=10)


EXPERIMENT = Experiment(
    paper=56,
    claim=Claim(
        statement=(
            "Mixture-of-experts models train faster when every expert is sharded to one device "
            "and the busiest are gathered where they are needed in each iteration."
        ),
        figure="up to 3.54 times faster than state-of-the-art systems",
        source="abstract; V100 and A100 clusters of 4 nodes with 8 GPUs",
    ),
    setup=(
        "Latencies are simulated, no GPU was used: a cost model of 4 nodes with 8 devices, "
        f"{LAYERS} layers of {EXPERTS} experts, {TOKENS} tokens a device to {TOP_K} experts each; "
        f"routing probabilities are Zipf({ZIPF}) with AR(1) logits (decay {DECAY}, standard "
        f"deviation {SPREAD}); planners see the last {WINDOW} steps only. Overlap degree "
        f"{OVERLAP}, {CAPACITY} copies a device and layer, owners chosen anew at step "
        f"{REARRANGE_EVERY} and every {RESHARD_EVERY} steps where FSSDP is sharded by load; the "
        "calibrated arm keeps half of the copies for the loads that have come in. Constants: "
        + ", ".join(f"{name} = {value:g}" for name, value in CONSTANTS.items())
        + f". Measured: {RANKS} gloo processes, {SMALL_LAYERS} layers of {SMALL_EXPERTS} experts, "
        f"{STEPS} AdamW steps on Zipf routing whose order of experts drifts."
    ),
    baseline=(
        "expert parallelism with fixed owners; rearrangement every 10 steps of past loads, by "
        "permuting owners or by replicas with their optimizer states (the faster one counts), "
        "moving 6 times an expert's parameter bytes; one process"
    ),
    criteria=(
        Criterion(
            "skewed loads: FSSDP, in each of its three arms, is more than 1.5 times as fast as "
            "EP on every seed (simulated)",
            _faster_than_ep,
        ),
        Criterion(
            "uniform loads: FSSDP takes at most 5 % longer than EP (simulated)", _even_at_uniform
        ),
        Criterion(
            "skewed loads: FSSDP is faster than the faster rearrangement on every seed (simulated)",
            _faster_than_rearranged,
        ),
        Criterion("no system is faster than the balanced bound (simulated)", _above_bound),
        Criterion(
            "FSSDP sharded by load is at least as fast as with blocks of experts, on every seed "
            "(simulated)",
            _sharding_helps,
        ),
        Criterion(f"a device holds at most {CAPACITY} copies a layer", _few_copies),
        Criterion("4 processes: weights within 1e-5 of one process's", _equal_weights),
        Criterion("4 processes: fewer bytes gathered than by all-gathers", _fewer_bytes),
        Criterion(
            "4 processes: expert memory of a rank below EP with replicated optimizer", _less_memory
        ),
    ),
    budgets={
        "full": {"seeds": 5, "steps": 200, "uniform_steps": 30},
        "smoke": {"seeds": 1, "steps": 11, "uniform_steps": 1},
    },
    trial=trial,
    plot=plot,
)
