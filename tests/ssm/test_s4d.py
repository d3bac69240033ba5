"""S4D against a direct sum, SciPy's simulation of linear systems, and the matrix exponential."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.signal import dlsim

from torchzoo.ssm import S4D, S4DKernel

discs = pytest.mark.parametrize("disc", ["zoh", "bilinear"])
INITS = ("lin", "inv", "legs", "real", "random")


def linear(d_model=3, d_state=8, seed=0, **options):
    """A layer without anything after the linear system."""
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, "activation": None, "post": None, **options}
    return S4D(d_model, d_state, **options).eval()


def system(kernel):
    """A, B, C and dt as NumPy arrays in double precision, from the stored parameters."""
    log_dt, log_real, imag, B, C = (
        getattr(kernel, name).detach().double().numpy()
        for name in ("log_dt", "log_A_real", "A_imag", "B", "C")
    )
    A = -np.exp(log_real) + 1j * imag
    return A, B[..., 0] + 1j * B[..., 1], C[..., 0] + 1j * C[..., 1], np.exp(log_dt)[:, None]


def discrete(kernel, disc):
    A, B, C, dt = system(kernel)
    if disc == "zoh":
        return np.exp(dt * A), (np.exp(dt * A) - 1) / A * B, C
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2) * B, C


def real_system(Abar, Bbar, C, D):
    """One feature's pairs as a real system (A, B, C, D) on their real and imaginary parts."""
    n = len(Abar)
    A = np.zeros((2 * n, 2 * n))
    for i, a in enumerate(Abar):
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[a.real, -a.imag], [a.imag, a.real]]
    B = np.stack([Bbar.real, Bbar.imag], -1).reshape(-1, 1)
    return A, B, 2 * np.stack([C.real, -C.imag], -1).reshape(1, -1), np.array([[D]])


# The kernel


@pytest.mark.claim(
    107,
    "The kernel is 2 Re sum_n C_n Bbar_n Abar_n^l, to 1e-10 in double precision, L up to 16384",
    tolerance=1e-10,
)
@discs
@pytest.mark.parametrize(("init", "N", "L"), [("inv", 64, 16384), ("legs", 16, 100), ("lin", 2, 1)])
def test_kernel_is_the_direct_sum(init, N, L, disc):
    torch.manual_seed(0)
    kernel = S4DKernel(3, N, init=init, disc=disc, channels=2, dtype=torch.float64)
    Abar, Bbar, C = discrete(kernel, disc)
    powers = np.exp(np.arange(L) * np.log(Abar)[..., None])
    exact = 2 * np.einsum("chn,hnl->chl", C * Bbar, powers).real
    actual = kernel(L).detach().numpy()
    assert actual.shape == (2, 3, L)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-10 * np.abs(exact).max())


@pytest.mark.claim(
    107,
    "In float32 the kernel of its own parameters is right to 1e-4, over 16384 steps and over the "
    "second half of them alone",
    tolerance=1e-4,
)
@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_late_part_of_a_float32_kernel(init):
    torch.manual_seed(1)
    L, kernel = 16384, S4DKernel(3, 64, init=init, dt_min=9.99e-4, dt_max=1e-2)
    with torch.no_grad():
        kernel.log_dt.copy_(torch.tensor([1e-3, 3e-3, 1e-2]).log())
    Abar, Bbar, C = discrete(kernel, "zoh")
    A, _, _, dt = system(kernel)
    powers = np.exp(np.arange(L) * (dt * A)[..., None])
    exact = 2 * np.einsum("chn,hnl->chl", C * Bbar, powers).real[0]
    actual = kernel(L)[0].detach()
    assert actual.dtype == torch.float32
    for part in (slice(0, L), slice(L // 2, L)):
        error = np.abs(actual.numpy() - exact)[:, part].max(1)
        assert (error < 1e-4 * np.abs(exact)[:, part].max(1)).all()
    assert abs(Abar).max() < 1


@pytest.mark.claim(107, "Gradients of the kernel equal finite differences", tolerance=1e-6)
@discs
@pytest.mark.parametrize("transform", ["exp", "softplus", "relu", "none"])
def test_gradients_of_the_kernel(disc, transform):
    torch.manual_seed(0)
    kernel = S4DKernel(2, 4, disc=disc, real_transform=transform, train_B=True, dtype=torch.float64)
    names, values = zip(*kernel.named_parameters(), strict=True)
    assert len(names) == 5

    def run(*tensors):
        return torch.func.functional_call(kernel, dict(zip(names, tensors, strict=True)), (5, 1.5))

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.claim(107, "As A goes to 0 the kernel stays finite: it goes to 2 Re(C B) dt")
@discs
def test_small_eigenvalues(disc):
    tiny = torch.full((4,), -1e-20 + 0j)
    kernel = S4DKernel(2, 8, init=tiny, disc=disc)
    K = kernel(50)
    exact = 2 * kernel.C[..., 0].sum(-1) * kernel.log_dt.exp()
    torch.testing.assert_close(K, exact[..., None].expand(K.shape))
    K.sum().backward()
    assert all(p.grad.isfinite().all() for p in kernel.parameters())


# Two modes of one system


@pytest.mark.claim(
    107,
    "Convolution, steps and scipy.signal.dlsim agree, to 1e-10 in double precision",
    tolerance=1e-10,
)
@discs
@pytest.mark.parametrize("init", INITS)
def test_modes_equal_scipy(disc, init):
    layer = linear(init=init, disc=disc, channels=2)
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    y, state = layer(x, return_state=True)
    layer.setup_step()
    now, outputs = layer.initial_state(2), []
    for t in range(50):
        out, now = layer.step(x[:, t], now)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), y, rtol=0, atol=1e-10)
    torch.testing.assert_close(now, state, rtol=0, atol=1e-10)
    Abar, Bbar, C = discrete(layer.kernel, disc)
    D = layer.D.detach().numpy()
    for c in range(2):
        for h in range(3):
            A, B, row, skip = real_system(Abar[h], Bbar[h], C[c, h], D[c, h])
            before = (A, B, row @ A, row @ B + skip, 1)  # dlsim reads the state before the update
            for b in range(2):
                _, exact, _ = dlsim(before, x[b, :, h].numpy())
                actual = y[b, :, 3 * c + h].detach().numpy()
                np.testing.assert_allclose(actual, exact[:, 0], rtol=0, atol=1e-10)


@pytest.mark.claim(
    107, "Steps and convolution agree in float32 after all that follows the system", tolerance=1e-5
)
@discs
def test_modes_agree_in_float32(disc):
    torch.manual_seed(0)
    layer = S4D(8, 64, init="legs", disc=disc).eval()
    x = torch.randn(2, 200, 8)
    y, state = layer(x, return_state=True)
    now, outputs = layer.initial_state(2), []
    layer.setup_step()
    for t in range(200):
        out, now = layer.step(x[:, t], now)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(now, state, rtol=0, atol=1e-5)


@pytest.mark.claim(
    107, "Parts of a sequence with the state carried over give the whole", tolerance=1e-10
)
@given(
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    disc=st.sampled_from(["zoh", "bilinear"]),
    rate=st.sampled_from([1.0, 0.5, 2.0]),
)
@settings(max_examples=15, deadline=None)
def test_any_split(cuts, disc, rate):
    layer = linear(disc=disc, activation="gelu", post="glu")
    x = torch.randn(2, sum(cuts), 3, dtype=torch.float64)
    whole, last = layer(x, return_state=True, rate=rate)
    state, parts = None, []
    for part in x.split(cuts, 1):
        y, state = layer(part, state, return_state=True, rate=rate)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-10)


@pytest.mark.claim(107, "Outputs before a step do not depend on inputs from it on", tolerance=1e-12)
def test_causal():
    layer = linear(init="inv")
    x = torch.randn(1, 60, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 41:] += 100
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert difference[:41].max() < 1e-12 * 100
    assert (difference[41:] > 1e-3).all()


@pytest.mark.claim(
    107,
    "In a padded batch each sequence gives what it gives alone, its state too, whatever is in the "
    "padding",
    tolerance=1e-10,
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(bidirectional):
    layer = linear(activation="gelu", post="glu", bidirectional=bidirectional)
    lengths = torch.tensor([[7, 20], [1, 13]])
    x = torch.randn(2, 2, 20, 3, dtype=torch.float64)
    for place, length in zip(x.flatten(0, 1), lengths.flatten(), strict=True):
        place[length:] = torch.nan
    start = None if bidirectional else torch.randn(2, 2, 3, 4, dtype=torch.complex128)
    results = layer(x, start, lengths=lengths, return_state=not bidirectional)
    y, state = (results, None) if bidirectional else results
    for i in range(2):
        for j in range(2):
            n = lengths[i, j]
            one = None if start is None else start[i, j]
            alone = layer(x[i, j, :n], one, return_state=not bidirectional)
            if not bidirectional:
                torch.testing.assert_close(state[i, j], alone[1], rtol=0, atol=1e-10)
                alone = alone[0]
            torch.testing.assert_close(y[i, j, :n], alone, rtol=0, atol=1e-10)
            assert (y[i, j, n:] == 0).all()


@pytest.mark.claim(
    107,
    "A bidirectional layer adds the convolution of the reversed sequence with a second kernel, "
    "from the next input on",
    tolerance=1e-10,
)
def test_bidirectional():
    layer = linear(bidirectional=True, channels=2)
    x = torch.randn(1, 30, 3, dtype=torch.float64)
    K = layer.kernel(30).detach().numpy()
    assert K.shape == (4, 3, 30)
    y = layer(x).detach().numpy()[0]
    u, D = x[0].numpy(), layer.D.detach().numpy()
    for c in range(2):
        for h in range(3):
            past = np.convolve(u[:, h], K[c, h])[:30]
            future = np.convolve(u[::-1, h], K[2 + c, h])[:30][::-1]
            exact = past + np.append(future[1:], 0) + D[c, h] * u[:, h]
            np.testing.assert_allclose(y[:, 3 * c + h], exact, atol=1e-10)
    with pytest.raises(ValueError, match="step: a bidirectional layer"):
        layer.step(x[:, 0], layer.initial_state(1))
    for asked in ({"return_state": True}, {"state": layer.initial_state(1)}):
        with pytest.raises(ValueError, match=next(iter(asked))):
            layer(x, **asked)


# Linear and time-invariant


@pytest.mark.claim(
    107, "Before the activation the layer is linear and commutes with shifts", tolerance=1e-5
)
@discs
def test_linear_and_time_invariant(disc):
    layer = linear(init="legs", disc=disc, dtype=torch.float32)
    a, b = torch.randn(2, 1, 80, 3)
    mixed = layer(2 * a - 3 * b)
    torch.testing.assert_close(mixed, 2 * layer(a) - 3 * layer(b), rtol=0, atol=1e-5)
    shifted = layer(torch.nn.functional.pad(a, (0, 0, 17, 0)))
    torch.testing.assert_close(shifted[:, 17:], layer(a), rtol=0, atol=1e-5)
    assert shifted[:, :17].abs().max() < 1e-5
    late = torch.zeros(1, 80, 3)
    late[:, -1] = 1
    assert layer(late)[:, :-1].abs().max() < 1e-5  # nothing wraps around


# Discretisation


def held(layer, u, dt, repeats, rate):
    """Outputs at the ends of intervals of length dt, in each of which the input is held."""
    with torch.no_grad():
        layer.kernel.log_dt.fill_(math.log(dt))
        x = u.repeat_interleave(repeats, 1)
        return layer(x, rate=rate)[:, repeats - 1 :: repeats].numpy()


def exact_held(layer, u, dt):
    """The same from the matrix exponential of the real system and its input."""
    A, B, C, _ = system(layer.kernel)
    columns = []
    for h in range(u.shape[-1]):
        continuous = real_system(A[h], B[h], C[0, h], layer.D[0, h].item())
        n = len(continuous[0])
        both = np.zeros((n + 1, n + 1))
        both[:n, :n], both[:n, n:] = continuous[0], continuous[1]
        flow = expm(dt * both)
        x, outputs = np.zeros(n), []
        for value in u[0, :, h].numpy():
            x = flow[:n, :n] @ x + flow[:n, n] * value
            outputs.append((continuous[2] @ x)[0] + continuous[3][0, 0] * value)
        columns.append(outputs)
    return np.array(columns).T[None]


@pytest.mark.claim(
    107, "ZOH is exact for an input held over each step, by scipy.linalg.expm", tolerance=1e-8
)
@pytest.mark.parametrize("init", INITS)
def test_zoh_is_exact(init):
    layer = linear(init=init)
    u = torch.randn(1, 40, 3, dtype=torch.float64)
    actual = held(layer, u, 0.07, 1, 1.0)
    np.testing.assert_allclose(actual, exact_held(layer, u, 0.07), rtol=0, atol=1e-8)


@pytest.mark.claim(
    107, "The error of the bilinear rule falls with the square of the step", tolerance=0.1
)
def test_bilinear_is_second_order():
    layer = linear(disc="bilinear")
    u = torch.randn(1, 20, 3, dtype=torch.float64)
    exact = exact_held(layer, u, 0.1)
    counts = np.array([8, 16, 32, 64])
    errors = [np.abs(held(layer, u, 0.1, m, 1 / m) - exact).max() for m in counts]
    slope = np.polyfit(np.log(1 / counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)


@pytest.mark.claim(107, "A kernel at rate 2 is the kernel of twice the time step", tolerance=1e-12)
@discs
def test_rate(disc):
    kernel = linear(disc=disc).kernel
    twice = copy.deepcopy(kernel)
    with torch.no_grad():
        twice.log_dt += math.log(2)
    torch.testing.assert_close(kernel(40, rate=2.0), twice(40), rtol=1e-12, atol=1e-12)
    kernel.setup_step(2.0)
    u, state = torch.randn(3, 3, dtype=torch.float64), kernel.initial_state(3)
    for one, two in zip(kernel.step(u, state), twice.step(u, state), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.claim(
    107,
    "With ZOH an input held twice as long gives at every second step what rate 2 gives",
    tolerance=1e-5,
)
def test_resolution_transfer():
    layer = linear(init="inv", dtype=torch.float32)
    u = torch.randn(2, 50, 3)
    fine = layer(u.repeat_interleave(2, 1))[:, 1::2]
    torch.testing.assert_close(fine, layer(u, rate=2.0), rtol=0, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.claim(
    107, "Outputs, states and gradients on a GPU are those of the CPU", tolerance=1e-4
)
@discs
def test_gpu_equals_cpu(disc):
    layer = linear(d_model=8, d_state=64, init="inv", disc=disc, dtype=torch.float32)
    twin = copy.deepcopy(layer).cuda()
    x = torch.randn(2, 1000, 8)
    pairs = zip(layer(x, return_state=True), twin(x.cuda(), return_state=True), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(two.cpu(), one, rtol=1e-4, atol=1e-4)
        for output in (one, two):
            output.abs().square().sum().backward()
    for one, two in zip(layer.parameters(), twin.parameters(), strict=True):
        atol = 1e-4 * one.grad.abs().max().item()
        torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=1e-4, atol=atol)
