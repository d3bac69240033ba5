"""The search that EvoNorm came from: graphs of primitive operations, evolved and screened.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3. Graphs
start at random and change by mutation of one node. Those that don't train, or whose gradient an
adversary can blow up, are rejected; of the others the Pareto frontier of their accuracies on
several architectures breeds.

Deviations from the paper: the adversary's step is along the gradient of the logarithm of the
gradient's norm, of fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from torchzoo.activations.evonorm_graph import BINARY, INPUTS, OPERATIONS, Graph, alive


def random_graph(num_nodes: int = 14, *, generator: torch.Generator | None = None) -> Graph:
    """A graph with operations and their inputs drawn uniformly, that reads x.

    Args:
        num_nodes: Number of nodes, the 4 inputs among them.
        generator: Draws.

    Raises:
        ValueError: Fewer than 5 nodes.

    Example:
        >>> len(random_graph(9, generator=torch.Generator().manual_seed(0)))
        5
    """
    if num_nodes <= INPUTS:
        raise ValueError(f"num_nodes: expected more than {INPUTS}, got {num_nodes}")
    while True:
        graph = tuple(_random_node(place, generator) for place in range(INPUTS, num_nodes))
        if 0 in alive(graph):
            return graph


def mutate(graph: Graph, *, generator: torch.Generator | None = None) -> Graph:
    """A graph with one node, drawn uniformly, drawn anew; it still reads x.

    Example:
        >>> from torchzoo.activations.evonorm_graph import S0
        >>> child = mutate(S0, generator=torch.Generator().manual_seed(0))
        >>> sum(old != new for old, new in zip(S0, child)) <= 1
        True
    """
    while True:
        place = _draw(len(graph), generator)
        node = _random_node(INPUTS + place, generator)
        child = (*graph[:place], node, *graph[place + 1 :])
        if 0 in alive(child):
            return child


def _random_node(place: int, generator: torch.Generator | None) -> tuple[str | int, ...]:
    name = OPERATIONS[_draw(len(OPERATIONS), generator)]
    return (name, *(_draw(place, generator) for _ in range(2 if name in BINARY else 1)))


def _draw(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (), generator=generator))


def worst_gradient_norm(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 100, lr: float = 0.1
) -> float:
    """How large an adversary who moves the convolution kernels can make their gradient.

    Args:
        model: A classifier; it stays as it is.
        x: Images.
        y: Labels.
        steps: Steps of the adversary.
        lr: Length of a step, over all kernels.

    Returns:
        The largest norm, over the steps, of the gradient of the cross entropy to the kernels;
        infinity where it is not finite. The paper rejects a layer above 1e8.

    Raises:
        ValueError: The model has no convolutions.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3.3.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    moved = {
        f"{name}.weight": module.weight.detach().clone().requires_grad_()
        for name, module in model.named_modules()
        if isinstance(module, convolutions)
    }
    if not moved:
        raise ValueError("model: expected one with convolutions, got none")
    kept = {n: t.detach().clone() for n, t in model.state_dict().items() if n not in moved}
    worst = 0.0
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, kept | moved, (x,)), y)
        grads = torch.autograd.grad(loss, list(moved.values()), create_graph=True)
        log_norm = torch.stack([grad.square().sum() for grad in grads]).sum().log() / 2
        if not log_norm.isfinite():
            return float("inf") if log_norm > 0 or log_norm.isnan() else worst
        worst = max(worst, float(log_norm.detach().exp()))
        ascent = torch.autograd.grad(log_norm, list(moved.values()))
        length = torch.stack([a.square().sum() for a in ascent]).sum().sqrt()
        if not length.isfinite():
            return float("inf")
        with torch.no_grad():
            for kernel, step in zip(moved.values(), ascent, strict=True):
                kernel += lr * step / length.clamp_min(torch.finfo(length.dtype).tiny)
    return worst


class Candidate(NamedTuple):
    """A graph that was scored.

    Attributes:
        graph: The graph.
        scores: Its accuracy on each architecture; None where it was rejected.
    """

    graph: Graph
    scores: tuple[float, ...] | None


def pareto_frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats: none is as good everywhere and better somewhere.

    Example:
        >>> from torchzoo.activations.evonorm_graph import S0
        >>> a, b, c = (Candidate(S0, scores) for scores in [(1.0, 3.0), (2.0, 2.0), (1.0, 2.0)])
        >>> pareto_frontier([a, b, c]) == [a, b]
        True
    """
    scored = [c for c in candidates if c.scores is not None]
    return [c for c in scored if not any(_beats(other, c) for other in scored)]


def _beats(one: Candidate, two: Candidate) -> bool:
    assert one.scores is not None
    assert two.scores is not None
    pairs = list(zip(one.scores, two.scores, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def search(
    score: Callable[[Graph], Sequence[float] | None],
    *,
    population: int = 64,
    rounds: int = 256,
    tournament: float = 0.05,
    num_nodes: int = 14,
    start: Sequence[Graph] = (),
    generator: torch.Generator | None = None,
) -> list[Candidate]:
    """Evolve graphs by tournaments that a random member of the Pareto frontier wins.

    Args:
        score: Gives a graph's accuracy on each of several architectures, larger is better, or
            None to reject it: the paper's are below 20 % accuracy after 100 steps, or above 1e8
            by `worst_gradient_norm`.
        population: Graphs before the first tournament, and how many of the latest take part.
        rounds: Tournaments, each with one child.
        tournament: Share of the population that a tournament draws, at least one.
        num_nodes: Nodes of a random graph.
        start: Graphs to begin with, before random ones.
        generator: Draws.

    Returns:
        All that was scored, in order.

    Raises:
        ValueError: A count below 1, or a share outside (0, 1].

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3.4.

    Example:
        >>> found = search(lambda graph: [-len(alive(graph))], population=4, rounds=8, num_nodes=6)
        >>> len(found)
        12
    """
    if population < 1:
        raise ValueError(f"population: expected at least 1, got {population}")
    if not 0 < tournament <= 1:
        raise ValueError(f"tournament: expected a share in (0, 1], got {tournament}")

    def judge(graph: Graph) -> Candidate:
        scores = score(graph)
        return Candidate(graph, None if scores is None else tuple(float(s) for s in scores))

    found = [judge(graph) for graph in start]
    while len(found) < population:
        found.append(judge(random_graph(num_nodes, generator=generator)))
    for _ in range(rounds):
        living = [c for c in found[-population:] if c.scores is not None]
        if not living:
            found.append(judge(random_graph(num_nodes, generator=generator)))
            continue
        size = max(1, round(tournament * len(living)))
        drawn = torch.randperm(len(living), generator=generator)[:size].tolist()
        winners = pareto_frontier([living[i] for i in drawn])
        parent = winners[_draw(len(winners), generator)]
        found.append(judge(mutate(parent.graph, generator=generator)))
    return found
