"""Paper 168: does random-feature attention need fewer samples than a random-feature network?

Ridge regressions of targets that do not depend on the order of the keys, on the features of
attention heads with zero-mean and with biased random weights, and on those of a two-layer network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.attention import (
    BiasedRandomFeatureAttention,
    RandomFeatureAttention,
    RandomFeatureMLP,
    rfa_target,
)
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements

DIM, KEYS = 10, 8
SIZES = (200, 400, 800, 1600)
ARMS = ("RFA", "BRFA", "RFMLP")
TARGETS = (("mean", 1), ("mean", 2), ("mean", 3), ("correlation", 3))
PENALTIES = torch.logspace(-8, 1, 19, dtype=torch.float64)
"""In units of the mean eigenvalue of the training features' Gram matrix."""


def figure_name(arm: str, kind: str, power: int, n: int, keys: int = KEYS) -> str:
    """Name of a figure: the relative test error of an arm."""
    return f"{arm}: {kind} p={power}, n={n}, N={keys}"


def draw(rows: int, keys: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and keys, uniform on the unit sphere."""
    x = torch.randn(rows, keys + 1, DIM, generator=generator)
    x = nn.functional.normalize(x, dim=-1)
    return x[:, 0], x[:, 1:]


def build(arm: str, keys: int, heads: int, seed: int) -> RandomFeatureAttention | RandomFeatureMLP:
    """The model of an arm; all have as many trained parameters."""
    if arm == "RFA":
        return RandomFeatureAttention(DIM, heads, seed=seed)
    if arm == "BRFA":
        return BiasedRandomFeatureAttention(DIM, heads, seed=seed)
    return RandomFeatureMLP(DIM, keys, heads * (DIM + 1), seed=seed)


def ridge_errors(features: Tensor, y: Tensor, n: int, parts: tuple[int, int, int]) -> Tensor:
    """Test errors of ridge regressions on the first n training rows, over the test variance.

    Args:
        features: Training, validation and test rows, `(rows, P)`.
        y: Their targets, `(rows, T)`.
        n: Training rows to use.
        parts: Numbers of training, validation and test rows.

    Returns:
        `(T,)`, each at the penalty that has the least validation error of its target.
    """
    train, val, test = features.double().split(parts)
    y_train, y_val, y_test = y.double().split(parts)
    train, y_train = train[:n], y_train[:n]
    centre = y_train.mean(0)
    dual = n < train.shape[1]
    gram = train @ train.mT if dual else train.mT @ train
    eigenvalues, basis = torch.linalg.eigh(gram)
    rotated = basis.mT @ ((y_train - centre) if dual else train.mT @ (y_train - centre))
    val, test = ((x @ train.mT if dual else x) @ basis for x in (val, test))
    shifted = eigenvalues.clamp_min(0) + PENALTIES[:, None] * eigenvalues.mean()
    coefficients = rotated / shifted[..., None]  # (penalties, n or P, T)
    scores = (val @ coefficients + centre - y_val).square().mean(1)
    best = coefficients[scores.argmin(0), :, torch.arange(y.shape[1])].mT
    return (test @ best + centre - y_test).square().mean(0) / y_test.var(0, unbiased=False)


@torch.no_grad()
def trial(context: Context) -> dict[str, float]:
    """Relative test errors of every arm, target and size, and with twice as many keys."""
    options, seed = context.options, context.seed
    parts = (SIZES[-1], options["validation"], options["test"])
    generator = torch.Generator().manual_seed(seed)
    figures = {}
    for keys in (KEYS, 2 * KEYS):
        query, key = draw(sum(parts), keys, generator)
        beta = nn.functional.normalize(torch.randn(DIM, generator=generator), dim=0)
        targets = TARGETS if keys == KEYS else TARGETS[:1]
        y = torch.stack([rfa_target(query, key, beta, power=p, kind=k) for k, p in targets], 1)
        for arm in ARMS if keys == KEYS else ("RFA", "RFMLP"):
            context.progress(f"{arm}, {keys} keys")
            model = build(arm, keys, options["heads"], seed).to(context.device)
            features = model.features(query.to(context.device), key.to(context.device))
            features = features.flatten(1).cpu()
            for n in SIZES if keys == KEYS else SIZES[:1]:
                errors = ridge_errors(features, y, n, parts).tolist()
                for (kind, power), error in zip(targets, errors, strict=True):
                    figures[figure_name(arm, kind, power, n, keys)] = error
    return figures


def fewer_samples(measured: Measurements) -> tuple[bool, str]:
    """The headline: the quadratic mean, on every seed."""
    ours = measured[figure_name("RFA", "mean", 2, 800)]
    theirs = measured[figure_name("RFMLP", "mean", 2, 800)]
    pairs = zip(ours.values, theirs.values, strict=True)
    return all(a < 0.25 and a < b / 4 for a, b in pairs), f"{ours} against {theirs}"


def bias_helps(measured: Measurements) -> tuple[bool, str]:
    """Biased against zero-mean weights on correlations."""
    gains = {n: gain(measured, n) for n in (800, 1600)}
    text = ", ".join(
        f"n={n}: {measured[figure_name('BRFA', 'correlation', 3, n)]} against "
        f"{measured[figure_name('RFA', 'correlation', 3, n)]}, difference {value}"
        for n, value in gains.items()
    )
    return all(value.mean > value.std_error for value in gains.values()), text


def gain(measured: Measurements, n: int) -> Measurement:
    """Error of RFA less that of BRFA on correlations."""
    one, two = (measured[figure_name(arm, "correlation", 3, n)] for arm in ("RFA", "BRFA"))
    return one - two


def growth(measured: Measurements, arm: str) -> float:
    """How much the mean error grows with twice as many keys."""
    once, twice = (measured[figure_name(arm, "mean", 1, 200, n)] for n in (KEYS, 2 * KEYS))
    return twice.mean / once.mean


def keys_are_free(measured: Measurements) -> tuple[bool, str]:
    """Samples do not depend on the number of keys."""
    ours, theirs = growth(measured, "RFA"), growth(measured, "RFMLP")
    holds = max(ours, 1 / ours) < 1.5 and theirs > 1.5
    return holds, f"RFA times {ours:.2f}, RFMLP times {theirs:.2f}"


COLOURS = dict(zip(ARMS, ("tab:blue", "tab:green", "tab:orange"), strict=True))
NAMES = {
    "RFA": "attention, zero mean (RFA)",
    "BRFA": "attention, biased (BRFA)",
    "RFMLP": "two-layer network (RFMLP)",
}
TITLES = {
    ("mean", 1): "mean of ⟨β, x⟩",
    ("mean", 2): "mean of ⟨β, x⟩²",
    ("mean", 3): "mean of ⟨β, x⟩³",
    ("correlation", 3): "mean of ⟨x₀, x⟩³⟨β, x⟩",
}


def plot(measured: Measurements, figure: Any) -> None:
    """Learning curves of every target, and errors with 8 and 16 keys."""
    axes = figure.subplots(2, 3).flatten()
    for axis, (kind, power) in zip(axes, TARGETS, strict=False):
        for arm in ARMS:
            values = [measured[figure_name(arm, kind, power, n)] for n in SIZES]
            mean, error = [v.mean for v in values], [v.std_error for v in values]
            axis.errorbar(
                SIZES, mean, yerr=error, fmt="-o", ms=4, color=COLOURS[arm], label=NAMES[arm]
            )
        axis.set_xscale("log")
        axis.set_xticks(SIZES, map(str, SIZES))
        axis.minorticks_off()
        axis.set_xlabel("training samples n", fontsize=9)
        axis.set_title(TITLES[kind, power], fontsize=10)
    for axis in axes[:3]:
        axis.set_yscale("log")
        axis.set_ylim(1e-3, 2)
    axes[3].set_ylim(0, 1)
    for axis in axes[[0, 3]]:
        axis.set_ylabel("test MSE / variance", fontsize=9)
    doubled, legend = axes[4:]
    for arm in ("RFA", "RFMLP"):
        pairs = [measured[figure_name(arm, "mean", 1, 200, n)].values for n in (KEYS, 2 * KEYS)]
        doubled.plot([KEYS, 2 * KEYS], pairs, "-o", ms=4, alpha=0.5, color=COLOURS[arm])
    doubled.set_yscale("log")
    doubled.set_ylim(1e-3, 2)
    doubled.set_xticks([KEYS, 2 * KEYS])
    doubled.set_xlim(KEYS / 2, 2.5 * KEYS)
    doubled.set_xlabel("keys N", fontsize=9)
    doubled.set_title("mean of ⟨β, x⟩, n = 200", fontsize=10)
    legend.axis("off")
    legend.legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)


EXPERIMENT = Experiment(
    paper=168,
    claim=Claim(
        statement=(
            "Attention with frozen random query-key weights learns permutation-invariant targets "
            "from fewer samples than a two-layer random-feature network, however many keys there "
            "are; weights of non-zero mean need fewer still where query and key are compared."
        ),
        figure="about d^p samples against (N d)^p for the mean of the p-th power over N keys",
        source="abstract; the orders are those of the paper's examples",
    ),
    setup=(
        "Query and 8 keys uniform on the sphere in 10 dimensions; targets are the mean over keys "
        "of ⟨β, x⟩^p for p = 1, 2, 3 and of ⟨x0, x⟩³⟨β, x⟩, without noise. 300 heads, 3,300 "
        "trained parameters. Ridge regression at the penalty that is best on 400 validation rows, "
        "targets centred by the training mean; error on 1,000 test rows over their variance. A "
        "seed draws data, β and weights anew."
    ),
    baseline="a two-layer ReLU network with a frozen random first layer and 3,300 neurons",
    criteria=(
        Criterion(
            "quadratic mean, n = 800: RFA's error below 0.25 and below a quarter of RFMLP's on "
            "every seed",
            fewer_samples,
        ),
        Criterion(
            "correlation, n = 800 and 1,600: BRFA's error below RFA's by more than 1 s.e. of the "
            "paired difference",
            bias_helps,
        ),
        Criterion(
            "16 keys instead of 8, mean p = 1, n = 200: RFA's error changes by less than 1.5 "
            "times, RFMLP's grows by more",
            keys_are_free,
        ),
    ),
    budgets={
        "full": {"seeds": 4, "heads": 300, "validation": 400, "test": 1000},
        "smoke": {"seeds": 2, "heads": 10, "validation": 50, "test": 100},
    },
    trial=trial,
    plot=plot,
)
