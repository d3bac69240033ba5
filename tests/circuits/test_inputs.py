"""Leaves against SciPy and sums over all values, and their most likely parameters."""

import pytest
import torch
from scipy import stats

from torchzoo.circuits import (
    BernoulliLeaf,
    BinomialLeaf,
    CategoricalLeaf,
    DiscretizedLogisticLeaf,
    GaussianLeaf,
)

F64 = torch.float64
FINITE = {
    "categorical": CategoricalLeaf(5),
    "bernoulli": BernoulliLeaf(),
    "binomial": BinomialLeaf(4),
    "logistic": DiscretizedLogisticLeaf(6),
}
finite = pytest.mark.parametrize("template", FINITE.values(), ids=FINITE)
shared = pytest.mark.parametrize("shared", [False, True])


def build(template, folds=3, units=2, seed=0, **options):
    torch.manual_seed(seed)
    return template.resized(folds, units, dtype=F64, **options)


@finite
@shared
def test_finite_leaves_equal_sums_over_their_values(template, shared):
    leaf = build(template, shared=shared)
    count = leaf.num_categories
    x = torch.arange(count).expand(3, -1)
    probs = leaf.log_prob(x).exp()  # (F, C, K)
    values = x[..., None].to(F64)
    torch.testing.assert_close(probs.sum(1), torch.ones(3, 2, dtype=F64))
    below = torch.cat([torch.zeros(3, 1, 2, dtype=F64), probs.cumsum(1)[:, :-1]], 1)
    torch.testing.assert_close(leaf.log_cdf(x).exp(), below)
    torch.testing.assert_close(leaf.mean(), (probs * values).sum(1))
    torch.testing.assert_close(leaf.second_moment(), (probs * values**2).sum(1))
    assert torch.equal(leaf.mode(), probs.argmax(1))
    torch.testing.assert_close(leaf.max_log_prob().exp(), probs.amax(1))
    other = build(template, units=4, seed=1)
    theirs = other.log_prob(x).exp()
    inner = torch.einsum("fck,fcj->fkj", probs, theirs)
    torch.testing.assert_close(leaf.inner(other).exp(), inner)
    product = leaf.product(other).log_prob(x).exp().unflatten(2, (2, 4))
    torch.testing.assert_close(product * inner[:, None], probs[..., None] * theirs[:, :, None])
    log_w = torch.randn(3, 7, count, dtype=F64)
    soft = torch.einsum("fbc,fck->fbk", log_w.exp(), probs)
    torch.testing.assert_close(leaf.log_prob_soft(log_w).exp(), soft)
    assert leaf.invalid(torch.tensor([[-1, 0, count]])).tolist() == [[True, False, True]]
    for kind in (torch.uint8, torch.int8):  # limits beyond the type must not wrap around
        values = torch.tensor([[0, min(count - 1, torch.iinfo(kind).max)]], dtype=kind)
        assert not leaf.invalid(values).any()


@finite
def test_samples_follow_the_unit_asked_for(template):
    leaf = build(template)
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(2, (3, 4000), generator=generator)
    drawn = leaf.sample(units, generator)
    for fold in range(3):
        for unit in range(2):
            own = drawn[fold][units[fold] == unit]
            counts = torch.bincount(own, minlength=leaf.num_categories).double()
            expected = leaf.full_table()[fold, :, unit].exp().detach() * len(own)
            assert stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3


def test_binomial_and_bernoulli_equal_scipy():
    leaf = build(BinomialLeaf(7))
    x = torch.arange(8).expand(3, -1)
    chance = leaf.logit.sigmoid().detach()
    expected = stats.binom.logpmf(x[..., None].numpy(), 7, chance[:, None].numpy())
    torch.testing.assert_close(leaf.log_prob(x).detach(), torch.from_numpy(expected))
    leaf = build(BernoulliLeaf())
    torch.testing.assert_close(leaf.log_prob(x[:, 1:2])[:, 0].exp(), leaf.logit.sigmoid())


def test_discretized_logistic_equals_differences_of_scipys_cdf():
    leaf = build(DiscretizedLogisticLeaf(6))
    edges = torch.arange(7, dtype=F64) / 6
    edges[0], edges[-1] = -torch.inf, torch.inf
    scale = leaf.log_scale.exp().detach()
    cdf = stats.logistic.cdf(edges[:, None], leaf.loc.detach()[:, None], scale[:, None])
    torch.testing.assert_close(leaf.log_table().exp().detach(), torch.from_numpy(cdf).diff(dim=1))
    leaf.log_scale.data.fill_(-8)  # narrow: a difference of sigmoids would be 0 - 0
    assert leaf.log_table().isfinite().all()


def test_gaussian_equals_scipy():
    leaf, other = build(GaussianLeaf(0.1)), build(GaussianLeaf(0.1), units=3, seed=1)
    other.log_std.data.uniform_(-1, 1)
    x = torch.randn(3, 6, dtype=F64)
    loc, std = leaf.loc.detach().numpy(), (0.1 + leaf.log_std.exp()).detach().numpy()
    rows = x[..., None].numpy(), loc[:, None], std[:, None]
    torch.testing.assert_close(
        leaf.log_prob(x).detach(), torch.from_numpy(stats.norm.logpdf(*rows))
    )
    torch.testing.assert_close(leaf.log_cdf(x).detach(), torch.from_numpy(stats.norm.logcdf(*rows)))
    torch.testing.assert_close(leaf.second_moment().detach(), torch.from_numpy(loc**2 + std**2))
    peak = torch.from_numpy(stats.norm.logpdf(0, 0, std))
    torch.testing.assert_close(leaf.max_log_prob().detach(), peak)
    assert torch.equal(leaf.mode(), leaf.mean())
    grid = torch.linspace(-12, 12, 4801, dtype=F64)
    both = (
        leaf.log_prob(grid.expand(3, -1))[..., None]
        + other.log_prob(grid.expand(3, -1))[:, :, None]
    )
    integral = torch.trapezoid(both.exp(), grid, dim=1)
    torch.testing.assert_close(leaf.inner(other).exp(), integral, rtol=1e-6, atol=1e-9)
    product = leaf.product(other).log_prob(grid.expand(3, -1)).unflatten(2, (2, 3))
    torch.testing.assert_close(product.exp() * integral[:, None], both.exp(), rtol=1e-6, atol=1e-9)
    units = torch.zeros(3, 5000, dtype=torch.long)
    drawn = leaf.sample(units, torch.Generator().manual_seed(0))
    for fold in range(3):
        test = stats.kstest(drawn[fold].detach(), stats.norm(loc[fold, 0], std[fold, 0]).cdf)
        assert test.pvalue > 1e-3


def weighted_likelihood(leaf, x, flow):
    return (flow * leaf.log_prob(x)).sum()


@pytest.mark.parametrize(
    "template", [*FINITE.values(), GaussianLeaf(1e-3)], ids=[*FINITE, "gaussian"]
)
@shared
def test_update_is_a_stationary_point_of_the_weighted_likelihood(template, shared):
    """Families with a closed form reach the maximum in one step; the logistic one climbs to it."""
    leaf = build(template, shared=shared)
    generator = torch.Generator().manual_seed(1)
    if leaf.num_categories:
        x = torch.randint(leaf.num_categories, (3, 50), generator=generator)
    else:
        x = torch.randn(3, 50, generator=generator, dtype=F64)
    flow = torch.rand(3, 50, 2, generator=generator, dtype=F64)
    before = weighted_likelihood(leaf, x, flow)
    leaf.update(leaf.statistics(x, flow), 0.0, 1.0)
    after = weighted_likelihood(leaf, x, flow)
    assert after > before
    if not isinstance(leaf, DiscretizedLogisticLeaf):
        slopes = torch.autograd.grad(after, list(leaf.parameters()))
        assert max(slope.abs().max() for slope in slopes) < 1e-9


def test_logistic_update_never_lowers_the_likelihood():
    leaf = build(DiscretizedLogisticLeaf(8), folds=40, units=4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(40, 8, 4, generator=generator, dtype=F64) ** 6
    score = (counts * leaf.log_table()).sum(1)
    for _ in range(10):
        leaf.fit_counts(counts, 1.0)
        better = (counts * leaf.log_table()).sum(1)
        assert (better >= score - 1e-12).all()
        score = better


def test_steps_and_pseudocounts_are_as_documented():
    leaf = build(CategoricalLeaf(3))
    old = leaf.full_table().exp().detach()
    counts = torch.tensor([1.0, 2.0, 5.0], dtype=F64)[None, :, None].expand(3, 3, 2)
    leaf.update(counts, 0.5, 0.25)
    new = torch.tensor([1.5, 2.5, 5.5], dtype=F64)[None, :, None] / 9.5
    torch.testing.assert_close(leaf.full_table().exp().detach(), 0.75 * old + 0.25 * new)
    old = leaf.full_table().exp().detach()
    leaf.update(torch.zeros_like(counts), 0.0, 1.0)  # a unit that no sample uses stays
    torch.testing.assert_close(leaf.full_table().exp().detach(), old)
    own = torch.tensor([[0.0, 0.0, 4.0]] * 3, dtype=F64)
    leaf.update(counts, own, 1.0)
    expected = torch.tensor([1.0, 2.0, 9.0], dtype=F64) / 12
    torch.testing.assert_close(leaf.full_table()[1, :, 0].exp().detach(), expected)


def test_gaussian_steps_blend_moments():
    leaf = build(GaussianLeaf(1e-3), folds=1, units=1)
    mean, second = leaf.mean().item(), leaf.second_moment().item()
    x = torch.tensor([[1.0, 2.0, 6.0]], dtype=F64)
    leaf.update(leaf.statistics(x, torch.ones(1, 3, 1, dtype=F64)), 0.0, 0.5)
    assert abs(leaf.mean().item() - 0.5 * (mean + 3.0)) < 1e-12
    assert abs(leaf.second_moment().item() - 0.5 * (second + 41 / 3)) < 1e-9
    leaf.update(leaf.statistics(x[:, :1], torch.ones(1, 1, 1, dtype=F64)), 0.0, 1.0)
    assert leaf.variance().sqrt().item() == pytest.approx(1e-3, rel=1e-3)  # not 0


@finite
def test_fit_noisily_without_noise_is_the_marginal(template):
    leaf = build(template)
    x = torch.randint(leaf.num_categories, (3, 5000), generator=torch.Generator().manual_seed(0))
    leaf.fit_noisily(x, 0.0, None)
    assert (leaf.mean() - x.to(F64).mean(1, keepdim=True)).abs().max() < 0.1
    leaf.fit_noisily(x, 0.5, torch.Generator().manual_seed(0))
    assert (leaf.mean()[:, 0] != leaf.mean()[:, 1]).all()


def test_refusals():
    for make, message in (
        (lambda: CategoricalLeaf(0), "num_categories: got 0"),
        (lambda: CategoricalLeaf(2, num_units=0), "num_units: got 0"),
        (lambda: BinomialLeaf(0), "n: got 0"),
        (lambda: GaussianLeaf(-1), "min_std: got -1"),
        (lambda: DiscretizedLogisticLeaf(1), "num_bins: got 1"),
        (lambda: CategoricalLeaf(2).inner(CategoricalLeaf(3)), "other: got"),
        (lambda: GaussianLeaf().inner(CategoricalLeaf(3)), "other: got"),
        (lambda: GaussianLeaf().update(torch.zeros(3, 1, 1), torch.zeros(1, 1), 1.0), "number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_bytes_are_values_of_256_categories():
    leaf = CategoricalLeaf(256).resized(1, 2)
    assert not leaf.invalid(torch.tensor([[0, 255]], dtype=torch.uint8)).any()
    assert leaf.invalid(torch.tensor([[255, 256]])).tolist() == [[False, True]]
