"""Learning rates of a scene's parameters, and step counts, for runs of any length.

Full-size rates and step counts are those of Kerbl et al., "3D Gaussian Splatting for Real-Time
Radiance Field Rendering", 2023, whose runs take 30,000 steps. An Adam parameter moves at most about
rate times steps, so that short runs have higher rates of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Adam

__all__ = [
    "FULL_RATES",
    "FULL_STEPS",
    "SHORT_FACTORS",
    "adam",
    "base_rates",
    "means_decay",
    "scaled_steps",
    "set_rates",
]

FULL_STEPS = 30_000
"""The run that full-size step counts belong to."""

SHORT_STEPS = 3_000
"""Runs below this take the short rates, if none are given, and never reset opacities."""

FULL_RATES = {
    "means": 1.6e-4,  # times the scene's scale
    "quats": 1e-3,
    "log_scales": 5e-3,
    "opacity_logits": 5e-2,
    "sh0": 2.5e-3,
    "shN": 2.5e-3 / 20,
    "features": 2.5e-3,
}
"""Learning rates of a run of full size."""

SHORT_FACTORS = {"means": 4.0, "quats": 4.0, "log_scales": 4.0, "sh0": 4.0, "shN": 40.0}
"""What short runs multiply them by."""

BETAS, EPS = (0.9, 0.999), 1e-15

Rates = str | Mapping[str, float] | None


def scaled_steps(count: int, steps: int, least: int = 1) -> int:
    """A step count of a run of 30,000 steps in one of `steps`, at least `least`.

    Example:
        >>> scaled_steps(500, 6000), scaled_steps(500, 600, 25), scaled_steps(500, 90_000)
        (100, 25, 500)
    """
    return max(least, round(count * min(1.0, steps / FULL_STEPS)))


def means_decay(done: int, steps: int) -> float:
    """Factor of the means' rate after `done` of `steps` steps, from 1 down to 0.01.

    Example:
        >>> round(means_decay(150, 300), 9)
        0.1
    """
    return 0.01 ** (done / steps)


def base_rates(
    names: Iterable[str], rates: Rates, *, steps: int, scene_scale: float
) -> dict[str, float]:
    """The rate of each parameter in the first step, with one view a step.

    Args:
        names: The parameters' names; those of a submodule are `"module.name"`.
        rates: `"full"`, `"short"`, or None, which takes `"short"` below 3,000 steps. A mapping
            gives rates to further parameters or submodules, or others to the known ones, which
            count as they are; the rest is as with None.
        steps: Steps of the run.
        scene_scale: What the rate of the means is proportional to.

    Returns:
        Rates by name.

    Raises:
        ValueError: An unknown preset, a rate that is missing, negative or of no parameter.
    """
    names, given = list(names), dict(rates) if isinstance(rates, Mapping) else {}
    preset = rates if isinstance(rates, str) else "short" if steps < SHORT_STEPS else "full"
    if preset not in ("full", "short"):
        raise ValueError(f"rates: got {preset!r}, expected 'full', 'short' or rates by name")
    known = {
        name: rate * (SHORT_FACTORS.get(name, 1.0) if preset == "short" else 1.0)
        for name, rate in FULL_RATES.items()
    }
    known["means"] *= scene_scale
    found = {}
    for name in names:
        keys = [key for key in (name, name.split(".")[0]) if key in given or key in known]
        if not keys:
            raise ValueError(f"rates: got none for {name!r}, expected rates={{{name!r}: …}}")
        found[name] = given.get(keys[0], known.get(keys[0], 0.0))
        if not found[name] >= 0:
            raise ValueError(f"rates: got {found[name]} for {name!r}, expected at least 0")
    if unused := given.keys() - {key for name in names for key in (name, name.split(".")[0])}:
        raise ValueError(f"rates: got {sorted(unused)[0]!r}, expected one of {sorted(names)}")
    return found


def adam(module: nn.Module) -> Adam:
    """One Adam with a group for each parameter, named as the parameter is."""
    groups = [
        {"params": [parameter], "name": name}
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    return Adam(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def set_rates(optimizer: Adam, rates: Mapping[str, float], decay: float, batch: int) -> None:
    """Set Adam up for a step on so many views.

    With B views the rates are multiplied and eps divided by sqrt(B), and the averages forget B
    times as fast, so that a step does as much as B steps on one view.

    Args:
        optimizer: What `adam` gave.
        rates: Rates by name with one view.
        decay: Factor of the means' rate.
        batch: B.
    """
    for group in optimizer.param_groups:
        factor = decay if group["name"] == "means" else 1.0
        group["lr"] = rates[group["name"]] * factor * batch**0.5
        group["eps"] = EPS / batch**0.5
        group["betas"] = tuple(max(0.0, 1 - batch * (1 - beta)) for beta in BETAS)
