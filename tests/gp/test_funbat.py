"""The decompositions against dense Gaussian processes and updates written out entry by entry."""

import copy
import math

import pytest
import torch

from torchzoo.gp import FunBaT, FunctionalCP, StateSpaceGP
from torchzoo.testing.work import CountElements


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def entries(n, modes, seed=0):
    """Scattered entries of a smooth function of rank 1."""
    index = torch.rand(n, modes, generator=seeded(seed), dtype=torch.float64)
    noise = 0.1 * torch.randn(n, generator=seeded(seed + 1), dtype=torch.float64)
    return index, (4 * index).sin().prod(-1) + noise


def fitted(n=60, *, epochs=3, modes=2, ranks=(2, 3), **options):
    index, y = entries(n, modes)
    index[: n // 4, 0] = index[0, 0]  # several entries at one index
    model = FunBaT(modes, ranks, lengthscale=0.4, dtype=torch.float64, **options)
    return model.fit(index, y, num_epochs=epochs, generator=seeded(2))


@pytest.mark.claim(
    45,
    "One mode of rank 1 with a core of 1 and known noise is exact Gaussian process regression, in "
    "mean, variance and evidence, between data and beyond",
    tolerance=1e-8,
)
@pytest.mark.parametrize("kernel", ["matern12", "matern32", "matern52"])
def test_one_mode_is_regression(kernel):
    index, y = entries(50, 1)
    index[3] = index[7]
    options = {"lengthscale": 0.3, "variance": 1.7, "kernel": kernel}
    model = FunctionalCP(1, 1, noise_variance=0.05, damping=1.0, dtype=torch.float64, **options)
    model.fit(index, y, num_epochs=1)
    gp = StateSpaceGP(index[:, 0], y, noise=0.05, parallel=False, **options)
    at = torch.linspace(-1, 2, 31, dtype=torch.float64)
    found, expected = model(at[:, None]), gp(at)
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.variance, expected.variance + 0.05, atol=1e-8, rtol=0)
    torch.testing.assert_close(model.elbo(), gp.log_likelihood(), atol=1e-8, rtol=0)


def by_hand(model, k):
    """A mode's messages, entry by entry, with the unfolded core and full Kronecker products."""
    count, ranks = len(model.ranks), model.ranks
    core = model.core_mean
    unfolded = core.reshape(ranks).movedim(k, 0).reshape(ranks[k], -1)
    second_core = (model.core_cov + torch.outer(core, core)).reshape(*ranks, *ranks)
    second_core = second_core.movedim((k, count + k), (0, count))
    second_core = second_core.reshape(ranks[k], unfolded.shape[1], ranks[k], unfolded.shape[1])
    tau = model.noise_shape / model.noise_rate
    shift, precision = {}, {}
    for index, y in zip(model.index, model.y, strict=True):
        first, second = torch.ones(1).double(), torch.ones(1, 1).double()
        for j in set(range(count)) - {k}:
            mean, cov = model.factors[j].read(index[j, None])
            first = torch.kron(first, mean[0])
            second = torch.kron(second, cov[0] + torch.outer(mean[0], mean[0]))
        key = index[k].item()
        shift[key] = shift.get(key, 0) + tau * y * unfolded @ first
        moved = torch.einsum("apbq,pq->ab", second_core, second)
        precision[key] = precision.get(key, 0) + tau * moved
    order = sorted(shift)
    return torch.stack([shift[i] for i in order]), torch.stack([precision[i] for i in order])


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_messages_are_those_written_out(modes):
    model = fitted(20, modes=modes, ranks=(2, 3, 2)[:modes], epochs=2)
    for k in range(modes):
        for found, expected in zip(model._messages(k), by_hand(model, k), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        for found, chunked in zip(model._messages(k), model._messages(k, 7), strict=True):
            torch.testing.assert_close(found, chunked)


@pytest.mark.claim(
    45,
    "A model of categorical modes alone is variational Bayes for a Tucker decomposition: a step is "
    "the closed-form maximum of the bound, and its fixed point that of updates written out",
    tolerance=1e-6,
)
def test_categorical_modes_are_a_tucker_decomposition():
    index = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0)).double()
    y = ((index[:, 0] - 2) * (index[:, 1] > 1)).double() + 0.1 * (7 * index.sum(-1)).sin()
    types = ["categorical", "categorical"]
    model = FunBaT(2, (2, 2), mode_types=types, damping=1.0, dtype=torch.float64)
    model.fit(index, y, num_epochs=2, generator=seeded(3))
    ours = copy.deepcopy(model)._run(150, None, None)

    U = [
        (model.factors[0].mean.clone(), model.factors[0].cov.clone()),
        (model.factors[1].mean.clone(), model.factors[1].cov.clone()),
    ]
    W, S = model.core_mean.clone(), model.core_cov.clone()
    shape, rate = model.noise_shape.clone(), model.noise_rate.clone()
    places = index.long()

    def second(k, i):
        mean, cov = U[k][0][i], U[k][1][i]
        return cov + torch.outer(mean, mean)

    for _ in range(150):
        tau = shape / rate
        M = (S + torch.outer(W, W)).reshape(2, 2, 2, 2)
        for k in range(2):
            mean, cov = torch.zeros_like(U[k][0]), torch.zeros_like(U[k][1])
            for level in range(len(mean)):
                lam, eta = torch.eye(2).double(), torch.zeros(2).double()
                for (i, j), value in zip(places.tolist(), y, strict=True):
                    if (i, j)[k] != level:
                        continue
                    if k == 0:
                        lam += tau * torch.einsum("abcd,bd->ac", M, second(1, j))
                        eta += tau * value * W.reshape(2, 2) @ U[1][0][j]
                    else:
                        lam += tau * torch.einsum("abcd,ac->bd", M, second(0, i))
                        eta += tau * value * W.reshape(2, 2).T @ U[0][0][i]
                cov[level] = lam.inverse()
                mean[level] = cov[level] @ eta
            U[k] = (mean, cov)
        lam, eta = torch.eye(4).double(), torch.zeros(4).double()
        for (i, j), value in zip(places.tolist(), y, strict=True):
            lam += tau * torch.kron(second(0, i), second(1, j))
            eta += tau * value * torch.kron(U[0][0][i], U[1][0][j])
        S, W = lam.inverse(), lam.inverse() @ eta
        M, error = S + torch.outer(W, W), 0.0
        for (i, j), value in zip(places.tolist(), y, strict=True):
            b = torch.kron(U[0][0][i], U[1][0][j])
            error += value**2 - 2 * value * W @ b
            error += (M * torch.kron(second(0, i), second(1, j))).sum()
        shape, rate = torch.tensor(1e-3 + len(y) / 2).double(), 1e-3 + error / 2
    torch.testing.assert_close(ours.factors[0].mean, U[0][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.factors[1].cov, U[1][1], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.core_mean, W, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.core_cov, S, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.noise_rate, rate, atol=1e-6, rtol=0)
    unseen = ours(torch.tensor([[9.0, 9.0]]).double())
    total = (W @ W + S.trace() + (shape * 0 + rate / (shape - 1))).item()
    assert unseen.mean.item() == 0
    assert unseen.variance.item() == pytest.approx(total)


@pytest.mark.claim(
    45, "Steps without damping never lower the bound, which is below the evidence", tolerance=1e-8
)
@pytest.mark.parametrize("kind", [FunBaT, FunctionalCP])
def test_bound_rises(kind):
    index, y = entries(40, 2)
    index[:, 1] = (4 * index[:, 1]).round()
    types = ["continuous", "categorical"]
    model = kind(2, 2, lengthscale=0.4, mode_types=types, damping=1.0, dtype=torch.float64)
    bounds = []
    model.fit(
        index, y, num_epochs=30, callback=lambda _, m: bounds.append(m.elbo()), generator=seeded(1)
    )
    rises = torch.stack(bounds).diff()
    assert rises.min() > -1e-8
    assert rises.sum() > 1


def test_bound_is_its_definition():
    """E[log joint] + entropy of a small model by sampling from the posterior."""
    index = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double()
    y = torch.tensor([0.3, -0.4, 0.8]).double()
    types = ["categorical"] * 2
    model = FunBaT(2, (1, 2), mode_types=types, noise_variance=0.3, dtype=torch.float64)
    model.fit(index, y, num_epochs=3, generator=seeded(0))
    draws, terms = 200_000, []
    torch.manual_seed(0)
    parts = {}
    for name, mean, cov in (
        ("a", model.factors[0].mean, model.factors[0].cov),
        ("b", model.factors[1].mean, model.factors[1].cov),
        ("w", model.core_mean, model.core_cov),
    ):
        q = torch.distributions.MultivariateNormal(mean, cov)
        parts[name] = q.sample((draws,))
        log_ratio = -(parts[name].square() + math.log(2 * math.pi)).sum(-1) / 2
        log_ratio = log_ratio - q.log_prob(parts[name])
        terms.append(log_ratio if log_ratio.ndim == 1 else log_ratio.sum(-1))
    w = parts["w"].reshape(-1, 1, 2)
    values = torch.stack(
        [
            torch.einsum("nab,na,nb->n", w, parts["a"][:, int(i)], parts["b"][:, int(j)])
            for i, j in index
        ],
        -1,
    )
    terms.append(torch.distributions.Normal(values, math.sqrt(0.3)).log_prob(y).sum(-1))
    total = sum(terms)
    error = total.std() / math.sqrt(draws)
    assert abs(total.mean() - model.elbo()) < 4 * error
    assert error < 0.01


@pytest.mark.claim(
    45, "The order of entries does not matter, and a repeated entry counts twice", tolerance=1e-8
)
def test_order_of_entries():
    index, y = entries(40, 2)
    index[:5] = index[0]
    at, _ = entries(10, 2, seed=5)
    order = torch.randperm(40, generator=seeded(1))
    results = []
    for places in (torch.arange(40), order):
        model = FunBaT(2, 2, lengthscale=0.4, dtype=torch.float64)
        model.fit(index[places], y[places], num_epochs=5, generator=seeded(0))
        results.append(model(at))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)
    twice = model.factors[0].precision.clone()
    model.fit(index.repeat(2, 1), y.repeat(2), num_epochs=0, generator=seeded(0))
    lone = FunBaT(2, 2, lengthscale=0.4, dtype=torch.float64)
    lone.fit(index, y, num_epochs=0, generator=seeded(0))
    torch.testing.assert_close(model._messages(0)[1], 2 * lone._messages(0)[1])
    assert twice.shape == model.factors[0].precision.shape
    single = FunBaT(2, 2, dtype=torch.float64).fit(index[:1], y[:1], num_epochs=3)
    assert torch.linalg.eigvalsh(single.factors[0].cov).min() > 0


@pytest.mark.claim(
    45,
    "Far from a mode's data its factor is the prior, and an entry has mean 0 and the variance "
    "of the prior factor with the core's second moments",
    tolerance=1e-8,
)
def test_far_away():
    model = fitted(variance=(1.7, 1.0), epochs=5)
    mean, variance = model.factor(0, torch.tensor([-90.0, 90.0]).double())
    torch.testing.assert_close(mean, torch.zeros(2, 2).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(variance, torch.full((2, 2), 1.7).double())
    found = model(torch.tensor([[90.0, 0.4]]).double())
    at_mean, at_cov = model.factors[1].read(torch.tensor([0.4]).double())
    second = at_cov[0] + torch.outer(at_mean[0], at_mean[0])
    core = model.core_mean
    products = (model.core_cov + torch.outer(core, core)).reshape(2, 3, 2, 3)
    expected = 1.7 * torch.einsum("abac,bc->", products, second)
    noise = model.noise_rate / (model.noise_shape - 1)
    assert abs(found.mean.item()) < 1e-8
    assert found.variance.item() == pytest.approx((expected + noise).item(), rel=1e-8)


@pytest.mark.claim(
    45,
    "Covariances stay positive definite for 100 epochs on data of noise, at ranks above the true "
    "one",
    tolerance=None,
)
def test_covariances_stay_positive():
    index = torch.rand(60, 2, generator=seeded(0), dtype=torch.float64)
    y = torch.randn(60, generator=seeded(1), dtype=torch.float64)
    least = []

    def look(_, model):
        covs = (model.factors[0].cov, model.factors[1].cov, model.core_cov)
        least.append(min(torch.linalg.eigvalsh(cov).min().item() for cov in covs))

    FunBaT(2, 4, lengthscale=0.2, dtype=torch.float64).fit(
        index, y, num_epochs=100, callback=look, generator=seeded(2)
    )
    assert min(least) > 0


@pytest.mark.claim(
    45,
    "At convergence every message is its formula at the present moments, with damping",
    tolerance=1e-6,
)
def test_fixed_point():
    model = fitted(30, ranks=(1, 2), epochs=280, damping=0.8)
    for k in range(2):
        for name, found in zip(("shift", "precision"), model._messages(k), strict=True):
            stored = getattr(model.factors[k], name)
            assert (found - stored).abs().max() < 1e-6 * stored.abs().max()
    for name, found in zip(("shift", "precision"), model._core_messages(), strict=True):
        stored = getattr(model, f"core_{name}")
        assert (found - stored).abs().max() < 1e-6 * stored.abs().max()


def test_weak_starts_do_not_collapse():
    """From any start a few entries of rank 1 are explained, where a noise estimate would win."""
    index, y = entries(35, 2)
    for seed in range(2):
        model = FunBaT(2, 1, lengthscale=0.4, dtype=torch.float64)
        model.fit(index, y, num_epochs=50, generator=seeded(seed))
        assert (model(index).mean - y).norm() < 0.5 * y.norm()


def test_damping_mixes_natural_parameters():
    model = fitted(epochs=1, damping=0.3)
    old, new = model.factors[0].shift.clone(), model._messages(0)[0]
    model._run(1, None, None)
    torch.testing.assert_close(model.factors[0].shift, 0.7 * old + 0.3 * new)


def test_batch_is_a_loop():
    """Masked entries of a batch are as if they weren't there."""
    index, y = entries(30, 2)
    ys = torch.stack([y, -y.flip(0)])
    mask = torch.rand(2, 30, generator=seeded(3)) < 0.7
    model = FunBaT(2, 2, lengthscale=0.4, batch_shape=(2,), dtype=torch.float64)
    model.fit(index, ys, mask=mask, num_epochs=0, generator=seeded(0))
    at, _ = entries(7, 2, seed=5)
    for i in range(2):
        one = FunBaT(2, 2, lengthscale=0.4, dtype=torch.float64)
        one.fit(index, ys[i], mask=mask[i], num_epochs=0)
        start = dict(model.named_buffers())
        for name, buffer in one.named_buffers():
            if not name.endswith(("index", "knots", "lengthscale", "variance")):
                buffer.copy_(start[name][i])
        one._run(4, None, None)
        alone = one(at)
        whole = copy.deepcopy(model)._run(4, None, None)
        torch.testing.assert_close(whole(at).mean[i], alone.mean)
        torch.testing.assert_close(whole(at).variance[i], alone.variance)
        torch.testing.assert_close(whole.elbo()[i], one.elbo())


def test_update_goes_on_from_the_posterior():
    """New entries say nothing until an epoch has run; then all count."""
    index, y = entries(50, 2)
    options = {"lengthscale": 0.4, "dtype": torch.float64}
    whole = FunBaT(2, 1, **options).fit(index, y, num_epochs=60, generator=seeded(0))
    part = FunBaT(2, 1, **options).fit(index[:35], y[:35], num_epochs=30, generator=seeded(0))
    at, _ = entries(7, 2, seed=5)
    before = part(at)
    part.update(index[35:], y[35:], num_epochs=0)
    for one, other in zip(part(at), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)
    part.update(index[:1], y[:1], mask=torch.zeros(1, dtype=torch.bool), num_epochs=50)
    assert (before.mean - whole(at).mean).abs().max() > 0.02
    assert (part(at).mean - whole(at).mean).abs().max() < 0.01


def test_state_dict_carries_the_posterior():
    model = fitted()
    other = FunBaT(2, (2, 3), lengthscale=0.4, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    at, _ = entries(7, 2, seed=5)
    torch.testing.assert_close(other(at), model(at), rtol=0, atol=0)
    index, y = entries(5, 2, seed=8)
    torch.testing.assert_close(other.update(index, y)(at), model.update(index, y)(at))


def test_length_is_a_fifth_of_the_range():
    index, y = entries(20, 2)
    model = FunBaT(2, 1, dtype=torch.float64).fit(index * 3, y, num_epochs=1)
    lengths = torch.stack([factor.lengthscale for factor in model.factors])
    torch.testing.assert_close(lengths, 3 * (index.amax(0) - index.amin(0)) / 5)


@pytest.mark.claim(45, "Work is linear in the entries: slope of 1.0 ± 0.1 in logarithms", 0.1)
def test_work_is_linear():
    sizes, touched = (250, 4000), []
    for n in sizes:
        index, y = entries(n, 2)
        model = FunBaT(2, 2, lengthscale=0.2).fit(index, y, num_epochs=1)
        with CountElements() as work:
            model._run(1, None, None)
        touched.append(work.elements)
    slope = math.log(touched[1] / touched[0]) / math.log(sizes[1] / sizes[0])
    assert slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("index: ", lambda m: m.fit(torch.ones(3, 3), torch.ones(3))),
        ("index: ", lambda m: m.fit(torch.full((3, 2), math.inf), torch.ones(3))),
        ("index: ", lambda m: m.update(torch.ones(3, 2), torch.ones(3))),
        ("y: ", lambda m: m.fit(torch.ones(3, 2), torch.ones(2))),
        ("y: .*finite", lambda m: m.fit(torch.ones(3, 2), torch.full((3,), math.nan))),
        ("mask: ", lambda m: m.fit(torch.ones(3, 2), torch.ones(3), mask=torch.ones(3))),
        ("mode: ", lambda m: m.factor(2, torch.ones(3))),
        ("t: ", lambda m: m.factor(0, torch.ones(3, 1))),
        ("ranks: ", lambda _: FunBaT(2, 0)),
        ("ranks: ", lambda _: FunctionalCP(2, (1, 2))),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(FunBaT(2, 1))
