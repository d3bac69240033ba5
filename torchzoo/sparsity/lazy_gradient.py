"""Why training makes neurons lazy: what the loss asks of active neurons where training starts.

Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo and Kumar, "The Lazy Neuron Phenomenon:
On Emergence of Activation Sparsity in Transformers", 2023. For f(x) = V h with a random V of C
rows, whose entries are independent, of mean 0 and variance s², and independent of h,

    E_V ∂/∂h_i ½ ‖V h - t‖² = C s² h_i,
    E_V ∂/∂h_i crossentropy(V h, t) > 0 where h_i > 0,   = s² h_i (C - 1) / C to first order,

so that gradient descent lowers every active neuron, whatever the labels t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.sparsity.ffn import on_hidden
from torchzoo.sparsity.hosts import FFN, find_ffns


class GradientAtInit(NamedTuple):
    """Mean slope of the loss in a layer's active neurons, and the standard error of that mean."""

    mean: float
    std_error: float


def activation_gradient_at_init(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Callable[[Any, Any], Tensor],
    n_draws: int = 64,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, GradientAtInit]:
    """Whether training will make a model's neurons lazy: the slope of the loss in active neurons.

    The down-projection of every feed-forward layer is redrawn, normal and of its present size, with
    both signs in turn (what is odd in it, as labels mostly are, then drops out exactly). Where the
    mean is positive, the first steps of gradient descent lower active neurons. The weights are put
    back in the end; dropout is as the model's mode says.

    Args:
        model: The model, its feed-forward layers such as `find_ffns` finds.
        x: Its input.
        y: The targets.
        loss: Called as `loss(model(x), y)`, gives a scalar; slopes are of this scalar, so that a
            mean over tokens divides them by the number of tokens.
        n_draws: Draws of the projections, at least 2.
        generator: Makes the draws repeatable, on the CPU.

    Returns:
        For each layer that had active neurons the mean slope over them, with its standard error
        over draws.

    Raises:
        ValueError: Fewer than 2 draws, or no feed-forward layer.

    Source:
        Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in
        Transformers", 2023, the theorem of section 3.

    Example:
        >>> from torch.nn import functional as F
        >>> mlp = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> x, labels = torch.randn(16, 4), torch.randint(10, (16,))
        >>> slope = activation_gradient_at_init(mlp, x, labels, F.cross_entropy)[""]
        >>> slope.mean > 0
        True
    """
    if n_draws < 2:
        raise ValueError(f"n_draws: expected at least 2, got {n_draws}")
    ffns = find_ffns(model)
    sizes = {name: ffn.weight.detach().square().mean().sqrt() for name, ffn in ffns.items()}
    slopes: dict[str, list[Tensor]] = {name: [] for name in ffns}
    with _neurons(ffns) as neurons, torch.enable_grad():
        for _ in range(n_draws):
            drawn = {
                name: size * torch.randn(ffns[name].weight.shape, generator=generator).to(size)
                for name, size in sizes.items()
            }
            pair: dict[str, list[Tensor]] = {name: [] for name in ffns}
            for sign in (1, -1):
                _set_weights(ffns, {name: sign * weight for name, weight in drawn.items()})
                neurons.clear()
                value = loss(model(x), y)
                wanted = [h for _, h in neurons]
                gradients = torch.autograd.grad(value, wanted, materialize_grads=True)
                for (name, h), gradient in zip(neurons, gradients, strict=True):
                    pair[name].append(gradient[h > 0].double())
            for name, parts in pair.items():
                if parts and (active := torch.cat(parts)).numel():
                    slopes[name].append(active.mean())
    means = {name: torch.stack(found) for name, found in slopes.items() if found}
    return {
        name: GradientAtInit(float(m.mean()), float(m.std()) / math.sqrt(len(m)))
        for name, m in means.items()
    }


@contextmanager
def _neurons(ffns: dict[str, FFN]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect the neurons' values of each forward, with their graph; weights are put back after."""
    seen: list[tuple[str, Tensor]] = []

    def see(name: str, h: Tensor) -> Tensor:
        seen.append((name, h if h.requires_grad else h.detach().requires_grad_()))
        return seen[-1][1]

    saved = {name: ffn.weight.detach().clone() for name, ffn in ffns.items()}
    with ExitStack() as undo:
        undo.callback(_set_weights, ffns, saved)
        for name, ffn in ffns.items():
            undo.callback(on_hidden(ffn.module, ffn.down, partial(see, name)))
        yield seen


@torch.no_grad()
def _set_weights(ffns: dict[str, FFN], weights: dict[str, Tensor]) -> None:
    for name, ffn in ffns.items():
        ffn.weight.copy_(weights[name])
