"""Filters and smoothers against the dense joint normal distribution."""

import math

import pytest
import torch

from torchzoo.common.filters import information_filter, kalman_filter, rts_smoother


def model(batch=(2,), T=7, n=3, k=2, seed=0):
    """A random model with matrices of each time, and observations with missing rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def positive(*shape):
        root = normal(*shape, shape[-1])
        return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)

    y = normal(*batch, T, k)
    y[0, 2] = math.nan
    y[1, 0, 1] = math.nan
    y[1, 4:6] = math.nan
    return {
        "y": y,
        "A": 0.7 * normal(*batch, T, n, n),
        "G": positive(*batch, T, n),
        "C": normal(k, n),
        "S": positive(*batch, T, k),
        "mu0": normal(*batch, n),
        "P0": positive(*batch, n),
    }


def joint(A, G, mu0, P0):
    """Mean `(T n,)` and covariance of all states of one series."""
    mean, cov = [mu0], [[P0]]
    for t in range(1, len(A)):
        mean.append(A[t] @ mean[-1])
        row = [A[t] @ block for block in cov[-1]]
        own = A[t] @ cov[-1][-1] @ A[t].mT + G[t]
        for s in range(t):
            cov[s].append(row[s].mT)
        cov.append([*row, own])
    return torch.cat(mean), torch.cat([torch.cat(row, 1) for row in cov])


def conditioned(m, b, upto):
    """Moments `(T, n)`, `(T, n, n)` and log density of series b given rows up to a time."""
    mean, cov = joint(m["A"][b], m["G"][b], m["mu0"][b], m["P0"][b])
    T, n = m["A"].shape[1], m["A"].shape[-1]
    rows = [t for t in range(upto) if not m["y"][b, t].isnan().any()]
    H = torch.zeros(0, T * n, dtype=torch.float64)
    for t in rows:
        one = torch.zeros(len(m["C"]), T * n, dtype=torch.float64)
        one[:, t * n : (t + 1) * n] = m["C"]
        H = torch.cat([H, one])
    y = m["y"][b, rows].flatten()
    noise = torch.block_diag(*m["S"][b, rows]) if rows else torch.zeros(0, 0).double()
    total = H @ cov @ H.mT + noise
    gain = torch.linalg.solve(total, H @ cov).mT
    log_prob = torch.distributions.MultivariateNormal(H @ mean, total).log_prob(y)
    after = cov - gain @ H @ cov
    blocks = torch.stack([after[t * n : (t + 1) * n, t * n : (t + 1) * n] for t in range(T)])
    return (mean + gain @ (y - H @ mean)).unflatten(0, (T, n)), blocks, log_prob


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_dense(parallel, T):
    m = model(T=7)
    m = {name: value[:, :T] if name in "yAGS" else value for name, value in m.items()}
    mean, cov, log_likelihood = kalman_filter(**m, parallel=parallel)
    smoothed = rts_smoother(mean, cov, m["A"], m["G"], parallel=parallel)
    for b in range(2):
        for t in range(T):
            if t == 0 and m["y"][b, 0].isnan().any():
                torch.testing.assert_close(mean[b, 0], m["mu0"][b])
                torch.testing.assert_close(cov[b, 0], m["P0"][b])
                continue
            means, covs, log_prob = conditioned(m, b, t + 1)
            torch.testing.assert_close(mean[b, t], means[t], rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(cov[b, t], covs[t], rtol=1e-8, atol=1e-10)
        if not m["y"][b].isnan().any(-1).all():
            torch.testing.assert_close(log_likelihood[b], log_prob, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(smoothed.mean[b], means, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(smoothed.cov[b], covs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("parallel", [False, True])
def test_factors_of_low_rank(parallel):
    """A factor of one direction of f is an observation of it."""
    m = model()
    direction = torch.tensor([0.6, -1.2], dtype=torch.float64)
    y = torch.arange(14.0).double().reshape(2, 7, 1).sin()
    one = kalman_filter(
        y, m["A"], m["G"], (direction @ m["C"])[None], torch.eye(1).double(), m["mu0"], m["P0"]
    )
    found = information_filter(
        y * direction,
        torch.outer(direction, direction).expand(2, 7, 2, 2),
        m["A"],
        m["G"],
        m["C"],
        m["mu0"],
        m["P0"],
        parallel=parallel,
    )
    torch.testing.assert_close(found.mean, one.mean)
    torch.testing.assert_close(found.cov, one.cov)
    constant = (y**2 / 2 + math.log(2 * math.pi) / 2).sum((-1, -2))
    torch.testing.assert_close(found.log_likelihood - constant, one.log_likelihood)


@pytest.mark.parametrize("parallel", [False, True])
def test_constant_matrices_and_gradients(parallel):
    m = model(T=4)
    m |= {name: m[name][0, 1] for name in ("A", "G", "S")}
    full = {name: m[name].expand(2, 4, *m[name].shape) for name in ("A", "G", "S")}
    for one, other in zip(
        kalman_filter(**m, parallel=parallel),
        kalman_filter(**{**m, **full}, parallel=parallel),
        strict=True,
    ):
        torch.testing.assert_close(one, other)

    def function(A, P0, C):
        mean, cov, log_likelihood = kalman_filter(
            **{**m, "A": A, "P0": P0 @ P0.mT, "C": C}, parallel=parallel
        )
        return log_likelihood, *rts_smoother(mean, cov, A, m["G"], parallel=parallel)

    leaves = [m[name].clone().requires_grad_() for name in ("A", "P0", "C")]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A", torch.ones(2, 2)),
        ("A", torch.ones(2, 5, 3, 3)),
        ("G", torch.ones(2, 2)),
        ("C", torch.ones(2, 4)),
        ("S", torch.ones(3, 3)),
        ("y", torch.ones(0, 2)),
    ],
)
def test_errors(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        kalman_filter(**{**model(), name: value.double()})
