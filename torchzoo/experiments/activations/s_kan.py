"""Paper 10: does choosing a family of functions at each node beat every single family?

Seven functions are fitted by S-KAN, by a KAN of each of its four families, and by an MLP with as
many parameters as the pruned S-KAN, all with the same number of Adam steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.activations import SKAN, KANLinear, SKANTrainer
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements

HIDDEN, RATE = 5, 1e-2
FAMILIES = ("bspline", "rbf", "chebyshev", "wavelet")
ARMS = ("S-KAN", *FAMILIES, "MLP")
LABELS = {
    "S-KAN": "S-KAN",
    "bspline": "B-spline",
    "rbf": "RBF",
    "chebyshev": "Chebyshev",
    "wavelet": "wavelet",
    "MLP": "MLP",
}


def step(x: Tensor) -> Tensor:
    """1 where x > 0, else 0."""
    return (x > 0).to(x.dtype)


def bump_and_chirp(x: Tensor) -> Tensor:
    """A narrow Gaussian of width 0.05 at 0.3, and a chirp."""
    return torch.exp(-(((x[:, 0] - 0.3) / 0.05) ** 2)) + 0.5 * torch.sin(
        2 * math.pi * (x[:, 0] + 1) ** 2
    )


FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "J0(20 x)": (1, lambda x: torch.special.bessel_j0(20 * x[:, 0])),
    "exp(sin(pi x) + y^2)": (2, lambda x: torch.exp(torch.sin(math.pi * x[:, 0]) + x[:, 1] ** 2)),
    "x y": (2, lambda x: x[:, 0] * x[:, 1]),
    "sin(pi x) cos(2 pi y) + step(x)": (
        2,
        lambda x: torch.sin(math.pi * x[:, 0]) * torch.cos(2 * math.pi * x[:, 1]) + step(x[:, 0]),
    ),
    "sign(x) sqrt(abs(x))": (1, lambda x: x[:, 0].sign() * x[:, 0].abs().sqrt()),
    "exp of sines of 4 squares": (
        4,
        lambda x: torch.exp(
            0.5 * torch.sin(math.pi * (x[:, 0] ** 2 + x[:, 1] ** 2))
            + 0.5 * torch.sin(math.pi * (x[:, 2] ** 2 + x[:, 3] ** 2))
        ),
    ),
    "bump + chirp": (1, bump_and_chirp),
}


def draw(name: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of [-1, 1]^d and a function's values there."""
    width, function = FUNCTIONS[name]
    x = 2 * torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) - 1
    return x, function(x)


def mean_square(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of a model with one output."""
    return F.mse_loss(model(x)[:, 0], y)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def mlp(width: int, parameters: int) -> nn.Module:
    """Two hidden layers of tanh, as wide as gives the nearest number of parameters."""
    sizes = {h: (width + 1) * h + (h + 1) * h + h + 1 for h in range(2, 64)}
    hidden = min(sizes, key=lambda h: abs(sizes[h] - parameters))
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, 1),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """A model after full-batch steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, foreach=True)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        mean_square(model, x, y).backward()
        optimizer.step()
    return model


def fit_arm(
    arm: str, x: Tensor, y: Tensor, steps: tuple[int, int, int], parameters: int
) -> nn.Module:
    """The trained model of an arm; `parameters` are those of the pruned S-KAN, for the MLP."""
    width = x.shape[-1]
    if arm == "S-KAN":
        model = SKAN((width, HIDDEN, 1), pool=FAMILIES).to(x.device)
        trainer = SKANTrainer(model, steps, hard=True)
        trainer.fit(mean_square, (x, y), lr=RATE)
        return trainer.model
    if arm == "MLP":
        return train(mlp(width, parameters).to(x.device), x, y, sum(steps))
    layers = (KANLinear(width, HIDDEN, arm), KANLinear(HIDDEN, 1, arm))
    return train(nn.Sequential(*layers).to(x.device), x, y, sum(steps))


def trial(context: Context) -> Mapping[str, float]:
    """Test error, CPU seconds and parameters of every arm on every function."""
    options, figures, spent = context.options, {}, dict.fromkeys(ARMS, 0.0)
    for index, name in enumerate(FUNCTIONS):
        seed = 1000 * context.seed + index
        x, y = (t.to(context.device) for t in draw(name, options["rows"], seed))
        test_x, test_y = (t.to(context.device) for t in draw(name, options["rows"], seed + 500))
        parameters = 0
        for arm in ARMS:
            context.progress(f"{name}, {arm}")
            torch.manual_seed(context.seed)
            started = time.process_time()
            model = fit_arm(arm, x, y, options["steps"], parameters)
            spent[arm] += time.process_time() - started
            parameters = count(model) if arm == "S-KAN" else parameters
            with torch.no_grad():
                figures[error(name, arm)] = mean_square(model, test_x, test_y).sqrt().item()
            figures[f"{name}: parameters, {arm}"] = count(model)
    return figures | {f"CPU seconds, {arm}": spent[arm] for arm in ARMS}


def error(function: str, arm: str) -> str:
    """Name of the figure with an arm's root mean squared error on a function."""
    return f"{function}: error, {arm}"


def mean_rank(measured: Measurements, arm: str) -> Measurement:
    """An arm's mean rank over the functions (1 is best), seed by seed; ties share a rank."""
    seeds = range(len(measured[error(next(iter(FUNCTIONS)), arm)].values))
    ranks = []
    for seed in seeds:
        total = 0.0
        for name in FUNCTIONS:
            own = measured[error(name, arm)].values[seed]
            others = [measured[error(name, a)].values[seed] for a in ARMS if a != arm]
            total += 1 + sum(o < own for o in others) + 0.5 * sum(o == own for o in others)
        ranks.append(total / len(FUNCTIONS))
    return Measurement(f"mean rank, {arm}", tuple(ranks))


def worst_ratio(measured: Measurements, arm: str) -> float:
    """The largest ratio, over the functions, of an arm's mean error to the best single family's."""
    return max(
        measured[error(name, arm)].mean
        / min(measured[error(name, family)].mean for family in FAMILIES)
        for name in FUNCTIONS
    )


def ranks_best(measured: Measurements) -> tuple[bool, str]:
    """The headline."""
    ranks = {arm: mean_rank(measured, arm).mean for arm in ARMS}
    text = ", ".join(f"{LABELS[arm]} {rank:.2f}" for arm, rank in ranks.items())
    return all(ranks["S-KAN"] < rank for arm, rank in ranks.items() if arm != "S-KAN"), text


def varies_least(measured: Measurements) -> tuple[bool, str]:
    """How much worse than the best family an arm can be."""
    ratios = {arm: worst_ratio(measured, arm) for arm in ("S-KAN", *FAMILIES)}
    text = ", ".join(f"{LABELS[arm]} {ratio:.2f}" for arm, ratio in ratios.items())
    return all(ratios["S-KAN"] < ratios[family] for family in FAMILIES), text


def beats_mlp(measured: Measurements) -> tuple[bool, str]:
    """On at least six of the seven functions."""
    wins = sum(
        measured[error(name, "S-KAN")].mean < measured[error(name, "MLP")].mean
        for name in FUNCTIONS
    )
    return wins >= 6, f"{wins} of {len(FUNCTIONS)} functions"


def plot(measured: Measurements, figure: Any) -> None:
    """Errors of all arms, a row a function, with each seed's range."""
    axes = figure.subplots()
    colors = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:gray")
    for place, arm in enumerate(ARMS):
        offset = 0.12 * (place - (len(ARMS) - 1) / 2)
        values = [measured[error(name, arm)] for name in FUNCTIONS]
        rows = [row + offset for row in range(len(FUNCTIONS))]
        means = [value.mean for value in values]
        low = [value.mean - min(value.values) for value in values]
        high = [max(value.values) - value.mean for value in values]
        axes.errorbar(
            means,
            rows,
            xerr=[low, high],
            fmt="D" if arm == "S-KAN" else "o",
            markersize=7 if arm == "S-KAN" else 5,
            color=colors[place],
            label=f"{LABELS[arm]} (rank {mean_rank(measured, arm).mean:.1f})",
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(FUNCTIONS)), list(FUNCTIONS))
    axes.invert_yaxis()
    axes.set(xlabel="test root mean squared error (mean, and range over the seeds)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


EXPERIMENT = Experiment(
    paper=10,
    claim=Claim(
        statement="S-KAN, which chooses a family of functions at each node, fits seven functions "
        "better than baseline KANs and than MLPs of the same size, and varies less between tasks.",
        figure="best on seven function-fitting tasks",
        source="abstract",
    ),
    setup="Seven functions (ours) of 1 to 4 variables in [-1, 1], 1,000 points each for training "
    "and test; networks [d, 5, 1]; 400 full-batch steps of Adam at 1e-2 for every arm, for S-KAN "
    "130 with all families, 160 choosing with one-hot gates (better than soft ones on functions "
    "planted in the families, the only thing tried before) and 110 pruned; 3 seeds.",
    baseline="A KAN of each family of the pool (B-spline, RBF, Chebyshev, wavelet) with a SiLU "
    "branch, and an MLP with two hidden layers of tanh and the pruned S-KAN's number of "
    "parameters.",
    criteria=(
        Criterion("S-KAN has the best mean rank of all six arms", ranks_best),
        Criterion(
            "S-KAN's largest ratio to the best single family's error is below that of every "
            "single family",
            varies_least,
        ),
        Criterion("S-KAN's error is below the MLP's on at least 6 of 7 functions", beats_mlp),
    ),
    budgets={
        "full": {"seeds": 3, "steps": (130, 160, 110), "rows": 1000},
        "smoke": {"seeds": 1, "steps": (3, 4, 3), "rows": 50},
        "long": {"seeds": 3, "steps": (490, 600, 410), "rows": 1000},
    },
    trial=trial,
    plot=plot,
)
