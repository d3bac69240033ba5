"""What comes from botorch, on our models, against our closed forms."""

import pytest
import torch

import torchzoo.gp as unit
from tests.gp.gp_models import problem
from torchzoo.gp import NoisyExpectedImprovement, as_botorch_model, expected_improvement, gaussian
from torchzoo.gp.acquisition_botorch import NAMES
from torchzoo.gp.bayes_opt_acquisition import Improvement

pytest.importorskip("botorch", reason="botorch is an extra")


def rand(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def test_names():
    import botorch.acquisition

    for name, theirs in NAMES.items():
        found = getattr(unit, name)
        assert found.__module__.startswith("botorch.")
        assert found.__name__ == theirs.rpartition(".")[2]
        assert name not in unit.__all__
    assert unit.NoisyExpectedImprovement is not botorch.acquisition.NoisyExpectedImprovement


def test_a_plain_model_in_botorch():
    x, y, model = problem()
    wrapped = as_botorch_model(model)
    at = rand(5, 3, 2)
    found = wrapped.posterior(at)
    torch.testing.assert_close(found.mean, gaussian(model, at).mean)
    covariance = gaussian(model, at).covariance[..., 0, :, :]
    torch.testing.assert_close(found.distribution.covariance_matrix, covariance)
    assert as_botorch_model(wrapped) is wrapped
    assert not hasattr(model, "posterior")
    for ours in (NoisyExpectedImprovement(m, x)(rand(6, 1, 2)) for m in (model, wrapped)):
        assert (ours > 0).all()
    both = [NoisyExpectedImprovement(m, x)(rand(6, 1, 2)) for m in (model, wrapped)]
    torch.testing.assert_close(*both)
    fantasy = wrapped.condition_on_observations(rand(1, 2), y[:1, None])
    assert fantasy.posterior(at).mean.shape[-2:] == (3, 1)
    with pytest.raises(ValueError, match="model: expected"):
        as_botorch_model(object())


@pytest.mark.claim(5, "qEI of one point is EI; order and copies of points change nothing", 4.0)
def test_batch_improvement():
    from botorch.sampling import SobolQMCNormalSampler

    _, y, model = problem()
    wrapped, best = as_botorch_model(model), float(y.max()) - 0.5
    joint = unit.qExpectedImprovement(
        wrapped, best, sampler=SobolQMCNormalSampler(torch.Size([8192]), seed=0)
    )
    at = rand(4, 1, 2)
    normal = gaussian(model, at)
    one = expected_improvement(normal.mean[:, 0, 0], normal.variance[:, 0, 0].sqrt(), best)
    torch.testing.assert_close(joint(at), one, rtol=0, atol=4 * 0.5 / 8192**0.5)
    torch.testing.assert_close(unit.ExpectedImprovement(wrapped, best)(at), one)
    torch.testing.assert_close(unit.LogExpectedImprovement(wrapped, best)(at), one.log())
    pair = rand(1, 2, 2, seed=3)
    torch.testing.assert_close(joint(pair), joint(pair.flip(1)), rtol=0, atol=0.01)
    torch.testing.assert_close(joint(pair[:, [0, 0]]), joint(pair[:, :1]), rtol=0, atol=0.01)
    assert (joint(pair) > joint(pair[:, :1])).all()


@pytest.mark.claim(5, "Constrained EI is EI times the probability that constraints hold", 1e-8)
def test_constrained_improvement():
    from botorch.models import ModelListGP

    _, y, model = problem()
    _, _, limit = problem(seed=3)
    best = y.max() - 0.5
    both = ModelListGP(as_botorch_model(model), as_botorch_model(limit))
    at = rand(6, 1, 2)
    theirs = unit.ConstrainedEI(both, best, 0, {1: (None, 0.0)})(at)

    class Limits:
        posterior = staticmethod(lambda x: gaussian(limit, x))

    torch.testing.assert_close(Improvement(model, best, Limits)(at), theirs, rtol=1e-8, atol=1e-10)
    chance = Improvement(model, None, Limits)(at)
    normal = gaussian(limit, at)
    z = -normal.mean[:, 0, 0] / normal.variance[:, 0, 0].sqrt()
    torch.testing.assert_close(chance, torch.special.ndtr(z))
