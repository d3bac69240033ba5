"""The loop: the same run whether or not it was killed, and botorch on top of the bandit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from torchzoo.gp import BBKB, BKB, run_bandit

PROGRAM = """
import os, signal, torch
from torchzoo.gp import BKB, run_bandit

def rbf(a, b):
    return (-torch.cdist(a, b).square() / 0.08).exp()

def start(kill_at, path):
    torch.manual_seed(3)
    arms = torch.rand(50, 2, dtype=torch.float64)
    bandit = BKB(rbf, noise_variance=0.1, oversampling=2.0, beta_scale=0.5)

    def objective(x):
        if bandit.t == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return (5 * x).sin().sum(-1) + 0.3 * torch.randn(len(x))

    bandit.initialize(arms, [0], [0.1])
    run_bandit(bandit, objective, 60, checkpoint=path, every=7)
    return bandit
"""


@pytest.mark.claim(49, "A run that is killed and started again gives the same pulls and means")
def test_kill_and_resume(tmp_path):
    defined = {}
    exec(PROGRAM, defined)
    path = str(tmp_path / "state")
    command = [sys.executable, "-c", f"{PROGRAM}\nstart(31, {path!r})"]
    assert subprocess.run(command).returncode == -9
    assert load_file(path)["pulled_index"].shape == (29,)  # the last of rounds 7, 14, 21, 28
    again, whole = defined["start"](-1, path), defined["start"](-1, None)
    assert again.pulled_index.tolist() == whole.pulled_index.tolist()
    assert again.pulled_y.tolist() == whole.pulled_y.tolist()
    assert (again.means == whole.means).all()
    assert len(whole.pulled_index.unique()) > 5


def bandit(cls=BKB, **options):
    generator = torch.Generator().manual_seed(0)
    arms = torch.rand(30, 1, dtype=torch.float64, generator=generator)
    kernel = lambda a, b: (-torch.cdist(a, b).square() / 0.08).exp()  # noqa: E731
    found = cls(kernel, generator=generator, noise_variance=0.01, oversampling=8.0, **options)
    found.initialize(arms, [0, 5], [0.1, -0.2])
    return found


def test_the_loop_is_ask_and_tell(tmp_path):
    by_hand, looped = bandit(), bandit()
    for _ in range(20):
        arm = by_hand.ask()
        by_hand.tell(arm, by_hand.arms[arm, 0] ** 2)
    run_bandit(looped, lambda x: x[:, 0] ** 2, 22)
    assert looped.pulled_index.tolist() == by_hand.pulled_index.tolist()
    batches = bandit(BBKB)
    run_bandit(batches, lambda x: x[:, 0] ** 2, 22, checkpoint=tmp_path / "state", every=100)
    assert batches.t == 22
    assert (tmp_path / "state").exists()
    fresh = BBKB(lambda a, b: a @ b.mT, noise_variance=0.01)  # arms come from the checkpoint
    run_bandit(fresh, lambda x: x[:, 0], 22, checkpoint=tmp_path / "state")
    assert fresh.pulled_index.tolist() == batches.pulled_index.tolist()


def test_bad_calls(tmp_path):
    with pytest.raises(ValueError, match="every: expected"):
        run_bandit(bandit(), lambda x: x, 5, every=0)
    with pytest.raises(ValueError, match="y: expected"):
        run_bandit(bandit(), lambda x: x[:, 0] * float("nan"), 5)
    with pytest.raises(RuntimeError, match="initialize first"):
        run_bandit(BKB(lambda a, b: a @ b.mT), lambda x: x, 5, checkpoint=tmp_path / "none")


def test_botorch_acquisition_functions():
    botorch = pytest.importorskip("botorch", reason="needs torchzoo[gp]")
    found = bandit()
    run_bandit(found, lambda x: (6 * x[:, 0]).sin(), 12)
    model = found.to_botorch()
    beta = float(found.beta) ** 2 / found.lam
    bound = botorch.acquisition.UpperConfidenceBound(model, beta=beta)
    values = bound(found.arms[:, None])
    own = found.means + found.beta * found.variances.sqrt()
    torch.testing.assert_close(values, own, rtol=1e-6, atol=1e-8)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    best, value = botorch.optim.optimize_acqf(
        bound, ends, q=1, num_restarts=2, raw_samples=8, options={"maxiter": 30}
    )
    assert value >= own.max() - 1e-9
    choice = found.ask(best)  # a continuous domain: the optimum as the one candidate
    found.tell(choice, 0.4)
    assert (found.arms[-1] == best[0]).all()


def test_botorch_posterior_is_joint_and_may_have_noise():
    pytest.importorskip("botorch", reason="needs torchzoo[gp]")
    found = bandit()
    x = torch.rand(4, 3, 1, dtype=torch.float64)
    model = found.to_botorch()
    assert (model.num_outputs, model.batch_shape) == (1, ())
    plain, noisy = model.posterior(x), model.posterior(x, observation_noise=True)
    joint = plain.distribution.covariance_matrix
    torch.testing.assert_close(joint, found.covariance(x))
    torch.testing.assert_close(plain.mean[..., 0], found.posterior(x).mean)
    torch.testing.assert_close(noisy.variance, plain.variance + 0.01)
    ScaledBy3 = lambda posterior: posterior.mean * 3  # noqa: E731
    torch.testing.assert_close(model.posterior(x, posterior_transform=ScaledBy3), 3 * plain.mean)


def test_without_botorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchzoo.gp._botorch", None)
    with pytest.raises(ImportError, match=r"pip install torchzoo\[gp\]"):
        bandit().to_botorch()
