"""Batches of the bandit against rounds told one by one."""

import math

import pytest
import torch

from torchzoo.gp import BBKB, BKB


def rbf(a, b):
    return (-torch.cdist(a, b).square() / (2 * 0.2**2)).exp()


def start(cls=BBKB, arms=60, pulls=80, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(arms, 2, dtype=torch.float64, generator=generator)
    index = torch.randint(arms, (pulls,), generator=generator)
    y = (6 * x[index]).sin().sum(-1)
    found = cls(rbf, generator=generator, oversampling=1e6, **options)
    found.initialize(x, index, y)
    return found


@pytest.mark.claim(
    49,
    "A batch picks by the bound with means kept and variances as after pulling its earlier arms, "
    "and ends when one and the variances before it add up to above the threshold",
    tolerance=1e-9,
)
@pytest.mark.parametrize("threshold", [1.3, 2.0, 4.0])
def test_a_batch(threshold):
    found = start(ratio_threshold=threshold, lam=0.3, noise_variance=0.3, pulls=600)
    beta, means, before = found.beta, found.means.clone(), found.variances.clone()
    batch = found.ask().tolist()
    assert 1 + before[batch].sum() > threshold
    assert 1 + before[batch[:-1]].sum() <= threshold
    told = found
    state = found.state_dict()
    for arm in batch:  # all pulled arms are inducing points: the sketch stays what it is
        assert arm == (means + beta * told.variances.sqrt()).argmax()
        told = start(BKB, lam=0.3, noise_variance=0.3)
        told.load_state_dict(
            state | {"counts": state["counts"].index_add_(0, torch.tensor([arm]), _one())}
        )
    assert len(set(batch)) > {1.3: 0, 2.0: 1, 4.0: 3}[threshold]


def _one():
    return torch.ones(1, dtype=torch.float64)


@pytest.mark.claim(
    49, "The width in batches sums log(1 + sigma²) over pulls, times the threshold", tolerance=1e-10
)
def test_width():
    found = start(
        pulls=3, lam=0.4, noise_variance=0.2, fnorm=1.5, delta=0.1, beta_scale=0.5,
        ratio_threshold=1.7,
    )  # fmt: skip
    total = 3 * math.log(1 + 1 / 0.4)
    for _ in range(4):
        norm = math.sqrt(0.4) * 1.5
        expected = 0.5 * (norm + math.sqrt(0.2 * (1.7 * total + math.log(10))))
        assert float(found.beta) == pytest.approx(expected, abs=1e-10)
        batch = found.ask()
        total += float((1 + found.variances[batch]).log().sum())
        found.tell(batch, torch.zeros(len(batch)))


def test_a_threshold_of_one_is_one_arm():
    single = start(ratio_threshold=1.0, lam=0.3)
    for _ in range(5):
        batch = single.ask()
        rival = single.means + single.beta * single.variances.sqrt()
        assert batch.tolist() == [rival.argmax()]
        single.tell(batch, [0.3])


def test_batches_grow():
    """As variances fall, fewer rounds are needed for the same pulls."""
    found = start(pulls=1, noise_variance=0.1, ratio_threshold=2.0)
    sizes = []
    while found.t < 200:
        batch = found.ask()
        sizes.append(len(batch))
        found.tell(batch, (6 * found.arms[batch]).sin().sum(-1))
    assert sizes[0] == 1
    assert len(sizes) < 120
    assert sum(sizes[-5:]) > 2 * sum(sizes[:5])
    best = (6 * found.arms).sin().sum(-1).max()
    chosen = found.arms[found.means.argmax()]
    assert best - (6 * chosen).sin().sum() < 0.1


def test_candidates_and_state():
    found, again = start(lam=0.2), start(seed=5, lam=0.2)
    fresh = torch.rand(20, 2, dtype=torch.float64)
    batch = found.ask(fresh)
    again.load_state_dict(found.state_dict())
    assert again.beta == found.beta
    for bandit in (found, again):
        bandit.tell(batch, torch.ones(len(batch)))
    assert (found.arms[-len(batch) :] == fresh[batch]).all()
    assert (found.variances == again.variances).all()
    assert found.ask().tolist() == again.ask().tolist()


def test_a_kernel_of_no_variance_ends():
    found = BBKB(lambda a, b: a @ b.mT)
    found.initialize(torch.zeros(3, 1), [0], [0.0])
    assert found.ask().tolist() == [0]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"ratio_threshold": 0.9}, "ratio_threshold"), ({"constants": "theory"}, "constants")],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        BBKB(rbf, **options)
