"""Paper 62: do states that project onto orthogonal bases remember, and does the timescale matter?

Three measurements: how exactly exp(tA) B is the basis times the measure; how well the last quarter
of a signal is read back from one state; and how well the value of 256 steps ago can be read from
the states of a frozen system by ridge regression, at a matching and at two wrong timescales.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.ssm import hippo_basis, hippo_matrix, hippo_measure, hippo_project, hippo_reconstruct
from torchzoo.ssm.recurrence import discretize_dense, linear_recurrence

BASES = {"LegS": "legs", "LegT": "legt", "FouT": "fout"}
RANDOM, UNIFORM = "random A", "LegS/t"
RECALL = (*BASES, RANDOM)
PAST = ("LegS", "FouT", RANDOM, UNIFORM)
FACTORS = {"1/dt = lag": 1.0, "dt 10x too large": 10.0, "dt 10x too small": 0.1}
MATCHED, *WRONG = FACTORS
EXACT = "LegS: largest error of exp(tA) B"
WINDOW, ORDER = 500, 32
RIDGES = 10.0 ** np.arange(-14, 3)


def band_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise `(..., L)` of unit variance in the lowest 2 % of its frequency bins."""
    *rows, length = shape
    bins = (length // 2 + 1) // 50
    spectrum = torch.zeros(*rows, length // 2 + 1, dtype=torch.complex128)
    spectrum[..., 1 : bins + 1] = torch.randn(
        *rows, bins, generator=generator, dtype=torch.complex128
    )
    u = torch.fft.irfft(spectrum, n=length)
    return u / u.std(-1, keepdim=True)


def random_system(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A dense A with eigenvalues in a disc of radius 1, shifted until the last is at Re = -0.1."""
    A = torch.randn(N, N, generator=generator, dtype=torch.float64) / math.sqrt(N)
    shift = torch.linalg.eigvals(A).real.max() + 0.1
    return A - shift * torch.eye(N, dtype=A.dtype), torch.randn(
        N, generator=generator, dtype=A.dtype
    )


def states(system: tuple[Tensor, Tensor], u: Tensor, dt: float) -> Tensor:
    """States `(M, L, N)` of x' = A x + B u, by the bilinear rule."""
    A, B = discretize_dense(*system, dt)
    return linear_recurrence(A, B, u, u.new_zeros(len(u), len(B)))


# Basis


def kernel_error(N: int = 16) -> float:
    """Largest difference of exp(tA) B from basis times measure for LegS, t in [0, 6]."""
    A, B = hippo_matrix("legs", N)
    t = torch.linspace(0, 6, 61, dtype=torch.float64)
    kernel = (t[:, None, None] * A).matrix_exp() @ B
    exact = hippo_basis("legs", N, t) * hippo_measure("legs", t)[:, None]
    return (kernel - exact).abs().max().item()


def window_error(measure: str, N: int, dt: float = 0.01) -> float:
    """Largest error of the integral of the first kernel over [0, t], which is min(t, 1)."""
    steps = int(2 / dt)
    A, B = hippo_matrix(measure, N)
    A, B = discretize_dense(A, B, dt, "zoh")  # exact for a constant input
    x = linear_recurrence(A, B, torch.ones(1, steps).double(), torch.zeros(1, N).double())
    t = torch.arange(1, steps + 1) * dt
    return (x[0, :, 0] - t.clamp_max(1)).abs().max().item()


# Reconstruction


def reconstructions(u: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The last `WINDOW` values of u `(L,)`, newest first, read back from one state of each arm."""
    s = (torch.arange(WINDOW, dtype=u.dtype) + 0.5) / WINDOW
    found = {}
    for name in ("LegS", "FouT"):
        x = hippo_project(u, BASES[name], ORDER, 1 / WINDOW)[-1]
        found[name] = hippo_reconstruct(x, BASES[name], s)
    x = hippo_project(u, "legs_tv", ORDER)[-1]
    found[UNIFORM] = hippo_reconstruct(x, "legs_tv", s * WINDOW / len(u))
    system = random_system(ORDER, generator)
    impulse = torch.zeros_like(u)
    impulse[0] = 1
    kernel = states(system, impulse[None], 1 / WINDOW)[0]  # no basis: the smallest past that fits
    x = states(system, u[None], 1 / WINDOW)[0, -1]
    found[RANDOM] = (torch.linalg.pinv(kernel.mT, rcond=1e-10) @ x)[:WINDOW]
    return found


def past_error(past: Tensor, found: Tensor) -> float:
    """Root mean square with the weight exp(-s) of LegS, as a share of the signal's."""
    weights = (-torch.arange(WINDOW, dtype=past.dtype) / WINDOW).exp()
    return ((weights @ (found - past).square()) / (weights @ past.square())).sqrt().item()


# Recall


def ridge_mse(features: Tensor, targets: Tensor) -> float:
    """Test error of ridge regression; rows are sequences for training, validation and test."""
    scale = features[0].std(0).clamp_min(1e-300)
    x = (features / scale).numpy()
    y = targets.numpy()
    left, sizes, right = np.linalg.svd(x[0], full_matrices=False)
    along = left.T @ y[0]
    best: tuple[float, float] | None = None
    for penalty in RIDGES:
        weights = right.T @ (sizes * along / (sizes**2 + penalty * len(y[0])))
        validation, test = (float(np.mean((x[i] @ weights - y[i]) ** 2)) for i in (1, 2))
        if best is None or validation < best[0]:
            best = validation, test
    assert best is not None
    return best[1]


def mse_name(arm: str, factor: str) -> str:
    return f"MSE of {arm}, {factor}"


def error_name(arm: str) -> str:
    return f"reconstruction error of {arm}"


def trial(context: Context) -> dict[str, float]:
    """All three measurements, with the signals and the random system of one seed."""
    options = context.options
    generator = torch.Generator().manual_seed(context.seed)
    figures = {EXACT: kernel_error()}
    for name, sizes in (("LegT", (16, 64)), ("FouT", (17, 65))):
        for N in sizes:
            figures[f"{name}: error of the window at N = {N}"] = window_error(BASES[name], N)

    context.progress("reconstruction")
    u = band_noise((4 * WINDOW,), generator)
    for name, found in reconstructions(u, generator).items():
        figures[error_name(name)] = past_error(u.flip(0)[:WINDOW], found)

    context.progress("recall")
    lag = options["lag"]
    signals = band_noise((3, options["length"]), generator)
    systems = {name: hippo_matrix(measure, options["N"]) for name, measure in BASES.items()}
    systems[RANDOM] = random_system(options["N"], generator)
    for arm, system in systems.items():
        for factor, times in FACTORS.items():
            x = states(system, signals, times / lag)
            figures[mse_name(arm, factor)] = ridge_mse(x[:, lag:], signals[:, :-lag])
    return figures


def _beats_random(measured: Measurements) -> tuple[bool, str]:
    random = measured[mse_name(RANDOM, MATCHED)]
    arms = {name: measured[mse_name(name, MATCHED)] for name in BASES}
    holds = all(
        (random - arm).mean > (random - arm).std_error and arm.mean < random.mean / 2
        for arm in arms.values()
    )
    ranking = sorted(arms.items(), key=lambda pair: pair[1].mean)
    text = ", ".join(f"{name} {arm}" for name, arm in ranking)
    best = min((measured[mse_name(RANDOM, factor)] for factor in FACTORS), key=lambda m: m.mean)
    return holds, f"MSE {text}; {RANDOM} {random}, at the best of the three dt {best}"


def _timescale(measured: Measurements) -> tuple[bool, str]:
    ratios = {
        f"{name}, {factor}": measured[mse_name(name, factor)].mean
        / measured[mse_name(name, MATCHED)].mean
        for name in BASES
        for factor in WRONG
    }
    worst = min(ratios, key=lambda key: ratios[key])
    return ratios[worst] > 2, f"smallest ratio of MSE {ratios[worst]:.3g} ({worst})"


def _exact(measured: Measurements) -> tuple[bool, str]:
    error = max(measured[EXACT].values)
    return error < 1e-10, f"{error:.1e}"


COLOURS = {
    "LegS": "tab:blue",
    "LegT": "tab:green",
    "FouT": "tab:orange",
    RANDOM: "tab:red",
    UNIFORM: "tab:purple",
}


def plot(measured: Measurements, figure: Any) -> None:
    """The past of one signal with its reconstructions, and the recall at three timescales."""
    past, recall = figure.subplots(1, 2, width_ratios=(1.6, 1))
    generator = torch.Generator().manual_seed(0)
    u = band_noise((4 * WINDOW,), generator)
    ago = np.arange(WINDOW)
    past.plot(ago, u.flip(0)[:WINDOW], color="0.75", lw=5, label="signal")
    for name, found in reconstructions(u, generator).items():
        error = measured[error_name(name)]
        label = f"{name}: {100 * error.mean:.2g} % off on average"
        past.plot(ago, found, lw=1.3, color=COLOURS[name], label=label)
    top = float(u[-WINDOW:].abs().max())
    past.set_ylim(-1.3 * top, 1.9 * top)
    past.invert_xaxis()
    past.set_xlabel("steps ago")
    past.set_title(f"one state of {ORDER} numbers, read back", fontsize=10)
    past.legend(fontsize=8, loc="upper left", ncols=2)

    for place, arm in enumerate(RECALL):
        means = [measured[mse_name(arm, factor)] for factor in FACTORS]
        for i, mean in enumerate(means):
            x = i + 0.12 * (place - 1.5)
            recall.plot(
                [x] * len(mean.values), mean.values, "o", color=COLOURS[arm], ms=3, alpha=0.4
            )
        recall.plot(
            [i + 0.12 * (place - 1.5) for i in range(3)],
            [math.exp(float(np.mean(np.log(m.values)))) for m in means],
            "_",
            color=COLOURS[arm],
            ms=14,
            mew=2,
            label=arm,
        )
    recall.set_yscale("log")
    recall.set_xticks(
        range(3),
        [name.replace(" = ", "\n= ").replace("10x ", "10x\n") for name in FACTORS],
        fontsize=8,
    )
    recall.set_ylabel("MSE of the value one lag ago")
    recall.set_title("recall from a frozen system", fontsize=10)
    recall.legend(fontsize=8, loc="lower right")


EXPERIMENT = Experiment(
    paper=62,
    claim=Claim(
        statement=(
            "State matrices that belong to an orthogonal basis and a measure make a state space "
            "remember, among them the exponentially warped Legendre basis that explains S4; and "
            "the step size must match the length of what is to be remembered."
        ),
        figure="S4 reaches 86 % on Long Range Arena on average, 96 % on Path-X",
        source="abstract",
    ),
    setup=(
        "Long Range Arena and Path-X do not fit a minute on two cores; what is measured is the "
        "mechanism. Reconstruction: band-limited noise (lowest 2 % of the bins) of 2000 steps, its "
        "last 500 read back from one state of 32 numbers, error weighted by exp(-s). Recall: such "
        "noise of 2048 steps, the value 256 steps ago read by ridge regression from the state of a "
        "frozen system of 65 states, at dt = 1/256 and at 10 times more and less; penalty chosen "
        "on a second sequence, error on a third. Float64, bilinear rule. The ranking of the three "
        "bases is shown and no claim is made of it."
    ),
    baseline=(
        "a random dense A with largest real part -0.1 and a random B, with the same regression; "
        "in the reconstruction the smallest past that gives its state, and LegS/t"
    ),
    criteria=(
        Criterion(
            "recall at dt = 1/256: LegS, LegT and FouT each have less MSE than random A by more "
            "than a standard error, and less than half of it",
            _beats_random,
        ),
        Criterion(
            "for each of the three, dt = 1/256 has less than half the MSE of either wrong dt",
            _timescale,
        ),
        Criterion("exp(tA) B of LegS is its basis times measure to 1e-10 at N = 16", _exact),
    ),
    budgets={
        "full": {"seeds": 8, "N": 65, "length": 2048, "lag": 256},
        "smoke": {"seeds": 1, "N": 9, "length": 512, "lag": 64},
    },
    trial=trial,
    plot=plot,
)
