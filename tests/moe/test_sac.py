"""The SAC learner: its updates by hand, its replay, its checkpoints, and that it learns."""

import copy
from functools import partial

import pytest
import torch

from torchzoo.errors import WeightsError
from torchzoo.moe import SAC, PMoEPolicy, ReplayBuffer, pmoe_sac_loss
from torchzoo.moe import learner as learner_module


def learner(seed=0, rows=40, **options):
    """A small learner whose buffer is filled at random."""
    torch.manual_seed(seed)
    policy = PMoEPolicy(3, 2, num_experts=3, hidden=(8,))
    made = SAC(policy, **{"hidden": (8,), "batch_size": 16, "capacity": 50} | options)
    for row in range(rows):
        a = torch.rand(2) * 2 - 1
        made.buffer.add(torch.randn(3), a, float(row), torch.randn(3), row % 5 == 0)
    return made


def snapshot(made):
    return {name: value.clone() for name, value in made._tensors().items()}


def test_replay_is_a_ring():
    buffer = ReplayBuffer(4, 1, 1)
    with pytest.raises(ValueError, match="at least one transition"):
        buffer.sample(2)
    for row in range(3):
        buffer.add(torch.ones(1), torch.ones(1), float(row), torch.ones(1), False)
    assert set(buffer.sample(200).reward.tolist()) == {0, 1, 2}
    for row in range(3, 6):
        buffer.add(torch.full((1,), row), torch.zeros(1), float(row), torch.ones(1), row == 5)
    assert len(buffer) == 4
    batch = buffer.sample(500)
    assert set(batch.reward.tolist()) == {2, 3, 4, 5}
    late = batch.reward >= 3
    assert torch.equal(batch.s[late, 0], batch.reward[late])
    assert torch.equal(batch.terminal, (batch.reward == 5).float())
    share = (batch.reward == 2).float().mean()
    assert 0.15 < share < 0.35


def test_critic_loss_by_hand():
    made = learner()
    with torch.no_grad():
        made.log_alpha.fill_(-0.7)
    torch.manual_seed(5)
    batch = made.buffer.sample(16)
    torch.manual_seed(6)
    loss = made._critic_loss(batch)
    torch.manual_seed(6)
    pi = made.policy(batch.next_s)
    u = pi.loc + pi.log_std.exp() * torch.randn_like(pi.loc)
    expert = pi.sample_expert()
    a = torch.stack([u[row, i] for row, i in enumerate(expert.tolist())]).tanh()
    q1, q2 = (target(batch.next_s, a) for target in made.targets)
    soft = torch.minimum(q1, q2) - torch.tensor(-0.7).exp() * pi.log_prob(a)
    y = torch.where(batch.terminal.bool(), batch.reward, batch.reward + 0.99 * soft).detach()
    assert 0 < batch.terminal.sum() < 16
    exact = sum((critic(batch.s, batch.a) - y).square().mean() for critic in made.critics)
    torch.testing.assert_close(loss, exact)
    assert all(parameter.grad is None for parameter in made.targets.parameters())


def test_update_moves_each_part_by_its_own_loss():
    made = learner(tau=0.25)
    parts = {name: copy.deepcopy(part) for name, part in made._modules().items()}
    critics, policy, targets = (parts[name] for name in ("critics", "policy", "targets"))
    # Plain descent, as Adam's first step has the size of the learning rate even for rounding.
    made.optimizers = {
        "actor": torch.optim.SGD(made.actor_parameters, lr=1e-2),
        "critic": torch.optim.SGD(made.critics.parameters(), lr=1e-2),
    }
    torch.manual_seed(3)
    made.update()
    # The same with separate modules, optimisers and losses.
    twin = SAC(policy, hidden=(8,))
    twin.critics, twin.targets = critics, targets
    torch.manual_seed(3)
    batch = made.buffer.sample(16)
    twin._critic_loss(batch).backward()
    torch.optim.SGD(critics.parameters(), lr=1e-2).step()
    critics.requires_grad_(False)
    log_alpha = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([*policy.parameters(), log_alpha], lr=1e-2)
    losses = pmoe_sac_loss(policy, list(critics), batch.s, log_alpha.exp())
    sum(losses.values()).backward()
    optimizer.step()
    for module, exact in ((made.critics, critics), (made.policy, policy)):
        torch.testing.assert_close(dict(module.named_parameters()), dict(exact.named_parameters()))
    torch.testing.assert_close(made.log_alpha, log_alpha)
    assert log_alpha != 0
    for target, before, critic in zip(
        made.targets.parameters(), targets.parameters(), critics.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.75 * before + 0.25 * critic)


@pytest.mark.parametrize("rows", [40, 70])
def test_resumed_learner_goes_on_bit_for_bit(tmp_path, rows):
    made = learner(rows=rows)
    for _ in range(3):
        made.update()
    made.save(tmp_path / "c", {"episode": 7})

    def go_on(some):
        for _ in range(3):
            some.update()
            s = torch.randn(3)
            some.buffer.add(s, some.policy.act(s), 0.0, s, False)
        return snapshot(some)

    expected = go_on(made)
    other = learner(seed=1, rows=0)
    assert other.load(tmp_path / "c") == {"episode": 7}
    resumed = go_on(other)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    made = learner()
    made.save(tmp_path / "c", {"n": 1})

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(learner_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path / "c", {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert made.load(tmp_path / "c") == {"n": 1}


def test_refused_checkpoints_change_nothing(tmp_path):
    learner().save(tmp_path / "good")
    other = learner(seed=1, hidden=(9,))
    before = snapshot(other)
    with pytest.raises(WeightsError, match=r"critics.0.trunk.0.weight: got \(8, 5\), expected \(9"):
        other.load(tmp_path / "good")
    (tmp_path / "bad").write_bytes(b"no tensors")
    for name in ("bad", "missing"):
        with pytest.raises(WeightsError, match="can't read the checkpoint"):
            other.load(tmp_path / name)
    after = snapshot(other)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("backprop", ["max", "all"])
def test_learns_a_bandit(backprop):
    """Every step is terminal, and the best action is a known function of the state."""
    torch.manual_seed(0)
    made = SAC(
        PMoEPolicy(1, 1, num_experts=3, hidden=(32,)),
        actor_loss=partial(pmoe_sac_loss, backprop=backprop),
        hidden=(32,),
        batch_size=64,
        lr=1e-2,
    )
    for step in range(250):
        s = 2 * torch.rand(1) - 1
        a = made.policy.act(s)
        made.buffer.add(s, a, -5 * (a - 0.6 * s).square().item(), s, True)
        if step >= 50:
            made.update()
    s = torch.linspace(-0.9, 0.9, 20)[:, None]
    assert (made.policy.act(s, deterministic=True) - 0.6 * s).abs().mean() < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected"),
        ({"capacity": 0}, "capacity: expected"),
        ({"gamma": 1.5}, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"tau": -0.1}, "tau: expected"),
        ({"lr": 0.0}, "lr: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SAC(PMoEPolicy(3, 2), **options)
