"""Paper 69: is the temperature of a softmax gate estimated at a polynomial rate?

Two gates, a linear one with a learned temperature and one with a tanh before bias and temperature,
are fitted by maximum likelihood to samples of growing size from a known mixture of two experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.moe import (
    ActivationDenseToSparseGate,
    DenseToSparseGate,
    Gate,
    GaussianMoE,
    MoEParams,
    voronoi_cells,
    voronoi_loss,
)

SIZES = (300, 1000, 3000, 10000)
GATES = ("linear", "activation")
ERRORS = ("gating", "gating / tau", "experts", "Voronoi", "Hellinger")
EXPERT_NOISE, GATE_NOISE, SMALL_GATE_NOISE = 0.05, 0.3, 0.1


def truth() -> MoEParams:
    """The mixture that the data come from; the gate of its second expert is 0 and held there."""
    columns = {
        "beta0": [-0.5, 0.0],
        "beta1": [[4.0], [0.0]],
        "a": [[-2.0], [2.0]],
        "b": [1.0, -1.0],
        "var": [0.10, 0.15],
        "temperature": 0.2,
    }
    return MoEParams(**{k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()})


def make_gate(name: str) -> Gate:
    """A gate of two experts in one dimension, with bias and learned temperature."""
    if name == "linear":
        return DenseToSparseGate(1, 2, temperature="learned", noise=None, bias=True)
    return ActivationDenseToSparseGate(1, 2, activation="tanh", learn_temperature=True)


class SecondAtZero(nn.Module):
    """Holds the second expert's row of a gate's parameter at 0, as a parametrisation."""

    def forward(self, first: Tensor) -> Tensor:
        return torch.cat([first, torch.zeros_like(first)])

    def right_inverse(self, both: Tensor) -> Tensor:
        return both[:1]


def start_near(true: MoEParams, draws: Tensor, gate_noise: float) -> MoEParams:
    """The truth with noise on its nine free parameters; draws are nine standard normals."""
    gate, experts = draws[:3] * gate_noise, draws[3:] * EXPERT_NOISE
    shift = torch.zeros(2, 2, dtype=draws.dtype)
    shift[:, 0] = gate[:2]
    assert true.temperature is not None
    return MoEParams(
        beta0=true.beta0 + shift[0],
        beta1=true.beta1 + shift[1, :, None],
        a=true.a + experts[:2, None],
        b=true.b + experts[2:4],
        var=true.var * experts[4:].exp(),
        temperature=true.temperature * gate[2].exp(),
    )


def fit_from(start: MoEParams, gate: str, x: Tensor, y: Tensor, max_iter: int) -> GaussianMoE:
    """The maximum-likelihood fit that L-BFGS reaches from a start."""
    model = GaussianMoE.from_params(start, gate=make_gate(gate))
    for name in ("weight", "bias"):
        parametrize.register_parametrization(model.gate, name, SecondAtZero())
    return model.fit(x, y, max_iter=max_iter)


def errors(model: GaussianMoE, true_model: GaussianMoE) -> dict[str, float]:
    """Distances of a fit from the truth; each atom is compared with the true one nearest to it."""
    fitted, true = model.params(), true_model.params()
    assert fitted.temperature is not None
    assert true.temperature is not None
    cells = voronoi_cells(fitted, true)
    d_beta0 = fitted.beta0 - true.beta0[cells]
    d_beta1 = (fitted.beta1 - true.beta1[cells]).flatten()
    d_log_tau = (fitted.temperature / true.temperature).log().reshape(1)
    scaled = fitted.beta0 / fitted.temperature - true.beta0[cells] / true.temperature
    scaled1 = fitted.beta1 / fitted.temperature - true.beta1[cells] / true.temperature
    experts = [fitted.a.flatten() - true.a[cells].flatten(), fitted.b - true.b[cells]]
    experts.append(fitted.var - true.var[cells])
    return {
        "gating": torch.cat([d_beta0, d_beta1, d_log_tau]).norm().item(),
        "gating / tau": torch.cat([scaled, scaled1.flatten()]).norm().item(),
        "experts": torch.cat(experts).norm().item(),
        "Voronoi": voronoi_loss(fitted, true, 1).item(),
        "Hellinger": hellinger(model, true_model),
    }


def hellinger(model: GaussianMoE, true_model: GaussianMoE) -> float:
    """Hellinger distance of two conditional densities for x ~ U(-1, 1), by quadrature."""
    x = (torch.arange(128, dtype=torch.float64) + 0.5) / 64 - 1
    y = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid_x, grid_y = torch.meshgrid(x, y, indexing="ij")
    roots = [(0.5 * m.log_prob(grid_x[..., None], grid_y)).exp() for m in (model, true_model)]
    squared = torch.trapezoid((roots[0] - roots[1]).square(), y).mean() / 2
    return squared.sqrt().item()


def trial(context: Context) -> dict[str, float]:
    """Errors of both gates at each size, and at the largest size from a nearer start."""
    generator = torch.Generator().manual_seed(context.seed)
    draws = torch.randn(9, generator=generator, dtype=torch.float64)
    far, near = (start_near(truth(), draws, noise) for noise in (GATE_NOISE, SMALL_GATE_NOISE))
    max_iter = context.options["max_iter"]
    figures: dict[str, float] = {}
    for gate in GATES:
        true_model = GaussianMoE.from_params(truth(), gate=make_gate(gate))
        for n in SIZES:
            context.progress(f"{gate} gate, n = {n}")
            x = 2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1
            y = true_model.sample(x, generator=generator)
            found = errors(fit_from(far, gate, x, y, max_iter), true_model)
            figures |= {figure_name(gate, error, n): found[error] for error in ERRORS}
        found = errors(fit_from(near, gate, x, y, max_iter), true_model)
        figures[near_name(gate)] = found["gating"]
    return figures


def figure_name(gate: str, error: str, n: int) -> str:
    """Name of a figure: an error at a sample size."""
    return f"{gate} gate: {error}, n = {n}"


def near_name(gate: str) -> str:
    """Name of the gating error at the largest size, from the nearer start."""
    return f"{gate} gate: gating, n = {SIZES[-1]}, start at {SMALL_GATE_NOISE}"


def table(measured: Measurements, gate: str, error: str) -> np.ndarray:
    """Errors, a row a seed and a column a size."""
    return np.array([measured[figure_name(gate, error, n)].values for n in SIZES]).T


def slopes(values: np.ndarray) -> np.ndarray:
    """Slopes of log median error over log size; `(..., seeds, sizes)` to `(...)`."""
    log_size = np.log(SIZES) - np.mean(np.log(SIZES))
    return np.log(np.median(values, axis=-2)) @ log_size / (log_size @ log_size)


def slope(values: np.ndarray) -> float:
    """The slope for `(seeds, sizes)` errors."""
    return float(slopes(values))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the slope over seeds."""
    seeds = len(values)
    draws = np.random.default_rng(0).integers(seeds, size=(2000, seeds))
    low, high = np.quantile(slopes(values[draws]), [0.025, 0.975])
    return float(low), float(high)


def slope_text(measured: Measurements, gate: str, error: str) -> str:
    """A slope with its interval."""
    values = table(measured, gate, error)
    low, high = interval(values)
    return f"{error} {slope(values):.2f} [{low:.2f}, {high:.2f}]"


def _slope_below(measured: Measurements) -> tuple[bool, str]:
    linear, activation = (slope(table(measured, gate, "gating")) for gate in GATES)
    text = "; ".join(f"{gate}: {slope_text(measured, gate, 'gating')}" for gate in GATES)
    return activation <= linear - 0.2, text


def _linear_floor(measured: Measurements) -> tuple[bool, str]:
    text = ", ".join(slope_text(measured, "linear", error) for error in ERRORS[:4])
    return slope(table(measured, "linear", "gating")) > -0.2, text


def _activation_falls(measured: Measurements) -> tuple[bool, str]:
    text = ", ".join(slope_text(measured, "activation", error) for error in ERRORS[:4])
    return slope(table(measured, "activation", "gating")) < -0.35, text


def _densities_fall(measured: Measurements) -> tuple[bool, str]:
    found = [slope(table(measured, gate, "Hellinger")) for gate in GATES]
    text = "; ".join(f"{gate}: {slope_text(measured, gate, 'Hellinger')}" for gate in GATES)
    return max(found) < -0.4, text


def start_ratio(measured: Measurements, gate: str) -> np.ndarray:
    """For each seed, the gating error from the far start in units of that from the near one."""
    far = np.array(measured[figure_name(gate, "gating", SIZES[-1])].values)
    return far / np.array(measured[near_name(gate)].values)


def _start_text(measured: Measurements, gate: str) -> str:
    far = np.median(measured[figure_name(gate, "gating", SIZES[-1])].values)
    near = np.median(measured[near_name(gate)].values)
    ratio = start_ratio(measured, gate)
    return (
        f"ratio {ratio.min():.3f} to {ratio.max():.3f} over seeds; "
        f"median error {near:.3f} and {far:.3f}"
    )


def _start_forgotten(measured: Measurements) -> tuple[bool, str]:
    ratio = start_ratio(measured, "activation")
    return bool((abs(ratio - 1) <= 0.1).all()), _start_text(measured, "activation")


def _start_kept(measured: Measurements) -> tuple[bool, str]:
    ratio = start_ratio(measured, "linear")
    return bool((ratio > 2).all()), _start_text(measured, "linear")


def plot(measured: Measurements, figure: Any) -> None:
    """Gating error and Hellinger distance against n, and the gating errors of the two starts."""
    colours = {"linear": "tab:orange", "activation": "tab:blue"}
    gating, density, starts = figure.subplots(1, 3)
    for gate, colour in colours.items():
        for axes, error in ((gating, "gating"), (density, "Hellinger")):
            values = table(measured, gate, error)
            axes.loglog(SIZES, values.T, ".", color=colour, alpha=0.35)
            label = f"{gate} ({slope(values):.2f})"
            axes.loglog(SIZES, np.median(values, axis=0), color=colour, label=label)
    fixed = table(measured, "linear", "gating / tau")
    label = f"linear, β/τ ({slope(fixed):.2f})"
    gating.loglog(SIZES, np.median(fixed, axis=0), "--", color=colours["linear"], label=label)
    gating.set_title("error of the gate's parameters", fontsize=10)
    density.set_title("Hellinger distance", fontsize=10)
    for axes in (gating, density):
        axes.set_xlabel("n")
        axes.set_ylim(top=axes.get_ylim()[1] * 3)
        axes.legend(title="median (slope)", loc="upper right", fontsize=7, title_fontsize=7)
    _plot_starts(measured, starts, colours)


def _plot_starts(measured: Measurements, axes: Any, colours: Mapping[str, str]) -> None:
    points = {}
    for gate, colour in colours.items():
        far = measured[figure_name(gate, "gating", SIZES[-1])].values
        points[gate] = (measured[near_name(gate)].values, far)
        axes.loglog(*points[gate], "o", color=colour, label=gate, alpha=0.8)
    every = [value for pair in points.values() for values in pair for value in values]
    ends = np.array([min(every) / 1.3, max(every) * 1.3])
    ratio = GATE_NOISE / SMALL_GATE_NOISE
    axes.loglog(ends, ends, color="0.5", linewidth=1, label="start forgotten")
    axes.loglog(ends, ratio * ends, ":", color="0.5", linewidth=1, label="start kept")
    axes.set(xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
        axis.set_ticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    axes.set_title(f"gate error at n = {SIZES[-1]}", fontsize=10)
    axes.set_xlabel(f"started {SMALL_GATE_NOISE} from the truth")
    axes.set_ylabel(f"started {GATE_NOISE} from the truth")
    axes.legend(fontsize=7, loc="lower right")


EXPERIMENT = Experiment(
    paper=69,
    claim=Claim(
        statement=(
            "Gate parameters of a softmax gate with a temperature are estimated more slowly than "
            "any power of n, those of a gate with an activation before bias and temperature at a "
            "polynomial rate; the densities of both converge at the parametric rate."
        ),
        figure="parameters as slow as 1 / log n against polynomial; densities (log n / n)^(1/2)",
        source="abstract; densities: the paper's theorem on conditional density estimation",
    ),
    setup=(
        "Two experts in one dimension, x ~ U(-1, 1): beta1 = (4, 0), beta0 = (-0.5, 0), tau = 0.2, "
        "a = (-2, 2), b = (1, -1), var = (0.10, 0.15), the second expert's gate held at 0. "
        "Maximum likelihood by L-BFGS in float64 for n = 300, 1000, 3000, 10000, started at the "
        "truth plus normal noise of 0.3 on (beta1, beta0, log tau), 0.05 on the experts. Slopes "
        "are those of the log median error over the seeds against log n, with 95 % bootstrap "
        "intervals over the seeds; gating errors are of (beta1, beta0, log tau), those marked "
        "'/ tau' of (beta1, beta0) / tau, which the linear gate does determine. Hellinger "
        "distances by quadrature over x and y."
    ),
    baseline="the linear gate softmax((beta1 x + beta0) / tau), the rest the same",
    criteria=(
        Criterion(
            "slope of the gating error: activation gate below linear gate by at least 0.2",
            _slope_below,
        ),
        Criterion("slope of the gating error, linear gate: above -0.2", _linear_floor),
        Criterion("slope of the gating error, activation gate: below -0.35", _activation_falls),
        Criterion("slope of the Hellinger distance, both gates: below -0.4", _densities_fall),
        Criterion(
            "activation gate, n = 10000: on every seed the gating error from a start at noise 0.3 "
            "is within 10 % of that from noise 0.1",
            _start_forgotten,
        ),
        Criterion(
            "linear gate, n = 10000: on every seed the gating error from a start at noise 0.3 is "
            "more than twice that from noise 0.1",
            _start_kept,
        ),
    ),
    budgets={"full": {"seeds": 8, "max_iter": 500}, "smoke": {"seeds": 1, "max_iter": 10}},
    trial=trial,
    plot=plot,
)
