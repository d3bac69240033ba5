"""A training step of KAN layers against their plainest public forms: all functions at once, kept.

Those forms evaluate every function of every input into one tensor `(N, D, K)`, B-splines by the
recursion of Cox and de Boor over all K of them, as the well-known efficient-kan does, and leave
what is on the way to autograd. They compute the same as our layers, from the same parameters, which
is checked before anything is timed: so at equal steps the error is equal too.

AF-KAN has a second peer, the B-spline layer of the same width, as its claim is to take that one's
place; the bar is against it. Its plain form computes two SiLUs a pair, most of its time; ours one
exponential an input.

The layer is the first one of a network for MNIST, 784 inputs and 64 outputs. A step is forward, the
gradients of a squared error by the parameters and the input, and an update by SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.activations import (
    AFKANLayer,
    BSplineBasis,
    KANLinear,
    RBFBasis,
    SKANLinear,
    WaveletBasis,
)
from torchzoo.benchmark import OURS, Bench, Case

BATCH, INPUTS, OUTPUTS = 1024, 784, 64
PLAIN, SPLINES = "all functions at once", "B-splines, all at once"
Plain = Callable[[Any, Tensor], Tensor]


def splines(basis: BSplineBasis, x: Tensor) -> Tensor:
    """All B-splines, (N, D) to (N, D, K), by the recursion over their orders."""
    order, (low, high) = basis.order, basis.grid_range
    step = (high - low) / basis.grid_size
    places = torch.arange(-order, basis.grid_size + order + 1, device=x.device, dtype=x.dtype)
    knots = low + step * places
    x = x.unsqueeze(-1)
    values = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for n in range(1, order + 1):
        rise = (x - knots[: -n - 1]) / (knots[n:-1] - knots[: -n - 1])
        fall = (knots[n + 1 :] - x) / (knots[n + 1 :] - knots[1:-n])
        values = rise * values[..., :-1] + fall * values[..., 1:]
    return values


def gaussians(basis: RBFBasis, x: Tensor) -> Tensor:
    low, high = basis.grid_range
    centres = torch.linspace(low, high, basis.num_basis, device=x.device, dtype=x.dtype)
    return torch.exp(-(((x.unsqueeze(-1) - centres) / (centres[1] - centres[0])) ** 2))


def chebyshev(basis: nn.Module, x: Tensor) -> Tensor:
    values = [torch.ones_like(x), torch.tanh(x)]
    for _ in range(2, basis.num_basis):  # type: ignore[arg-type]
        values.append(2 * values[1] * values[-1] - values[-2])
    return torch.stack(values, -1)


def mexican_hats(basis: WaveletBasis, x: Tensor) -> Tensor:
    u = (x.unsqueeze(-1) - basis.shift.mT) / basis.log_scale.mT.exp()
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - u**2) * torch.exp(-(u**2) / 2)


def plain_kan(layer: KANLinear, x: Tensor) -> Tensor:
    """Base branch and splines, as two products."""
    assert isinstance(layer.basis, BSplineBasis)
    assert layer.base is not None
    functions = splines(layer.basis, x).flatten(1)
    return F.linear(F.silu(x), layer.base) + F.linear(functions, layer.coef.flatten(1))


def plain_s_kan(layer: SKANLinear, x: Tensor) -> Tensor:
    """Each family's functions times its gates, and a product for each."""
    made: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "bspline": splines,
        "rbf": gaussians,
        "chebyshev": chebyshev,
        "wavelet": mexican_hats,
    }
    total = layer.bias
    for gate, (name, basis, coef) in zip(layer.gates.unbind(-1), layer.families(), strict=True):
        functions = made[name](basis, x) * gate.unsqueeze(-1)
        total = total + F.linear(functions.flatten(1), coef.flatten(1))
    assert total is not None
    return total


def plain_af_kan(layer: AFKANLayer, x: Tensor) -> Tensor:
    """All pairs, scaled over each sample; scores of the inputs; the weighted sums."""
    assert layer.score is not None
    assert layer.temperature is not None
    column = x.unsqueeze(-1)
    pairs = (F.silu(column - layer.basis.low) * F.silu(layer.basis.high - column)) ** 2
    low, high = pairs.amin((1, 2), keepdim=True), pairs.amax((1, 2), keepdim=True)
    pairs = (pairs - low) / (high - low)
    attention = (layer.score(pairs).squeeze(-1) / layer.temperature.clamp(min=1)).softmax(-1)
    reduced = layer.norm(attention * pairs.sum(-1))
    return F.linear(F.silu(reduced), layer.weight)


def step(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Forward, backward, and a little way down."""
    inputs = x.detach().requires_grad_()
    leaves = [inputs, *layer.parameters()]
    gradients = torch.autograd.grad(F.mse_loss(run(inputs), y), leaves)
    with torch.no_grad():
        for leaf, gradient in zip(leaves[1:], gradients[1:], strict=True):
            leaf.sub_(gradient, alpha=1e-6)


def contenders(
    device: torch.device,
    make: Callable[[], nn.Module],
    plain: Plain,
    splines_too: bool = False,
    batch: int = BATCH,
) -> Mapping[str, Callable[[], Any]]:
    """Our layer's step, and that of the plain form on the same parameters; they must agree."""
    torch.manual_seed(0)
    layer = make().to(device)
    generator = torch.Generator().manual_seed(1)
    x = (2 * torch.rand(batch, INPUTS, generator=generator) - 1).to(device)
    y = torch.randn(batch, OUTPUTS, generator=generator).to(device)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-4)
    calls = {
        OURS: partial(step, layer, layer, x, y),
        PLAIN: partial(step, layer, partial(plain, layer), x, y),
    }
    if splines_too:
        kan = KANLinear(INPUTS, OUTPUTS).to(device)
        calls[SPLINES] = partial(step, kan, partial(plain_kan, kan), x, y)
    return calls


def case(
    name: str, make: Callable[[], nn.Module], plain: Plain, functions: int, against: str = PLAIN
) -> Case:
    products = 6.0 * BATCH * INPUTS * OUTPUTS * functions
    return Case(
        name,
        partial(contenders, make=make, plain=plain, splines_too=against == SPLINES),
        products,
        4.0 * 3 * (BATCH * (INPUTS + OUTPUTS) + INPUTS * OUTPUTS * functions),
        products,
        3.0,
        against,
    )


BENCH = Bench(
    "kan",
    [
        case(
            "AF-KAN, global attention",
            partial(AFKANLayer, INPUTS, OUTPUTS),
            plain_af_kan,
            1,
            SPLINES,
        ),
        case("KAN, cubic B-splines", partial(KANLinear, INPUTS, OUTPUTS), plain_kan, 9),
        case("S-KAN, four families", partial(SKANLinear, INPUTS, OUTPUTS), plain_s_kan, 29),
    ],
)
