"""The S4 layer: one system as convolution and as recurrence."""

import pytest
import torch

from torchzoo.ssm import S4, ssm_param_groups


def layer(**options):
    torch.manual_seed(0)
    return S4(4, 8, **options).eval()


@pytest.mark.claim(
    62, "The layer by steps is the layer over sequences, split anywhere", tolerance=1e-5
)
@pytest.mark.parametrize("init", ["legs", "fout", "legt", "lagt", "legs+fout"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_steps_are_the_sequence(init, dtype, tolerance):
    model = layer(init=init, channels=2, dtype=dtype)
    x = torch.randn(3, 50, 4, dtype=dtype)
    with torch.no_grad():
        whole, last = model(x, return_state=True)
        model.setup_step()
        state, outputs = model.initial_state(3), []
        for t in range(50):
            y, state = model.step(x[:, t], state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=tolerance)
        torch.testing.assert_close(state, last, rtol=0, atol=tolerance)
        for split in (1, 17, 49):
            first, between = model(x[:, :split], return_state=True)
            rest = model(x[:, split:], between)
            parts = torch.cat([first, rest], 1)
            torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)


@pytest.mark.claim(
    62,
    "Before its activation the layer is linear, and outputs do not depend on what comes later",
    tolerance=1e-5,
)
def test_linear_and_causal():
    model = layer(init="legs+fout", activation=None, post=None)
    a, b = torch.randn(2, 1, 40, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(2 * a - b), 2 * model(a) - model(b), rtol=0, atol=1e-5)
        changed = torch.cat([a[:, :25], b[:, 25:]], 1)
        torch.testing.assert_close(model(changed)[:, :25], model(a)[:, :25], rtol=0, atol=1e-5)
        assert (model(changed)[:, 25:] - model(a)[:, 25:]).abs().max() > 0.1


def test_bidirectional_sees_the_future():
    model = layer(bidirectional=True)
    assert model.kernel.channels == 2
    x = torch.randn(1, 10, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    assert (grad[0, 3:].abs() > 0).any()


def test_parameters():
    model = layer(init="legt")
    assert all(not value.is_complex() for value in model.state_dict().values())
    groups = ssm_param_groups(model, lr=1e-2, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    slow = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    dynamics = {"log_dt", "log_A_real", "A_imag", "P", "B"}
    assert slow == {f"kernel.{name}" for name in dynamics}
    fixed = layer(train_B=False)
    assert "kernel.B" in dict(fixed.named_buffers())
    assert "init='legs'" in repr(fixed)


def test_one_length_does_not_bind_another():
    """The taps of a short kernel begin a long one."""
    kernel = layer(init="fout").kernel
    with torch.no_grad():
        torch.testing.assert_close(kernel(20), kernel(333)[..., :20], rtol=1e-5, atol=1e-6)
