"""Transfer functions of systems and layers, against NumPy and discrete kernels."""

import math

import numpy as np
import pytest
import torch

from torchzoo.ssm import S4, S4D, S4PTD, S5, hippo_matrix, transfer_function, transfer_gap

DOUBLE, COMPLEX = torch.float64, torch.complex128


def test_transfer_function_of_dense_and_diagonal_systems():
    A, B = hippo_matrix("legs", 6)
    generator = torch.Generator().manual_seed(0)
    C = torch.randn(6, dtype=DOUBLE, generator=generator)
    s = torch.randn(3, 50, dtype=COMPLEX, generator=generator) + 2
    expected = [
        [C.numpy() @ np.linalg.solve(z * np.eye(6) - A.numpy(), B.numpy()) for z in row]
        for row in s.numpy()
    ]
    np.testing.assert_allclose(transfer_function((A, B, C), s), expected, atol=1e-10)
    dense = (torch.diag(s[0, :6]), B, C)
    diagonal = (s[0, :6], B, C)
    torch.testing.assert_close(
        transfer_function(dense, s[1] + 9), transfer_function(diagonal, s[1] + 9)
    )


@pytest.mark.parametrize("cls", [S4D, S4PTD, S4])
def test_transfer_function_of_layers(cls):
    """The sum over the discrete kernel, for a time step so small that it is the integral."""
    torch.manual_seed(0)
    layer = cls(3, 8, **({"eps": 0.5} if cls is S4PTD else {}), dtype=DOUBLE)
    kernel = layer.kernel
    with torch.no_grad():
        kernel.log_dt.fill_(math.log(1e-3))
    taps = kernel(1 << 15).detach()[0, 1]
    for w in (0.0, 0.7, 5.0):
        lags = torch.arange(len(taps), dtype=DOUBLE) + 0.5
        summed = (taps * torch.exp(-1j * w * 1e-3 * lags)).sum()
        got = transfer_function(layer, torch.tensor([1j * w]), channel=1)
        torch.testing.assert_close(got, summed[None], rtol=2e-3, atol=2e-3)


def test_transfer_gap_finds_the_worst_frequency():
    one = torch.ones(1, dtype=DOUBLE)
    freqs = torch.tensor([1.0, -3.0, 0.5])
    gap = transfer_gap((-one, one, one), (-one - 3j, one, one), freqs)
    curve = [abs(1 / (1j * w + 1) - 1 / (1j * w + 1 + 3j)) for w in freqs.numpy()]
    np.testing.assert_allclose(gap.curve, curve, atol=1e-12)
    assert gap.argmax == int(np.argmax(curve))
    assert gap.max_gap == gap.curve[gap.argmax].item()


A16 = hippo_matrix("legs", 16)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: transfer_function((A16, A16[0], A16[0, :3]), A16[0]),
            ValueError,
            "ssm: expected A",
        ),
        (
            lambda: transfer_function(S4D(2, 4), A16[0], channel=2),
            ValueError,
            "channel: expected 0 to 1",
        ),
        (lambda: transfer_function(S5(2, 4), A16[0]), ValueError, "ssm: expected a layer"),
        (lambda: transfer_gap(S4D(2, 4), S4D(2, 4), A16), ValueError, "freqs: expected"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
