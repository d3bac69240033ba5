"""Normal-plus-low-rank kernels against dense recurrences in the original HiPPO coordinates."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from torchzoo.ssm import DPLRKernel, fft_conv, hippo_dplr, hippo_matrix, hippo_project
from torchzoo.ssm.dplr import RANKS, SMALLEST_DECAY

inits = pytest.mark.parametrize("init", RANKS)


def double(d_model, d_state, **options):
    return DPLRKernel(d_model, d_state, dtype=torch.float64, **options)


def original(kernel, feature, measure):
    """A, B and C `(C, N)` of a feature in the coordinates of `hippo_matrix`, as NumPy arrays."""
    N = kernel.d_state
    A, B = (value.numpy() for value in hippo_matrix(measure, N))
    if measure != "legs":
        A = A - SMALLEST_DECAY * np.eye(N)  # where eigenvalues of real part 0 start
    V = hippo_dplr(measure, N).V.numpy()
    C = torch.view_as_complex(kernel.C.detach())[:, feature].numpy()
    return A, B, 2 * (C @ V.conj().T).real


def dense_kernel(A, B, C, dt, L):
    """The taps C Abar^l Bbar `(C, L)`, one by one."""
    eye = np.eye(len(B))
    Abar = np.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    x, taps = np.linalg.solve(eye - dt / 2 * A, dt * B), []
    for _ in range(L):
        taps.append(C @ x)
        x = Abar @ x
    return np.stack(taps, -1)


@pytest.mark.claim(62, "V (Lambda - P P^*) V^* is the HiPPO matrix, with unitary V", tolerance=1e-9)
@inits
@pytest.mark.parametrize("N", [2, 4, 16, 64])
def test_normal_plus_low_rank(init, N):
    system = hippo_dplr(init, N)
    A, B = hippo_matrix(init, N)
    both = [torch.cat([value, value.conj()], -1) for value in system[:3]]
    eigenvalues, P, b = both
    V = torch.cat([system.V, system.V.conj()], -1)
    inner = torch.diag(eigenvalues) - sum(torch.outer(p, p.conj()) for p in P)
    torch.testing.assert_close(V @ inner @ V.mH, A.to(V), rtol=0, atol=1e-9)
    torch.testing.assert_close(V @ b, B.to(V), rtol=0, atol=1e-9)
    torch.testing.assert_close(V.mH @ V, torch.eye(N).to(V), rtol=0, atol=1e-12)
    assert len(system.P) == RANKS[init]
    assert (system.eigenvalues.real == (-0.5 if init == "legs" else 0)).all()
    assert (system.eigenvalues.imag >= 0).all()


def test_low_rank_vectors():
    """P in the original coordinates, by their formulas."""
    n = np.arange(8)
    even = n % 2 == 0
    root = np.sqrt(2 * n + 1)
    expected = {
        "legs": [np.sqrt(n + 0.5)],
        "legt": [root * even, root * ~even],
        "lagt": [np.full(8, math.sqrt(0.5))],
        "fout": [
            np.array([1, 0, math.sqrt(2), 0, math.sqrt(2), 0, math.sqrt(2), 0]) * math.sqrt(2)
        ],
    }
    for init, vectors in expected.items():
        system = hippo_dplr(init, 8)
        found = 2 * (system.V @ system.P.mT).real.mT
        np.testing.assert_allclose(found.numpy(), np.stack(vectors), atol=1e-12)


@pytest.mark.claim(
    62,
    "Eigenvectors of LegS itself are useless: their condition number is above 1e10 at N = 16",
    tolerance=None,
)
def test_direct_diagonalisation_is_hopeless():
    vectors = np.linalg.eig(hippo_matrix("legs", 16)[0].numpy())[1]
    assert np.linalg.cond(vectors) > 1e10


@pytest.mark.claim(
    62,
    "The kernel from Cauchy sums is C Abar^l Bbar of the HiPPO matrices in their own coordinates",
    tolerance=1e-9,
)
@inits
@pytest.mark.parametrize(("N", "L"), [(2, 1), (4, 2), (8, 7), (16, 64), (16, 63)])
def test_kernel_is_dense(init, N, L):
    kernel = double(3, N, init=init, channels=2)
    taps = kernel(L)
    assert taps.shape == (2, 3, L)
    for feature, log_dt in enumerate(kernel.log_dt.tolist()):
        system = original(kernel, feature, init)
        expected = dense_kernel(*system, math.exp(log_dt), L)
        np.testing.assert_allclose(
            taps[:, feature].detach().numpy(), expected, atol=1e-9 * np.abs(expected).max()
        )


@pytest.mark.claim(
    62,
    "In float32 the kernel is that of float64 to rounding, with long and short memories",
    tolerance=1e-5,
)
@inits
def test_single_precision(init):
    kernel = DPLRKernel(4, 64, init=init, dt_min=1e-4, dt_max=1e-1)
    taps = kernel(2000)
    assert taps.dtype == torch.float32
    exact = kernel.double()(2000)
    assert ((taps - exact).abs().amax(-1) / exact.abs().amax(-1)).max() < 1e-5


@pytest.mark.claim(
    62,
    "Convolution, recurrence and jump to the last state agree, from any state, at any rate",
    tolerance=1e-8,
)
@pytest.mark.parametrize("init", [*RANKS, "legs+fout"])
@pytest.mark.parametrize("L", [1, 2, 37])
def test_convolution_is_recurrence(init, L):
    kernel = double(3, 8, init=init, channels=2)
    u = torch.randn(2, L, 3, dtype=torch.float64)
    start = torch.randn_like(kernel.initial_state(2))
    kernel.setup_step(rate=1.7)
    state, outputs = start, []
    for t in range(L):
        y, state = kernel.step(u[:, t], state)
        outputs.append(y)
    convolved = fft_conv(u.mT[:, None], kernel(L, 1.7)) + kernel.response(start, L, 1.7)
    torch.testing.assert_close(convolved, torch.stack(outputs, -1), rtol=0, atol=1e-8)
    torch.testing.assert_close(kernel.advance(u, start, rate=1.7), state, rtol=0, atol=1e-10)


def test_rate_is_a_factor_of_the_time_step():
    kernel = double(2, 8, init="fout")
    with torch.no_grad():
        fast = kernel(30, 2.0)
        once = kernel(30)
        kernel.log_dt.add_(math.log(2))
        torch.testing.assert_close(kernel(30), fast, rtol=0, atol=1e-10)
    assert (fast - once).abs().max() > 1e-3


def test_last_state_of_padded_sequences():
    kernel = double(2, 6, init="legt")
    u = torch.randn(4, 9, 2, dtype=torch.float64)
    start = torch.randn_like(kernel.initial_state(4))
    lengths = torch.tensor([0, 3, 8, 9])
    after = kernel.advance(u, start, lengths)
    rested = kernel.advance(u, None, lengths)
    for row, length in enumerate(lengths.tolist()):
        state, rest = start[row], torch.zeros_like(start[row])
        for t in range(length):
            state = kernel.step(u[row, t], state)[1]
            rest = kernel.step(u[row, t], rest)[1]
        torch.testing.assert_close(after[row], state, rtol=0, atol=1e-10)
        torch.testing.assert_close(rested[row], rest, rtol=0, atol=1e-10)


@pytest.mark.claim(
    62, "The state of the layer is the projection of the input onto the basis", tolerance=1e-9
)
def test_state_is_the_projection():
    kernel = double(2, 16, init="legs")
    u = torch.randn(1, 300, 2, dtype=torch.float64)
    z = kernel.advance(u, None)[0]
    V = hippo_dplr("legs", 16).V
    for feature, dt in enumerate(kernel.log_dt.exp().tolist()):
        x = hippo_project(u[0, :, feature], "legs", 16, dt)[-1]
        torch.testing.assert_close(2 * (V @ z[feature]).real, x, rtol=0, atol=1e-9)


@pytest.mark.claim(
    62,
    "C of unit variance gives an output whose mean square is the sum of squared coefficients",
    tolerance=0.05,
)
def test_normalisation():
    torch.manual_seed(0)
    kernel = double(1, 16, init="legs", channels=20_000, dt_min=0.01, dt_max=0.0101)
    u = torch.randn(1, 500, 1, dtype=torch.float64)
    state = kernel.advance(u, None)
    x = 2 * (hippo_dplr("legs", 16).V @ state[0, 0]).real
    y = 2 * (torch.view_as_complex(kernel.C) @ state[0, 0][:, None]).real
    assert y.square().mean().item() == pytest.approx(x.square().sum().item(), rel=0.05)


@pytest.mark.claim(
    62,
    "Every transition matrix is a contraction towards rest, and training can't change that",
    tolerance=0.0,
)
@inits
def test_stable(init):
    kernel = double(2, 16, init=init, dt_min=1e-3, dt_max=1.0)
    with torch.no_grad():
        kernel.P.normal_()
        kernel.A_imag.mul_(3)
    Abar, _, _ = kernel.dense()
    assert torch.linalg.matrix_norm(Abar, 2).max() < 1
    assert np.abs(np.linalg.eigvals(Abar.detach().numpy())).max() < 1


def test_initial_values():
    torch.manual_seed(0)
    kernel = double(2000, 4, init="legs+fout", dt_min=1e-3, dt_max=1e-1)
    legs, fout = hippo_dplr("legs", 4), hippo_dplr("fout", 4)
    for rows, system in ((slice(1000), legs), (slice(1000, None), fout)):
        for value, expected in (
            (kernel.A_imag[rows], system.eigenvalues.imag),
            (torch.view_as_complex(kernel.P.detach())[0, rows], system.P[0]),
            (torch.view_as_complex(kernel.B.detach())[rows], system.B),
        ):
            torch.testing.assert_close(value, expected.expand_as(value))
    decay = kernel.log_A_real.exp()
    assert decay[:1000].unique().item() == pytest.approx(0.5)
    assert decay[1000:].unique().item() == pytest.approx(1e-4)
    assert kernel.C.var().item() == pytest.approx(0.5, rel=0.05)
    inside = (kernel.log_dt.detach().numpy() - math.log(1e-3)) / math.log(100)
    assert kstest(inside, "uniform").pvalue > 0.01
    odd = double(3, 4, init="fout+legs").log_A_real[:, 0].exp().tolist()
    assert odd == pytest.approx([1e-4, 1e-4, 0.5])


def test_rank():
    assert [double(2, 4, init=init).rank for init in ("legs", "legt", "fout", "legs+legt")] == [
        1,
        2,
        1,
        2,
    ]
    narrow, wide = double(2, 4), double(2, 4, rank=3)
    assert wide.P.shape == (3, 2, 2, 2)
    assert not wide.P[1:].any()
    with torch.no_grad():
        wide.C.copy_(narrow.C)
        wide.log_dt.copy_(narrow.log_dt)
    torch.testing.assert_close(wide(20), narrow(20))


def test_gradients_of_every_parameter():
    kernel = double(1, 4, init="legt", dt_min=0.1, dt_max=0.5)
    names, values = zip(*kernel.named_parameters(), strict=True)
    assert {*names} == {"log_dt", "log_A_real", "A_imag", "P", "B", "C"}
    state = torch.randn(1, 1, 2, dtype=torch.complex128)
    u = torch.randn(1, 5, 1, dtype=torch.float64)

    def function(*values):
        named = dict(zip(names, values, strict=True))
        outputs = []
        for method, args in (("forward", (5,)), ("response", (state, 4)), ("advance", (u, state))):
            outputs.append(
                torch.func.functional_call(
                    Call(kernel, method), {f"kernel.{k}": v for k, v in named.items()}, args
                )
            )
        return tuple(torch.view_as_real(y) if y.is_complex() else y for y in outputs)

    assert torch.autograd.gradcheck(
        function, tuple(v.detach().clone().requires_grad_() for v in values)
    )


class Call(torch.nn.Module):
    """A method of a kernel as a module, for `functional_call`."""

    def __init__(self, kernel, method):
        super().__init__()
        self.kernel, self.method = kernel, method

    def forward(self, *args):
        return getattr(self.kernel, self.method)(*args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo_dplr("lmu", 4), "measure: .*got 'lmu'"),
        (lambda: hippo_dplr("legs", 5), "d_state must be even: got 5"),
        (lambda: DPLRKernel(2, 4, init="legs+lmu"), "init: .*got 'legs.lmu'"),
        (lambda: DPLRKernel(2, 4, init=3), "init: .*got 3"),
        (lambda: DPLRKernel(2, 4, init="legt", rank=1), "rank: .*2.*got 1"),
        (lambda: DPLRKernel(2, 4, disc="zoh"), "disc: .*got 'zoh'"),
        (lambda: DPLRKernel(2, 4, channels=0), "channels: "),
        (lambda: DPLRKernel(2, 4)(0), "L: .*got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
