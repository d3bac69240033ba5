"""COLEP: conformal prediction sets whose concepts were corrected by rules, certified in a ball.

M. Kang, N. M. Gürel, L. Li and B. Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal
Prediction via Probabilistic Circuits", 2024. Each concept j is a binary problem with the corrected
probability `p_j` of `y_j = 1`. With scores `S_j` of the true labels of n calibration points

    S_j(y) = 1 - P(y)                       (hps)
    S_j(y) = P(label likelier than y) + (1 - U) P(y),  U uniform on [0, 1]          (aps)
    qhat_j = the ceil((n + 1)(1 - alpha_j))-th smallest score,
    class j is in the set C(x) iff S_j(1) <= qhat_j.

The true class is missed with chance `alpha_j` for its own concept, and these add over concepts:
`alpha_j = alpha / L` ("union"). Taking the quantile of class j over points of class j alone,
`P(miss) = sum_j P(Y = j) P(S_j(1) > qhat_j | Y = j)`, allows `alpha_j = alpha` ("mondrian").

Under attack: with bounds of all detectors in a ball around the input that is seen, a class stays in
the set if its best case does (`predict_certified`, theorem 2 of the paper); with bounds around
clean held-out points, those whose worst case is still covered bound the coverage of ordinary sets
(`certified_coverage`, theorem 3).

Deviations from the paper: `alpha_cert` is the chance that both ends of an interval fail together,
half of it each; the coverage is certified on points that were not used for the thresholds, so that
a binomial bound is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchzoo.circuits.certificate import certified_coverage, smoothed_bounds
from torchzoo.circuits.decisions import check_probabilities
from torchzoo.circuits.elimination import concept_of
from torchzoo.circuits.knowledge import KnowledgeCircuit, KnowledgeMixture
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

__all__ = ["COLEP", "certified_coverage", "conformal_quantile", "smoothed_bounds"]

SCORES = ("hps", "aps")
ALLOCATIONS = ("union", "mondrian")


def conformal_rank(n: int, level: float) -> int:
    """The rank of the score that is the threshold; more than n if n points are too few."""
    return math.ceil(round((n + 1) * (1 - level), 9))


def conformal_quantile(scores: Tensor, level: float) -> Tensor:
    """Threshold that a new exchangeable score exceeds with chance at most `level`.

    Args:
        scores: Calibration scores.
        level: Chance of a miss.

    Shape:
        - scores: `(n,)`
        - output: `()`

    Returns:
        The `ceil((n + 1)(1 - level))`-th smallest score; infinite where n is less than that.

    Raises:
        ValueError: Scores of another shape, or a level outside (0, 1).

    Source:
        Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005: split conformal
        prediction.

    Example:
        >>> conformal_quantile(torch.arange(1.0, 10.0), 0.1), conformal_quantile(torch.ones(8), 0.1)
        (tensor(9.), tensor(inf))
    """
    if scores.ndim != 1:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected (n,)")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number in (0, 1)")
    rank = conformal_rank(len(scores), level)
    if rank > len(scores):
        return scores.new_tensor(torch.inf)
    return scores.kthvalue(rank).values


@register(
    paper=21,
    example=lambda: Example(
        kwargs={"reasoner": KnowledgeCircuit(4, [(0, 2, 1.0), (1, ~3, 2.0)]), "num_classes": 2},
        inputs=(0.05 + 0.9 * torch.rand(5, 4, generator=torch.Generator().manual_seed(0)),),
        bad_options={
            "num_classes": 5,
            "alpha": 1.0,
            "alpha_cert": 0.5,
            "score": "raps",
            "allocation": "none",
        },
    ),
    compare="exact probabilities under rules, which no layer of torch gives",
)
class COLEP(ZooModel):
    """Conformal sets of classes after reasoning; `forward` gives the corrected probabilities.

    Before `calibrate`, thresholds are infinite and all sets full.

    Args:
        reasoner: A `KnowledgeCircuit` or `KnowledgeMixture` over `L` concepts.
        num_classes: The first so many concepts are the classes.
        alpha: Chance that a set misses the true class.
        score: `"hps"`, one minus the probability, or `"aps"`, randomised cumulative mass.
        allocation: `"union"`, thresholds from all points at `alpha / L`, or `"mondrian"`, a
            class's threshold from its own points at `alpha`.
        alpha_cert: Chance that a detector's bounds fail, for certificates: `L alpha_cert` is taken
            off `alpha`.
        prune: Drop classes of which a rule implies a concept's value that this concept's own set
            rules out; needs `"union"`, and rules that always hold.

    Shape:
        - pi: `(..., L)`
        - output: `(..., L)`

    Attributes:
        qhat: `(L,)` float64, thresholds.

    Returns:
        The corrected probabilities.

    Raises:
        ValueError: An option out of its range; an input of the wrong shape or type, or
            probabilities outside [0, 1].

    Source:
        Kang, Gürel, Li and Li, "COLEP: Certifiably Robust Learning-Reasoning Conformal Prediction
        via Probabilistic Circuits", 2024, sections 4 and 5.

    Example:
        >>> colep = COLEP(KnowledgeCircuit(3, [(0, 2, 2.0)]), num_classes=2)
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool().repeat(50, 1)
        >>> noise = 0.2 * torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
        >>> colep.calibrate(torch.where(labels, 1 - noise, noise), labels)
        >>> colep.predict(torch.tensor([0.9, 0.1, 0.95]))
        tensor([ True, False])
    """

    qhat: Tensor

    def __init__(
        self,
        reasoner: KnowledgeCircuit | KnowledgeMixture,
        num_classes: int,
        *,
        alpha: float = 0.1,
        score: str = "hps",
        allocation: str = "union",
        alpha_cert: float = 0.0,
        prune: bool = False,
    ) -> None:
        super().__init__()
        size = reasoner.num_concepts
        if not 1 <= num_classes <= size:
            raise ValueError(f"num_classes: got {num_classes}, expected 1 to {size}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: got {alpha}, expected a number in (0, 1)")
        if not 0 <= alpha_cert * size < alpha:
            raise ValueError(
                f"alpha_cert: got {alpha_cert}, expected 0 to alpha / {size} = {alpha / size:.3g}"
            )
        if score not in SCORES:
            raise ValueError(f"score: got {score!r}, expected one of {SCORES}")
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation: got {allocation!r}, expected one of {ALLOCATIONS}")
        if prune and allocation != "union":
            raise ValueError(f"prune: got True with {allocation!r}, expected allocation='union'")
        self.reasoner, self.num_classes, self.num_concepts = reasoner, num_classes, size
        self.alpha, self.alpha_cert, self.prune = alpha, alpha_cert, prune
        self.score, self.allocation = score, allocation
        device = next(reasoner.buffers()).device
        self.register_buffer("qhat", torch.empty(size, device=device, dtype=torch.float64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the calibration: all sets are full."""
        self.qhat.fill_(torch.inf)

    @property
    def level(self) -> float:
        """The chance of a miss that each threshold is taken at."""
        left = self.alpha - self.alpha_cert * self.num_concepts
        return left / self.num_concepts if self.allocation == "union" else left

    def forward(self, pi: Tensor) -> Tensor:
        """Correct probabilities; see `KnowledgeCircuit.forward`."""
        return self.reasoner(pi)

    @torch.no_grad()
    def calibrate(
        self, pi: Tensor, concepts: Tensor, *, generator: torch.Generator | None = None
    ) -> None:
        """Set the thresholds.

        Args:
            pi: `(N, L)`, probabilities before reasoning, of points exchangeable with later ones.
            concepts: `(N, L)`, true concepts, exactly one of the classes among them.
            generator: Source of the uniform numbers of `"aps"`.

        Raises:
            ValueError: Wrong shapes or values, or too few points for the level.
        """
        concepts = self._check_labels(pi, concepts)
        p = self.reasoner(pi)
        u = self._uniform(p, generator)
        own = torch.where(concepts, p, 1 - p)
        scores = self._scores(own, own, u)[0]
        union = self.allocation == "union"
        for j in range(self.num_concepts if union else self.num_classes):
            column = scores[:, j] if union else scores[concepts[:, j], j]
            if conformal_rank(len(column), self.level) > len(column):
                needed = math.ceil(round(1 / self.level, 9)) - 1
                kind = "points" if union else f"points of class {j}"
                raise ValueError(
                    f"pi: got {len(column)} {kind}, expected at least {needed} for a miss of "
                    f"{self.level:.3g} at each threshold"
                )
            self.qhat[j] = conformal_quantile(column, self.level)

    @torch.no_grad()
    def predict(self, pi: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Sets of classes.

        Args:
            pi: `(..., L)`, probabilities before reasoning.
            generator: Source of the uniform numbers of `"aps"`.

        Returns:
            `(..., num_classes)` bool.

        Raises:
            ValueError: See `forward`.
        """
        p = self.reasoner(pi)
        return self._sets(p, p, self._uniform(p, generator))

    @torch.no_grad()
    def predict_certified(
        self, lo: Tensor, hi: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sets that keep their coverage under attack: all classes that could be in a clean set.

        Args:
            lo: `(..., L)`, lower ends before reasoning over a ball around the input that is seen,
                which holds the clean one.
            hi: `(..., L)`, upper ends.
            generator: Source of the uniform numbers of `"aps"`.

        Returns:
            `(..., num_classes)` bool.

        Raises:
            ValueError: See `KnowledgeCircuit.bounds`.
        """
        p_lo, p_hi = self.reasoner.bounds(lo, hi)
        return self._sets(p_lo, p_hi, self._uniform(p_lo, generator))

    @torch.no_grad()
    def covered(
        self,
        lo: Tensor,
        hi: Tensor,
        concepts: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Whether the ordinary set holds the true class in the worst case of a ball.

        Args:
            lo: `(N, L)`, lower ends before reasoning over a ball around clean points.
            hi: `(N, L)`, upper ends.
            concepts: `(N, L)`, true concepts, exactly one of the classes among them.
            generator: Source of the uniform numbers of `"aps"`.

        Returns:
            `(N,)` bool.

        Raises:
            ValueError: Wrong shapes or values; see `KnowledgeCircuit.bounds`.
        """
        labels = self._check_labels(lo, concepts)[:, : self.num_classes].long().argmax(1)
        kept = torch.empty(len(lo), dtype=torch.bool, device=lo.device)
        u = self._uniform(lo, generator)
        for label in labels.unique().tolist():
            rows = labels == label
            needed = [label, *self._implied(label)]
            asked = [concept_of(v) for v in needed]
            p_lo, p_hi = self.reasoner.bounds(lo[rows], hi[rows], concepts=asked)
            negative = torch.tensor([v < 0 for v in needed], device=lo.device)
            own = torch.where(negative, 1 - p_hi, p_lo), torch.where(negative, 1 - p_lo, p_hi)
            worst = self._scores(*own, u[rows][:, asked])[1]
            kept[rows] = (worst <= self.qhat[asked]).all(1)
        return kept

    def certified_coverage(
        self,
        lo: Tensor,
        hi: Tensor,
        concepts: Tensor,
        beta: float = 1e-3,
        *,
        generator: torch.Generator | None = None,
    ) -> float:
        """Lower bound of the coverage of ordinary sets when every input is attacked.

        Args:
            lo: `(N, L)`, lower ends before reasoning over a ball around clean points, which were
                not given to `calibrate`.
            hi: `(N, L)`, upper ends.
            concepts: `(N, L)`, true concepts, exactly one of the classes among them.
            beta: Chance that the bound fails.
            generator: Source of the uniform numbers of `"aps"`.

        Returns:
            The bound, less `alpha_cert` for each detector that a class's corrected probability
            depends on.

        Raises:
            ValueError: Wrong shapes or values, or a `beta` outside (0, 1).
        """
        kept = self.covered(lo, hi, concepts, generator=generator)
        groups = [self._leaves(label) for label in range(self.num_classes)]
        return certified_coverage(kept, beta=beta, loss=self.alpha_cert * max(map(len, groups)))

    def _leaves(self, label: int) -> frozenset[int]:
        """The detectors on which it depends whether a class is in the set."""
        concepts = [label, *map(concept_of, self._implied(label))]
        return frozenset().union(*map(self.reasoner.group, concepts))

    def _implied(self, label: int) -> list[int]:
        """Literals of knowledge concepts that a class implies, where they prune."""
        found: list[int] = []
        for clause in self.reasoner.clauses if self.prune else ():
            if ~label in clause.literals and len(clause.literals) == 2:
                (other,) = (v for v in clause.literals if v != ~label)
                found += [other] if concept_of(other) >= self.num_classes else []
        return found

    def _scores(self, low: Tensor, high: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest score of labels whose probabilities are in an interval."""
        if self.score == "hps":
            return 1 - high, 1 - low
        # falls from 1 to 1 - u / 2 on [0, 1/2), and rises from (1 - u) / 2 to 1 - u above
        best = torch.where(high >= 0.5, (1 - u) * low.clamp_min(0.5), 1 - u * high)
        worst = torch.where(low < 0.5, 1 - u * low, (1 - u) * high)
        return best, worst

    def _sets(self, p_lo: Tensor, p_hi: Tensor, u: Tensor) -> Tensor:
        """`(..., num_classes)`, what the best case of each label lets in."""
        one = self._scores(p_lo, p_hi, u)[0] <= self.qhat
        zero = self._scores(1 - p_hi, 1 - p_lo, u)[0] <= self.qhat
        found = one[..., : self.num_classes].clone()
        for label in range(self.num_classes):
            for literal in self._implied(label):
                right, wrong = (one, zero) if literal >= 0 else (zero, one)
                concept = concept_of(literal)
                found[..., label] &= right[..., concept] | ~wrong[..., concept]
        return found

    def _uniform(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.score == "hps":
            return torch.zeros_like(like)
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def _check_labels(self, pi: Tensor, concepts: Tensor) -> Tensor:
        check_probabilities("pi", pi, self.num_concepts)
        if pi.ndim != 2 or concepts.shape != pi.shape:
            got = f"{tuple(concepts.shape)} with probabilities {tuple(pi.shape)}"
            raise ValueError(f"concepts: got {got}, expected (N, {self.num_concepts}) for both")
        if not ((concepts == 0) | (concepts == 1)).all():
            raise ValueError("concepts: got values other than 0 and 1, expected true or false")
        count = concepts[:, : self.num_classes].sum(1)
        if not (count == 1).all():
            worst = int((count != 1).nonzero()[0])
            raise ValueError(
                f"concepts: got {int(count[worst])} classes in row {worst}, expected exactly one "
                f"among the first {self.num_classes}"
            )
        return concepts.bool()

    def extra_repr(self) -> str:
        """Options in short."""
        sizes = f"num_classes={self.num_classes}, alpha={self.alpha}, alpha_cert={self.alpha_cert}"
        return f"{sizes}, score={self.score!r}, allocation={self.allocation!r}, prune={self.prune}"
