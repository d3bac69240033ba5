"""The Slepian process against simulation, series and closed forms."""

import gpytorch
import pytest
import torch

from torchzoo.experiments.gp.slepian import PROCESSES, diffusion, gauss, matern52, oscillating
from torchzoo.gp import SlepianProcess, as_stationary, excursion_times, simulate_stationary
from torchzoo.testing import assert_within_se


def matern32(t):
    return (1 + t) * torch.exp(-t)


MONOTONE = PROCESSES | {"diffusion, d=4": diffusion(4), "matern-3/2": matern32}
MOMENT = {  # -r''(0), by hand
    "diffusion, d=1": 1 / 8,
    "diffusion, d=2": 1 / 4,
    "diffusion, d=3": 3 / 8,
    "diffusion, d=4": 1 / 2,
    "acceleration": 3 / 4,
    "gauss": 1.0,
    "matern-5/2": 1 / 3,
    "matern-3/2": 1.0,
}


@pytest.mark.parametrize("name", MONOTONE)
def test_second_spectral_moment(name):
    moment = SlepianProcess(MONOTONE[name]).spectral_moment
    torch.testing.assert_close(moment.item(), MOMENT[name], rtol=1e-12, atol=0)


@pytest.mark.claim(
    151, "The expected sign after an up-crossing is that of simulated Slepian paths", tolerance=4
)
@pytest.mark.parametrize("name", ["diffusion, d=2", "gauss", "matern-5/2"])
def test_expected_sign_of_paths(name):
    process = SlepianProcess(MONOTONE[name])
    t = torch.tensor([0.0, 0.01, 0.3, 1.0, 2.5, 6.0], dtype=torch.float64)
    paths = process.sample(t, 200_000, generator=torch.Generator().manual_seed(1))
    expected = process.expected_clipped(t)
    assert expected[0] == 1
    assert (expected.diff() < 0).all()
    # paths start at zero to within the root of rounding: at 0.01 that is 1e-5 of their height
    assert_within_se(paths[:, 1:].sign(), expected[1:])


def test_slepian_paths_are_the_process_after_its_up_crossings():
    """Paths of the process itself, cut where they cross zero upwards."""
    generator = torch.Generator().manual_seed(2)
    dt, after = 0.01, 150
    x = simulate_stationary(gauss, 400.0, 40_001, num_paths=60, generator=generator)
    path, at = ((x[:, :-1] < 0) & (x[:, 1:] >= 0)).nonzero(as_tuple=True)
    kept = at + after + 1 < x.shape[1]
    path, at = path[kept], at[kept]
    late = x[path, at] / (x[path, at] - x[path, at + 1])  # the crossing, in steps after `at`
    seen = torch.lerp(x[path, at + after], x[path, at + after + 1], late)
    t = torch.tensor([after * dt], dtype=torch.float64)
    drawn = SlepianProcess(gauss).sample(t, len(seen), generator=generator)[:, 0]
    places = torch.linspace(-2, 3, 11, dtype=torch.float64)
    both = torch.stack([(sample[:, None] < places).double().mean(0) for sample in (seen, drawn)])
    assert len(seen) > 3500
    assert (both[0] - both[1]).abs().max() < 4 * (0.5 / len(seen)) ** 0.5


@pytest.mark.claim(
    151,
    "The Gaussian part of the Slepian process has a positive semi-definite covariance that is 0, "
    "with its slope, at the crossing",
    tolerance=1e-10,
)
@pytest.mark.parametrize("name", MONOTONE)
def test_covariance_of_the_gaussian_part(name):
    process = SlepianProcess(MONOTONE[name])
    t = torch.linspace(0, 8, 60, dtype=torch.float64)
    covariance = process.covariance(t)
    torch.testing.assert_close(covariance, covariance.mT)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-10
    assert covariance[0].abs().max() < 1e-12
    h = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    step = process.covariance(h)[1, 1]  # the variance of h D'(0) + O(h^2)
    rough = name in ("matern-3/2", "acceleration")  # r has a term in t³, so D² is of that order
    assert step / h[1] ** 2 < (1e-3 if rough else 1e-6)


def test_moments_given_the_slope():
    """Mean and covariance are those of X(t) given X(0) = 0 and X'(0) = R sqrt(lam2)."""
    t = torch.tensor([0.4, 1.7], dtype=torch.float64)
    for cov, moment in ((gauss, 1.0), (matern52, 1 / 3)):
        known = as_stationary(cov)
        r, dr = known.r(t), known.dr(t)
        joint = torch.zeros(4, 4, dtype=torch.float64)  # X(0), X'(0), X(t1), X(t2)
        joint[0, 0], joint[1, 1] = 1, moment
        joint[0, 2:], joint[1, 2:] = r, -dr
        joint[2:, 2:] = known.r((t[:, None] - t).abs())
        joint = joint + joint.triu(1).mT - joint.tril(-1) * (joint.triu(1).mT != 0)
        joint = (joint + joint.mT) / 2
        gain = torch.linalg.solve(joint[:2, :2], joint[:2, 2:])
        expected = joint[2:, 2:] - joint[2:, :2] @ gain
        process = SlepianProcess(cov)
        torch.testing.assert_close(process.covariance(t), expected)
        slope = 1.3 * moment**0.5
        torch.testing.assert_close(process.mean(t, 1.3), slope * gain[1])


@pytest.mark.claim(
    151, "The expected sign near the crossing is free of cancellation", tolerance=1e-6
)
@pytest.mark.parametrize(("cov", "first"), [(gauss, (1 / 8, 2)), (diffusion(2), (1 / 8, 2))])
def test_no_cancellation_near_the_crossing(cov, first):
    # gauss: E = t exp(-t²/2) / sqrt(1 - exp(-t²)) = 1 - t²/4 + O(t⁴); sech(t/2) is exact below
    t = torch.tensor([1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.4], dtype=torch.float64)
    got = SlepianProcess(cov).expected_clipped(t)
    if cov is gauss:
        exact = t * torch.exp(-(t**2) / 2) / (-torch.expm1(-(t**2))).sqrt()
    else:  # r' = -r tanh(t/2) / 2 and 1 - r² = tanh²(t/2)
        exact = 1 / torch.cosh(t / 2)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=0)


def test_gpytorch_kernels_are_their_own_functions():
    t = torch.linspace(0, 5, 21, dtype=torch.float64)
    kernels = [gpytorch.kernels.MaternKernel(nu=nu) for nu in (1.5, 2.5)]
    kernels += [gpytorch.kernels.RBFKernel(), gpytorch.kernels.RQKernel()]
    for kernel in kernels:
        kernel = kernel.double()
        kernel.lengthscale = 1.7
        if isinstance(kernel, gpytorch.kernels.RQKernel):
            kernel.alpha = 2.5
        expected = kernel(t[:, None], t[:1, None]).to_dense()[:, 0]
        torch.testing.assert_close(as_stationary(kernel).r(t), expected, rtol=1e-7, atol=1e-7)


def test_an_object_with_derivatives_is_taken_as_it_is():
    class Given:
        d2r0 = torch.tensor(-1.0, dtype=torch.float64)

        def r(self, t):
            return gauss(t)

        def dr(self, t):
            return -t * gauss(t)

    t = torch.linspace(0, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(
        SlepianProcess(Given()).expected_clipped(t), SlepianProcess(gauss).expected_clipped(t)
    )
    assert not SlepianProcess(gauss).expected_clipped(t).requires_grad


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        (lambda t: 2 * gauss(t), "r\\(0\\) = 1, got 2"),
        (lambda t: torch.exp(-t), "r'\\(0\\) = -1"),
        (lambda t: torch.cos(t) - 0.01 * torch.sin(t), "r'\\(0\\) = -0.01"),
        (gpytorch.kernels.MaternKernel(nu=0.5), "r'\\(0\\)"),
        (gpytorch.kernels.PeriodicKernel(), "PeriodicKernel"),
        (gpytorch.kernels.RBFKernel(ard_num_dims=2), "one lengthscale"),
        (lambda t: torch.ones_like(t), "r''\\(0\\)"),
        (lambda t: torch.exp(-(t**1.5)), "r''\\(0\\)"),
        ("rbf", "cov: expected a function of the lag"),
    ],
)
def test_bad_covariances_are_refused(cov, message):
    with pytest.raises(ValueError, match=message):
        SlepianProcess(cov)


def test_bad_times_are_refused():
    for t in (torch.tensor([-1.0, 0.0]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="t: expected a vector"):
            SlepianProcess(gauss).sample(t, 3)


def test_simulated_paths_have_the_covariance():
    generator = torch.Generator().manual_seed(3)
    for cov in (matern52, oscillating, diffusion(1)):  # the last one's circle is made longer
        x = simulate_stationary(cov, 6.0, 25, num_paths=20_001, generator=generator)
        lags = torch.tensor([0, 1, 4, 12, 24])
        expected = cov(0.25 * lags.double())
        assert_within_se(x[:, [0]] * x[:, lags], expected)
        assert_within_se(x[:10_000, 0] * x[10_001:, 0], 0.0)  # real and imaginary parts


def test_simulation_refuses_what_it_cannot_embed():
    with pytest.raises(ValueError, match="negative eigenvalues"):
        simulate_stationary(lambda t: torch.cos(t) + 0 * t, 10.0, 50)
    with pytest.raises(ValueError, match=r"share 0\.0\d+"):
        simulate_stationary(gauss, 0.02, 10)
    for bad in ((0.0, 10), (1.0, 1)):
        with pytest.raises(ValueError, match="duration, num_points"):
            simulate_stationary(gauss, *bad)


def test_excursions_of_a_sine():
    t = torch.arange(0, 40, 0.01, dtype=torch.float64)
    lengths = excursion_times(torch.stack([torch.sin(t + 0.3), 2 * torch.sin(2 * t)]), 0.01)
    for found, expected, count in zip(lengths, (torch.pi, torch.pi / 2), (11, 23), strict=True):
        assert len(found) == count or len(found) == count + 1
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-5, atol=0)
    assert [len(x) for x in excursion_times(torch.ones(2, 5), 1.0)] == [0, 0]
    with pytest.raises(ValueError, match="paths, dt"):
        excursion_times(torch.ones(5), 0.0)
