"""Perturb, then diagonalise, against NumPy, closed forms and simulation."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.signal import cont2discrete

from torchzoo.ssm import (
    S4D,
    S4PTD,
    hippo_basis,
    hippo_matrix,
    legs_normal_part,
    perturb_then_diagonalize,
    ptd_init,
    transfer_function,
    transfer_gap,
)
from torchzoo.ssm.ptd import ptd_system

PAPER = 132
DOUBLE, COMPLEX = torch.float64, torch.complex128

both_ways = pytest.mark.parametrize("method", ["random", "optimize"])


def legs(n):
    return hippo_matrix("legs", n)


def readout(n, seed=0):
    """A real C of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, generator=generator, dtype=DOUBLE), dim=0)


def ptd_triple(n, C, **options):
    """The diagonal system of a perturbed HiPPO-LegS, and what was found."""
    A, B = legs(n)
    found = perturb_then_diagonalize(A, **options)
    V = found.V
    return (found.eigenvalues, torch.linalg.solve(V, B.to(V)), C.to(V) @ V), found


def s4d_triple(n, C):
    """The diagonal system that drops the low-rank part, all eigenvalues."""
    half, V = legs_normal_part(n)
    V = torch.cat([V, V.conj()], 1)
    return torch.cat([half, half.conj()]), V.mH @ legs(n)[1].to(V) / 2, C.to(V) @ V


def axis(n):
    """Frequencies, with all eigenfrequencies of the normal part."""
    grid = torch.logspace(-2, 5, 400, dtype=DOUBLE)
    return torch.cat([torch.zeros(1, dtype=DOUBLE), grid, legs_normal_part(n)[0].imag])


# The diagonalisation


@pytest.mark.claim(
    PAPER, "V diag(eigenvalues) V^-1 is A + E, with E within its bound", tolerance=1e-9
)
@both_ways
@pytest.mark.parametrize("n", [4, 16, 48])
@pytest.mark.parametrize("eps", [0.1, 0.7])
def test_backward_stable(method, n, eps):
    A, _ = legs(n)
    found = perturb_then_diagonalize(A, eps=eps, method=method, steps=30)
    V, E = found.V.numpy(), found.E.numpy()
    perturbed = A.numpy() + E
    again = V @ np.diag(found.eigenvalues.numpy()) @ np.linalg.inv(V)
    assert np.linalg.norm(again - perturbed, 2) < 1e-9 * np.linalg.norm(perturbed, 2)
    assert np.linalg.norm(E, 2) <= eps * (1 + 1e-9)
    assert found.norm_E == pytest.approx(np.linalg.norm(E, 2), rel=1e-9)
    assert found.kappa == pytest.approx(np.linalg.cond(V, 2), rel=1e-9)
    assert found.max_real == found.eigenvalues.real.max().item()
    np.testing.assert_allclose(np.linalg.norm(V, axis=0), 1, atol=1e-12)
    assert (E != 0).all()
    if method == "random":
        assert found.norm_E == pytest.approx(eps, rel=1e-9)


@pytest.mark.claim(
    PAPER, "kappa falls with the size of a random E, log-log slope -1.6 to -0.2 over 1e-4 to 1"
)
@pytest.mark.parametrize("n", [16, 32])
def test_condition_falls_with_the_perturbation(n):
    sizes = np.logspace(-4, 0, 5)
    A, _ = legs(n)
    options = {"relative": True, "method": "random", "stable_margin": None}
    kappas = [
        np.mean([perturb_then_diagonalize(A, eps=e, seed=s, **options).kappa for s in range(5)])
        for e in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(kappas), 1)[0]
    assert -1.6 <= slope <= -0.2
    assert (np.diff(kappas[:4]) < 0).all()  # at the norm of A itself it is a random matrix's


@pytest.mark.claim(PAPER, "an optimised E of no greater norm has smaller kappa than a random one")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_descent_lowers_the_condition(seed, eps):
    A, _ = legs(16)
    start = perturb_then_diagonalize(A, eps=eps, method="random", seed=seed)
    found = perturb_then_diagonalize(A, eps=eps, seed=seed, steps=100)
    assert found.kappa < 0.7 * start.kappa
    assert found.norm_E <= start.norm_E * (1 + 1e-9)


def test_gamma_weighs_the_norm():
    """With E free to shrink, a heavy weight makes it small: Phi is what the descent lowers."""
    A, _ = legs(8)
    options = {"eps": 1.0, "steps": 200}
    light, heavy = (perturb_then_diagonalize(A, gamma=g, **options) for g in (1.0, 3000.0))
    assert heavy.norm_E < 0.7 * light.norm_E
    assert heavy.kappa > light.kappa
    assert heavy.kappa + 3000 * heavy.norm_E < light.kappa + 3000 * light.norm_E


@pytest.mark.claim(
    PAPER, "all eigenvalues are left of minus the margin, in conjugate pairs, and E is real"
)
@both_ways
@pytest.mark.parametrize(("n", "eps"), [(16, 5.0), (64, 3.0), (64, 20.0)])
@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_stable_and_conjugate(method, n, eps, margin):
    A, _ = legs(n)
    found = perturb_then_diagonalize(A, eps=eps, method=method, steps=10, stable_margin=margin)
    values = found.eigenvalues.numpy()
    assert values.real.max() <= -margin
    assert np.linalg.eigvals(A.numpy() + found.E.numpy()).real.max() <= -margin * 0.999
    assert (found.E.imag == 0).all()
    np.testing.assert_array_equal(np.sort_complex(values), np.sort_complex(values.conj()))


def test_shrinking_stops_at_the_margin():
    """Bisection gives away little: E ends where the real part meets the margin."""
    A, _ = legs(64)
    free = perturb_then_diagonalize(A, eps=20.0, method="random", stable_margin=None)
    assert free.max_real > 0
    assert free.norm_E == pytest.approx(20.0, rel=1e-9)
    found = perturb_then_diagonalize(A, eps=20.0, method="random")
    assert found.max_real == pytest.approx(-0.1, abs=0.02)
    assert 0.1 < found.norm_E < 20.0
    direction = free.E / found.E
    torch.testing.assert_close(direction, direction[0, 0].expand_as(direction))


@pytest.mark.claim(
    PAPER, "eigenvalues of a normal matrix move by at most the norm of E", tolerance=1e-9
)
@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 12), seed=st.integers(0, 99), eps=st.floats(1e-3, 2.0))
def test_bauer_fike(n, seed, eps):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=COMPLEX))[0]
    values = torch.randn(n, generator=generator, dtype=COMPLEX)
    A = Q @ torch.diag(values) @ Q.mH
    found = perturb_then_diagonalize(A, eps=eps, method="random", stable_margin=None)
    distance = (found.eigenvalues[:, None] - values).abs().min(1).values
    assert distance.max().item() <= found.norm_E + 1e-9
    assert found.E.imag.abs().max() > 0
    assert found.norm_E == pytest.approx(eps, rel=1e-9)


def test_relative_sizes_are_in_units_of_the_matrix():
    A, _ = legs(8)
    found = perturb_then_diagonalize(A, eps=1e-3, relative=True, method="random")
    assert found.norm_E == pytest.approx(1e-3 * np.linalg.norm(A.numpy(), 2), rel=1e-9)


# The transfer function


@pytest.mark.claim(
    PAPER, "the transfer function stays within (2 ln n + 4) eps of HiPPO's at every frequency"
)
@both_ways
@pytest.mark.parametrize("n", [16, 64])
def test_gap_is_bounded(method, n):
    C, eps = readout(n), 0.1
    system, _ = ptd_triple(n, C, eps=eps, method=method, steps=30)
    gap = transfer_gap(system, (*legs(n), C), axis(n))
    assert gap.max_gap <= (2 * math.log(n) + 4) * eps
    assert gap.max_gap < 0.3 * eps  # what it is in fact, the bound being loose
    assert gap.max_gap > 1e-3 * eps


@pytest.mark.claim(PAPER, "the gap is C R(s) E R(s) B to first order in E", tolerance=0.01)
@pytest.mark.parametrize("n", [16, 64])
def test_gap_to_first_order(n):
    A, B = legs(n)
    C = readout(n)
    system, found = ptd_triple(n, C, eps=1e-3, method="random")
    s = 1j * axis(n).to(COMPLEX)
    change = transfer_function(system, s) - transfer_function((A, B, C), s)
    resolvent = torch.linalg.inv(s[:, None, None] * torch.eye(n) - A)
    first = torch.einsum(
        "i,sij,jk,skl,l->s", C.to(COMPLEX), resolvent, found.E, resolvent, B.to(COMPLEX)
    )
    assert (change - first).abs().max() < 0.01 * first.abs().max()


@pytest.mark.claim(
    PAPER, "states of HiPPO-LegS driven by a unit tone have norm at most 1, at frequency 0", 1e-6
)
@pytest.mark.parametrize("n", [4, 16, 64])
def test_resolvent_of_the_input(n):
    A, B = legs(n)
    s = 1j * axis(n).to(COMPLEX)
    states = torch.linalg.solve(s[:, None, None] * torch.eye(n) - A, B.to(COMPLEX))
    sizes = states.norm(dim=-1)
    assert sizes.max().item() == pytest.approx(1, abs=1e-6)
    assert sizes.argmax() == 0


@pytest.mark.claim(
    PAPER, "at the eigenfrequencies S4D-LegS is over 20 times as far from HiPPO as PTD"
)
@both_ways
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_s4d_has_spikes_and_ptd_has_not(method, n, seed):
    C = readout(n, seed)
    spikes = legs_normal_part(n)[0].imag
    true = (*legs(n), C)
    system, _ = ptd_triple(n, C, eps=0.1, method=method, steps=30)
    dropped = transfer_gap(s4d_triple(n, C), true, spikes)
    kept = transfer_gap(system, true, spikes)
    assert dropped.max_gap > 20 * kept.max_gap
    assert dropped.max_gap > 1


@pytest.mark.claim(
    PAPER, "in the steady state a tone at the spike passes as through HiPPO; not in S4D", 0.05
)
def test_spike_in_the_time_domain():
    """Exact steps of all three systems over 20 units of time."""
    n, dt = 16, 1e-3
    A, B = legs(n)
    C = readout(n, 3)
    w = legs_normal_part(n)[0].imag.max().item()
    system, found = ptd_triple(n, C, eps=0.1)
    near, dropped = found.E.real + A, s4d_triple(n, C)
    time = np.arange(20000) * dt
    u = np.exp(1j * w * time)

    def amplitude(A, B, C):
        Ad, Bd, *_ = cont2discrete((A, B[:, None], C[None], np.zeros((1, 1))), dt)
        values, V = np.linalg.eig(Ad)
        kernel_states = np.linalg.solve(V, Bd[:, 0])
        powers = np.exp(np.log(values)[:, None] * np.arange(len(u))[::-1])
        state = V @ (kernel_states * (powers * u).sum(1))
        return abs(C @ state)

    true = amplitude(A.numpy(), B.numpy(), C.numpy())
    ours = amplitude(near.numpy(), B.numpy(), C.numpy())
    diagonal = amplitude(
        *(np.diag(x.numpy()) if i == 0 else x.numpy() for i, x in enumerate(dropped))
    )
    direct = abs(transfer_function(system, torch.tensor([1j * w])).item())
    assert ours == pytest.approx(true, abs=0.05)
    assert abs(diagonal - true) > 0.5
    assert direct == pytest.approx(ours, abs=0.01)


# The initialisation


@pytest.mark.claim(PAPER, "d_state / 2 conjugate pairs, no real eigenvalue", tolerance=0)
@pytest.mark.parametrize("n", [4, 8, 16, 32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_init_has_pairs_only(n, seed):
    A, B = ptd_init(n, eps=0.5, method="random", seed=seed)
    assert A.shape == B.shape == (n // 2,)
    assert (A.imag > 0).all()
    assert (A.imag.diff() >= 0).all()
    assert (A.real <= -0.1).all()
    assert A.dtype == B.dtype == COMPLEX


@pytest.mark.claim(PAPER, "2 Re of half of the pairs is the kernel of the whole system", 1e-10)
@both_ways
@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_half_of_the_pairs_is_the_whole_kernel(method, measure):
    """The states themselves: e_k^T exp(t (A + E)) B, with B as it is, not halved."""
    n = 12
    system = ptd_system(n, measure, eps=0.2, method=method, steps=20)
    A_hippo, B = (x.numpy() for x in hippo_matrix(measure, n))
    A, b = ptd_init(n, measure=measure, eps=0.2, method=method, steps=20)
    E = 2 * (system.V @ torch.diag(A) @ system.V_inv).real.numpy() - A_hippo
    assert np.linalg.norm(E, 2) <= 0.2 * (1 + 1e-6)
    for t in (0.0, 0.3, 1.0):
        half = 2 * (system.V @ (torch.exp(t * A) * b)).real
        np.testing.assert_allclose(half, expm(t * (A_hippo + E)) @ B, atol=1e-9)


@pytest.mark.claim(
    PAPER, "a vanishing perturbation gives the warped Legendre kernels of HiPPO-LegS", 1e-3
)
@both_ways
def test_small_perturbations_recover_the_basis(method):
    n = 8
    found = perturb_then_diagonalize(legs(n)[0], eps=1e-6, method=method, steps=20)
    B = torch.linalg.solve(found.V, legs(n)[1].to(COMPLEX))
    t = torch.linspace(0, 4, 60, dtype=DOUBLE)
    kernel = (torch.exp(t[:, None] * found.eigenvalues) * B) @ found.V.mT
    expected = hippo_basis("legs", n, t) * torch.exp(-t)[:, None]
    np.testing.assert_allclose(kernel.real, expected, atol=1e-3)
    np.testing.assert_allclose(kernel.imag, 0, atol=1e-6)


@pytest.mark.claim(PAPER, "the kernel of the layer is real and that of its 2 n eigenvalues", 1e-10)
def test_layer_kernel_is_the_full_complex_one():
    torch.manual_seed(0)
    layer = S4PTD(3, 8, eps=0.5, dtype=DOUBLE)
    A, B, C, dt = layer.kernel.continuous()
    full = [torch.cat([x, x.conj()], -1) for x in (A, B, C[0])]
    A, B, C = full
    log = dt * A
    v = C * (log.exp() - 1) / A * B
    lags = torch.arange(200, dtype=DOUBLE)
    kernel = torch.einsum("dn,dnl->dl", v, torch.exp(log[..., None] * lags))
    torch.testing.assert_close(
        layer.kernel(200)[0].detach(), kernel.real.detach(), rtol=0, atol=1e-10
    )
    assert kernel.imag.abs().max() < 1e-10


@pytest.mark.claim(PAPER, "S4PTD is S4D with other initial values, and nothing else", tolerance=0)
def test_layer_is_s4d():
    torch.manual_seed(0)
    layer = S4PTD(3, 8, eps=0.5)
    other = S4D(3, 8)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 50, 3)
    assert torch.equal(layer(x), other(x))
    assert type(layer).forward is S4D.forward
    assert type(layer.kernel) is type(other.kernel)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in other.parameters())
    A, B = ptd_init(8, eps=0.5)
    kernel = layer.kernel
    own_A, own_B, _, _ = kernel.continuous()
    torch.testing.assert_close(own_A, A.expand(3, 4), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own_B, B.expand(3, 4), rtol=1e-6, atol=1e-6)


def test_layer_reads_out_by_real_vectors():
    """C = C_0 V: each C is in the real span of the rows of V, and C_0 has variance 1."""
    torch.manual_seed(0)
    layer = S4PTD(500, 8, eps=0.5, channels=2, dtype=DOUBLE)
    system = ptd_system(8, eps=0.5)
    for _ in range(2):
        C = torch.view_as_complex(layer.kernel.C.detach())
        start = 2 * (C @ system.V_inv).real  # (C_0 V) V^-1
        torch.testing.assert_close(start.to(COMPLEX) @ system.V, C)
        np.testing.assert_allclose(start.std(), 1, rtol=0.03)
        np.testing.assert_allclose(start.mean(), 0, atol=0.03)
        layer.reset_parameters()


def test_layer_copies():
    layer = S4PTD(3, 4, eps=0.5)
    x = torch.randn(2, 9, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.reset_parameters()


def test_too_small_perturbations_leave_real_eigenvalues():
    with pytest.raises(RuntimeError, match=r"eps=1e-05: each of 64 .* a larger eps"):
        ptd_init(8, eps=1e-5, method="random")
    with pytest.raises(RuntimeError, match=r"eps=0.1"):
        ptd_init(2, eps=0.1, method="random")


A16 = legs(16)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: perturb_then_diagonalize(A16[:4, :3]),
            ValueError,
            r"A: expected \(n, n\), got \(4, 3\)",
        ),
        (lambda: perturb_then_diagonalize(A16 * math.nan), ValueError, "A: expected finite"),
        (lambda: perturb_then_diagonalize(A16, eps=0), ValueError, "eps: expected .* got 0"),
        (lambda: perturb_then_diagonalize(A16, method="qr"), ValueError, "method: expected"),
        (lambda: perturb_then_diagonalize(A16, gamma=-1), ValueError, "gamma: expected"),
        (lambda: perturb_then_diagonalize(A16, steps=-1), ValueError, "steps: expected"),
        (lambda: perturb_then_diagonalize(A16, stable_margin=-1), ValueError, "stable_margin:"),
        (lambda: perturb_then_diagonalize(-A16), RuntimeError, "A itself has"),
        (lambda: ptd_init(7), ValueError, "d_state must be even: got 7"),
        (lambda: ptd_init(8, measure="fout"), ValueError, "measure: expected one of"),
        (lambda: ptd_init(8, eps=-1.0), ValueError, "eps: expected"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
