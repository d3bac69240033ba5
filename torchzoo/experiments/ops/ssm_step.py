"""One time step of S4D's recurrence against the same step written with complex tensors.

Both start from coefficients that are worked out once. At the least the state is read and written,
and three coefficients of its size are read, two of which have no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.ssm import S4DKernel
from torchzoo.ssm.functional import discretise

STEPS = 16


def contenders(
    device: torch.device, batch: int, d_model: int, d_state: int
) -> Mapping[str, Callable[[], Any]]:
    """A few steps of each; the state is carried from one to the next."""
    torch.manual_seed(0)
    kernel = S4DKernel(d_model, d_state, device=device).eval()
    kernel.setup_step()
    inputs = torch.randn(STEPS, batch, d_model, device=device)
    A, B, C, dt = (part.detach() for part in kernel.continuous())
    Abar, Bbar = (part.to(torch.complex64) for part in discretise(A, dt, B))
    row = C[0].to(torch.complex64)

    @torch.no_grad()
    def ours() -> Tensor:
        state = kernel.initial_state(batch)
        for u in inputs:
            y, state = kernel.step(u, state)
        return y[:, 0]

    @torch.no_grad()
    def plain() -> Tensor:
        state = kernel.initial_state(batch)
        for u in inputs:
            state = Abar * state + Bbar * u[..., None]
            y = 2 * (row * state).sum(-1).real
        return y

    return {OURS: ours, "complex": plain}


def _case(batch: int, d_model: int, d_state: int = 64) -> Case:
    pairs = STEPS * d_model * d_state / 2
    return Case(
        f"{batch} x {d_model} features, {d_state} states, {STEPS} steps",
        partial(contenders, batch=batch, d_model=d_model, d_state=d_state),
        16.0 * batch * pairs,
        8.0 * (2 * batch + 3) * pairs,
        16.0 * batch * pairs,
        1.0,
    )


BENCH = Bench("ssm_step", [_case(*size) for size in ((1, 256), (16, 256), (1, 1024), (16, 1024))])
