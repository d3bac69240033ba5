"""Learning curves of mixture policies under SAC or PPO on a control task of gymnasium.

Actors on the same budget: the mixture whose router learns by the frequency loss, with the gradient
through the best primitive or through all of them (which are one under PPO); the same mixture
without that loss, whose router stays as it was drawn under SAC and learns by the surrogate alone
under PPO; and a unimodal policy.

    python -m torchzoo.experiments.moe.policy_control --env Pendulum-v1 --steps 20000 --out DIR
    python -m torchzoo.experiments.moe.policy_control --learner ppo --steps 100000 --out DIR

Training goes by whole episodes, each reset from a seed of its own, and checkpoints lie between
episodes. So a run that was interrupted goes on with `--resume` exactly as if it had not been,
in any environment that a seed determines. Needs the extra `rl`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from torchzoo.errors import TorchzooError
from torchzoo.experiment import describe, versions
from torchzoo.files import atomic_path, write_json
from torchzoo.moe.policy import PMoEPolicy
from torchzoo.moe.policy_losses import pmoe_ppo_loss, pmoe_sac_loss
from torchzoo.moe.ppo import PPO
from torchzoo.moe.sac import SAC

ARMS: dict[str, dict[str, Any]] = {
    "PMoE max": {"num_experts": 4, "backprop": "max", "freq_coef": 1.0},
    "PMoE all": {"num_experts": 4, "backprop": "all", "freq_coef": 1.0},
    "mixture without frequency loss": {"num_experts": 4, "backprop": "all", "freq_coef": 0.0},
    "unimodal": {"num_experts": 1, "backprop": "all", "freq_coef": 0.0},
}
PPO_ARMS: dict[str, dict[str, Any]] = {
    "PMoE": {"num_experts": 4, "freq_coef": 1.0},
    "mixture without frequency loss": {"num_experts": 4, "freq_coef": 0.0},
    "unimodal": {"num_experts": 1, "freq_coef": 0.0},
}
LEARNERS = {"sac": ARMS, "ppo": PPO_ARMS}
EVALUATION_SEED = 1_000_000
Point = dict[str, float]


@dataclass(frozen=True)
class Config:
    """What determines a run, apart from its length; `warmup` is SAC's and `horizon` PPO's."""

    env: str = "Pendulum-v1"
    learner: str = "sac"
    seed: int = 0
    hidden: int = 64
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 1000
    horizon: int = 1000
    evaluate_every: int = 1000
    evaluation_episodes: int = 5


class Task:
    """An environment with a box of actions, in tensors and with actions scaled to (-1, 1)."""

    def __init__(self, name: str) -> None:
        try:
            import gymnasium
        except ModuleNotFoundError as error:
            raise TorchzooError("gymnasium is missing: pip install 'torchzoo[rl]'") from error
        try:
            self.env: Any = gymnasium.make(name)
        except gymnasium.error.Error as error:
            raise TorchzooError(f"can't make the environment {name!r}: {error}") from error
        states: Any = self.env.observation_space
        actions: Any = self.env.action_space
        boxes = all(isinstance(space, gymnasium.spaces.Box) for space in (states, actions))
        if not boxes or len(states.shape) != 1 or not np.isfinite(actions.high).all():
            raise TorchzooError(
                f"{name}: expected vectors as states and bounded continuous actions, "
                f"got {states} and {actions}"
            )
        self.obs_dim, self.action_dim = states.shape[0], actions.shape[0]
        self.low, self.high = actions.low, actions.high

    def reset(self, seed: int) -> Tensor:
        """The first state of the episode that a seed determines."""
        return torch.as_tensor(self.env.reset(seed=seed)[0], dtype=torch.float32)

    def step(self, a: Tensor) -> tuple[Tensor, float, bool, bool]:
        """State, reward, whether no reward can follow, and whether the episode is over."""
        scaled = self.low + (a.clamp(-1, 1).numpy() + 1) / 2 * (self.high - self.low)
        s, reward, terminal, truncated, _ = self.env.step(scaled.astype(self.low.dtype))
        state = torch.as_tensor(s, dtype=torch.float32)
        return state, float(reward), bool(terminal), bool(terminal or truncated)


def make_learner(config: Config, arm: str, task: Task) -> SAC | PPO:
    """A fresh learner; it sets torch's generator from the run's seed."""
    torch.manual_seed(config.seed)
    options = dict(LEARNERS[config.learner][arm])
    hidden = (config.hidden, config.hidden)
    policy = PMoEPolicy(
        task.obs_dim,
        task.action_dim,
        num_experts=options.pop("num_experts"),
        hidden=hidden,
        squash=config.learner == "sac",
    )
    shared: dict[str, Any] = {"hidden": hidden, "batch_size": config.batch_size, "lr": config.lr}
    if config.learner == "sac":
        return SAC(policy, actor_loss=partial(pmoe_sac_loss, **options), **shared)
    loss = partial(pmoe_ppo_loss, **options)
    return PPO(policy, actor_loss=loss, horizon=config.horizon, **shared)


def play(learner: SAC | PPO, task: Task, seed: int, warmup: int) -> int:
    """Learn through one episode and return its length.

    SAC updates after each step, and acts uniformly during the warm-up; PPO when it has collected
    its horizon.
    """
    s, steps, over = task.reset(seed), 0, False
    while not over:
        exploring = isinstance(learner, SAC) and learner.buffer.added < warmup
        a = 2 * torch.rand(task.action_dim) - 1 if exploring else learner.policy.act(s)
        next_s, reward, terminal, over = task.step(a)
        if isinstance(learner, PPO):
            learner.buffer.add(s, a, reward, next_s, terminal, over)
            due = learner.buffer.full
        else:
            learner.buffer.add(s, a, reward, next_s, terminal)
            due = not exploring
        if due:
            learner.update()
        s, steps = next_s, steps + 1
    return steps


def evaluate(learner: SAC | PPO, task: Task, episodes: int) -> float:
    """Mean return of the deterministic policy over episodes that are the same each time."""
    total = 0.0
    for episode in range(episodes):
        s, over = task.reset(EVALUATION_SEED + episode), False
        while not over:
            s, reward, _, over = task.step(learner.policy.act(s, deterministic=True))
            total += reward
    return total / episodes


def train(
    config: Config,
    arm: str,
    steps: int,
    folder: Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 1000,
    report: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """Learning curve of one arm, up to the end of the episode that reaches `steps`.

    Args:
        config: What determines the run.
        arm: One of `LEARNERS[config.learner]`.
        steps: Environment steps.
        folder: Gets `checkpoint.safetensors` and, at the end, the policy.
        resume: Whether to go on from the checkpoint that lies there.
        checkpoint_every: Environment steps from one checkpoint to the next, at least.
        report: Called with a line for each point of the curve.

    Raises:
        TorchzooError: The checkpoint is of another run, or the environment won't do.
    """
    task, path = Task(config.env), folder / "checkpoint.safetensors"
    with torch.random.fork_rng(devices=[]):
        learner = make_learner(config, arm, task)
        state: dict[str, Any] = {"arm": arm, "config": asdict(config), "episode": 0, "curve": []}
        if resume and path.exists():
            state = _resumed(learner, path, state)
        saved = learner.buffer.added
        while learner.buffer.added < steps:
            before = learner.buffer.added
            play(learner, task, _episode_seed(config.seed, state["episode"]), config.warmup)
            state["episode"] += 1
            now = learner.buffer.added
            if now // config.evaluate_every > before // config.evaluate_every:
                value = evaluate(learner, task, config.evaluation_episodes)
                state["curve"].append({"step": now, "return": value})
                report(f"{arm}: step {now}, return {value:.1f}")
            if now - saved >= checkpoint_every or now >= steps:
                learner.save(path, state)
                saved = now
    learner.policy.save_pretrained(folder / "policy")
    return state["curve"]


def _episode_seed(seed: int, episode: int) -> int:
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def _resumed(learner: SAC | PPO, path: Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
    state = learner.load(path)
    wrong = [
        f"{name} was {state['config'].get(name)!r}, is {value!r}"
        for name, value in fresh["config"].items()
        if state["config"].get(name) != value
    ]
    if state["arm"] != fresh["arm"] or wrong:
        raise TorchzooError(f"{path} is of another run: {', '.join(wrong) or state['arm']}")
    return state


def save_plot(curves: Mapping[str, list[Point]], title: str, path: Path) -> None:
    """Draw learning curves into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    for arm, curve in curves.items():
        points = [(point["step"], point["return"]) for point in curve]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=arm)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of the deterministic policy")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, curves and plot.")],
    env: Annotated[str, typer.Option(help="Environment of gymnasium.")] = "Pendulum-v1",
    steps: Annotated[int, typer.Option(min=1, help="Environment steps of each arm.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and episodes.")] = 0,
    learner: Annotated[str, typer.Option(help="sac or ppo.")] = "sac",
    hidden: Annotated[int, typer.Option(min=1, help="Width of both hidden layers.")] = 64,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in the folder.")] = False,
) -> None:
    """Train every arm, then write `policy_control.json` and `policy_control.png`."""
    if learner not in LEARNERS:
        raise typer.BadParameter(f"expected {' or '.join(LEARNERS)}, got {learner!r}")
    config = Config(env=env, learner=learner, seed=seed, hidden=hidden)
    arms, curves = LEARNERS[learner], {}
    try:
        for arm in arms:
            folder = out / arm.replace(" ", "-")
            report = partial(typer.echo, err=True)
            curves[arm] = train(config, arm, steps, folder, resume=resume, report=report)
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with --resume --out {out}", err=True)
        raise typer.Exit(130) from None
    except TorchzooError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    import gymnasium

    record = {
        "steps": steps,
        "config": asdict(config),
        "arms": arms,
        "curves": curves,
        "versions": versions() | {"gymnasium": gymnasium.__version__},
        "device": describe("cpu"),
    }
    write_json(out / "policy_control.json", record)
    if any(curves.values()):
        save_plot(curves, f"{env}, {learner.upper()}", out / "policy_control.png")
    sys.stdout.write(f"{out / 'policy_control.json'}\n")


if __name__ == "__main__":
    typer.run(main)
