"""Paper 5: does expected improvement that reckons with noise find better points under noise?

Four searches choose from the same Sobol points, with the same Gaussian process. Whatever they have
seen, the evaluated point of the highest posterior mean is what they report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.experiments.gp.bnn_surrogates_problems import ackley, branin, hartmann
from torchzoo.gp import BayesOpt, GPSurrogate, NoisyExpectedImprovement, expected_improvement
from torchzoo.gp.acquisition_lines import gaussian

EI, NOISY, KG = "plug-in EI", "noisy EI", "knowledge gradient"
METHODS = {"random": "random", EI: "ei", NOISY: "noisy_ei", KG: "kg", "MES": "mes"}
MODEL_BASED = (EI, NOISY, KG)
FUNCTIONS = {"Branin": (branin, 2), "Hartmann-6": (hartmann, 6), "Ackley-5": (ackley, 5)}
NOISE = 0.5  # of the function's standard deviation
JITTER = 1e-12  # variance where there is no noise; its root is what EI has at points seen
QUIET, LOUD = "Branin", ("Branin, noise", "Hartmann-6, noise")
SETTINGS = (QUIET, *LOUD)
AGREE = 1e-6


class FixedNoiseGP(GPSurrogate):
    """A Gaussian process that is told that there is no noise."""

    def _build(self, x: Tensor, z: Tensor) -> Any:
        from gpytorch.constraints import GreaterThan

        model = super()._build(x, z)
        likelihood = type(model.likelihood)(
            noise_constraint=GreaterThan(JITTER / 10), batch_shape=model.kernel.batch_shape
        ).to(x)
        likelihood.noise = JITTER
        model.likelihood = likelihood.requires_grad_(False)
        return model


class Setting:
    """A function on Sobol points with noise; the n-th evaluation has the same noise for all.

    Args:
        name: A function, and `", noise"` behind it for values with noise.
        seed: Of points and noise.
        count: Points.
    """

    def __init__(self, name: str, seed: int, count: int):
        function, self.dim = FUNCTIONS[name.removesuffix(", noise")]
        engine = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=seed)
        self.points = engine.draw(count, dtype=torch.float64)
        self.values = function(self.points)
        self.spread = self.values.std()
        generator = torch.Generator().manual_seed(1000 + seed)
        self.noisy = name.endswith("noise")
        self.noise = NOISE * torch.randn(1000, dtype=torch.float64, generator=generator)
        self.bounds = torch.tensor([[0.0], [1.0]]).expand(2, self.dim)

    def true(self, x: Tensor) -> Tensor:
        """Values in units of their standard deviation, `(n,)`."""
        at = (x[:, None] == self.points).all(-1).int().argmax(-1)
        return self.values[at] / self.spread

    def observed(self, x: Tensor, n: int) -> Tensor:
        """What the n-th evaluation gives."""
        return self.true(x) + (self.noise[n] if self.noisy else 0.0)

    def regret(self, x: Tensor) -> float:
        """How far a point is from the best one, in units of the standard deviation."""
        return float(self.values.max() / self.spread - self.true(x[None]))


def search(method: str, setting: Setting, seed: int, options: Mapping[str, Any]) -> BayesOpt:
    """An optimiser; where there is no noise its model knows."""
    kind = GPSurrogate if setting.noisy else FixedNoiseGP
    return BayesOpt(
        setting.bounds,
        acquisition=METHODS[method],
        surrogate=kind(
            max_iter=options["iterations"], generator=torch.Generator().manual_seed(seed)
        ),
        seed=seed,
        candidates=setting.points,
        refit_every=options["refit every"],
    )


def agreement(found: BayesOpt, setting: Setting) -> float:
    """The largest difference between noisy and plain expected improvement over all candidates."""
    model, at = found.surrogate_given_data(), setting.points[:, None]
    normal = gaussian(model, at)
    mean, std = normal.mean[:, 0, 0], normal.variance[:, 0, 0].clamp_min(0).sqrt()
    plain = expected_improvement(mean, std, found.y.max())
    return float((NoisyExpectedImprovement(model, found.x)(at) - plain).abs().max())


@torch.no_grad()
def play(method: str, name: str, seed: int, options: Mapping[str, Any]) -> dict[str, float]:
    """Regret of what would be reported after each evaluation from the initial ones on."""
    setting = Setting(name, seed, options["candidates"])
    found = search(method, setting, seed, options)
    initial = found.num_initial
    for n in range(initial):
        x = found.suggest()
        found.observe(x, setting.observed(x, n))
    figures = {f"regret after 0, {method}, {name}": setting.regret(found.best()[0])}
    apart = []
    for step in range(1, options["evaluations"] + 1):
        if method == NOISY and name == QUIET:
            apart.append(agreement(found, setting))
        x = found.suggest()
        found.observe(x, setting.observed(x, initial + step - 1))
        figures[f"regret after {step}, {method}, {name}"] = setting.regret(found.best()[0])
    if apart:
        figures[f"EI and noisy EI apart, {name}"] = max(apart)
    return figures


def trial(context: Context) -> dict[str, float]:
    """All searches of one seed."""
    figures: dict[str, float] = {}
    for name in context.options["settings"]:
        for method in context.options["methods"]:
            context.progress(f"{method} on {name}")
            figures |= play(method, name, context.seed, context.options)
    return figures | {"evaluations": context.options["evaluations"]}


def regret(measured: Measurements, method: str, name: str, step: int | None = None) -> Measurement:
    """Regret after so many evaluations; in the end if None."""
    step = _steps(measured) if step is None else step
    return measured[f"regret after {step}, {method}, {name}"]


def _steps(measured: Measurements) -> int:
    return round(measured["evaluations"].mean)


def pooled(measured: Measurements, method: str, names: tuple[str, ...]) -> Measurement:
    """Final regrets of all seeds in several settings."""
    values = [v for name in names for v in regret(measured, method, name).values]
    return Measurement(method, tuple(values))


def _beats_random(measured: Measurements) -> tuple[bool, str]:
    random = pooled(measured, "random", SETTINGS)
    found = {m: pooled(measured, m, SETTINGS) for m in MODEL_BASED}
    ends = {m: (found[m] - random).interval for m in MODEL_BASED}
    text = ", ".join(
        f"{m} {found[m]} (difference [{low:.3g}, {high:.3g}])" for m, (low, high) in ends.items()
    )
    return all(high < 0 for _, high in ends.values()), f"random {random}; {text}"


def _noise(measured: Measurements) -> tuple[bool, str]:
    ours, plain = pooled(measured, NOISY, LOUD), pooled(measured, EI, LOUD)
    low, high = (ours - plain).interval
    tie = " (a tie)" if low <= 0 <= high else ""
    order = sorted(MODEL_BASED, key=lambda m: pooled(measured, m, LOUD).mean)
    place = f"knowledge gradient is number {order.index(KG) + 1} of {len(order)}"
    return high < 0, f"{ours} against {plain}, difference [{low:.3g}, {high:.3g}]{tie}; {place}"


def _agree(measured: Measurements) -> tuple[bool, str]:
    apart = max(measured[f"EI and noisy EI apart, {QUIET}"].values)
    return apart <= AGREE, f"at most {apart:.2g} apart"


def plot(measured: Measurements, figure: Any) -> None:
    """Regret by evaluations in each setting, with 95 % intervals of the mean over seeds."""
    names = [name for name in (*SETTINGS, "Ackley-5, noise") if _has(measured, name)]
    methods = [m for m in METHODS if f"regret after 0, {m}, {QUIET}" in measured]
    colours = dict(zip(METHODS, ("tab:gray", "C1", "C0", "C2", "C3"), strict=True))
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    steps = range(_steps(measured) + 1)
    for ax, name in zip(axes, names, strict=True):
        top = 0.0
        for method in methods:
            runs = [regret(measured, method, name, step) for step in steps]
            bands = [r.interval for r in runs]
            means = [r.mean for r in runs]
            top = max(top, *means)
            ax.plot(steps, means, color=colours[method], label=method)
            if math.isfinite(bands[0][0]):
                low, high = ([max(b[i], 0.0) for b in bands] for i in (0, 1))
                ax.fill_between(steps, low, high, color=colours[method], alpha=0.12, lw=0)
        ax.set(title=name, xlabel="evaluations", ylim=(0, 1.3 * top), xlim=(0, steps[-1]))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("regret of the reported point / sd of f")
    axes[-1].legend(fontsize=8, loc="upper right")


def _has(measured: Measurements, name: str) -> bool:
    return f"regret after 0, random, {name}" in measured


FULL: dict[str, Any] = {
    "seeds": 5,
    "settings": SETTINGS,
    "methods": ("random", *MODEL_BASED),
    "candidates": 512,
    "evaluations": 20,
    "refit every": 5,
    "iterations": 100,
}

EXPERIMENT = Experiment(
    paper=5,
    claim=Claim(
        statement=(
            "Bayesian optimisation finds good points of expensive functions in few evaluations; "
            "expected improvement extends to noisy evaluations by a decision-theoretic argument."
        ),
        figure="none: a tutorial",
        source="abstract",
    ),
    setup=(
        "Branin without noise, Branin and Hartmann-6 with noise of half a standard deviation; 512 "
        "Sobol points a seed as candidates, the first 2 (d + 1) evaluated before any fit, then 20 "
        "evaluations. The model is a Gaussian process with a Matérn-5/2 kernel, at the mode of "
        "its hyperparameters, which are fitted every 5 evaluations. Each method reports the "
        "evaluated point of the highest posterior mean; regret is to the best candidate."
    ),
    baseline="random search, and expected improvement on the best value observed",
    criteria=(
        Criterion(
            "each of plug-in EI, noisy EI and knowledge gradient ends with less regret than random "
            "search: 95 % intervals of paired differences over seeds and settings are below 0",
            _beats_random,
        ),
        Criterion(
            "with noise, noisy EI ends with less regret than plug-in EI: the 95 % interval of "
            "paired differences over seeds and both settings is below 0",
            _noise,
        ),
        Criterion(
            "without noise, noisy EI and EI agree to 1e-6 at all candidates in every step", _agree
        ),
    ),
    budgets={
        "full": FULL,
        "extended": FULL
        | {
            "seeds": 20,
            "settings": (*SETTINGS, "Ackley-5, noise"),
            "methods": ("random", *MODEL_BASED, "MES"),
        },
        "smoke": FULL
        | {"seeds": 2, "candidates": 16, "evaluations": 2, "refit every": 5, "iterations": 2},
    },
    trial=trial,
    plot=plot,
)
