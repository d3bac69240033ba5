"""S5 in its three forms against each other and SciPy, and its initialisations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from torchzoo.ssm import (
    S5,
    S5PTD,
    S4Block,
    hippo_matrix,
    legs_normal_part,
    ptd_init,
    ssm_param_groups,
)
from torchzoo.ssm.ptd import ptd_system

PAPER = 132
DOUBLE, COMPLEX = torch.float64, torch.complex128

LAYERS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 2},
        {"disc": "bilinear"},
        {"init": "ptd", "eps": 0.5},
        {"init": "ptd", "eps": 0.5, "blocks": 2, "disc": "bilinear"},
    ],
    ids=str,
)


def linear(d_model=3, d_state=8, **options):
    """A layer that is its linear system, in double precision."""
    torch.manual_seed(0)
    return S5(d_model, d_state, activation=None, post=None, dtype=DOUBLE, **options)


def sequences(*shape, seed=1):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def dense(layer, rate=1.0):
    """Abar, Bbar, C of all conjugates, by the rules in NumPy, and D."""
    kernel = layer.kernel
    A = -np.exp(kernel.log_A_real.detach().numpy()) + 1j * kernel.A_imag.detach().numpy()
    B, C = (torch.view_as_complex(x.detach()).numpy() for x in (kernel.B, kernel.C))
    dt = rate * np.exp(kernel.log_dt.detach().numpy())
    if kernel.disc == "zoh":
        Abar, Bbar = np.exp(dt * A), ((np.exp(dt * A) - 1) / A)[:, None] * B
    else:
        Abar = (1 + dt * A / 2) / (1 - dt * A / 2)
        Bbar = (dt / (1 - dt * A / 2))[:, None] * B
    return Abar, Bbar, C, layer.D.detach().numpy()[0]


def loop(layer, x, state=None, rate=1.0):
    """Outputs and last states by the recurrence, one step and one sequence at a time."""
    Abar, Bbar, C, D = dense(layer, rate)
    outputs, states = [], []
    for i, row in enumerate(x.numpy()):
        z = np.zeros(len(Abar), complex) if state is None else state[i].numpy()
        ys = []
        for u in row:
            z = Abar * z + Bbar @ u
            ys.append(2 * (C @ z).real + D * u)
        outputs.append(ys)
        states.append(z)
    return np.array(outputs), np.array(states)


@pytest.mark.claim(PAPER, "S5: scan, recurrence by steps and convolution are the same", 1e-5)
@LAYERS
def test_three_forms_agree(options):
    layer = linear(**options)
    x = sequences(2, 37, 3)
    y, after = layer(x, return_state=True)
    expected, states = loop(layer, x)
    np.testing.assert_allclose(y.detach(), expected, atol=1e-10)
    np.testing.assert_allclose(after.detach(), states, atol=1e-10)

    kernel = layer.kernel(37).detach().numpy()
    convolved = sum(
        np.stack(
            [[np.convolve(row[:, i], kernel[o, i])[:37] for o in range(3)] for row in x.numpy()]
        )
        for i in range(3)
    )
    direct = layer.D.detach().numpy()[0] * x.numpy()
    np.testing.assert_allclose(y.detach(), convolved.transpose(0, 2, 1) + direct, atol=1e-10)

    layer.eval().setup_step()
    state = layer.initial_state(2)
    for t in range(37):
        step, state = layer.step(x[:, t], state)
        torch.testing.assert_close(step, y[:, t].detach(), atol=1e-10, rtol=0)


@pytest.mark.claim(PAPER, "S5 in single precision: scan and recurrence are the same", 1e-5)
@pytest.mark.parametrize("cls", [S5, S5PTD])
def test_float32_forms_agree(cls):
    torch.manual_seed(0)
    layer = cls(4, 16, blocks=2, eps=0.5).eval()
    x = torch.randn(2, 200, 4)
    y = layer(x).detach()
    layer.setup_step()
    state = layer.initial_state(2)
    for t in range(200):
        step, state = layer.step(x[:, t], state)
        torch.testing.assert_close(step, y[:, t], atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 19), lengths=st.lists(st.integers(0, 20), min_size=2, max_size=2))
def test_states_carry_on_and_padding_does_not_count(cut, lengths):
    layer = linear(init="ptd", eps=0.5)
    x = sequences(2, 20, 3)
    whole, last = layer(x, return_state=True)
    first, state = layer(x[:, :cut], return_state=True)
    second, end = layer(x[:, cut:], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-10, rtol=0)
    y, state = layer(x, lengths=torch.tensor(lengths), return_state=True)
    for i, length in enumerate(lengths):
        assert (y[i, length:] == 0).all()
        torch.testing.assert_close(y[i, :length], whole[i, :length])
        if length:
            alone = layer(x[i : i + 1, :length], return_state=True)[1][0]
            torch.testing.assert_close(state[i], alone)
        else:
            assert (state[i] == 0).all()


def test_rate_stretches_time():
    layer = linear()
    x = sequences(2, 12, 3)
    np.testing.assert_allclose(layer(x, rate=2.0).detach(), loop(layer, x, rate=2.0)[0], atol=1e-10)
    layer.setup_step(2.0)
    step, _ = layer.step(x[:, 0], layer.initial_state(2))
    torch.testing.assert_close(step, layer(x, rate=2.0)[:, 0].detach())


@pytest.mark.claim(
    PAPER, "S5-PTD starts from HiPPO-LegS plus E in every block, whole B and C", 1e-8
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_ptd_blocks_are_perturbed_hippo(blocks):
    """A real system (A + E, B_0, C_0) in diagonal coordinates, from its impulse response."""
    layer = linear(3, 16, blocks=blocks, init="ptd", eps=0.3)
    size, kernel = 16 // blocks, layer.kernel
    A, _ = ptd_init(size, eps=0.3)
    system = ptd_system(size, eps=0.3)
    found = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag).detach()
    torch.testing.assert_close(found, A.repeat(blocks), atol=1e-8, rtol=0)
    dense_A = 2 * (system.V @ torch.diag(A) @ system.V_inv).real
    E = dense_A - hippo_matrix("legs", size)[0]
    assert 1e-3 < torch.linalg.matrix_norm(E, 2) <= 0.3 * (1 + 1e-6)
    B, C = (torch.view_as_complex(x.detach()) for x in (kernel.B, kernel.C))
    for b in range(blocks):
        rows = slice(b * size // 2, (b + 1) * size // 2)
        B0 = 2 * (system.V @ B[rows]).real
        torch.testing.assert_close(system.V_inv @ B0.to(COMPLEX), B[rows], atol=1e-8, rtol=0)
        free = 2 * (system.V @ (torch.exp(0.3 * A)[:, None] * B[rows])).real
        np.testing.assert_allclose(free, expm(0.3 * dense_A.numpy()) @ B0.numpy(), atol=1e-8)
    assert C.shape == (3, 8)


@pytest.mark.claim(
    PAPER, "S5 starts from B = V^-1 B_0 and C = C_0 V, B_0 of variance 1/D, C_0 of 1/P", 0.1
)
@pytest.mark.parametrize("init", ["legs-n", "ptd"])
def test_random_parts_are_isotropic(init):
    """In the coordinates of HiPPO the rows of B_0 are independent; V is not unitary for PTD."""
    D, P = 4000, 8
    kernel = linear(D, P, init=init, eps=0.3).kernel
    V = legs_normal_part(P)[1] if init == "legs-n" else ptd_system(P, eps=0.3).V
    B, C = (torch.view_as_complex(x.detach()) for x in (kernel.B, kernel.C))
    B0 = 2 * (V @ B).real
    torch.testing.assert_close(B0 @ B0.mT, torch.eye(P, dtype=DOUBLE), atol=0.1, rtol=0)
    torch.testing.assert_close(C.mH @ C * P / D, V.mH @ V, atol=0.1, rtol=0)


def test_normal_blocks_are_unitary():
    layer = linear(3, 16, blocks=2)
    eigenvalues, V = legs_normal_part(8)
    kernel = layer.kernel
    found = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag).detach()
    torch.testing.assert_close(found, eigenvalues.repeat(2), atol=1e-12, rtol=0)
    B = torch.view_as_complex(kernel.B.detach())[:4]
    B0 = 2 * (V @ B).real
    torch.testing.assert_close(V.mH @ B0.to(V), B)


def test_scale_of_the_initial_values():
    """B_0 of variance 1/D and C_0 of variance 1/P, in coordinates that a unitary V leaves alone."""
    torch.manual_seed(0)
    kernel = S5(400, 64, dt_min=0.01, dt_max=0.1).kernel
    B, C = (torch.view_as_complex(x.detach()) for x in (kernel.B, kernel.C))
    np.testing.assert_allclose(B.abs().square().mean() * 400, 1, rtol=0.05)
    np.testing.assert_allclose(C.abs().square().mean() * 64, 1, rtol=0.05)
    assert kernel.log_dt.shape == (32,)
    assert ((kernel.log_dt >= math.log(0.01)) & (kernel.log_dt <= math.log(0.1))).all()
    assert len(kernel.log_dt.unique()) == 32


def test_s5ptd_is_s5():
    torch.manual_seed(0)
    one = S5PTD(4, 8, eps=0.5, dropout=0.1, lr=0.0)
    torch.manual_seed(0)
    two = S5(4, 8, init="ptd", eps=0.5, dropout=0.1, lr=0.0)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not one.kernel.B.requires_grad
    assert one.kernel.C.requires_grad
    assert one.dropout == 0.1


def test_dynamics_are_a_group_of_their_own():
    layer = S5(4, 8)
    rest, slow = ssm_param_groups(layer, lr=1e-2, weight_decay=0.1)
    names = {id(p): name for name, p in layer.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {
        f"kernel.{name}" for name in ("log_dt", "log_A_real", "A_imag", "B")
    }
    assert (slow["lr"], slow["weight_decay"], rest["weight_decay"]) == (1e-3, 0.0, 0.1)


def test_block_takes_s5():
    block = S4Block(4, 8, ssm="S5", blocks=2)
    assert isinstance(block.ssm, S5)
    assert block(torch.randn(2, 9, 4)).shape == (2, 9, 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"blocks: expected a number that cuts d_state=8 .* got 3"):
        S5(4, 8, blocks=3)
    with pytest.raises(ValueError, match="init: expected 'legs-n' or 'ptd', got 'lin'"):
        S5(4, 8, init="lin")
    with pytest.raises(ValueError, match="L: expected"):
        S5(4, 8).kernel(0)
    with pytest.raises(ValueError, match="state: expected shape"):
        S5(4, 8).step(torch.zeros(2, 4), torch.zeros(2, 8, dtype=torch.cfloat))
