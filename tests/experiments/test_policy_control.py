"""The training script: whole runs, and runs that were interrupted."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import torchzoo
from torchzoo.errors import TorchzooError
from torchzoo.experiments.moe import policy_control as unit
from torchzoo.experiments.moe.policy_control import Config, Task, train

gymnasium = pytest.importorskip("gymnasium")
gymnasium.register(
    "ShortPendulum-v0",
    entry_point="gymnasium.envs.classic_control:PendulumEnv",
    max_episode_steps=20,
)

SMALL = Config(
    env="ShortPendulum-v0",
    hidden=8,
    batch_size=16,
    warmup=15,
    evaluate_every=20,
    evaluation_episodes=1,
)


SMALL_PPO = replace(SMALL, learner="ppo", horizon=25)  # so that episodes end within a rollout


def run(folder, config=SMALL, **options):
    arm = "PMoE all" if config.learner == "sac" else "PMoE"
    return train(config, arm, 60, folder, checkpoint_every=20, **options)


@pytest.mark.parametrize("config", [SMALL, SMALL_PPO], ids=["sac", "ppo"])
@pytest.mark.parametrize("stop", [10, 53, 79])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, stop, config):
    """Stopped in the first episode, in a later one, or while evaluating."""
    curve = run(tmp_path / "whole", config)
    assert [point["step"] for point in curve] == [20, 40, 60]
    step, count = Task.step, iter(range(10_000))

    def stopping(self, a):
        if next(count) == stop:
            raise KeyboardInterrupt
        return step(self, a)

    monkeypatch.setattr(Task, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config)
    monkeypatch.setattr(Task, "step", step)
    torch.rand(7)  # another process would have another generator
    assert run(tmp_path / "parts", config, resume=True) == curve
    whole, parts = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert any(name.startswith("optimizer.") for name in whole), "it has learned"
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_longer_run_goes_on_from_a_finished_one(tmp_path):
    first = run(tmp_path)
    again = train(SMALL, "PMoE all", 80, tmp_path, checkpoint_every=20, resume=True)
    assert again[:3] == first
    assert len(again) == 4
    whole = train(SMALL, "PMoE all", 80, tmp_path / "whole")
    assert again == whole


def test_training_leaves_the_callers_generator_alone(tmp_path):
    state = torch.get_rng_state()
    train(SMALL, "unimodal", 20, tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(TorchzooError, match="another run: seed was 0, is 1"):
        train(Config(**{**vars(SMALL), "seed": 1}), "PMoE all", 60, tmp_path, resume=True)
    with pytest.raises(TorchzooError, match="another run"):
        train(SMALL, "PMoE max", 60, tmp_path, resume=True)
    with pytest.raises(TorchzooError, match=r"value\.trunk\.0\.weight: got nothing"):
        run(tmp_path, replace(SMALL, learner="ppo"), resume=True)


def test_task_scales_actions_and_ends_with_the_time():
    task, raw = Task("Pendulum-v1"), Task("Pendulum-v1").env
    assert (task.obs_dim, task.action_dim) == (3, 1)
    s = task.reset(3)
    raw.reset(seed=3)
    for t in range(200):
        a = torch.tensor([(-1.0) ** t * 0.75])
        s, reward, terminal, over = task.step(a)
        exact = raw.step(2 * a.numpy())
        assert s.tolist() == exact[0].tolist()
        assert reward == exact[1]
        assert not terminal
        assert over == (t == 199)
    task.reset(5)
    outside = task.step(torch.tensor([7.0]))
    task.reset(5)
    assert torch.equal(outside[0], task.step(torch.tensor([1.0]))[0])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v1", "CartPole-v1: expected vectors .* continuous actions, got"),
        ("Nothing-v0", "can't make the environment 'Nothing-v0'"),
    ],
)
def test_environments_that_wont_do(env, message):
    with pytest.raises(TorchzooError, match=message):
        Task(env)


def test_missing_gymnasium_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(TorchzooError, match=r"pip install 'torchzoo\[rl\]'"):
        Task("Pendulum-v1")


def app():
    single = typer.Typer()
    single.command()(unit.main)
    return single


@pytest.mark.parametrize("learner", ["sac", "ppo"])
def test_script(tmp_path, learner):
    env = ["--env", "ShortPendulum-v0", "--learner", learner]
    options = [*env, "--steps", "1000", "--hidden", "8", "--out", str(tmp_path)]
    result = CliRunner().invoke(app(), options)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "policy_control.json").read_text())
    arms = unit.LEARNERS[learner]
    assert record["curves"].keys() == record["arms"].keys() == arms.keys()
    assert [len(curve) for curve in record["curves"].values()] == [1] * len(arms)
    assert {"torch", "torchzoo", "gymnasium"} <= record["versions"].keys()
    assert (tmp_path / "policy_control.png").stat().st_size > 10_000
    first = next(iter(arms)).replace(" ", "-")
    policy = torchzoo.from_pretrained(tmp_path / first / "policy")
    assert (policy.num_experts, policy.squash) == (4, learner == "sac")
    again = CliRunner().invoke(app(), [*options, "--resume"])
    assert again.exit_code == 0
    assert json.loads((tmp_path / "policy_control.json").read_text())["curves"] == record["curves"]


def test_script_says_what_went_wrong(tmp_path, monkeypatch):
    options = ["--steps", "200", "--out", str(tmp_path)]
    result = CliRunner().invoke(app(), [*options, "--env", "Nothing-v0"])
    assert result.exit_code == 2
    assert "error: can't make" in result.output

    result = CliRunner().invoke(app(), [*options, "--learner", "a2c"])
    assert result.exit_code == 2
    assert "expected sac or ppo, got 'a2c'" in result.output

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(unit, "train", interrupt)
    result = CliRunner().invoke(app(), options)
    assert result.exit_code == 130
    assert "--resume" in result.output
