"""Derivatives of functions against closed forms."""

import pytest
import torch

from torchzoo.common.autodiff import gradient_penalty


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_penalty_of_a_linear_critic():
    weight = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    critic = lambda x: x @ weight  # noqa: E731
    found = gradient_penalty(critic, normal(7, 5, 2), normal(7, 5, 2, seed=1), center=2.0)
    assert found.item() == pytest.approx(9.0)
    (slope,) = torch.autograd.grad(found, weight)  # 2 (norm - center) w / norm
    torch.testing.assert_close(slope, 6 * weight.detach() / 5)


def test_points_lie_between_their_pairs():
    real, fake = normal(500, 1), 10 + normal(500, 1, seed=1)
    seen = []

    def critic(x):
        seen.append(x.detach())
        return (x**2 / 2).sum(-1)  # its gradient is x

    found = gradient_penalty(
        critic, real, fake, center=0.0, generator=torch.Generator().manual_seed(0)
    )
    share = ((seen[0] - real) / (fake - real))[:, 0]
    assert share.min() >= 0
    assert share.max() <= 1
    assert abs(share.mean() - 0.5) < 0.06
    assert len(share.unique()) == 500
    torch.testing.assert_close(found, seen[0].square().mean())


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 0.0), (3.0, 4.0)])
def test_one_sided(scale, expected):
    found = gradient_penalty(
        lambda x: scale * x[:, 0], normal(4, 2), normal(4, 2, seed=1), one_sided=True
    )
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_gradients():
    weight = normal(3, 2).requires_grad_()
    real, fake = normal(4, 2), normal(4, 2, seed=1)

    def penalty(weight):
        generator = torch.Generator().manual_seed(0)
        return gradient_penalty(
            lambda x: (x @ weight.mT).tanh().sum(-1), real, fake, generator=generator
        )

    assert torch.autograd.gradcheck(penalty, weight)
    with torch.no_grad():
        assert penalty(weight) > 0
    constant = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = gradient_penalty(lambda x: x @ constant, real, fake)
    assert torch.autograd.grad(found, constant)[0].isfinite().all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"fake: .*got"):
        gradient_penalty(lambda x: x[:, 0], torch.zeros(4, 2), torch.zeros(3, 2))
