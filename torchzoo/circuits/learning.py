"""Learning a circuit: expectation maximisation, whose counts come from one backward pass.

The expected number of uses of an edge is its flow, `theta d(sum_b log p_b) / d theta`. A full step
sets each row of weights to its share of the flows; a step of size eta on a batch goes that part of
the way. Leaves take the moments of their values, weighted by flows. Pseudocounts are per entry.

With soft evidence `w_i(c)` the likelihood is that of `sum_x p(x) prod_i w_i(x_i)`: a leaf's flow is
then spread over its values in proportion to `p_k(c) w_i(c)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.circuits.evidence import Evidence, check_evidence
from torchzoo.circuits.folded_layers import Weights
from torchzoo.circuits.leaf import blend

if TYPE_CHECKING:
    from torchzoo.circuits.circuit import Circuit

__all__ = ["EdgeFlows", "edge_flows", "em_fit", "em_step", "init_from_data"]


class WeightFlow(NamedTuple):
    """A parameter of sums, the linear weights it stands for, and the flows through their edges."""

    parameter: nn.Parameter
    weight: Tensor
    flow: Tensor


class EdgeFlows(NamedTuple):
    """Expected uses of all edges.

    Attributes:
        weights: For each parameter of the sums, in the order of the circuit's layers, its flows;
            layers that share a parameter have one entry.
        leaf: The leaf layer's sufficient statistics.
        log_likelihood: Sum over the samples.
        num_samples: Number of samples.
    """

    weights: list[WeightFlow]
    leaf: Tensor
    log_likelihood: Tensor
    num_samples: int


def edge_flows(
    circuit: Circuit,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    log_w: Tensor | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
) -> EdgeFlows:
    """Expected uses of all edges, added up over samples.

    Args:
        circuit: The circuit.
        x: `(N, D)`, values; None means that all evidence is soft.
        mask: `(N, D)` bool, True where observed.
        log_w: `(N, D, C)`, soft evidence where `x` is not observed; see `Circuit.forward`.
        labels: `(N,)`, the class of each sample, needed where there are several.
        batch_size: Samples at a time; all by default.

    Returns:
        The flows.

    Raises:
        ValueError: No samples, samples of probability 0, labels missing, or see `Circuit.forward`.
    """
    given, samples = _told(circuit, x, mask, log_w)
    if (labels is None) != (circuit.num_classes == 1):
        raise ValueError(f"labels: expected for {circuit.num_classes} classes only, got {labels}")
    found: dict[int, WeightFlow] = {}
    with torch.no_grad():
        weights = circuit.weights()
    leaf: Tensor | None = None
    total = torch.zeros((), device=samples.device)
    rows = torch.arange(len(samples), device=samples.device)
    for index in rows.split(batch_size or len(rows)):
        label = None if labels is None else labels[index]
        flows, statistics, log_prob = _batch_flows(circuit, weights, given.rows(index), label)
        for entry in flows:
            if old := found.get(id(entry.parameter)):
                entry = entry._replace(flow=old.flow + entry.flow)
            found[id(entry.parameter)] = entry
        leaf = statistics if leaf is None else leaf + statistics
        total = total + log_prob
    assert leaf is not None  # there are samples
    if not total.isfinite():
        raise ValueError(f"x: got log-likelihood {total.item()}, expected possible samples")
    return EdgeFlows(list(found.values()), leaf, total, len(samples))


def _told(
    circuit: Circuit, x: Tensor | None, mask: Tensor | None, log_w: Tensor | None
) -> tuple[Evidence, Tensor]:
    """The evidence, checked as a whole, and a tensor with a row for each sample."""
    check_evidence(circuit, x, mask, log_w)
    samples, name, form = (log_w, "log_w", "(N, D, C)") if x is None else (x, "x", "(N, D)")
    assert samples is not None  # that was checked
    if samples.dim() != form.count(",") + 1 or not len(samples):
        raise ValueError(f"{name}: got shape {tuple(samples.shape)}, expected {form} with N > 0")
    return Evidence(x, mask, log_w), samples


def _batch_flows(
    circuit: Circuit,
    weights: Sequence[Weights],
    given: Evidence,
    labels: Tensor | None,
) -> tuple[list[WeightFlow], Tensor, Tensor]:
    with torch.no_grad():
        values = circuit.leaf_values(*given)
    with torch.enable_grad():
        values.requires_grad_()
        own = [
            (w.detach().requires_grad_(), None if m is None else m.detach().requires_grad_())
            for w, m in weights
        ]
        root = circuit.propagate(values, own)[-1][0]
        if labels is not None:
            root = root.gather(1, labels[:, None])
        log_prob = root.sum()
        flat = [t for pair in own for t in pair if t is not None]
        leaf_flow, *slopes = torch.autograd.grad(log_prob, [values, *flat])
    with torch.no_grad():
        parameters = [p for layer in circuit.layers for p in layer.log_weights()]
        entries = zip(parameters, flat, slopes, strict=True)
        flows = [WeightFlow(p, w.detach(), w * slope) for p, w, slope in entries]
        return flows, _leaf_statistics(circuit, given, leaf_flow), log_prob.detach()


def _leaf_statistics(circuit: Circuit, given: Evidence, flow: Tensor) -> Tensor:
    """What leaves learn from values where they are observed, and from soft evidence elsewhere."""
    x, mask, log_w = given
    if x is None:
        assert log_w is not None
        return circuit.leaf.soft_statistics(circuit.soft_by_fold(log_w), flow)
    folds = circuit.by_fold(x)
    if mask is None:
        return circuit.leaf.statistics(folds, flow)
    observed = circuit.by_fold(mask)
    hard = flow * observed[..., None]
    found = circuit.leaf.statistics(folds.masked_fill(~observed, 0), hard)
    if log_w is None:
        return found
    return found + circuit.leaf.soft_statistics(circuit.soft_by_fold(log_w), flow - hard)


def em_step(
    circuit: Circuit,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    log_w: Tensor | None = None,
    labels: Tensor | None = None,
    step_size: float = 1.0,
    pseudocount: float = 0.0,
    leaf_pseudocount: float | Tensor = 0.0,
    batch_size: int | None = None,
) -> float:
    """Take one step of expectation maximisation.

    Args:
        circuit: The circuit, changed in place.
        x: `(N, D)`, values; None means that all evidence is soft.
        mask: `(N, D)` bool, True where observed.
        log_w: `(N, D, C)`, soft evidence where `x` is not observed; see `Circuit.forward`.
        labels: `(N,)`, the class of each sample, needed where there are several.
        step_size: How far to go towards the most likely parameters of this data: 1 for all data at
            once, less for batches.
        pseudocount: Added to each entry of each row of weights that is not 0.
        leaf_pseudocount: Added to each entry of each leaf's distribution; `(D, C)` for its own
            value for each variable and category.
        batch_size: Samples at a time; all by default. It changes memory, not the step.

    Returns:
        Mean log-likelihood before the step.

    Raises:
        ValueError: A step size outside (0, 1], a pseudocount below 0, or see `edge_flows`.

    Source:
        Peharz et al., "Einsum Networks: Fast and Scalable Learning of Tractable Probabilistic
        Circuits", 2020, section 3.5.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced
        >>> circuit, x = Circuit(balanced(4), CategoricalLeaf(3)), torch.randint(0, 3, (50, 4))
        >>> em_step(circuit, x) < em_step(circuit, x)
        True
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size: got {step_size}, expected a number in (0, 1]")
    for name, value in (("pseudocount", pseudocount), ("leaf_pseudocount", leaf_pseudocount)):
        if (least := float(torch.as_tensor(value).min())) < 0:
            raise ValueError(f"{name}: got {least}, expected at least 0")
    flows = edge_flows(circuit, x, mask, log_w=log_w, labels=labels, batch_size=batch_size)
    with torch.no_grad():
        for parameter, weight, flow in flows.weights:
            old = weight.flatten(2)
            new = blend(old, flow.flatten(2) + pseudocount * (old > 0).to(old), 2, step_size)
            parameter.copy_(new.log().view_as(parameter))
        if isinstance(leaf_pseudocount, Tensor):
            scope = circuit.scope
            leaf_pseudocount = leaf_pseudocount.to(scope.device).index_select(0, scope)
        circuit.leaf.update(flows.leaf, leaf_pseudocount, step_size)
    return flows.log_likelihood.item() / flows.num_samples


def em_fit(
    circuit: Circuit,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    log_w: Tensor | None = None,
    labels: Tensor | None = None,
    epochs: int = 40,
    batch_size: int | None = None,
    step_size: tuple[float, float] = (0.1, 0.01),
    schedule: str = "cosine",
    pseudocount: float = 0.0,
    leaf_pseudocount: float | Tensor = 0.0,
    start: int = 0,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Fit by expectation maximisation, on all data at once or on batches.

    A run can be taken up again: keep the circuit's `state_dict` and the generator's state after an
    epoch, and pass the number of epochs done as `start`.

    Args:
        circuit: The circuit, changed in place.
        x: `(N, D)`, values; None means that all evidence is soft.
        mask: `(N, D)` bool, True where observed.
        log_w: `(N, D, C)`, soft evidence where `x` is not observed; see `Circuit.forward`.
        labels: `(N,)`, the class of each sample, needed where there are several.
        epochs: Passes over the data.
        batch_size: Samples a step; None takes full steps on all data, without a schedule.
        step_size: First and last step size of batches.
        schedule: How the step size falls: `"cosine"` or `"linear"`.
        pseudocount: See `em_step`; counts of the whole data, of which a batch gets its share.
        leaf_pseudocount: See `em_step`; likewise.
        start: Epochs that are done already.
        generator: Source of the order of samples.
        progress: Called after each epoch with its number, from 1, and its mean log-likelihood.

    Returns:
        Mean log-likelihood of each epoch, of each batch before its step.

    Raises:
        ValueError: An unknown schedule, or see `em_step`.

    Example:
        >>> from torchzoo.circuits import CategoricalLeaf, Circuit, balanced
        >>> circuit, x = Circuit(balanced(4), CategoricalLeaf(3)), torch.randint(0, 3, (50, 4))
        >>> len(em_fit(circuit, x, epochs=3, batch_size=20))
        3
    """
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"schedule: got {schedule!r}, expected 'cosine' or 'linear'")
    given, samples = _told(circuit, x, mask, log_w)
    size = batch_size or len(samples)
    steps = math.ceil(len(samples) / size)
    history = []
    for epoch in range(start, epochs):
        total = 0.0
        for index, rows in enumerate(_batches(samples, size, generator)):
            share = len(rows) / len(samples)
            x, mask, log_w = given.rows(rows)
            done = (epoch * steps + index) / max(1, epochs * steps - 1)
            log_likelihood = em_step(
                circuit,
                x,
                mask,
                log_w=log_w,
                labels=None if labels is None else labels[rows],
                step_size=1.0 if steps == 1 else _between(*step_size, done, schedule),
                pseudocount=pseudocount * share,
                leaf_pseudocount=leaf_pseudocount * share,
            )
            total += log_likelihood * share
        history.append(total)
        if progress is not None:
            progress(epoch + 1, total)
    return history


def _batches(x: Tensor, size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    if size >= len(x):
        yield torch.arange(len(x), device=x.device)
    else:
        yield from torch.randperm(len(x), generator=generator, device=x.device).split(size)


def _between(first: float, last: float, done: float, schedule: str) -> float:
    """A step size after the share `done` of the steps."""
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return first + (last - first) * done


@torch.no_grad()
def init_from_data(
    circuit: Circuit, x: Tensor, *, noise: float = 0.5, generator: torch.Generator | None = None
) -> None:
    """Start from the data: leaves are noisy copies of the variables' marginals.

    Identical units would stay identical under expectation maximisation; noise parts them. Rows of
    weights are drawn from Dirichlet(1), those of the root are uniform.

    Args:
        circuit: The circuit, changed in place.
        x: `(N, D)`, values.
        noise: Standard deviation of the logarithm of the noise on probabilities.
        generator: Source of randomness.

    Raises:
        ValueError: No samples, or values that leaves can't have.
    """
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, D) with N > 0")
    circuit.leaf_values(x[:0])  # the checks of shape and type
    circuit.leaf.fit_noisily(circuit.by_fold(x), noise, generator)
    for layer in circuit.layers:
        layer.reset_parameters(generator)
    for parameter in circuit.layers[-1].parameters():
        parameter.zero_()
