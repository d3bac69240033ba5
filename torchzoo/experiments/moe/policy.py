"""Paper 123: does a mixture policy, its router trained by the frequency loss, keep several optima?

A contextual bandit whose critic is known. The state is a point on the unit circle, the action is in
the plane, and three actions are equally good,

    Q(s, a) = log sum_k exp(-|a - m_k(s)|^2 / 0.02),   |m_k| = 0.6, angle(s) + 2 pi k / 3.

With alpha = 1 the best policy is exp(Q) / Z, three Gaussians of deviation 0.1, so that

    KL(pi || pi*) = E_pi[log pi(a) - Q(s, a)] + log Z

scores a policy without any other training run. One that keeps to a single optimum has at least
KL = log 3. All replicas of an arm are trained together, on a leading axis.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.moe import PMoEPolicy, SquashedGaussianMixture, pmoe_sac_loss

OPTIMA, RADIUS, WIDTH = 3, 0.6, 0.1
LOG_Z = math.log(OPTIMA * 2 * math.pi * WIDTH**2)
ONE_OPTIMUM = math.log(OPTIMA)
ARMS: dict[str, dict[str, Any]] = {
    "unimodal": {"num_experts": 1},
    "PMoE max": {"backprop": "max"},
    "PMoE all": {"backprop": "all"},
    "Gumbel": {"estimator": "gumbel"},
    "score": {"estimator": "score"},
}
PMOE = ("PMoE max", "PMoE all")
EVALUATION_STATES, EVALUATION_DRAWS = 64, 256


def optima(s: Tensor) -> Tensor:
    """`(..., 3, 2)`, the best actions in states `(..., 2)`."""
    angle = 2 * math.pi / OPTIMA * torch.arange(OPTIMA, dtype=s.dtype, device=s.device)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    return RADIUS * einsum(rotation.view(-1, 2, 2), s, "k i j, ... j -> ... k i")


def value(s: Tensor, a: Tensor) -> Tensor:
    """`(...)`, Q for states and actions `(..., 2)`."""
    squared = (a[..., None, :] - optima(s)).square().sum(-1)
    return (-squared / (2 * WIDTH**2)).logsumexp(-1)


class Replicas(nn.Module):
    """Independent policies of one architecture, evaluated together along the first axis."""

    def __init__(self, replicas: int, num_experts: int = 4) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_experts": num_experts, "hidden": (64, 64)}
        policies: list[nn.Module] = [PMoEPolicy(2, 2, **options) for _ in range(replicas)]
        stacked, _ = stack_module_state(policies)
        self.names = list(stacked)
        self.weights = nn.ParameterList(weight.detach() for weight in stacked.values())
        self.base = [policies[0].to("meta")]  # in a list, so that its weights are not this module's

    def forward(self, s: Tensor) -> SquashedGaussianMixture:
        def parts(weights: list[Tensor], s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            named = dict(zip(self.names, weights, strict=True))
            pi = functional_call(self.base[0], named, (s,))
            return pi.logits, pi.loc, pi.log_std

        return SquashedGaussianMixture(*torch.vmap(parts)(list(self.weights), s))


def states(replicas: int, batch: int, device: torch.device) -> Tensor:
    """`(replicas, batch, 2)`, points drawn on the unit circle."""
    angle = 2 * math.pi * torch.rand(replicas, batch, device=device)
    return torch.stack([angle.cos(), angle.sin()], -1)


def train(arm: str, replicas: int, seed: int, context: Context) -> Replicas:
    """Train an arm's policies; arms of the same size start with the same weights and states."""
    torch.manual_seed(seed)
    options = dict(ARMS[arm])
    policy = Replicas(replicas, options.pop("num_experts", 4)).to(context.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    for step in range(context.options["steps"]):
        if step % 100 == 0:
            context.progress(f"{arm}, step {step}")
        s = states(replicas, context.options["batch"], context.device)
        losses = pmoe_sac_loss(policy, [value], s, 1.0, **options)
        optimizer.zero_grad(set_to_none=True)
        (replicas * (losses["policy"] + losses["frequency"])).backward()
        optimizer.step()
    return policy


@torch.no_grad()
def evaluate(policy: Replicas, replicas: int, device: torch.device) -> dict[str, Tensor]:
    """KL, mean Q, optima covered and the router's error, `(replicas,)` each."""
    torch.manual_seed(1)
    s = states(replicas, EVALUATION_STATES, device)
    pi = policy(s)
    a = pi.sample((EVALUATION_DRAWS,))
    q = value(s, a)
    near = (a[..., None, :] - optima(s)).norm(dim=-1) < RADIUS / 2
    share = near.float().mean(0)
    primitives = torch.stack([pi.rsample_per_expert() for _ in range(EVALUATION_DRAWS)])
    best = value(rearrange(s, "r b o -> r b 1 o"), primitives).argmax(-1)
    frequency = nn.functional.one_hot(best, pi.num_experts).float().mean(0)
    error = (pi.mixture_weights - frequency).abs().amax(-1)
    return {
        "KL": (pi.log_prob(a) - q).mean((0, 2)) + LOG_Z,
        "mean Q": q.mean((0, 2)),
        "optima covered": (share >= 0.05).sum(-1).float().mean(-1),
        "router error": error.mean(-1),
    }


def train_block(block: int, context: Context) -> list[dict[str, float]]:
    """Figures of all seeds of a block, which are trained together with as many for the choice."""
    size = context.options["seeds"]
    figures: list[dict[str, float]] = [{} for _ in range(size)]
    for arm in ARMS:
        policy = train(arm, 2 * size, block, context)
        for name, values in evaluate(policy, 2 * size, context.device).items():
            for seed in range(size):
                figures[seed][figure_name(arm, name)] = values[seed].item()
                if arm in PMOE and name == "KL":
                    figures[seed][choosing_name(arm)] = values[size + seed].item()
    return figures


_blocks: dict[tuple[Any, ...], list[dict[str, float]]] = {}
"""The block that was trained last, for the trials of its other seeds."""


def trial(context: Context) -> dict[str, float]:
    """Figures of one seed, from the block that it is trained in."""
    block, seed = divmod(context.seed, context.options["seeds"])
    key = (block, context.device, *sorted(context.options.items()))
    if key not in _blocks:
        _blocks.clear()
        _blocks[key] = train_block(block, context)
    return _blocks[key][seed]


def figure_name(arm: str, figure: str) -> str:
    """Name of a figure of an arm."""
    return f"{arm}: {figure}"


def choosing_name(arm: str) -> str:
    """Name of the KL on a seed that only serves to choose between the two PMoE arms."""
    return f"{arm}: KL, seeds for the choice"


def chosen(measured: Measurements) -> str:
    """The PMoE arm with the lower mean KL on the seeds for the choice."""
    return min(PMOE, key=lambda arm: measured[choosing_name(arm)].mean)


def _text(measured: Measurements, figure: str) -> str:
    arms = [chosen(measured), *(arm for arm in ARMS if arm != chosen(measured))]
    return "chosen " + ", ".join(f"{arm} {measured[figure_name(arm, figure)]}" for arm in arms)


def _below_one_optimum(measured: Measurements) -> tuple[bool, str]:
    kl = measured[figure_name(chosen(measured), "KL")]
    text = f"highest {max(kl.values):.3f} against {ONE_OPTIMUM:.3f}"
    return max(kl.values) < ONE_OPTIMUM, f"{text}; {_text(measured, 'KL')}"


def _below_unimodal(measured: Measurements) -> tuple[bool, str]:
    gap = measured[figure_name(chosen(measured), "KL")] - measured["unimodal: KL"]
    return gap.mean < -gap.std_error, f"difference {gap}"


def _covers_two(measured: Measurements) -> tuple[bool, str]:
    covered = measured[figure_name(chosen(measured), "optima covered")]
    text = _text(measured, "optima covered")
    return min(covered.values) >= 2, f"least {min(covered.values):.2f}; {text}"


def _not_above(arm: str) -> Criterion:
    def test(measured: Measurements) -> tuple[bool, str]:
        gaps = {own: measured[figure_name(own, "KL")] - measured[f"{arm}: KL"] for own in PMOE}
        gap = gaps[chosen(measured)]
        text = ", ".join(f"{own} {value}" for own, value in gaps.items())
        return gap.mean <= gap.std_error, f"chosen {chosen(measured)}; differences: {text}"

    return Criterion(f"KL not above that of the {arm} estimator by more than 1 paired s.e.", test)


COLOURS = {
    "unimodal": "0.5",
    "PMoE max": "tab:blue",
    "PMoE all": "tab:cyan",
    "Gumbel": "tab:orange",
    "score": "tab:green",
}
PANELS = {
    "KL": "KL to the best policy (nats)",
    "mean Q": "mean Q",
    "optima covered": "optima covered, of 3",
}


def plot(measured: Measurements, figure: Any) -> None:
    """KL, mean Q and optima covered, a column an arm and a point a seed."""
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for column, (arm, colour) in enumerate(COLOURS.items()):
            values = measured[figure_name(arm, name)].values
            spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
            axes.plot(column + np.array(spread), values, "o", color=colour, alpha=0.6)
            axes.plot([column - 0.3, column + 0.3], [np.mean(values)] * 2, color=colour)
        axes.set_xticks(range(len(COLOURS)), COLOURS, rotation=35, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        if name == "KL":
            axes.axhline(ONE_OPTIMUM, color="0.5", linestyle=":", linewidth=1)
            label = "least with one optimum, log 3"
            axes.annotate(
                label, (-0.4, ONE_OPTIMUM), (0, -9), textcoords="offset points", fontsize=7
            )
            axes.set_ylim(bottom=0)


EXPERIMENT = Experiment(
    paper=123,
    claim=Claim(
        statement=(
            "A mixture policy trained with the frequency loss learns distinguishable primitives "
            "and does better than unimodal policies and than other estimators of the router's "
            "gradient."
        ),
        figure="higher returns than SAC and PPO with unimodal policies on six MuJoCo tasks",
        source="abstract; figures of the experiments",
    ),
    setup=(
        "Contextual bandit with a known critic: states on the unit circle, actions in the plane, "
        "three equally good actions at radius 0.6, 120 degrees apart, Q = log sum_k "
        "exp(-|a - m_k|^2 / 0.02), alpha = 1. Actors with a trunk of 2 x 64, K = 4 primitives, "
        "mixture entropy; Adam at 1e-3, batch 128, 1500 steps. KL from samples to the known best "
        "policy; an optimum counts as covered in a state where at least 5 % of 256 samples lie "
        "within 0.3 of it (mean over 64 states). The better of the two PMoE arms is chosen by "
        "KL on as many other seeds, trained alongside; the criteria are judged on the rest."
    ),
    baseline=(
        "a unimodal policy (K = 1); the same mixture with a straight-through Gumbel-softmax or a "
        "score-function gradient for the router"
    ),
    criteria=(
        Criterion("KL of the chosen PMoE arm below log 3 on every seed", _below_one_optimum),
        Criterion("KL below that of the unimodal arm by more than 1 paired s.e.", _below_unimodal),
        Criterion("at least 2 optima covered on every seed", _covers_two),
        _not_above("Gumbel"),
        _not_above("score"),
    ),
    budgets={
        "full": {"seeds": 4, "steps": 1500, "batch": 128},
        "smoke": {"seeds": 1, "steps": 10, "batch": 32},
    },
    trial=trial,
    plot=plot,
    together=True,
)
