"""The search that EvoNorm came from: graphs of primitive operations, evolved and screened.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3. A layer is
a graph of up to 14 nodes. Nodes 0 to 3 are the input x, zeros, and two trained vectors over the
channels that start at 0 and 1; each other node applies one operation to nodes before it. The last
node, scaled and shifted per channel, is the output.

Graphs start at random and change by mutation of one node. Those that don't train, or whose gradient
an adversary can blow up, are rejected; of the others the Pareto frontier of their accuracies on
several architectures breeds.

Deviations from the paper: statistics are those of the batch in evaluation too; the adversary's
step is along the gradient of the logarithm of the gradient's norm, of fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from torchzoo.activations.evonorm_functions import affine, column, widened
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register

Graph = tuple[tuple[str | int, ...], ...]
"""For each node from 4 on: its operation and the nodes that it reads."""

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda x: x.sign() * x.abs().log(),
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda x: x.sign() * x.abs().sqrt(),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
}
STATISTICS = tuple(
    f"{kind}_{axes}" for kind in ("mean", "std", "rms") for axes in ("bwh", "wh", "whc", "whg")
)
"""Mean, deviation and root mean square over batch (b), space (wh), channels (c) or a group (g)."""

OPERATIONS = (*UNARY, *BINARY, *STATISTICS)
_INPUTS = 4

B0: Graph = (("mul", 3, 0), ("std_wh", 0), ("add", 4, 5), ("std_bwh", 0), ("max", 6, 7))
B0 += (("div", 0, 8),)
S0: Graph = (("mul", 3, 0), ("sigmoid", 4), ("mul", 0, 5), ("std_whg", 0), ("div", 6, 7))


@register(
    paper=40,
    example=lambda: Example(
        {"num_features": 4, "graph": S0, "groups": 2},
        (torch.randn(3, 4, 2, 3),),
        bad_options={
            "num_features": 0,
            "graph": (("sigmoid", 4),),
            "groups": 3,
            "eps": -1.0,
        },
    ),
    exempt={"fixed-rank": "one batch axis, one channel axis, and all others are space"},
    compare=lambda: Comparison(
        {"num_features": 64, "graph": S0},
        (torch.randn(32, 64, 32, 32),),
        ("EvoNormS0(num_features=64)",),
    ),
)
class GraphNorm(ZooModel):
    """A normalisation-activation layer given by a graph of operations.

    Args:
        num_features: Channels C.
        graph: For each node from 4 on, its operation and the earlier nodes that it reads.
        groups: Number of groups of the statistics over groups, a divisor of C.
        eps: Added under the roots of the statistics.
        device: Where the tensors are.
        dtype: Their dtype.

    Shape:
        - x, output: `(N, C, *spatial)`

    Returns:
        The last node times `weight` plus `bias`, in the dtype of `x`. It may be infinite or NaN:
        not all graphs make sense.

    Raises:
        ValueError: An operation that there is not, or with other inputs than earlier nodes; an
            option out of its range; an input of other channels or without spatial axes.

    Source:
        Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3.1.

    Example:
        >>> relu = GraphNorm(8, (("max", 0, 1),))
        >>> relu(torch.full((1, 8, 2, 2), -1.0)).max().item()
        0.0
    """

    def __init__(
        self,
        num_features: int,
        graph: Graph,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features: expected a number of at least 1, got {num_features}")
        if groups < 1 or num_features % groups:
            raise ValueError(f"groups: expected a divisor of {num_features} channels, got {groups}")
        if not eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}")
        _check(graph)
        self.num_features = num_features
        self.graph = graph
        self.groups = groups
        self.eps = eps
        # one row each: the vectors of nodes 2 and 3, scale, and shift
        self.vectors = nn.Parameter(torch.empty(4, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the vectors of nodes 2 and 3, the scale and the shift to 0, 1, 1 and 0."""
        with torch.no_grad():
            self.vectors.copy_(self.vectors.new_tensor([0.0, 1.0, 1.0, 0.0])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected (N, {self.num_features}, *spatial), got {x.shape}")
        wide = widened(x)
        v0, v1, weight, bias = self.vectors.unbind()
        values = [wide, torch.zeros_like(wide)]
        values += [column(v, wide).expand_as(wide) for v in (v0, v1)]
        used = alive(self.graph)
        for place, (name, *inputs) in enumerate(self.graph, start=_INPUTS):
            operands = [values[int(i)] for i in inputs]
            # a node that the output does not read only keeps its place
            values.append(self._evaluate(str(name), operands) if place in used else wide)
        return affine(values[-1], weight, bias).to(x.dtype)

    def _evaluate(self, name: str, operands: list[Tensor]) -> Tensor:
        if name in UNARY:
            return UNARY[name](operands[0])
        if name in BINARY:
            return BINARY[name](*operands)
        kind, over = name.split("_")
        return _statistic(operands[0], kind, over, self.groups, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, {describe(self.graph)}"


def _statistic(x: Tensor, kind: str, over: str, groups: int, eps: float) -> Tensor:
    """A statistic, as large as `x`."""
    split = x.unflatten(1, (groups, -1) if over == "whg" else (1, -1))  # (N, G, C / G, *spatial)
    space = list(range(3, split.ndim))
    axes = {"bwh": [0, *space], "wh": space, "whc": [2, *space], "whg": [2, *space]}[over]
    if kind == "mean":
        value = split.mean(axes, keepdim=True)
    elif kind == "std":
        value = (split.var(axes, correction=0, keepdim=True) + eps).sqrt()
    else:
        value = (split.square().mean(axes, keepdim=True) + eps).sqrt()
    return value.expand_as(split).flatten(1, 2)


def alive(graph: Graph) -> set[int]:
    """The nodes that the last one depends on, itself among them."""
    seen: set[int] = set()
    waiting = [_INPUTS + len(graph) - 1]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [int(i) for i in graph[node - _INPUTS][1:]] if node >= _INPUTS else []
    return seen


def describe(graph: Graph) -> str:
    """The graph as a formula.

    Example:
        >>> describe(S0)
        'div(mul(x, sigmoid(mul(v1, x))), std_whg(x))'
    """
    texts = ["x", "0", "v0", "v1"]
    for name, *inputs in graph:
        texts.append(f"{name}({', '.join(texts[int(i)] for i in inputs)})")
    return texts[-1]


def _check(graph: Graph) -> None:
    if not graph:
        raise ValueError("graph: expected at least one operation, got none")
    for place, node in enumerate(graph, start=_INPUTS):
        name, *inputs = node
        known = name in OPERATIONS and len(inputs) == (2 if name in BINARY else 1)
        if not known or not all(isinstance(i, int) and 0 <= i < place for i in inputs):
            raise ValueError(
                f"graph: expected an operation with nodes before {place} as inputs, got {node!r}"
            )


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
    if num_nodes <= _INPUTS:
        raise ValueError(f"num_nodes: expected more than {_INPUTS}, got {num_nodes}")
    while True:
        graph = tuple(_random_node(place, generator) for place in range(_INPUTS, num_nodes))
        if 0 in alive(graph):
            return graph


def mutate(graph: Graph, *, generator: torch.Generator | None = None) -> Graph:
    """A graph with one node, drawn uniformly, drawn anew; it still reads x.

    Example:
        >>> child = mutate(S0, generator=torch.Generator().manual_seed(0))
        >>> sum(old != new for old, new in zip(S0, child)) <= 1
        True
    """
    while True:
        place = _draw(len(graph), generator)
        node = _random_node(_INPUTS + place, generator)
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
