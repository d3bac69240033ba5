"""Paper 82: do circuits compress near their likelihood, fast, and better than generic codecs?

Hidden Chow-Liu trees of digits and of patches of photographs code test sets against independent
pixels, a Chow-Liu tree, zlib, lzma, a predictor with lzma, zstd where Python has it, an integer
discrete flow, and a small autoregressive net.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    CircuitCodec,
    chow_liu_tree,
    em_fit,
    factorised,
    hclt,
    init_from_data,
)
from torchzoo.circuits.order import SCHEDULES
from torchzoo.circuits.residuals import to_patches
from torchzoo.circuits.vtree import EdgeCounter, factors_of
from torchzoo.data.digits import digits
from torchzoo.data.photographs import PHOTOGRAPHS, photograph
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.experiments.circuits.made import MADE
from torchzoo.experiments.circuits.rivals import flow_bits, generic, made_code
from torchzoo.ops.rans import frequency_tables

LEVELS, TEST = 17, 497
SIDE = 8


def digit_levels(seed: int) -> tuple[Tensor, Tensor]:
    """Digits as integers 0 to 16, `(1300, 64)` to train on and `(497, 64)` to test."""
    split = digits(seed=seed, test_fraction=TEST / 1797)
    train, test = ((16 * x).round().long().flatten(1) for x in (split.train_x, split.test_x))
    return train, test


def grey_patches() -> tuple[Tensor, Tensor]:
    """Grey 8x8 patches of the photographs `(N, 64)`, left halves to train on and right ones."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in PHOTOGRAPHS:
        grey = (255 * photograph(name).mean(2)).round().to(torch.uint8)[:424]
        for side, half in zip(sides, grey.chunk(2, 1), strict=True):
            side.append(to_patches(half[None]).long())
    return torch.cat(sides[0]), torch.cat(sides[1])


def fit_hclt(
    train: Tensor, categories: int, units: int, seed: int, **options: Any
) -> tuple[Circuit, float]:
    """A hidden Chow-Liu tree by expectation maximisation, and the seconds that took."""
    generator = torch.Generator().manual_seed(seed)
    bins = None if categories < 32 else 16
    marginal = torch.stack([x.bincount(minlength=categories) for x in train.T]) + 1 / categories
    started = time.perf_counter()
    tree = chow_liu_tree(train, num_categories=categories, bins=bins)
    circuit = Circuit(hclt(tree), CategoricalLeaf(categories), num_units=units)
    init_from_data(circuit, train, generator=generator)
    em_fit(
        circuit,
        train,
        pseudocount=0.05,
        leaf_pseudocount=marginal / marginal.sum(1, keepdim=True),
        generator=generator,
        **options,
    )
    return circuit, time.perf_counter() - started


def independent(train: Tensor, categories: int) -> Circuit:
    """Each variable by itself."""
    circuit = Circuit(factorised(train.shape[1]), CategoricalLeaf(categories), num_units=1)
    em_fit(circuit, train, epochs=1, leaf_pseudocount=0.05)
    return circuit


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """The least of some runs' times."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def tree_circuit(num_variables: int, categories: int = LEVELS, units: int = 16) -> Circuit:
    """A hidden binary tree, whose parameters a variable don't depend on how many there are."""
    parents = [-1, *((i - 1) // 2 for i in range(1, num_variables))]
    return Circuit(hclt(parents), CategoricalLeaf(categories), num_units=units)


def edges(circuit: Circuit) -> dict[str, int]:
    """Edges evaluated for a sample by each schedule."""
    factors = factors_of(circuit).map(torch.Tensor.detach)
    found = {}
    for name, schedule in SCHEDULES.items():
        counter = EdgeCounter()
        schedule(factors, 1, lambda variable, pmf: torch.zeros(1).long(), counter)
        found[name] = counter.edges
    return {**found, "naive": circuit.num_variables * factors.num_parameters}


@torch.no_grad()
def naive_seconds(circuit: Circuit, x: Tensor, steps: int) -> float:
    """Seconds of decoding by one query for each variable, from some of the steps."""
    coder_free = torch.linspace(0, circuit.num_variables - 1, steps).long()
    started = time.perf_counter()
    for turn in coder_free.tolist():
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[:, :turn] = True
        frequency_tables(circuit.posterior_marginals(x, mask)[:, turn].double())
    return (time.perf_counter() - started) * circuit.num_variables / steps


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of a straight line through the logarithms."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(costs).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def trial(context: Context) -> dict[str, float]:
    """Compress digits and patches, and measure how costs grow with the number of variables."""
    options = context.options
    context.progress("digits")
    train, test = digit_levels(context.seed)
    train, test = train[: options["train"]], test[: options["test"]]
    circuit, fitting = fit_hclt(train, LEVELS, 16, context.seed, epochs=options["epochs"])
    codec = CircuitCodec(circuit, block_size=len(test))
    length = codec.measure(test)
    data = codec.encode(test)
    if not torch.equal(codec.decode(data), test):
        raise AssertionError("the digits did not come back")
    alpha = {"num_categories": LEVELS, "alpha": 0.05}
    figures = {
        "digits: HCLT, payload": length.payload / length.variables,
        "digits: HCLT, file": length.container / length.variables,
        "digits: HCLT, ideal": length.ideal / length.variables,
        "digits: HCLT, train": codec.theoretical_bits_per_dim(train),
        "digits: Chow-Liu tree": coded(Circuit.from_chow_liu(train, **alpha), test),
        "digits: independent": coded(independent(train, LEVELS), test),
        **{f"digits: {name}": bits for name, bits in generic(test).items()},
        "seconds to fit the HCLT": fitting,
    }
    figures |= _against_net(context, codec, data, train, test, fitting)
    figures |= _patches(context)
    figures |= _scaling(context)
    return figures | _flows(context, train, test)


def coded(circuit: Circuit, x: Tensor) -> float:
    """Bits a variable of samples coded as one block."""
    return CircuitCodec(circuit, block_size=len(x)).bits_per_dim(x)


def _against_net(
    context: Context, codec: CircuitCodec, data: bytes, train: Tensor, test: Tensor, fitting: float
) -> dict[str, float]:
    context.progress("autoregressive net")
    net = MADE(train.shape[1], LEVELS, 256)
    epochs = net.fit(train, min(fitting, context.options["net_seconds"]))
    decode, bits = made_code(net, test)
    if not torch.equal(decode(), test):
        raise AssertionError("the net's digits did not come back")
    one, _ = made_code(net, test[:1])
    single = CircuitCodec(codec.circuit, block_size=1)
    first = single.encode(test[:1])
    return {
        "digits: MADE": bits,
        "epochs of MADE": epochs,
        "seconds to decode, HCLT": seconds(lambda: codec.decode(data)),
        "seconds to decode, MADE": seconds(decode),
        "seconds to decode one, HCLT": seconds(lambda: single.decode(first)),
        "seconds to decode one, MADE": seconds(one),
    }


def _patches(context: Context) -> dict[str, float]:
    context.progress("patches of photographs")
    train, test = _some_patches(context)
    epochs = context.options["patch_epochs"]
    options = {"epochs": epochs, "batch_size": 256, "step_size": (0.5, 0.05)}
    circuit, _ = fit_hclt(train, 256, 16, context.seed, **options)
    return {
        "patches: HCLT, payload": coded(circuit, test),
        "patches: HCLT, ideal": CircuitCodec(circuit).theoretical_bits_per_dim(test),
        "patches: independent": coded(independent(train, 256), test),
        **{f"patches: {name}": bits for name, bits in generic(test).items()},
    }


def _some_patches(context: Context) -> tuple[Tensor, Tensor]:
    train, test = grey_patches()
    return train[: context.options["patches"]], test[: context.options["patches"]]


def _flows(context: Context, train: Tensor, test: Tensor) -> dict[str, float]:
    context.progress("integer discrete flows")
    epochs = context.options["flow_epochs"], context.options["patch_flow_epochs"]
    return {
        "digits: IDF": flow_bits(train, test, LEVELS, epochs[0]),
        "patches: IDF": flow_bits(*_some_patches(context), 256, epochs[1]),
    }


def _scaling(context: Context) -> dict[str, float]:
    context.progress("scaling")
    sizes: list[int] = context.options["sizes"]
    counts: dict[str, list[float]] = {"tour": [], "paper": [], "naive": []}
    times = []
    for size in sizes:
        circuit = tree_circuit(size)
        for name, count in edges(circuit).items():
            counts[name].append(count)
        x = circuit_samples(circuit, 64)
        codec = CircuitCodec(circuit)
        data = codec.encode(x)
        times.append(seconds(lambda codec=codec, data=data: codec.decode(data)))  # type: ignore[misc]
    naive = naive_seconds(circuit, x, context.options["naive_steps"])
    return {
        **{f"exponent of operations, {name}": exponent(sizes, c) for name, c in counts.items()},
        "exponent of seconds, tour": exponent(sizes, times),
        "seconds to decode the largest, tour": times[-1],
        "seconds to decode the largest, naive": naive,
    }


def circuit_samples(circuit: Circuit, n: int) -> Tensor:
    """Uniform samples; how long coding takes does not depend on them."""
    return torch.randint(0, LEVELS, (n, circuit.num_variables))


def _near_ideal(measured: Measurements) -> tuple[bool, str]:
    payload, ideal, file = (measured[f"digits: HCLT, {n}"] for n in ("payload", "ideal", "file"))
    excess = max(p / i - 1 for p, i in zip(payload.values, ideal.values, strict=True))
    return excess <= 0.01, f"{payload} against {ideal}, at most +{100 * excess:.2f} %; file {file}"


def _order(measured: Measurements) -> tuple[bool, str]:
    names = ("HCLT, payload", "Chow-Liu tree", "independent")
    rows = [measured[f"digits: {name}"] for name in names]
    holds = all(a < b for p, q in pairwise(rows) for a, b in zip(p.values, q.values, strict=True))
    rival = measured["digits: lzma"]
    holds &= all(a < b for a, b in zip(rows[0].values, rival.values, strict=True))
    return holds, " < ".join(f"{row.mean:.3f}" for row in rows) + f"; lzma {rival.mean:.3f}"


def _scales(measured: Measurements) -> tuple[bool, str]:
    tour, paper, naive = (
        measured[f"exponent of operations, {name}"].mean for name in ("tour", "paper", "naive")
    )
    clock = measured["exponent of seconds, tour"].mean
    fast, slow = (measured[f"seconds to decode the largest, {n}"].mean for n in ("tour", "naive"))
    holds = tour <= 1.05 and paper <= 1.3 and naive >= 1.95 and clock <= 1.25 and slow >= 10 * fast
    return holds, (
        f"operations {tour:.3f}, {paper:.3f}, {naive:.3f}; seconds of the tour {clock:.2f}; "
        f"decoding {fast:.3f} s against {slow:.1f} s"
    )


def _faster_than_net(measured: Measurements) -> tuple[bool, str]:
    ours, net = (measured[f"seconds to decode, {name}"].mean for name in ("HCLT", "MADE"))
    one, other = (measured[f"seconds to decode one, {name}"].mean for name in ("HCLT", "MADE"))
    return net >= 5 * ours, (
        f"{1000 * ours:.0f} ms against {1000 * net:.0f} ms at {measured['digits: MADE'].mean:.3f} "
        f"bits; one sample {1000 * one:.1f} ms against {1000 * other:.1f} ms"
    )


def plot(measured: Measurements, figure: Any) -> None:
    """Rates on both data sets, and seconds of decoding."""
    rates, patches, clock = figure.subplots(1, 3, width_ratios=(1.2, 1, 0.8))
    skipped = ("file", "ideal", "train")
    for axes, data in ((rates, "digits"), (patches, "patches")):
        rows = [
            (name.removeprefix(f"{data}: ").removesuffix(", payload"), m)
            for name, m in measured.items()
            if name.startswith(data) and not name.endswith(skipped)
        ]
        rows.sort(key=lambda row: row[1].mean)
        colours = ["tab:blue" if name == "HCLT" else "0.75" for name, _ in rows]
        means = [m.mean for _, m in rows]
        bars = axes.barh([name for name, _ in rows], means, color=colours)
        axes.bar_label(bars, [f"{mean:.2f}" for mean in means], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.axvline(measured[f"{data}: HCLT, ideal"].mean, color="tab:red", lw=1, ls="--")
        axes.set_title(f"{data}: bits a pixel", fontsize=10)
        axes.set_xlabel("dashed: the circuit's ideal length", fontsize=8)
        axes.tick_params(labelsize=8)
    pairs = {
        "497 digits": ("seconds to decode, HCLT", "seconds to decode, MADE"),
        "D = 1024": tuple(f"seconds to decode the largest, {n}" for n in ("tour", "naive")),
    }
    labels = ("tour", "MADE, or naive")
    for i, label in enumerate(labels):
        heights = [measured[names[i]].mean for names in pairs.values()]
        places = [j + 0.4 * i - 0.2 for j in range(len(pairs))]
        colour = ("tab:blue", "0.75")[i]
        bars = clock.bar(places, heights, 0.38, color=colour, label=label)
        labels_of = [f"{h:.0f}" if h >= 10 else f"{h:.2g}" for h in heights]
        clock.bar_label(bars, labels_of, fontsize=8)
    clock.set_yscale("log")
    clock.margins(y=0.3)
    clock.set_xticks(range(len(pairs)), list(pairs), fontsize=8)
    clock.set_title("seconds to decode", fontsize=10)
    clock.legend(fontsize=7, loc="upper left")


EXPERIMENT = Experiment(
    paper=82,
    claim=Claim(
        statement=(
            "A probabilistic circuit codes at its likelihood, in O(log(D) |p|), faster than neural "
            "codecs of similar rate, and better than generic codecs on images of digits."
        ),
        figure="5 to 40 times faster than neural codecs of similar rate",
        source="abstract",
    ),
    setup=(
        "Hidden Chow-Liu trees with 16 states a variable: 8x8 digits of 17 levels, 1300 to train "
        "and 497 to test, 30 full steps of EM; grey 8x8 patches of two photographs, left halves to "
        "train and right ones to test, by mini-batch EM. Scaling on hidden binary trees of 64 to "
        "1024 variables; the naive decoder asks for all marginals once a variable and is timed on "
        "some of its steps. A seed is a split, a start and a net."
    ),
    baseline=(
        "independent pixels and a Chow-Liu tree through the same coder; zlib, lzma and a predictor "
        "with lzma on the whole test set, and zstd where Python has it (3.14, or the package "
        "`zstandard`); an integer discrete flow of four couplings; a masked autoregressive net, "
        "trained for as many seconds"
    ),
    criteria=(
        Criterion(
            "payload of the digits' test set, one block: within 1 % of the ideal length",
            _near_ideal,
        ),
        Criterion(
            "bits a pixel of digits, every seed: HCLT < Chow-Liu tree < independent, and HCLT < "
            "lzma",
            _order,
        ),
        Criterion(
            "exponents of the operation count over D: tour at most 1.05, the paper's schedule at "
            "most 1.3, naive at least 1.95; seconds to decode at D = 1024: tour at least 10 times "
            "less than naive, its exponent at most 1.25",
            _scales,
        ),
        Criterion(
            "decoding the digits' test set: at least 5 times faster than the net's D passes",
            _faster_than_net,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "train": 1300,
            "test": TEST,
            "epochs": 30,
            "patches": 5000,
            "patch_epochs": 6,
            "flow_epochs": 60,
            "patch_flow_epochs": 30,
            "sizes": [64, 128, 256, 512, 1024],
            "naive_steps": 16,
            "net_seconds": 1e9,
        },
        "smoke": {
            "seeds": 1,
            "train": 100,
            "test": 50,
            "epochs": 3,
            "patches": 100,
            "patch_epochs": 1,
            "flow_epochs": 1,
            "patch_flow_epochs": 1,
            "sizes": [16, 32],
            "naive_steps": 2,
            "net_seconds": 0.2,
        },
    },
    trial=trial,
    plot=plot,
)
