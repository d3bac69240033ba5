"""Paper 41: does a mixture of growth curves with covariates recover its parameters?

Panels drawn from a known mixture of two bilinear splines are fitted by the full model, by the two
models with covariates in one place only, and by the finite mixture without any.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.moe import GrowthMoE, GrowthMoEFit, GrowthParams, compare_models, fit_growth_moe

OCCASIONS, JITTER, EXPERT_CORRELATION, FACTOR_CORRELATION = 10, 0.25, 0.3, 0.3
SHAPES = {"gamma": (2, 1), "alpha": (2, 3), "beta": (2, 3, 2), "gate_weight": (2, 2)}
"""The parameters whose bias is judged, with their shapes."""

FULL, MIXTURE = "full model", "finite mixture"
RIVALS = ("expert", "gating", "mixture")


def truth() -> GrowthParams:
    """The mixture that the data come from, its means at expert covariates of 0."""

    def make(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    correlation = torch.full((3, 3), FACTOR_CORRELATION, dtype=torch.float64).fill_diagonal_(1)
    spread = make([[21.75, 0.87, 0.87], [18.5, 0.74, 0.74]]).sqrt()
    psi = spread[:, :, None] * correlation * spread[:, None]
    first = [[0.885, 1.327], [0.177, 0.265], [0.177, 0.265]]
    second = [[1.252, 1.877], [0.250, 0.375], [0.250, 0.375]]
    return GrowthParams(
        gate_bias=make([0.0, 0.0]),
        gate_weight=make([[0.0, 0.0], [math.log(1.5), math.log(1.7)]]),
        gamma=make([[3.5], [5.5]]),
        alpha=make([[100.0, -5.0, -2.6], [100.0, -5.0, -3.4]]),
        beta=make([first, second]),
        scale_tril=torch.linalg.cholesky(psi),
        theta=make([1.0, 1.0]),
        kappa=make([[], []]),
    )


def draw(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A panel of n subjects as arguments for a fit, and the subjects' classes."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(OCCASIONS, dtype=torch.float64).repeat(n, 1)
    inner = t[:, 1:-1]
    inner += (2 * torch.rand(inner.shape, generator=generator, dtype=t.dtype) - 1) * JITTER
    gate_x, normal = torch.randn(2, n, 2, generator=generator, dtype=t.dtype)
    first, other = normal.unbind(-1)
    correlated = EXPERT_CORRELATION * first + math.sqrt(1 - EXPERT_CORRELATION**2) * other
    expert_x = torch.stack([first, correlated], -1)
    model = GrowthMoE(2, 2, 2, time_range=(0.0, OCCASIONS - 1.0))
    model.set_params(truth())
    sample = model.sample(t, gate_x, expert_x, generator=generator)
    return {"y": sample.y, "t": t, "gate_x": gate_x, "expert_x": expert_x}, sample.classes


def true_values(expert_x: Tensor) -> dict[str, Tensor]:
    """The true parameters, means at the mean of the covariates, which is where fits have them."""
    true = truth()
    values = {**true._asdict(), "psi": true.psi}
    values["alpha"] = true.alpha + true.beta @ expert_x.mean(0)
    return values


def coverage(fit: GrowthMoEFit, true: dict[str, Tensor]) -> float:
    """The fraction of all free parameters whose 95 % interval has the true value in it."""
    covered = []
    for name, low, high in zip(fit.params._fields, *fit.ci, strict=True):
        inside = (low <= true[name]) & (true[name] <= high)
        free = torch.ones_like(inside)
        if name.startswith("gate"):
            free[0] = False
        elif name == "psi":
            free = free.tril()
        covered.append(inside[free])
    return torch.cat(covered).double().mean().item()


def figure_name(model: str, parameter: str, place: tuple[int, ...]) -> str:
    """Name of a figure: the error of one entry of a parameter."""
    return f"{model}: error of {parameter}[{', '.join(map(str, place))}]"


def places(parameter: str) -> list[tuple[int, ...]]:
    """The entries of a parameter that are judged; the gate of the first class is fixed."""
    every = list(np.ndindex(SHAPES[parameter]))
    return [place for place in every if place[0]] if parameter == "gate_weight" else every


def errors(model: str, fit: GrowthMoEFit, true: dict[str, Tensor]) -> dict[str, float]:
    """Errors of those parameters that the model has."""
    return {
        figure_name(model, name, place): (getattr(fit.params, name)[place] - true[name][place])
        .detach()
        .item()
        for name in (SHAPES if model == FULL else ("gamma", "alpha"))
        for place in places(name)
    }


def agreement(fit: GrowthMoEFit, panel: dict[str, Tensor], classes: Tensor) -> float:
    """Adjusted Rand index of the most probable and the true classes."""
    from sklearn.metrics import adjusted_rand_score

    used = {"gate_x": fit.model.num_gate_covariates, "expert_x": fit.model.num_expert_covariates}
    inputs = {name: value for name, value in panel.items() if used.get(name, 1)}
    with torch.no_grad():
        found = fit.model.posterior(**inputs).argmax(-1)
    return float(adjusted_rand_score(classes.numpy(), found.numpy()))


def trial(context: Context) -> dict[str, float]:
    """Errors, coverage, classification and information criteria on one panel."""
    options = context.options
    panel, classes = draw(options["n"], context.seed)
    true = true_values(panel["expert_x"])
    context.progress("four models from the truth")
    fits = compare_models(num_classes=2, init=truth(), max_iter=options["max_iter"], **panel)
    full, mixture = fits["full"], fits["mixture"]
    context.progress("full model from clusters")
    again = fit_growth_moe(
        num_classes=2, n_starts=options["n_starts"], max_iter=options["max_iter"], **panel
    )
    figures = errors(FULL, full, true) | errors(MIXTURE, mixture, true)
    figures |= {
        "coverage": coverage(full, true),
        "fits converged": sum(fit.converged for fit in fits.values()) / len(fits),
        "log-likelihood from clusters less from the truth": again.loglik - full.loglik,
    }
    for name, fit in ((FULL, full), (MIXTURE, mixture)):
        figures[f"{name}: adjusted Rand index"] = agreement(fit, panel, classes)
    for name in RIVALS:
        figures[f"BIC of {name} model less full"] = fits[name].bic - full.bic
    return figures


def entries(model: str) -> list[tuple[str, float, str]]:
    """Figures of the model's errors, with the true values and what to call the parameters."""
    true = truth()
    return [
        (figure_name(model, name, place), getattr(true, name)[place].item(), f"{name}{list(place)}")
        for name in (SHAPES if model == FULL else ("gamma", "alpha"))
        for place in places(name)
    ]


def rmse(errors: Measurement) -> float:
    """Root mean squared error."""
    return math.sqrt(math.fsum(e**2 for e in errors.values) / len(errors.values))


def bias_text(measured: Measurements, model: str) -> tuple[bool, str]:
    """Whether all biases are small, and a line on the worst of them and the precision."""
    excess, worst, ratios = -math.inf, "", []
    for name, true, label in entries(model):
        error = measured[name]
        allowed = max(0.1 * abs(true), 2 * error.std_error)
        ratios.append(rmse(error) / abs(true))
        if abs(error.mean) / allowed > excess:
            excess = abs(error.mean) / allowed
            worst = f"{label} {error.mean:+.3f} of allowed {allowed:.3f}"
    text = f"worst bias {worst}; median RMSE {100 * float(np.median(ratios)):.1f} % of the truth"
    return excess < 1, text


def _unbiased(measured: Measurements) -> tuple[bool, str]:
    holds, text = bias_text(measured, FULL)
    return holds, f"{text}. {MIXTURE}: {bias_text(measured, MIXTURE)[1]}"


def _coverage(measured: Measurements) -> tuple[bool, str]:
    mean = measured["coverage"].mean
    return 0.88 <= mean <= 0.99, f"{100 * mean:.1f} %"


def _classification(measured: Measurements) -> tuple[bool, str]:
    full, mixture = (measured[f"{m}: adjusted Rand index"] for m in (FULL, MIXTURE))
    gain = full - mixture
    return gain.mean > gain.std_error, f"{full} against {mixture}; difference {gain}"


def _bic(measured: Measurements) -> tuple[bool, str]:
    gaps = np.array([measured[f"BIC of {name} model less full"].values for name in RIVALS])
    share = float((gaps > 0).all(0).mean())
    text = ", ".join(f"{name} +{gap:.0f}" for name, gap in zip(RIVALS, gaps.mean(1), strict=True))
    return share >= 0.8, f"{100 * share:.0f} % of the panels; on average {text}"


def plot(measured: Measurements, figure: Any) -> None:
    """Biases with their errors, classification of the two models, and BIC of the other three."""
    bias, rand, bic = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    labels = [label for _, _, label in entries(FULL)]
    for model, colour, shift in ((FULL, "tab:blue", -0.15), (MIXTURE, "tab:orange", 0.15)):
        found = [(measured[name], true, label) for name, true, label in entries(model)]
        centre = [100 * error.mean / abs(true) for error, true, _ in found]
        width = [200 * error.std_error / abs(true) for error, true, _ in found]
        rows = [labels.index(label) + shift for _, _, label in found]
        bias.errorbar(centre, rows, xerr=width, fmt="o", ms=3, lw=1, color=colour, label=model)
    bias.axvspan(-10, 10, color="0.92", zorder=0)
    bias.axvline(0, color="0.5", lw=0.8)
    bias.set_yticks(range(len(labels)), labels, fontsize=6)
    bias.invert_yaxis()
    bias.set_xlabel("mean error ± 2 s.e., % of the truth")
    bias.legend(fontsize=7, loc="upper right")
    bias.set_title("bias", fontsize=10)

    pairs = [measured[f"{model}: adjusted Rand index"].values for model in (MIXTURE, FULL)]
    rand.plot([0, 1], pairs, "-o", color="tab:blue", alpha=0.4, ms=3)
    rand.set_xticks([0, 1], [MIXTURE, FULL], fontsize=8)
    rand.set_xlim(-0.3, 1.3)
    rand.set_title("adjusted Rand index", fontsize=10)

    gaps = [measured[f"BIC of {name} model less full"].values for name in RIVALS]
    for place, values in enumerate(gaps):
        bic.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.4, ms=4)
    bic.axhline(0, color="0.5", lw=0.8)
    bic.set_xticks(range(len(RIVALS)), RIVALS, fontsize=8)
    bic.set_xlim(-0.5, len(RIVALS) - 0.5)
    bic.set_title("BIC over full model", fontsize=10)


EXPERIMENT = Experiment(
    paper=41,
    claim=Claim(
        statement=(
            "A mixture of growth curves whose gate and experts both have covariates is estimated "
            "without bias and precisely, with intervals that cover as they should."
        ),
        figure="unbiased and precise estimates, target coverage of the 95 % intervals",
        source="abstract",
    ),
    setup=(
        "Two classes of bilinear splines with knots 3.5 and 5.5, 500 subjects, 10 occasions at "
        "0..9 moved by up to 0.25 within; two covariates of the gate with odds ratios 1.5 and 1.7, "
        "two correlated ones of the growth factors, which explain 13 % and 26 % of their "
        "variance. Maximum likelihood by L-BFGS in float64 from the truth, and once more from "
        "clusters of the subjects; standard errors from the observed information. Classes are "
        "matched by the order of the knots. A seed is a panel. The true means of the growth "
        "factors are those at the panel's mean covariates, as the fits centre them."
    ),
    baseline="the finite mixture without covariates, by the same fit of the same panels",
    criteria=(
        Criterion(
            "bias of every knot, mean, covariate effect and gate slope of the full model: below "
            "10 % of the true value or twice its Monte Carlo standard error",
            _unbiased,
        ),
        Criterion("coverage of the 95 % intervals, all parameters: 88 to 99 %", _coverage),
        Criterion(
            "adjusted Rand index of the classes: full model above the finite mixture by more than "
            "a standard error",
            _classification,
        ),
        Criterion("the full model has the least BIC of four on at least 80 % of panels", _bic),
    ),
    budgets={
        "full": {"seeds": 20, "n": 500, "n_starts": 3, "max_iter": 200},
        "smoke": {"seeds": 1, "n": 60, "n_starts": 1, "max_iter": 3},
    },
    trial=trial,
    plot=plot,
)
