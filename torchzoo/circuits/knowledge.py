"""Knowledge circuits: detectors of concepts corrected by rules, exactly, in one pass up and down.

M. Kang, N. M. Gürel, L. Li and B. Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal
Prediction via Probabilistic Circuits", 2024. Detectors say `pi_j = P(concept j holds)`. An
assignment `mu` of all concepts has the weight

    F(mu) = prod_j pi_j^mu_j (1 - pi_j)^(1 - mu_j) * exp(sum_h w_h [mu satisfies rule h]),
    pi^rs_j = sum over mu with mu_j = 1 of F(mu) / sum over all mu of F(mu).

Rules are compiled by variable elimination (`torchzoo.circuits.elimination`) into sums of two terms,
smooth, decomposable and deterministic, so that the cost follows the rules' treewidth and not `2^L`.
The flows of a pass down are `pi_j d log Z / d pi_j`, hence all `pi^rs` at once.

Deviations from the paper: rules are any weighted clauses, hard ones included, in one circuit of
whatever size; weights are counted for violations, which changes F by a factor only. Probabilities
count as at least the smallest normal number, so that certain but contradictory detectors have a
limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.circuits import reachable
from torchzoo.circuits.decisions import (
    Decisions,
    check_box,
    check_probabilities,
    decision_levels,
    log_leaves,
)
from torchzoo.circuits.elimination import Bucket, compile_clauses, connected, parse_rules
from torchzoo.hub import ZooModel
from torchzoo.ops.log_einsum_exp import log_einsum_exp
from torchzoo.registry import Example, register

__all__ = ["KnowledgeCircuit", "KnowledgeMixture"]

RULES = [(0, 2, 1.5), (1, 2, 0.7), (0, ~1, float("inf")), ([0, 1, ~3], 2.0)]


@register(
    paper=21,
    example=lambda: Example(
        kwargs={"num_concepts": 4, "rules": RULES, "learnable_weights": True, "blend": 0.8},
        inputs=(0.05 + 0.9 * torch.rand(5, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={"num_concepts": 0, "rules": [(0, 4, 1.0)], "blend": 1.5},
    ),
    compare="exact probabilities under rules, which no layer of torch gives",
)
class KnowledgeCircuit(ZooModel):
    """Corrects the probabilities of `L` binary concepts by weighted rules.

    Args:
        num_concepts: Number of concepts `L`.
        rules: Rules `(u, v, w)`, u implies v, or clauses `(literals, w)`, one of the literals
            holds. A literal is a concept's index `j`, or `~j` for its negative; the weight `w` is
            at least 0 and may be infinite.
        learnable_weights: Whether finite weights are a parameter.
        blend: Share of the corrected probability in the output, the rest is `pi`.
        device: Device of buffers and parameters.
        dtype: Type of the weights.

    Shape:
        - pi: `(..., L)`
        - output: `(..., L)`

    Attributes:
        clauses: The rules as clauses.
        weight: `(H,)`, finite weights in the order of the rules.
        num_sums: Number of sums, of two terms each.

    Returns:
        The corrected probabilities.

    Raises:
        ValueError: A size below 1, a rule of another form or of no concept, a weight below 0, hard
            rules that exclude each other, more than 20 concepts in a separator, a `blend` outside
            [0, 1]; an input of the wrong shape or type, or probabilities outside [0, 1].

    Source:
        Kang, Gürel, Li and Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal Prediction
        via Probabilistic Circuits", 2024, section 4 (the factor function and its circuit).

    Example:
        >>> circuit = KnowledgeCircuit(2, [(0, 1, 3.0)])  # a stop sign is an octagon
        >>> circuit(torch.tensor([0.9, 0.2])).mul(100).round()
        tensor([68., 63.])
    """

    log_weight: Tensor
    penalised: Tensor
    penalty: Tensor
    roots: Tensor
    weight: Tensor

    def __init__(
        self,
        num_concepts: int,
        rules: Sequence[Any],
        *,
        learnable_weights: bool = False,
        blend: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_concepts < 1:
            raise ValueError(f"num_concepts: got {num_concepts}, expected at least 1")
        if not 0 <= blend <= 1:
            raise ValueError(f"blend: got {blend}, expected a number in [0, 1]")
        self.num_concepts, self.blend = num_concepts, blend
        self.clauses = parse_rules(rules, num_concepts)
        self.buckets = compile_clauses(self.clauses, num_concepts)
        self._fold(device)
        soft = [clause.weight for clause in self.clauses if not clause.hard]
        weight = torch.empty(len(soft), device=device, dtype=dtype)
        if learnable_weights:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.reset_parameters()

    def _fold(self, device: torch.device | str | None) -> None:
        """Number the sums by height, and make the index tensors."""
        order = sorted(range(len(self.buckets)), key=lambda i: self.buckets[i].height)
        self.start, self.num_sums = [0] * len(order), 0
        for i in order:
            self.start[i] = self.num_sums
            self.num_sums += len(self.buckets[i].child)
        sums = [sum_ for i in order for sum_ in self._sums(self.buckets[i])]
        heights = [self.buckets[i].height for i in order for _ in self.buckets[i].child]
        self.levels = cast("Sequence[Decisions]", decision_levels(sums, heights, device))

        blocked, penalised, penalty, roots = [], [], [], []
        for i, bucket in enumerate(self.buckets):
            first = 2 * self.start[i]
            blocked += [first + int(edge) for edge in bucket.blocked.reshape(-1).nonzero()[0]]
            found = bucket.violated.reshape(bucket.blocked.size, len(bucket.clauses)).nonzero()
            penalised += [first + int(edge) for edge in found[0]]
            penalty += [bucket.clauses[column] for column in found[1]]
            roots += [] if bucket.separator else [1 + self.start[i]]
        zeros = torch.zeros(2 * self.num_sums, device=device)
        edges = torch.tensor(blocked, device=device, dtype=torch.int64)
        self.register_buffer("log_weight", zeros.index_fill(0, edges, -torch.inf), persistent=False)
        for name, indices in (("penalised", penalised), ("penalty", penalty), ("roots", roots)):
            buffer = torch.tensor(indices, device=device, dtype=torch.int64)
            self.register_buffer(name, buffer, persistent=False)

    def _sums(self, bucket: Bucket) -> list[tuple[int, list[list[int]]]]:
        """Variable and children of each sum; place 0 is the empty product."""
        offset = [1 + self.start[c] for c in bucket.children]
        return [
            (bucket.variable, [[o + int(c) for o, c in zip(offset, r, strict=True)] for r in pair])
            for pair in bucket.child
        ]

    def reset_parameters(self) -> None:
        """Set the weights to those of the rules."""
        soft = [clause.weight for clause in self.clauses if not clause.hard]
        with torch.no_grad():
            weight = torch.tensor(soft, dtype=torch.float64, device=self.weight.device)
            self.weight.copy_(weight)

    @classmethod
    def mixture(
        cls, circuits: Sequence[KnowledgeCircuit], beta: Sequence[float] | None = None
    ) -> KnowledgeMixture:
        """A mixture of circuits of different knowledge; see `KnowledgeMixture`."""
        return KnowledgeMixture(list(circuits), beta=None if beta is None else list(beta))

    def group(self, concept: int) -> frozenset[int]:
        """The concepts that hang together with one, itself included."""
        return next(group for group in self.groups() if concept in group)

    def groups(self) -> list[frozenset[int]]:
        """The concepts that hang together by rules."""
        return connected(self.buckets)

    def edge_weights(self, dtype: torch.dtype) -> Tensor:
        """`(S, 2)`, the logarithm of each term's weight."""
        weight = self.weight.to(dtype).index_select(0, self.penalty)
        return self.log_weight.to(dtype).index_add(0, self.penalised, -weight).view(-1, 2)

    def forward(self, pi: Tensor) -> Tensor:
        """Correct probabilities.

        Args:
            pi: `(..., L)`, probabilities of the concepts.

        Returns:
            `(..., L)`.

        Raises:
            ValueError: A wrong shape or type, or values outside [0, 1].
        """
        check_probabilities("pi", pi, self.num_concepts)
        wide = torch.promote_types(pi.dtype, torch.float32)
        leaves = rearrange(log_leaves(pi.to(wide).reshape(-1, self.num_concepts)), "b l v -> l v b")
        shares = self._down(*self._up(leaves)).view(pi.shape)
        return ((1 - self.blend) * pi + self.blend * shares).to(pi.dtype)

    def _up(self, leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Log-values `(1 + S, B)`, and of each level the shares `(S', 2, B)` of the two terms."""
        values = torch.zeros_like(leaves[:1, 0])
        shares = []
        sizes = [len(level.variable) for level in self.levels]
        for level, log_w in zip(
            self.levels, self.edge_weights(leaves.dtype).split(sizes), strict=True
        ):
            terms = level(values, leaves)
            w = log_w.exp()[:, None]
            out = log_einsum_exp(rearrange(terms, "s v b -> s b v").contiguous(), w)[..., 0]
            values = torch.cat([values, out])
            lowest = out.masked_fill(out == -torch.inf, torch.inf)  # no share of nothing
            shares.append((terms + log_w[..., None] - lowest[:, None]).exp())
        return values, shares

    def _down(self, values: Tensor, shares: list[Tensor]) -> Tensor:
        """`(B, L)`, the flow of each concept's value 1, from 1 at every root."""
        ones = torch.ones_like(values[: len(self.roots)])
        flow = torch.zeros_like(values).index_add(0, self.roots, ones)
        found = values.new_zeros(self.num_concepts, 2, values.shape[1])
        stop = len(values)
        for level, share in zip(reversed(list(self.levels)), reversed(shares), strict=True):
            start = stop - len(share)
            passed = flow[start:stop, None] * share
            found = found.index_add(0, level.variable, passed)
            spread = passed[:, :, None].expand(*level.child.shape, -1).flatten(0, 2)
            flow = flow.index_add(0, level.child.flatten(), spread)
            stop = start
        return (found[:, 1] / found.sum(1)).T

    @torch.no_grad()
    def bounds(
        self,
        lo: Tensor,
        hi: Tensor,
        *,
        method: str = "vertex",
        concepts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The range of corrected probabilities over a box of probabilities.

        Odds are a ratio of two functions that are linear in each `pi_i`, hence monotone in each,
        so that their extremes over a box are at vertices.

        Args:
            lo: `(..., L)`, lower ends of the box.
            hi: `(..., L)`, upper ends.
            method: `"vertex"` goes through the vertices and is exact; groups of more than 16
                concepts that are not fixed are bounded as by `"interval"`, which takes the
                extreme of every sum by itself, and is sound and looser.
            concepts: The concepts asked for; all by default.

        Returns:
            Lower and upper ends, `(..., L)`, or `(..., len(concepts))`; detached.

        Raises:
            ValueError: Wrong shapes, values outside [0, 1], or ends in the wrong order.
        """
        check_box(lo, hi, self.num_concepts)
        if method not in ("vertex", "interval"):
            raise ValueError(f"method: got {method!r}, expected 'vertex' or 'interval'")
        asked = range(self.num_concepts) if concepts is None else concepts
        low, high = (end.double().reshape(-1, self.num_concepts) for end in (lo, hi))
        found = reachable.probability_range(self, low, high, asked, exact=method == "vertex")
        shape = (*lo.shape[:-1], len(asked))
        low, high = (
            (1 - self.blend) * end[:, list(asked)] + self.blend * corrected
            for end, corrected in zip((low, high), found, strict=True)
        )
        return low.view(shape).to(lo.dtype), high.view(shape).to(hi.dtype)

    def extra_repr(self) -> str:
        """Sizes in short."""
        sizes = f"num_concepts={self.num_concepts}, rules={len(self.clauses)}"
        return f"{sizes}, sums={self.num_sums}, blend={self.blend}"


@register(
    paper=21,
    example=lambda: Example(
        kwargs={
            "circuits": [KnowledgeCircuit(3, [(0, 1, 1.0)]), KnowledgeCircuit(3, [(0, ~2, 2.0)])]
        },
        inputs=(0.05 + 0.9 * torch.rand(5, 3, generator=torch.Generator().manual_seed(0)),),
        bad_options={"circuits": [], "beta": [0.5, 0.6]},
    ),
    compare="exact probabilities under rules, which no layer of torch gives",
)
class KnowledgeMixture(ZooModel):
    """Averages knowledge circuits over the same concepts: `sum_r beta_r pi^(r)`.

    Args:
        circuits: The circuits.
        beta: Their coefficients, not below 0, of sum 1; by default equal for all circuits whose
            rules mention a concept.

    Shape:
        - pi: `(..., L)`
        - output: `(..., L)`

    Attributes:
        beta: `(R, L)`, coefficients.

    Returns:
        The corrected probabilities.

    Raises:
        ValueError: No circuits, circuits over other numbers of concepts, or coefficients that are
            no average; see `KnowledgeCircuit`.

    Source:
        Kang, Gürel, Li and Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal Prediction
        via Probabilistic Circuits", 2024, section 4 (several circuits).

    Example:
        >>> shape, colour = KnowledgeCircuit(3, [(0, 1, 3.0)]), KnowledgeCircuit(3, [(0, 2, 3.0)])
        >>> KnowledgeMixture([shape, colour]).beta
        tensor([[0.5000, 1.0000, 0.0000],
                [0.5000, 0.0000, 1.0000]])
    """

    beta: Tensor

    def __init__(
        self, circuits: list[KnowledgeCircuit], *, beta: list[float] | None = None
    ) -> None:
        super().__init__()
        sizes = {circuit.num_concepts for circuit in circuits}
        if len(sizes) != 1:
            raise ValueError(
                f"circuits: got sizes {sorted(sizes)}, expected one number of concepts"
            )
        self.num_concepts = sizes.pop()
        if beta is not None and (
            len(beta) != len(circuits) or min(beta) < 0 or abs(sum(beta) - 1) > 1e-6
        ):
            raise ValueError(
                f"beta: got {beta}, expected {len(circuits)} coefficients of sum 1, none below 0"
            )
        self.circuits = cast("Sequence[KnowledgeCircuit]", nn.ModuleList(circuits))
        device = circuits[0].weight.device
        rows = self._mentions() if beta is None else [[b] * self.num_concepts for b in beta]
        self.register_buffer("beta", torch.tensor(rows, device=device))

    def _mentions(self) -> list[list[float]]:
        """Coefficients that are equal for circuits that mention a concept."""
        named = [
            frozenset(c for clause in circuit.clauses for c in clause.concepts)
            for circuit in self.circuits
        ]
        counts = [sum(j in own for own in named) for j in range(self.num_concepts)]
        return [
            [float(j in own) / n if n else 1 / len(named) for j, n in enumerate(counts)]
            for own in named
        ]

    @property
    def clauses(self) -> list[Any]:
        """The clauses of all circuits."""
        return [clause for circuit in self.circuits for clause in circuit.clauses]

    def group(self, concept: int) -> frozenset[int]:
        """The concepts that hang together with one in some circuit."""
        return frozenset().union(*(circuit.group(concept) for circuit in self.circuits))

    def forward(self, pi: Tensor) -> Tensor:
        """Correct probabilities; see `KnowledgeCircuit.forward`."""
        parts = torch.stack([circuit(pi) for circuit in self.circuits])
        return torch.einsum("rl,r...l->...l", self.beta.to(parts), parts)

    @torch.no_grad()
    def bounds(
        self,
        lo: Tensor,
        hi: Tensor,
        *,
        method: str = "vertex",
        concepts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Bounds over a box: averages of the circuits' own bounds.

        An average is not monotone, as circuits may move in opposite directions: its extreme may be
        inside the box. These bounds are sound, and tight where one vertex serves all circuits.
        Arguments and errors are those of `KnowledgeCircuit.bounds`.
        """
        beta = self.beta if concepts is None else self.beta[:, list(concepts)]
        parts = [
            circuit.bounds(lo, hi, method=method, concepts=concepts) for circuit in self.circuits
        ]
        low, high = (torch.stack(ends) for ends in zip(*parts, strict=True))
        beta = beta.to(low)
        return torch.einsum("rl,r...l->...l", beta, low), torch.einsum("rl,r...l->...l", beta, high)
