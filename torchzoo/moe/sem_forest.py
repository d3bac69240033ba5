"""Which covariates matter for growth curves: an ensemble of trees of growth models.

A. M. Brandmaier, J. J. Prindle, J. J. McArdle and U. Lindenberger, "Theory-guided exploration with
structural equation model forests", 2016, which J. Liu and R. A. Perera, "Extending Mixture of
Experts Model to Investigate Heterogeneity of Trajectories: When, Where and How to Add Which
Covariates", 2021, use to choose covariates. A tree splits a bootstrap sample of the subjects on
covariates so that a growth model of one class in each part gains the most likelihood over one for
both. The importance of a covariate is by how much the log-likelihood of the subjects that a tree
has not seen drops, when the values of the covariate are permuted among them.

Deviations from the papers: splits are chosen, and models of parts fitted, by scores, as in
M. Arnold, M. C. Voelkle and A. M. Brandmaier, "Score-guided structural equation model trees", 2021,
so that no model is fitted for splits that are not made. With scores `s_i` of the n subjects of a
node and `I = sum_i s_i s_i^T`, a part L of m subjects gains about

    1/2 s_L^T I^-1 s_L n^2 / (m (n - m)),   s_L = sum_{i in L} s_i,

which is the gain of the likelihood to second order, and the model of L is one step of
`(n / m) I^-1 s_L` away, from where a few more are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchzoo.moe.growth import GrowthMoE
from torchzoo.moe.growth_curves import (
    ExpertParams,
    GrowthData,
    Trajectory,
    apply,
    condition,
    unpack_tril,
)
from torchzoo.moe.growth_fitting import check_values
from torchzoo.moe.growth_starts import best_start, shape_bounds
from torchzoo.moe.routing import check_count

STEPS = 3
"""Scoring steps that fit the model of a node, from that of its parent."""

LONGEST = 2.0
"""Most that a scoring step moves a coordinate of `displace`."""

ROWS = 50_000
"""Subjects, over all trees, that are fitted at once."""

THRESHOLDS = 15
"""Thresholds tried for a covariate in a node, at its quantiles."""


class Drops(NamedTuple):
    """What permuted covariates cost in each tree of a forest.

    Attributes:
        values: `(trees, n, c)`, drop of each subject's log-likelihood when a covariate is
            permuted, among subjects in the tree's sample or among those out of it.
        out: `(trees, n)` bool, True for subjects that the tree has not seen.
    """

    values: Tensor
    out: Tensor


class Trees(NamedTuple):
    """Binary trees of equal depth; node i splits into the nodes 2 i + 1 and 2 i + 2.

    Attributes:
        covariate: `(trees, 2^depth - 1)` int64, which covariate splits a node.
        threshold: `(trees, 2^depth - 1)`, subjects up to it go left: all, at a node that doesn't
            split, where it is infinite.
        leaves: The growth models of the leaves, `(trees 2^depth, 1, ...)`.
    """

    covariate: Tensor
    threshold: Tensor
    leaves: ExpertParams


def sem_forest_importance(
    y: Tensor,
    t: Tensor,
    covariates: Tensor,
    *,
    mask: Tensor | None = None,
    trajectory: str = "bilinear",
    num_trees: int = 100,
    min_leaf: int = 40,
    max_depth: int = 2,
    seed: int = 0,
) -> Tensor:
    """How much each covariate says about the growth curves of subjects a tree has not seen.

    Args:
        y: Responses.
        t: Times.
        covariates: Candidates for covariates of the gate or the experts.
        mask: True where measured; all by default.
        trajectory: See `GrowthMoE`.
        num_trees: Number of trees.
        min_leaf: Fewest subjects of a part, counted with the repetitions of the bootstrap.
        max_depth: Most splits on the way to a leaf.
        seed: Seed of bootstrap samples and permutations.

    Shape:
        - y: `(n, J)`
        - t: `(n, J)`, increasing along J where measured
        - covariates: `(n, c)`
        - mask: `(n, J)` bool
        - output: `(c,)`

    Returns:
        The mean drop of a subject's log-likelihood when the covariate is permuted; about 0, and
        of either sign, for covariates that say nothing.

    Raises:
        ValueError: Shapes that don't fit, counts below 1, or what `fit_growth_moe` refuses.

    Source:
        Liu and Perera, "Extending Mixture of Experts Model to Investigate Heterogeneity of
        Trajectories: When, Where and How to Add Which Covariates", 2021; Brandmaier, Prindle,
        McArdle and Lindenberger, "Theory-guided exploration with structural equation model
        forests", 2016.

    Example:
        >>> t, x = torch.arange(5.0).expand(200, 5), torch.randn(200, 2)
        >>> y = 3 * x[:, :1] + torch.randn(200, 1) * t + 0.3 * torch.randn(200, 5)
        >>> importance = sem_forest_importance(y, t, x, trajectory="linear", num_trees=5)
        >>> importance.argmax()
        tensor(0)
    """
    drops = forest_drops(
        y,
        t,
        covariates,
        mask=mask,
        trajectory=trajectory,
        num_trees=num_trees,
        min_leaf=min_leaf,
        max_depth=max_depth,
        seed=seed,
    )
    out = drops.out.to(drops.values.dtype)
    means = (drops.values * out[..., None]).sum(1) / out.sum(1)[:, None]
    return means.mean(0)


def forest_drops(
    y: Tensor,
    t: Tensor,
    covariates: Tensor,
    *,
    mask: Tensor | None = None,
    trajectory: str = "bilinear",
    num_trees: int = 100,
    min_leaf: int = 40,
    max_depth: int = 2,
    seed: int = 0,
) -> Drops:
    """Grow a forest and permute each covariate; see `sem_forest_importance`."""
    for name, value in (("num_trees", num_trees), ("min_leaf", min_leaf), ("max_depth", max_depth)):
        check_count(name, value)
    mask = check_values(y, t, mask=mask)
    if covariates.ndim != 2 or len(covariates) != len(y):
        got = tuple(covariates.shape)
        raise ValueError(f"covariates: expected ({len(y)}, c) as y has {len(y)} rows, got {got}")
    if not bool(covariates.isfinite().all()):
        raise ValueError("covariates: expected finite values, got some that are not")
    times = t[mask]
    model = GrowthMoE(
        1,
        trajectory=trajectory,
        time_range=(times.min().item(), times.max().item()),
        device=y.device,
    )
    data = model.data(y.double(), t.double(), mask=mask)
    grower = _Grower(
        model.experts.trajectory, shape_bounds(model), data, covariates.double(), min_leaf
    )
    root = best_start(model, data, 1, seed).experts
    generator = torch.Generator(y.device).manual_seed(seed)
    n = len(y)
    drawn = torch.randint(n, (num_trees, n), generator=generator, device=y.device)
    counts = drawn.new_zeros(num_trees, n).scatter_add_(1, drawn, torch.ones_like(drawn))
    values = []
    for chunk in counts.split(max(1, ROWS // n)):
        values.append(grower.drops(grower.grow(root, chunk, max_depth), chunk, generator))
    return Drops(torch.cat(values), counts == 0)


@dataclass(frozen=True)
class _Grower:
    """What the trees of a forest have in common; they grow level by level, all at once."""

    trajectory: Trajectory
    bounds: tuple[float, float] | None
    data: GrowthData
    x: Tensor
    min_leaf: int

    def grow(self, root: ExpertParams, counts: Tensor, depth: int) -> Trees:
        """Trees for bootstrap samples in which subjects occur `counts` times, `(trees, n)`."""
        trees = len(counts)
        tree, subject = counts.nonzero(as_tuple=True)
        level = _Level(self, subject, counts[tree, subject].to(self.x))
        params = ExpertParams(*(p.expand(trees, *p.shape) for p in root))
        node, found = tree, None
        covariates, thresholds = [], []
        for level_depth in range(depth + 1):
            params, found = level.fit(params, node, found)
            if level_depth == depth:
                break
            covariate, threshold = self.split(node, len(params.theta), level, found.scores)
            right = self.x[subject, covariate[node]] > threshold[node]
            node = 2 * node + right
            params = ExpertParams(*(p.repeat_interleave(2, 0) for p in params))
            covariates.append(covariate.view(trees, -1))
            thresholds.append(threshold.view(trees, -1))
        return Trees(torch.cat(covariates, 1), torch.cat(thresholds, 1), params)

    def split(
        self, node: Tensor, nodes: int, level: _Level, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best covariate and threshold for each node."""
        order = node.argsort(stable=True)
        sizes = node.bincount(minlength=nodes).tolist()
        parts = zip(
            self.x[level.subject[order]].split(sizes),
            scores[order].split(sizes),
            level.counts[order].split(sizes),
            strict=True,
        )
        covariate, threshold = zip(*(best_split(*p, self.min_leaf) for p in parts), strict=True)
        return node.new_tensor(covariate), self.x.new_tensor(threshold)

    def drops(self, trees: Trees, counts: Tensor, generator: torch.Generator) -> Tensor:
        """`(trees, n, c)`, drops of log-likelihoods for permuted covariates."""
        leaves = (p.squeeze(1).unflatten(0, (len(counts), -1)) for p in trees.leaves)
        models = (ExpertParams(*parts) for parts in zip(*leaves, strict=True))
        found = [condition(self.trajectory, model, self.data).log_density for model in models]
        density = torch.stack(found)  # (trees, n, leaves)
        x = self.x.expand(len(counts), *self.x.shape)
        before = density.gather(2, route(trees, x)[..., None])
        # A random order within each of the two groups, matched by sorting the groups.
        out = (counts == 0).to(x)
        place = out.argsort(dim=1, stable=True)
        values = []
        for j in range(x.shape[2]):
            noise = torch.rand(out.shape, generator=generator, device=x.device, dtype=x.dtype)
            mixed = x.clone()
            mixed[..., j].scatter_(
                1, place, x[..., j].gather(1, (out + 0.5 * noise).argsort(dim=1))
            )
            values.append(before - density.gather(2, route(trees, mixed)[..., None]))
        return torch.cat(values, -1)


class _Found(NamedTuple):
    """Log-densities `(rows,)` of rows at their node's parameters, and scores `(rows, P)`."""

    density: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Level:
    """Rows of all trees: which subjects, and how often each is in its tree's sample."""

    grower: _Grower
    subject: Tensor
    counts: Tensor

    def fit(
        self, params: ExpertParams, node: Tensor, found: _Found | None
    ) -> tuple[ExpertParams, _Found]:
        """Scoring steps of each node's parameters `(nodes, 1, ...)`; a step that loses is undone.

        Args:
            params: Where to start.
            node: `(rows,)`, each row's node.
            found: What `evaluate` gave at the start, if it is known.
        """
        nodes = len(params.theta)
        found = self.evaluate(params, node) if found is None else found
        value = self.total(found.density, node, nodes)
        size = value.new_ones(nodes)
        for _ in range(STEPS):
            outer = found.scores[:, :, None] * found.scores[:, None, :]
            inverse = torch.linalg.pinv(self.total(outer, node, nodes), hermitian=True)
            step = apply(inverse, self.total(found.scores, node, nodes))
            step = step / (step.abs().amax(-1, keepdim=True) / LONGEST).clamp_min(1) * size[:, None]
            moved = displace(params, step[:, None], self.grower.bounds)
            tried = self.evaluate(moved, node)
            new_value = self.total(tried.density, node, nodes)
            better = new_value > value
            params = ExpertParams(*_choose(better, moved, params))
            found = _Found(*_choose(better[node], tried, found))
            value, size = new_value.where(better, value), size.where(better, size / 4)
        return params, found

    def total(self, values: Tensor, node: Tensor, nodes: int) -> Tensor:
        """`(nodes, ...)`, sums over the rows of each node, with repetitions."""
        counts = self.counts.view(-1, *(1 for _ in values.shape[1:]))
        return values.new_zeros(nodes, *values.shape[1:]).index_add(0, node, counts * values)

    def evaluate(self, params: ExpertParams, node: Tensor) -> _Found:
        """Log-density of each row, and its gradient in the coordinates of `displace`."""
        d = self.grower.trajectory.num_factors
        size = self.grower.trajectory.num_shapes + d + d * (d + 1) // 2 + 1
        own = ExpertParams(*(p[node] for p in params))
        data = GrowthData(*(value[self.subject] for value in self.grower.data))
        delta = self.counts.new_zeros(len(node), 1, size, requires_grad=True)
        with torch.enable_grad():
            moved = displace(own, delta, self.grower.bounds)
            density = condition(self.grower.trajectory, moved, data).log_density.squeeze(-1)
            (slopes,) = torch.autograd.grad(density.sum(), delta)
        return _Found(density.detach(), slopes.squeeze(1))


def _choose(
    which: Tensor, ones: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """Rows of the tensors of one tuple where `which`, else of those of the other."""
    for one, other in zip(ones, others, strict=True):
        yield torch.where(which.view(-1, *(1 for _ in one.shape[1:])), one, other)


def displace(
    params: ExpertParams, delta: Tensor, bounds: tuple[float, float] | None
) -> ExpertParams:
    """One-class parameters moved by `(..., 1, P)` in coordinates that keep them valid.

    They are the logit of the knot or rate within its range, the means in units of the factors'
    spread, the logarithm and relative change of that spread, and the log residual variance.
    """
    d = params.alpha.shape[-1]
    gamma, alpha, spread, theta = delta.split([params.gamma.shape[-1], d, d * (d + 1) // 2, 1], -1)
    if bounds is not None:
        low, high = bounds
        at = ((params.gamma - low) / (high - low)).logit()
        gamma = low + (high - low) * (at + gamma).sigmoid()
    return params._replace(
        gamma=gamma,
        alpha=params.alpha + apply(params.scale_tril, alpha),
        scale_tril=params.scale_tril @ unpack_tril(spread, d),
        theta=params.theta * theta.squeeze(-1).exp(),
    )


def best_split(x: Tensor, scores: Tensor, counts: Tensor, min_leaf: int) -> tuple[int, float]:
    """Covariate and threshold of the split of a node that gains most; an infinite one for none."""
    if counts.sum() < 2 * min_leaf:
        return 0, math.inf
    levels = torch.linspace(0, 1, THRESHOLDS + 2, dtype=x.dtype, device=x.device)[1:-1]
    thresholds = x.quantile(levels, dim=0, interpolation="lower").mT  # (c, thresholds)
    left = (x.mT[:, None] <= thresholds[..., None]) * counts  # (c, thresholds, rows)
    n, m = counts.sum(), left.sum(-1)
    centred = scores - counts @ scores / n
    information = (counts[:, None] * centred).mT @ centred
    sums = left @ centred
    gain = (sums @ torch.linalg.pinv(information, hermitian=True) * sums).sum(-1)
    gain = 0.5 * gain * n**2 / (m * (n - m))
    gain = gain.where((m >= min_leaf) & (n - m >= min_leaf), -1.0)
    place = int(gain.argmax())
    if gain.flatten()[place] <= 0:
        return 0, math.inf
    return place // thresholds.shape[1], thresholds.flatten()[place].item()


def route(trees: Trees, x: Tensor) -> Tensor:
    """`(trees, n)` int64, the leaf of each subject with covariates `(trees, n, c)`."""
    node = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    inner = trees.covariate.shape[1]
    for _ in range(inner.bit_length()):
        covariate = trees.covariate.gather(1, node)
        value = x.gather(2, covariate[..., None]).squeeze(2)
        node = 2 * node + 1 + (value > trees.threshold.gather(1, node))
    return node - inner
