"""Layers that are graphs of primitive operations, among which EvoNorm was found.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section 3. A layer is
a graph of up to 14 nodes. Nodes 0 to 3 are the input x, zeros, and two trained vectors over the
channels that start at 0 and 1; each other node applies one operation to nodes before it. The last
node, scaled and shifted per channel, is the output.

Deviations from the paper: statistics are those of the batch in evaluation too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
INPUTS = 4
"""The nodes x, 0 and the two vectors."""

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
        for place, (name, *inputs) in enumerate(self.graph, start=INPUTS):
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
    waiting = [INPUTS + len(graph) - 1]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [int(i) for i in graph[node - INPUTS][1:]] if node >= INPUTS else []
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
    for place, node in enumerate(graph, start=INPUTS):
        name, *inputs = node
        known = name in OPERATIONS and len(inputs) == (2 if name in BINARY else 1)
        if not known or not all(isinstance(i, int) and 0 <= i < place for i in inputs):
            raise ValueError(
                f"graph: expected an operation with nodes before {place} as inputs, got {node!r}"
            )
