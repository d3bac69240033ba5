"""`lti_scan` against a loop in Python, torch's associative scan and SciPy's recursive filter.

The associative scan is what parallel state spaces run on elsewhere; it carries the transition along
with the states. The filter runs a state at a time and has no gradients. Scans for CUDA alone are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ops import lti_scan


def loop(a_bar: Tensor, bu: Tensor) -> Tensor:
    """One step after the other."""
    x = torch.zeros_like(bu[:, 0])
    states = []
    for step in bu.unbind(1):
        x = a_bar * x + step
        states.append(x)
    return torch.stack(states, 1)


def _after(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return first[0] * second[0], second[0] * first[1] + second[1]


def associative(a_bar: Tensor, bu: Tensor) -> Tensor:
    """The scan that torch has, of pairs, each the map x -> a x + b."""
    from torch._higher_order_ops import associative_scan

    pairs = (a_bar.expand_as(bu), bu)
    states: Tensor = associative_scan(_after, pairs, dim=1, combine_mode="generic")[1]
    return states


def filtered(a_bar: Tensor, bu: Tensor) -> Tensor:
    """SciPy's filter, a state at a time."""
    from scipy.signal import lfilter

    inputs, columns = bu.flatten(2).numpy(), []
    for n, a in enumerate(a_bar.flatten().tolist()):
        columns.append(torch.from_numpy(lfilter([1.0], [1.0, -a], inputs[..., n], axis=1)))
    return torch.stack(columns, -1).reshape(bu.shape).to(bu.dtype)


def contenders(
    device: torch.device, batch: int, length: int, width: int, states: int, backward: bool
) -> Mapping[str, Callable[[], Any]]:
    """A stable system on noise, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.9 + 0.1 * torch.rand(width, states, generator=generator)
    a_bar = torch.polar(sizes, 3 * torch.rand(width, states, generator=generator)).to(device)
    shape = (batch, length, width, states)
    bu, grad = (torch.randn(shape, dtype=torch.cfloat, generator=generator) for _ in range(2))
    bu, grad = bu.to(device), grad.to(device)
    leaves = [a_bar, bu]
    if backward:
        leaves = [t.requires_grad_() for t in leaves]

    def run(scan: Callable[..., Tensor]) -> Any:
        states = scan(a_bar, bu)
        return torch.autograd.grad(states, leaves, grad) if backward else states

    named: dict[str, Callable[..., Tensor]] = {OURS: lti_scan, "loop": loop}
    if not backward:
        named["associative_scan"] = associative
        if device.type == "cpu":
            named["scipy lfilter"] = filtered
    return {name: partial(run, scan) for name, scan in named.items()}


def case(batch: int, length: int, width: int, states: int, backward: bool) -> Case:
    count = batch * length * width * states
    numbers = 5 if backward else 2  # bu, x; then dx, x and dbu
    return Case(
        f"B={batch}, L={length}, H={width}, N={states}, "
        f"{'forward and backward' if backward else 'forward'}",
        partial(
            contenders,
            batch=batch,
            length=length,
            width=width,
            states=states,
            backward=backward,
        ),
        (24.0 if backward else 8.0) * count,
        8.0 * numbers * count,
        8.0 * count * (3 if backward else 1),
        2.0,
        "loop",
    )


BENCH = Bench(
    "lti_scan",
    [
        case(8, 256, 1, 32, False),
        case(8, 1024, 1, 128, False),
        case(8, 1024, 1, 128, True),
        case(4, 512, 64, 32, False),
    ],
)
