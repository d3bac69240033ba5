"""Paper 146: rates of top-K sparse softmax gating, and too few active experts in a large fit.

Fits by maximum likelihood to samples of growing size, from near the truth: with the true number of
experts, and with one expert too many of which either two or all three are active.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.moe import (
    GaussianMoE,
    MoEParams,
    fit_mle,
    overfit_exponents,
    voronoi_cells,
    voronoi_loss,
)

SIZES = (300, 1000, 3000, 10000)
START_NOISE, APART, FREE_STARTS, FREE_SIZE = 0.05, 0.3, 10, 1000
Y_NODES = torch.linspace(-9, 9, 361, dtype=torch.float64)
EXACT_D1, EXACT_H = "exact: D1", "exact: Hellinger"
ONE_ACTIVE = "K = 1: experts"
FEW_H, FEW_LOCAL_H = "2 of 3 active: Hellinger", "2 of 3 active, before EM: Hellinger"
ALL_H, ALL_LOSS, ALL_D2 = "3 of 3 active: Hellinger", "3 of 3 active: loss", "3 of 3 active: D2"
CURVES = (EXACT_D1, EXACT_H, ONE_ACTIVE, FEW_H, FEW_LOCAL_H, ALL_H, ALL_LOSS, ALL_D2)
FREE_H = f"2 of 3 active, best of {FREE_STARTS} free starts: Hellinger, n = {FREE_SIZE}"


def params(**columns: list[Any]) -> MoEParams:
    """Parameters from lists."""
    return MoEParams(**{k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()})


SPARSE_TRUTH = params(
    beta0=[0.5, -0.3, 0.0],
    beta1=[[4.0], [2.0], [0.0]],
    a=[[-4.0], [3.0], [1.0]],
    b=[1.0, -1.0, 3.0],
    var=[0.10, 0.15, 0.12],
)
"""Two of three experts active; which ones changes at x = 0."""

DENSE_TRUTH = params(
    beta0=[0.0, 0.0], beta1=[[3.0], [0.0]], a=[[-4.0], [4.0]], b=[1.0, -1.0], var=[0.10, 0.15]
)
"""Two experts, both active everywhere."""

HARD_TRUTH = params(
    beta0=[-8.0, 0.0], beta1=[[25.0], [0.0]], a=[[-20.0], [20.0]], b=[15.0, -5.0], var=[0.09, 0.16]
)
"""One of two experts active, chosen with bias, for x ~ U(0, 1): the first from x = 0.32 on."""


def near(true: MoEParams, generator: torch.Generator) -> MoEParams:
    """The truth with normal noise, relative on the variances."""

    def noise(field: Tensor) -> Tensor:
        return START_NOISE * torch.randn(field.shape, generator=generator, dtype=field.dtype)

    beta0, beta1, a, b = (field + noise(field) for field in true[:4])
    return MoEParams(beta0, beta1, a, b, true.var * noise(true.var).exp())


def with_copies(true: MoEParams) -> MoEParams:
    """The two experts of the dense truth, the first of them twice with its weight shared out."""
    copies = MoEParams(*(field[[0, 0, 1]] for field in true[:5]))
    shift = torch.tensor([APART, -APART, 0.0], dtype=true.b.dtype)
    share = torch.tensor([0.5, 0.5, 1.0], dtype=true.b.dtype)
    return copies._replace(
        beta0=copies.beta0 + share.log(),
        beta1=copies.beta1 + shift[:, None],
        a=copies.a + shift[:, None],
        b=copies.b + shift,
    )


def draw(
    model: GaussianMoE, n: int, low: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A sample of size n with x ~ U(low, 1)."""
    x = low + (1 - low) * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return x, model.sample(x, generator=generator)


def root_density(model: GaussianMoE) -> Tensor:
    """`(128, 361)`, roots of the conditional densities at the nodes of the quadrature."""
    x = (torch.arange(128, dtype=torch.float64) + 0.5) / 64 - 1
    grid_x, grid_y = torch.meshgrid(x, Y_NODES, indexing="ij")
    with torch.no_grad():
        return (0.5 * model.log_prob(grid_x[..., None], grid_y)).exp()


def hellinger(model: GaussianMoE, true_root: Tensor) -> float:
    """Hellinger distance of a conditional density from the true one, for x ~ U(-1, 1)."""
    gap = root_density(model) - true_root
    squared = torch.trapezoid(gap.square(), Y_NODES).mean() / 2
    return squared.sqrt().item()


def regional_loss(model: GaussianMoE, true: MoEParams, top_k: int, order: Any = 1) -> float:
    """D1 or, with `overfit_exponents`, D2 of a fit; gates anchored at the last expert."""
    fitted = model.params().anchored()
    return voronoi_loss(fitted, true, order, top_k=top_k, reduce="regions-max").item()


def exact_trial(context: Context, generator: torch.Generator) -> dict[str, float]:
    """(i) As many experts as there are, as many active as there are."""
    true_model = GaussianMoE.from_params(SPARSE_TRUTH, gate="topk", top_k=2)
    true_root = root_density(true_model)
    start, figures = near(SPARSE_TRUTH, generator), {}
    for n in SIZES:
        context.progress(f"exact, n = {n}")
        x, y = draw(true_model, n, -1, generator)
        model = GaussianMoE.from_params(start, gate="topk", top_k=2)
        model.fit(x, y, max_iter=context.options["max_iter"])
        figures[at(EXACT_D1, n)] = regional_loss(model, SPARSE_TRUTH, 2)
        figures[at(EXACT_H, n)] = hellinger(model, true_root)
    return figures


def one_active_trial(context: Context, generator: torch.Generator) -> dict[str, float]:
    """The experts of a fit with K = 1, where the likelihood can't see the gate: it is the truth's.

    The loss is the experts' part of D1, which at K = 1 is that of the worse expert.
    """
    rule: dict[str, Any] = {"gate": "topk", "top_k": 1, "select_with_bias": True}
    true_model = GaussianMoE.from_params(HARD_TRUTH, **rule)
    start, figures = near(HARD_TRUTH, generator), {}
    start = start._replace(beta0=HARD_TRUTH.beta0, beta1=HARD_TRUTH.beta1)
    even = HARD_TRUTH._replace(beta0=torch.zeros_like(HARD_TRUTH.beta0))
    for n in SIZES:
        x, y = draw(true_model, n, 0, generator)
        model = GaussianMoE.from_params(start, **rule)
        model.fit(x, y, max_iter=context.options["max_iter"])
        fitted = model.params()._replace(beta0=even.beta0)
        loss = voronoi_loss(fitted, even, 1, top_k=1, reduce="regions-max")
        figures[at(ONE_ACTIVE, n)] = loss.item()
    return figures


def overfit_trial(context: Context, generator: torch.Generator) -> dict[str, float]:
    """(ii), (iii) Three experts for two, with two and with all three active."""
    true_model = GaussianMoE.from_params(DENSE_TRUTH)
    true_root = root_density(true_model)
    start, figures = near(with_copies(DENSE_TRUTH), generator), {}
    max_iter = context.options["max_iter"]
    for n in SIZES:
        context.progress(f"over-specified, n = {n}")
        x, y = draw(true_model, n, -1, generator)
        model = GaussianMoE.from_params(start, gate="topk", top_k=3).fit(x, y, max_iter=max_iter)
        figures[at(ALL_H, n)] = hellinger(model, true_root)
        figures[at(ALL_LOSS, n)] = regional_loss(model, DENSE_TRUTH, 2)
        figures[at(ALL_D2, n)] = regional_loss(model, DENSE_TRUTH, 2, overfit_exponents)
        figures[shared(3, n)] = atoms_in_first_cell(model)
        model = GaussianMoE.from_params(start, gate="topk", top_k=2).fit(x, y, max_iter=max_iter)
        figures[at(FEW_LOCAL_H, n)] = hellinger(model, true_root)
        figures[shared(2, n)] = atoms_in_first_cell(model)
        model.fit(x, y, method="em", max_iter=context.options["em_iter"], tol=1e-6)
        figures[at(FEW_H, n)] = hellinger(model, true_root)
        if n == FREE_SIZE:
            starts = context.options["free_starts"]
            free = fit_mle(x, y, 3, gate="topk", top_k=2, restarts=starts, max_iter=max_iter)
            figures[FREE_H] = hellinger(free, true_root)
    return figures


def atoms_in_first_cell(model: GaussianMoE) -> int:
    """How many of the fitted experts are nearest to the first expert of the dense truth."""
    return int((voronoi_cells(model.params().anchored(), DENSE_TRUTH) == 0).sum())


def trial(context: Context) -> dict[str, float]:
    """All errors at each size."""
    generator = torch.Generator().manual_seed(context.seed)
    return (
        exact_trial(context, generator)
        | overfit_trial(context, generator)
        | one_active_trial(context, generator)
    )


def at(curve: str, n: int) -> str:
    """Name of a figure: an error at a sample size."""
    return f"{curve}, n = {n}"


def shared(top_k: int, n: int) -> str:
    """Name of the number of fitted experts in the cell of the first true one."""
    return f"{top_k} of 3 active: experts in the first cell, n = {n}"


def table(measured: Measurements, curve: str) -> np.ndarray:
    """Errors, a row a seed and a column a size."""
    return np.array([measured[at(curve, n)].values for n in SIZES]).T


def slope(measured: Measurements, curve: str) -> tuple[float, float]:
    """Slope of the mean log error over log n, and its standard error over the seeds."""
    log_size = np.log(SIZES) - np.mean(np.log(SIZES))
    slopes = np.log(table(measured, curve)) @ log_size / (log_size @ log_size)
    error = slopes.std(ddof=1) / math.sqrt(len(slopes)) if len(slopes) > 1 else 0.0
    return float(slopes.mean()), float(error)


def slope_text(measured: Measurements, curve: str) -> str:
    """A slope with its standard error."""
    return "{} {:.2f} ± {:.2f}".format(curve, *slope(measured, curve))


def median(measured: Measurements, figure: str) -> float:
    """Median of a figure over the seeds."""
    return float(np.median(measured[figure].values))


def _exact_d1(measured: Measurements) -> tuple[bool, str]:
    rate, error = slope(measured, EXACT_D1)
    text = f"{slope_text(measured, EXACT_D1)}; {slope_text(measured, ONE_ACTIVE)}"
    return -0.65 - 2 * error <= rate <= -0.35 + 2 * error, text


def _exact_density(measured: Measurements) -> tuple[bool, str]:
    return slope(measured, EXACT_H)[0] < -0.35, slope_text(measured, EXACT_H)


def _too_few_active(measured: Measurements) -> tuple[bool, str]:
    few, local, every = (
        median(measured, at(curve, SIZES[-1])) for curve in (FEW_H, FEW_LOCAL_H, ALL_H)
    )
    compared = median(measured, at(ALL_H, FREE_SIZE))
    text = (
        f"{few:.3f} ({local:.3f} before EM) against {every:.3f}; at n = {FREE_SIZE} the best of "
        f"{FREE_STARTS} free starts {median(measured, FREE_H):.3f} against {compared:.3f}"
    )
    return few > 2 * every, text


def _few_stay(measured: Measurements) -> tuple[bool, str]:
    text = f"{slope_text(measured, FEW_H)}; {slope_text(measured, FEW_LOCAL_H)}"
    return slope(measured, FEW_H)[0] > -0.2, text


def _all_fall(measured: Measurements) -> tuple[bool, str]:
    return slope(measured, ALL_H)[0] < -0.35, slope_text(measured, ALL_H)


def _parameters_slower(measured: Measurements) -> tuple[bool, str]:
    in_cell = np.array([measured[shared(3, n)].values for n in SIZES])
    text = "; ".join(slope_text(measured, curve) for curve in (ALL_LOSS, EXACT_D1, ALL_D2))
    text += f"; two experts in the first cell in {(in_cell == 2).mean():.0%} of the fits"
    return slope(measured, ALL_LOSS)[0] >= slope(measured, EXACT_D1)[0] + 0.15, text


def plot(measured: Measurements, figure: Any) -> None:
    """Densities' and parameters' errors against n."""
    density, loss = figure.subplots(1, 2)
    densities = {
        EXACT_H: ("exact: 3 experts, 2 active", "tab:blue", "-"),
        ALL_H: ("1 too many, 3 active", "tab:green", "-"),
        FEW_H: ("1 too many, 2 active", "tab:orange", "-"),
        FEW_LOCAL_H: ("the same before EM", "tab:orange", "--"),
    }
    losses = {
        EXACT_D1: ("exact: D1", "tab:blue", "-"),
        ALL_LOSS: ("1 too many, 3 active", "tab:green", "-"),
        ALL_D2: ("the same, D2", "tab:green", "--"),
        ONE_ACTIVE: ("K = 1: experts' part of D1", "0.5", "-"),
    }
    for axes, curves in ((density, densities), (loss, losses)):
        for curve, (label, colour, style) in curves.items():
            values = table(measured, curve)
            text = f"{label} ({slope(measured, curve)[0]:.2f})"
            axes.loglog(SIZES, np.median(values, axis=0), style, color=colour, label=text)
            if style == "-":
                axes.loglog(SIZES, values.T, ".", color=colour, alpha=0.25, markersize=4)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)
        axes.set_xlabel("n")
        axes.legend(
            title="median (slope of mean log)", fontsize=7, title_fontsize=7, loc="upper right"
        )
    density.set_title("Hellinger distance", fontsize=10)
    loss.set_title("error of the parameters", fontsize=10)


EXPERIMENT = Experiment(
    paper=146,
    claim=Claim(
        statement=(
            "With the true number of experts, densities and parameters of the top-K sparse "
            "softmax mixture are estimated at the parametric rate. With more, the density "
            "converges only if the fit uses at least as many experts as the Voronoi cells of K "
            "true ones hold; it then does so at the parametric rate, its parameters more slowly."
        ),
        figure="(log n / n)^(1/2) for densities and D1; no convergence below the threshold",
        source="abstract; the theorems on exact-specified and over-specified settings",
    ),
    setup=(
        "One dimension, maximum likelihood by L-BFGS in float64, n = 300, 1000, 3000, 10000, "
        "started at the truth plus normal noise of 0.05. Exact: 3 experts of which 2 are active, "
        "chosen without bias, x ~ U(-1, 1), beta1 = (4, 2, 0), beta0 = (0.5, -0.3, 0), "
        "a = (-4, 3, 1), b = (1, -1, 3), var = (0.10, 0.15, 0.12). Over-specified: 3 experts "
        "fitted to 2 that are active everywhere, beta1 = (3, 0), beta0 = 0, a = (-4, 4), "
        "b = (1, -1), var = (0.10, 0.15), two of them started 0.3 to both sides of the first, so "
        "that all 3 must be active. The fit with 2 active, whose likelihood is discontinuous, "
        "goes on by EM, which may take experts out of their cells. 'loss' is the Voronoi loss "
        "of the worst region with all exponents 1, as D1 is. K = 1: 2 experts, chosen with bias, "
        "x ~ U(0, 1), beta1 = (25, 0), beta0 = (-8, 0), a = (-20, 20), b = (15, -5), std = "
        "(0.3, 0.4), where the likelihood doesn't determine the gate, which starts and stays at "
        "the truth. Slopes are of the mean log error over the seeds against log n, with standard "
        "errors over the seeds; Hellinger distances by quadrature over x and y."
    ),
    baseline="the same fits with as many active experts as the threshold asks for",
    criteria=(
        Criterion(
            "exact: slope of D1 in [-0.65, -0.35], up to 2 standard errors",
            _exact_d1,
        ),
        Criterion("exact: slope of the Hellinger distance below -0.35", _exact_density),
        Criterion(
            "over-specified, n = 10000: median Hellinger distance with 2 of 3 active more than "
            "twice that with 3 of 3",
            _too_few_active,
        ),
        Criterion("2 of 3 active: slope of the Hellinger distance above -0.2", _few_stay),
        Criterion("3 of 3 active: slope of the Hellinger distance below -0.35", _all_fall),
        Criterion(
            "3 of 3 active: slope of the loss above that of D1 in the exact setting by at least "
            "0.15",
            _parameters_slower,
        ),
    ),
    budgets={
        "full": {"seeds": 16, "max_iter": 300, "em_iter": 40, "free_starts": FREE_STARTS},
        "smoke": {"seeds": 1, "max_iter": 2, "em_iter": 1, "free_starts": 1},
    },
    trial=trial,
    plot=plot,
)
