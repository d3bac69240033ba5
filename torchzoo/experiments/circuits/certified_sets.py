"""Coverage of conformal sets of digits, clean, attacked and certain, with reasoning and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.circuits import (
    COLEP,
    KnowledgeCircuit,
    ball_bounds,
    certified_coverage,
    conformal_quantile,
    mean_bounds,
    smoothed_mean,
)
from torchzoo.data.digits import digits
from torchzoo.experiment import Context
from torchzoo.experiments.circuits.detectors import (
    CLASSES,
    KNOWN,
    SIGMA,
    attack,
    attribute_table,
    choose_weight,
    rules,
    train,
)

ALPHA, ALPHA_CERT, BETA = 0.1, 0.001, 0.001
RADII = (0.125, 0.25, 0.5)
ABLATED = 0.25
"""The radius at which attributes of permuted labels are certified too."""


class Cache(NamedTuple):
    """What splits need of each image: corrected probabilities, and the true class's worst ones.

    Attributes:
        p: `(N, 16)`, corrected probabilities of clean images, or `(N, 10)` without reasoning.
        worst: For each radius `(E,)`, the least chance of the true class in the ball.
        attacked: For each radius `(E,)`, its chance at the attacked image.
    """

    p: Tensor
    worst: Mapping[float, Tensor]
    attacked: Mapping[float, Tensor]


def reasoned_worst(
    reasoner: KnowledgeCircuit, lo: Tensor, hi: Tensor, y: Tensor, radius: float
) -> Tensor:
    """`(E,)`, the least corrected chance of the true class in a ball."""
    lo, hi = ball_bounds(lo, hi, sigma=SIGMA, radius=radius)
    found = torch.empty(len(y), dtype=lo.dtype)
    for label in y.unique().tolist():
        rows = y == label
        found[rows] = reasoner.bounds(lo[rows], hi[rows], concepts=[label])[0][:, 0]
    return found


def caches(context: Context) -> tuple[dict[str, Cache], Tensor, float]:
    """Caches of the methods, labels, and the weight; the first images have bounds and attacks."""
    options = context.options
    data = digits(seed=context.seed, test_fraction=400 / 1797)
    context.progress("training")
    x, y = data.train_x.flatten(1), data.train_y
    model = train(x, y, options["epochs"])
    draw: dict[str, Any] = {"sigma": SIGMA, "output": "soft", "batch_size": 4000}
    start = smoothed_mean(model, x[:400], num_samples=32, **draw).float()
    weight = choose_weight(start[:, : CLASSES + KNOWN], y[:400])
    reasoner = KnowledgeCircuit(CLASSES + KNOWN, rules(weight))
    permuted = torch.cat([torch.arange(CLASSES), CLASSES + KNOWN + torch.arange(KNOWN)])
    own = torch.arange(CLASSES + KNOWN)

    context.progress("smoothing")
    samples, evaluated = options["samples"], options["evaluated"]
    x, y = data.test_x.flatten(1)[: options["images"]], data.test_y[: options["images"]]
    pi = smoothed_mean(model, x, num_samples=samples, **draw)
    x_e, y_e = x[:evaluated], y[:evaluated]
    lo, hi = mean_bounds(pi[:evaluated], samples, ALPHA_CERT, output="soft")

    def alone(pi: Tensor) -> Tensor:
        return pi[:, :CLASSES]

    def corrected(pi: Tensor) -> Tensor:
        return reasoner(pi[:, : CLASSES + KNOWN])

    context.progress("attacks")
    attacked: dict[Callable[[Tensor], Tensor], dict[float, Tensor]] = {alone: {}, corrected: {}}
    for correct, found in attacked.items():
        for radius in RADII:
            moved = attack(model, correct, x_e, y_e, radius, options["steps"])
            means = smoothed_mean(model, moved, num_samples=samples, **draw)
            found[radius] = correct(means).gather(1, y_e[:, None])[:, 0]

    context.progress("certificates")
    ours = {r: reasoned_worst(reasoner, lo[:, own], hi[:, own], y_e, r) for r in RADII}
    ablated = reasoned_worst(reasoner, lo[:, permuted], hi[:, permuted], y_e, ABLATED)
    single = lo.gather(1, y_e[:, None])[:, 0]
    alone_worst = {r: ball_bounds(single, single, sigma=SIGMA, radius=r)[0] for r in RADII}
    found_caches = {
        "COLEP": Cache(corrected(pi), ours, attacked[corrected]),
        "baseline": Cache(alone(pi), alone_worst, attacked[alone]),
        "permuted": Cache(reasoner(pi[:, permuted]), {ABLATED: ablated}, {}),
    }
    return found_caches, y, weight


class Thresholds(NamedTuple):
    """For each class the threshold of its score `1 - p`."""

    q: Tensor

    def size(self, p: Tensor) -> float:
        """Mean size of the sets."""
        return (1 - p[:, :CLASSES] <= self.q).sum(1).double().mean().item()

    def covered(self, chance: Tensor, y: Tensor) -> Tensor:
        """Whether true classes of these chances are in their sets."""
        return 1 - chance <= self.q[y]


def reasoned_thresholds(p: Tensor, y: Tensor) -> Thresholds:
    """Thresholds of COLEP on probabilities that are corrected already."""
    labels = torch.cat([F.one_hot(y, CLASSES), attribute_table()[y]], 1)
    colep = COLEP(KnowledgeCircuit(p.shape[1], [], dtype=p.dtype), CLASSES, alpha=ALPHA)
    colep.calibrate(p, labels)
    return Thresholds(colep.qhat[:CLASSES].to(p))


def single_threshold(p: Tensor, y: Tensor) -> Thresholds:
    """Split conformal prediction on one model."""
    q = conformal_quantile(1 - p.gather(1, y[:, None])[:, 0], ALPHA)
    return Thresholds(q.expand(CLASSES))


def of_size(p: Tensor, size: float) -> Thresholds:
    """The one threshold at which sets have a mean size."""
    scores = (1 - p[:, :CLASSES]).flatten()
    rank = min(max(round(size * len(p)), 1), len(scores))
    return Thresholds(scores.kthvalue(rank).values.expand(CLASSES))


def split_figures(
    found: dict[str, Cache], y: Tensor, options: Mapping[str, Any]
) -> dict[str, float]:
    """One split of the images: coverages certified, attacked and clean, and sizes of sets."""
    evaluated = options["evaluated"]
    order = torch.randperm(evaluated)
    certify, test = order[: options["certify"]], order[options["certify"] :]
    fresh = evaluated + torch.randperm(len(y) - evaluated)[: options["calibrate"]]
    made = {
        "COLEP": reasoned_thresholds(found["COLEP"].p[fresh], y[fresh]),
        "baseline": single_threshold(found["baseline"].p[fresh], y[fresh]),
        "permuted": reasoned_thresholds(found["permuted"].p[fresh], y[fresh]),
    }
    figures = {}
    leaves = {"COLEP": CLASSES + KNOWN, "baseline": 1, "permuted": CLASSES + KNOWN}
    for name, rule in made.items():
        cache = found[name]
        own = cache.p[test].gather(1, y[test][:, None])[:, 0]
        figures[f"{name}: clean coverage"] = rule.covered(own, y[test]).double().mean().item()
        figures[f"{name}: set size"] = rule.size(cache.p[certify])
        for r, worst in cache.worst.items():
            kept = rule.covered(worst[certify], y[certify])
            figures[f"{name}: certified at {r}"] = certified_coverage(
                kept, beta=BETA, loss=ALPHA_CERT * leaves[name]
            )
        for r, chance in cache.attacked.items():
            kept = rule.covered(chance[test], y[test])
            figures[f"{name}: attacked at {r}"] = kept.double().mean().item()
    single = found["baseline"]
    larger = of_size(single.p[certify], figures["COLEP: set size"])
    figures["baseline, equal size: set size"] = larger.size(single.p[certify])
    for r, worst in single.worst.items():
        kept = larger.covered(worst[certify], y[certify])
        figures[f"baseline, equal size: certified at {r}"] = certified_coverage(
            kept, beta=BETA, loss=ALPHA_CERT
        )
    return figures
