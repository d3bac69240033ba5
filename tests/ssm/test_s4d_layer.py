"""S4D's parameters, the authors' weights, and how a layer lives."""

import copy
import math

import pytest
import torch

from torchzoo.ssm import S4D, S4DKernel


def linear(d_model=3, d_state=8, seed=0, **options):
    """A layer without anything after the linear system."""
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, "activation": None, "post": None, **options}
    return S4D(d_model, d_state, **options).eval()


@pytest.mark.claim(107, "Re A stays below 0 whatever a gradient step does to the parameters")
@pytest.mark.parametrize("transform", ["exp", "softplus", "relu"])
def test_stable_after_any_step(transform):
    torch.manual_seed(0)
    kernel = S4DKernel(4, 16, real_transform=transform)
    A = kernel.continuous()[0]
    torch.testing.assert_close(A.real, torch.full_like(A.real, -0.5), rtol=1e-6, atol=0)
    for sign in (1, -1):
        with torch.no_grad():
            kernel.log_A_real += sign * 50 * torch.rand_like(kernel.log_A_real)
        A, *_ = kernel.continuous()
        assert (A.real < 0).all()
        assert kernel(100).isfinite().all()


@pytest.mark.claim(107, "Under bfloat16 autocast the system is computed in float32", tolerance=1e-6)
def test_autocast_leaves_the_system_alone():
    layer = linear(init="legs", d_state=16, dtype=torch.float32)
    x = torch.randn(2, 300, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        one, _ = layer.step(x[:, 0], layer.initial_state(2))
    assert y.dtype == one.dtype == torch.float32
    assert state.dtype == torch.complex64
    exact, last = layer(x, return_state=True)
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-6)
    torch.testing.assert_close(one, exact[:, 0], rtol=0, atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.claim(107, "The state dict has no complex tensors")
def test_state_dict_is_real():
    state = S4D(4, 8, train_B=True, bidirectional=True).state_dict()
    assert not any(tensor.is_complex() for tensor in state.values())
    assert state["kernel.C"].shape == (2, 4, 4, 2)
    assert state["kernel.B"].shape == (4, 4, 2)


@pytest.mark.claim(
    107,
    "C is complex normal of variance 1, D is normal, and dt is log-uniform in [1e-3, 1e-1]",
)
def test_initial_parameters():
    torch.manual_seed(0)
    layer = S4D(400, 64)
    C, log_dt = layer.kernel.C.detach(), layer.kernel.log_dt.detach()
    for part in C.unbind(-1):
        assert part.var().item() == pytest.approx(0.5, abs=0.03)
        assert abs(part.mean().item()) < 0.03
    assert layer.D.var().item() == pytest.approx(1, abs=0.25)
    low, high = math.log(1e-3), math.log(1e-1)
    assert ((low <= log_dt) & (log_dt <= high)).all()
    uniform = (log_dt.sort().values - low) / (high - low)
    assert (uniform - (torch.arange(400) + 0.5) / 400).abs().max() < 1.63 / 20  # KS, 1 %
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    same = {name for name, value in layer.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"kernel.log_A_real", "kernel.A_imag", "kernel.B"}


@pytest.mark.claim(107, "A given A, alone or with B, is what the kernel starts from")
def test_given_init():
    A = torch.tensor([-1 + 2j, -3 + 0j])
    B = torch.tensor([[1j, 2 + 0j]] * 3)
    for init, expected in ((A, torch.ones(3, 2)), ((A, B), B)):
        kernel = S4DKernel(3, 4, init=init)
        ours = kernel.continuous()
        torch.testing.assert_close(ours[0], A.expand(3, 2).to(ours[0]))
        torch.testing.assert_close(ours[1], expected.to(ours[1]))
    for wrong in (A[:1], -A, (A, B[:2])):
        with pytest.raises(ValueError, match="init: expected"):
            S4DKernel(3, 4, init=wrong)


def official_output(w, x):
    """The authors' minimal layer, by its formulas, for x `(B, L, H)`."""
    dt, C = w["kernel.log_dt"].exp(), torch.view_as_complex(w["kernel.C"])
    A = -w["kernel.log_A_real"].exp() + 1j * w["kernel.A_imag"]
    z, L = A * dt[:, None], x.shape[1]
    powers = (z[..., None] * torch.arange(L)).exp()
    K = 2 * torch.einsum("hn,hnl->hl", C * (z.exp() - 1) / A, powers).real
    u = x.mT
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(K, n=2 * L)
    y = torch.fft.irfft(spectrum, n=2 * L)[..., :L] + u * w["D"][:, None]
    y = torch.nn.functional.gelu(y)
    y = torch.nn.functional.conv1d(y, w["output_linear.0.weight"], w["output_linear.0.bias"])
    return torch.nn.functional.glu(y, dim=1).mT


@pytest.mark.claim(
    107, "Weights of the authors' minimal S4D load one to one and give its output", tolerance=1e-5
)
@pytest.mark.parametrize("prefix", ["", "layers.0."])
def test_official_weights(prefix):
    torch.manual_seed(0)
    H, pairs = 6, 8
    w = {
        "D": torch.randn(H),
        "kernel.C": torch.randn(H, pairs, 2),
        "kernel.log_dt": torch.rand(H) * 4.6 - 6.9,
        "kernel.log_A_real": torch.randn(H, pairs),
        "kernel.A_imag": 10 * torch.randn(H, pairs),
        "output_linear.0.weight": torch.randn(2 * H, H, 1),
        "output_linear.0.bias": torch.randn(2 * H),
    }
    layer = S4D.from_official({prefix + name: value for name, value in w.items()}, prefix)
    x = torch.randn(2, 70, H)
    torch.testing.assert_close(layer(x), official_output(w, x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"state_dict: expected 'kernel.log_dt'"):
        S4D.from_official({name: v for name, v in w.items() if name != "kernel.log_dt"})


# Life of a layer


def test_prepared_steps_follow_the_parameters():
    layer = linear(dtype=torch.float32)
    u, state = torch.randn(2, 3), layer.initial_state(2)

    def fresh(x):
        anew = copy.deepcopy(layer).train().eval()
        return anew.step(x, anew.initial_state(2))[0]

    layer.setup_step()
    with torch.no_grad():
        layer.kernel.log_dt += 1
    assert not torch.allclose(layer.step(u, state)[0], fresh(u))  # as it says, until told again
    layer.setup_step()
    torch.testing.assert_close(layer.step(u, state)[0], fresh(u))
    other = linear(seed=5, dtype=torch.float32)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer.step(u, state)[0], other.step(u, state)[0])
    layer.setup_step()
    layer.double()
    y, after = layer.step(u.double(), layer.initial_state(2))
    assert after.dtype == torch.complex128
    torch.testing.assert_close(y, fresh(u.double()), rtol=0, atol=1e-14)


def test_steps_are_differentiable_and_compile():
    layer = linear()
    u, state = torch.randn(2, 3, dtype=torch.float64), layer.initial_state(2) + 1
    layer.step(u, state)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    layer.setup_step()
    for one, two in zip(compiled(u, state), layer.step(u, state), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.claim(107, "Dropout drops a feature of a sequence at all steps together")
def test_dropout_is_tied_over_length():
    layer = linear(d_model=64, dropout=0.5).train()
    x = torch.randn(3, 20, 64, dtype=torch.float64)
    kept = layer(x) / layer.eval()(x)
    assert torch.equal(kept.round(), kept.round()[:, :1].expand(kept.shape))
    assert set(kept.round().unique().tolist()) == {0.0, 2.0}


def test_frozen_dynamics():
    kernel = S4DKernel(3, 8, lr=0.0, train_B=True)
    learns = {name for name, p in kernel.named_parameters() if p.requires_grad}
    assert learns == {"C"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.ones(2, 5, 4)), r"x: expected shape \(..., L, 3\)"),
        (lambda m: m(torch.ones(2, 0, 3)), "x: expected"),
        (lambda m: m(torch.ones(2, 5, 3), torch.ones(2, 3, 5)), "state: expected shape"),
        (lambda m: m(torch.ones(2, 5, 3), lengths=torch.ones(3)), "lengths: expected shape"),
        (lambda m: m.step(torch.ones(2, 4), m.initial_state(2)), "x: expected"),
        (lambda m: m.step(torch.ones(2, 3), m.initial_state(1)), "state: expected"),
        (lambda m: m.kernel(0), "L: expected"),
        (lambda m: S4D(3, 63), "d_state must be even: got 63, expected an even number"),
        (lambda m: S4D(3, 8, dt_min=0.1, dt_max=0.1), "dt_min: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear(dtype=torch.float32))
