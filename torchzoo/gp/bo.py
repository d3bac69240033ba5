"""Bayesian optimisation in rounds, by expected improvement on samples of functions.

With functions f_1, ..., f_S of a posterior, the improvement expected of q points together is

    qEI(x_1, ..., x_q) = sum_s max(0, max_j f_s(x_j) - best) / S,

with the same functions for all points and candidates. A greedy batch adds the point that raises it
most, one after the other, which is at least 1 - 1/e of the best batch's as qEI is submodular.

J. T. Wilson, F. Hutter and M. P. Deisenroth, "Maximizing acquisition functions for Bayesian
optimization", 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.files import atomic_path
from torchzoo.gp.bnn_surrogates import Surrogate
from torchzoo.gp.bnn_surrogates_posterior import FunctionSamples


class History(NamedTuple):
    """What was evaluated.

    Attributes:
        chosen: Which candidates, in their order, `(*b, n)`.
        y: Their outcomes, `(*b, n, 1)`.
    """

    chosen: Tensor
    y: Tensor


def sample_qei(values: Tensor, best: Tensor | float) -> Tensor:
    """Expected improvement of points together, from samples of functions.

    Args:
        values: Values of each function at the points.
        best: The best outcome so far.

    Shape:
        - values: `(S, ..., q)`
        - best: `(...)`
        - output: `(...)`

    Example:
        >>> values = torch.tensor([[1.0, 3.0], [2.0, 0.0]])  # two functions, two points
        >>> sample_qei(values, 1.0)
        tensor(1.5000)
    """
    return (values.amax(-1) - best).clamp_min(0).mean(0)


def greedy_batch(values: Tensor, best: Tensor, q: int, *, taken: Tensor | None = None) -> Tensor:
    """Candidates of a batch, each the one that raises the expected improvement most.

    Args:
        values: Values of each function at all candidates.
        best: The best outcome so far.
        q: Points of a batch.
        taken: True for candidates that are left out.

    Shape:
        - values: `(S, *b, N)`
        - best: `(*b)`
        - taken: `(*b, N)`
        - output: `(*b, q)`, indices

    Raises:
        ValueError: More points than candidates.

    Example:
        >>> values = torch.tensor([[1.0, 3.0, 2.9], [2.0, 0.0, 0.0]])
        >>> greedy_batch(values, torch.tensor(0.5), 2)
        tensor([1, 0])
    """
    if not 1 <= q <= values.shape[-1]:
        raise ValueError(f"q: expected within [1, {values.shape[-1]}], got {q}")
    reached = best.expand(values.shape[:-1])
    if taken is None:
        taken = torch.zeros(values.shape[1:], dtype=torch.bool, device=values.device)
    found = []
    for _ in range(q):
        gain = (values - reached[..., None]).clamp_min(0).mean(0)
        choice = gain.masked_fill(taken, -1.0).argmax(-1, keepdim=True)
        taken = taken.scatter(-1, choice, True)
        chosen = values.gather(-1, choice.expand(*values.shape[:-1], 1))[..., 0]
        reached = torch.maximum(reached, chosen)
        found.append(choice)
    return torch.cat(found, -1)


def run_rounds(
    surrogate: Surrogate | None,
    objective: Callable[[Tensor], Tensor],
    candidates: Tensor,
    *,
    initial: int,
    rounds: int,
    q: int,
    num_functions: int = 256,
    generator: torch.Generator | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Maximise over a finite set of candidates, in rounds of q points at once.

    Problems with the same shapes run side by side in leading dimensions. No candidate is
    evaluated twice.

    Args:
        surrogate: A surrogate; None: candidates are drawn at random.
        objective: Outcomes of points.
        candidates: Points to choose from; the first ones are evaluated before any fit.
        initial: How many of them.
        rounds: Rounds.
        q: Points of a round.
        num_functions: Functions that are drawn from a Gaussian posterior.
        generator: Draws them, and random candidates; None: a new one, seeded by torch's.
        checkpoint: File that the state is written to after each round, whole or not at all. One
            that is there is continued, and all comes out as if the run had never ended.

    Shape:
        - candidates: `(*b, N, d)`
        - objective: `(*b, q, d)` to `(*b, q, 1)`

    Returns:
        The `History`; the surrogate is fitted to all of it.

    Raises:
        ValueError: An option out of its range, or more points than candidates.

    Example:
        >>> from torchzoo.gp import GPSurrogate
        >>> x = torch.linspace(0, 1, 65, dtype=torch.float64)[torch.randperm(65), None]
        >>> history = run_rounds(
        ...     GPSurrogate(), lambda x: (5 * x).sin(), x, initial=4, rounds=4, q=2
        ... )
        >>> history.y.shape, bool(history.y.max() > 0.99)
        (torch.Size([12, 1]), True)
    """
    if initial < 1 or rounds < 0 or q < 1:
        raise ValueError(
            f"initial, rounds, q: expected at least 1, 0 and 1, got {initial}, {rounds} and {q}"
        )
    if candidates.ndim < 2 or initial + rounds * q > candidates.shape[-2]:
        raise ValueError(
            f"candidates: expected (..., N, d) with at least {initial + rounds * q} points, got "
            f"{tuple(candidates.shape)}"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    batch = candidates.shape[:-2]
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        history = _restore(path, surrogate, generator)
    else:
        index = torch.arange(initial).expand(*batch, initial)
        history = _evaluated(objective, candidates, index)
        _refit(surrogate, candidates, history)
        _save(path, surrogate, generator, history)
    while history.chosen.shape[-1] < initial + rounds * q:
        index = _next(surrogate, candidates, history, q, num_functions, generator)
        new = _evaluated(objective, candidates, index)
        history = History(
            torch.cat([history.chosen, new.chosen], -1), torch.cat([history.y, new.y], -2)
        )
        _refit(surrogate, candidates, history)
        _save(path, surrogate, generator, history)
    return history


@torch.no_grad()
def _next(
    surrogate: Surrogate | None,
    candidates: Tensor,
    history: History,
    q: int,
    num_functions: int,
    generator: torch.Generator,
) -> Tensor:
    """Indices of the next batch."""
    seen = torch.zeros(candidates.shape[:-1], dtype=torch.bool)
    seen = seen.scatter(-1, history.chosen, True)
    if surrogate is None:
        order = torch.rand(seen.shape, generator=generator).masked_fill(seen, 2.0).argsort(-1)
        return order[..., :q]
    posterior = surrogate.posterior(candidates)
    if isinstance(posterior, FunctionSamples):
        values = posterior.values
    else:
        values = posterior.rsample((num_functions,), generator=generator)
    values = values[..., 0].cpu()
    return greedy_batch(values, history.y[..., 0].amax(-1).to(values), q, taken=seen)


def _evaluated(objective: Callable[[Tensor], Tensor], candidates: Tensor, index: Tensor) -> History:
    return History(index, objective(_rows(candidates, index)).cpu())


def _rows(candidates: Tensor, index: Tensor) -> Tensor:
    wide = index[..., None].expand(*index.shape, candidates.shape[-1])
    return candidates.gather(-2, wide.to(candidates.device))


def _refit(surrogate: Surrogate | None, candidates: Tensor, history: History) -> None:
    if surrogate is not None:
        points = _rows(candidates, history.chosen)
        surrogate.fit(points, history.y.to(points))


def _save(
    path: Path | None,
    surrogate: Surrogate | None,
    generator: torch.Generator,
    history: History,
) -> None:
    from safetensors.torch import save_file

    if path is None:
        return
    state = {"chosen": history.chosen.contiguous(), "y": history.y.contiguous()}
    state["generator"] = generator.get_state()
    if surrogate is not None:
        state |= {f"surrogate.{name}": value for name, value in surrogate.state_dict().items()}
    with atomic_path(path) as part:
        save_file(state, part)


def _restore(path: Path, surrogate: Surrogate | None, generator: torch.Generator) -> History:
    from safetensors.torch import load_file

    state = load_file(path)
    generator.set_state(state["generator"])
    prefix = "surrogate."
    if surrogate is not None:
        surrogate.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    return History(state["chosen"], state["y"])
