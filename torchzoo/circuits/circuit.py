"""Probabilistic circuits: sums, products and leaves whose marginals are exact and fast.

A circuit is a smooth, decomposable graph. In log space, with a region's units indexed by o,

    leaf:     v_k = log p_k(x_i)                        (log 1 = 0 where x_i is not observed)
    product:  a_k = sum over the parts of a partition of their v_k
    sum:      v_o = log sum_k w_ok exp(a_k),            w = softmax(log_weight) over inputs
    mixing:   v_o = log sum_p m_op exp(v_po)            over the partitions p of a region

so that the root is normalised, and any marginal is one pass, linear in the number of edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from torchzoo.circuits import converters, pairs, products, queries, sampling
from torchzoo.circuits.builders import hclt
from torchzoo.circuits.evidence import check_evidence, check_values
from torchzoo.circuits.folded_layers import Contract, CPSum, SumLayer, TuckerSum, Weights
from torchzoo.circuits.inputs import CategoricalLeaf
from torchzoo.circuits.leaf import Leaf
from torchzoo.circuits.region_graph import RegionGraph
from torchzoo.circuits.schedule import schedule
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

__all__ = ["Circuit"]

SUMS: dict[str, type[SumLayer]] = {"cp": CPSum, "tucker": TuckerSum}
TIES = ("none", "sums", "leaves", "all")


@register(
    paper=82,
    example=lambda: Example(
        kwargs={
            "region_graph": hclt([-1, 0, 0, 1]),
            "leaf": CategoricalLeaf(3),
            "num_units": 4,
            "num_classes": 2,
        },
        inputs=(torch.randint(0, 3, (5, 4)),),
        bad_options={"num_units": 0, "num_leaf_units": 0, "sum": "max", "num_classes": 0},
    ),
    compare="`bench --op circuit_step` has a training step beside plain sums of exponentials",
)
class Circuit(ZooModel):
    """Probabilistic circuit over `D` variables, evaluated layer by layer in log space.

    `forward` gives `log p(x_observed | class)`. Queries that have an exact answer are methods;
    those that have none for the circuit at hand raise a ValueError that says why.

    Args:
        region_graph: How variables are split; see the builders of `torchzoo.circuits`.
        leaf: The distributions of single variables, a template.
        num_units: Units of a region; by default the region graph's, else 16.
        num_leaf_units: Units of a leaf region; `num_units` by default.
        sum: `"cp"`, sums over units that parts share, or `"tucker"`, over pairs of units of two
            parts.
        num_classes: Units of the root: a distribution each, over shared parts.
        tie: What has one set of weights everywhere: `"none"`, `"sums"` (but the root's),
            `"leaves"`, or `"all"`; a chain of tied parts is a homogeneous Markov model.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`, integers for discrete leaves
        - mask: `(..., D)`
        - log_w: `(..., D, C)`
        - output: `(..., num_classes)`

    Attributes:
        region_graph: The graph that is evaluated; with `num_leaf_units` other than `num_units` it
            has a sum above every leaf.
        schedule: Where the regions are: `schedule.place[region]` is (slot, row).
        leaf: The leaf layer; its folds are the regions `leaf_regions`.
        scope: `(F,)`, the variable of each fold of the leaf layer.
        layers: The sum layers, deepest first; the last one's only region is the root.

    Returns:
        Log-probabilities (densities) of what is observed, for each class.

    Raises:
        ValueError: A graph that is not smooth and decomposable or doesn't fit the kind of sum, a
            size below 1, an input of the wrong shape or type, or values that leaves can't have.

    Source:
        Poon and Domingos, "Sum-Product Networks: A New Deep Architecture", 2011; folded layers
        Peharz et al., "Einsum Networks", 2020; CP and Tucker sums Loconte et al., "What is the
        Relationship between Tensor Factorizations and Circuits", 2025.

    Example:
        >>> circuit = Circuit(hclt([-1, 0, 1]), CategoricalLeaf(5), num_units=4)
        >>> states = torch.cartesian_prod(*[torch.arange(5)] * 3)
        >>> circuit(states).exp().sum().item()
        1.0...
    """

    scope: Tensor
    layers: Sequence[SumLayer]

    log_prob = queries.log_prob
    log_marginal = queries.log_marginal
    log_conditional = queries.log_conditional
    posterior_marginals = queries.posterior_marginals
    mean = queries.mean
    variance = queries.variance
    expect = queries.expect
    sample = sampling.sample
    max_product_decode = sampling.max_product_decode
    inner_product = pairs.inner_product
    log_inner_product = pairs.log_inner_product
    renyi2_entropy = pairs.renyi2_entropy
    cauchy_schwarz_divergence = pairs.cauchy_schwarz_divergence
    entropy = products.entropy
    entropy_mc = products.entropy_mc
    kl = products.kl
    from_hmm = classmethod(converters.from_hmm)
    from_gmm = classmethod(converters.from_gmm)
    from_chow_liu = classmethod(converters.from_chow_liu)

    def __init__(
        self,
        region_graph: RegionGraph,
        leaf: Leaf,
        *,
        num_units: int | None = None,
        num_leaf_units: int | None = None,
        sum: str = "cp",
        num_classes: int = 1,
        tie: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        region_graph.check()
        units = region_graph.num_units or 16 if num_units is None else num_units
        leaf_units = units if num_leaf_units is None else num_leaf_units
        _check_options(units, leaf_units, sum, num_classes, tie)
        if leaf_units != units:
            region_graph = region_graph.with_leaf_sums()
        self.region_graph = region_graph
        self.schedule = schedule(region_graph, leaf_sums=region_graph.has_leaf_sums)
        self.num_variables, self.num_units, self.num_leaf_units = (
            region_graph.num_variables,
            units,
            leaf_units,
        )
        self.sum, self.num_classes, self.tie = sum, num_classes, tie
        self.leaf_regions = tuple(r for chunk in self.schedule.chunks for r in chunk)
        self.leaf = leaf.resized(
            len(self.leaf_regions),
            leaf_units,
            shared=tie in ("leaves", "all"),
            device=device,
            dtype=dtype,
        )
        variables = [region_graph.regions[region] for region in self.leaf_regions]
        self.register_buffer("scope", torch.tensor(variables, device=device), persistent=False)
        built = nn.ModuleList(self._build_layers(device, dtype))
        self.layers = cast("Sequence[SumLayer]", built)
        self._chunk_sizes = [len(chunk) for chunk in self.schedule.chunks]
        self._spent = self._last_reads()
        self.reset_parameters()

    def _build_layers(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Iterator[SumLayer]:
        tied: dict[torch.Size, nn.Parameter] = {}
        for index, plan in enumerate(self.schedule.layers):
            first, last = index == 0, index == len(self.schedule.layers) - 1
            arities = {len(fold.parts) for fold in plan.folds}
            kind = CPSum if arities == {1} else SUMS[self.sum]
            if kind is TuckerSum and arities != {2}:
                region = next(plan.regions[f.row] for f in plan.folds if len(f.parts) != 2)
                raise ValueError(
                    f"region_graph: got a partition of region {region} that is not into 2 parts, "
                    "expected 2 with sum='tucker'; see region_graph.binarized()"
                )
            layer = kind(
                plan,
                self.schedule,
                self.num_leaf_units if first else self.num_units,
                self.num_classes if last else self.num_units,
                tied=self.tie in ("sums", "all") and not last,
                device=device,
                dtype=dtype,
            )
            if self.tie in ("sums", "all") and not last:
                layer.log_weight = tied.setdefault(layer.log_weight.shape, layer.log_weight)
            yield layer

    def _last_reads(self) -> list[list[int]]:
        """For each layer the slots that no later layer reads."""
        last = {
            slot: index
            for index, layer in enumerate(self.layers)
            for operand in layer.operands
            for slot, _, _ in operand.slots
        }
        return [[s for s, at in last.items() if at == i] for i in range(len(self.layers))]

    def reset_parameters(self) -> None:
        """Draw leaves by their own rule and each row of weights from Dirichlet(1)."""
        self.leaf.reset_parameters()
        for layer in self.layers:
            layer.reset_parameters()

    def weights(self) -> list[Weights]:
        """Linear weights of each layer: of its sums `(F, O, K)` or `(F, O, K, K)`, and mixing."""
        return [
            (layer.weight(), None if layer.mixing is None else layer.mixing.weight())
            for layer in self.layers
        ]

    def leaf_values(
        self, x: Tensor | None = None, mask: Tensor | None = None, log_w: Tensor | None = None
    ) -> Tensor:
        """`(F, B, K)`, log-values of the leaves for a flattened batch of evidence; see `forward`.

        Raises:
            ValueError: See `forward`.
        """
        check_evidence(self, x, mask, log_w)
        soft = None if log_w is None else self.leaf.log_prob_soft(self.soft_by_fold(log_w))
        if x is None:
            assert soft is not None
            return soft
        folds = self.by_fold(x)
        if mask is None:
            check_values(self, folds, None)
            return self.leaf.log_prob(folds)
        observed = self.by_fold(mask)
        check_values(self, folds, observed)
        hard = self.leaf.log_prob(folds.masked_fill(~observed, 0))
        other = torch.zeros_like(hard) if soft is None else soft
        return torch.where(observed[..., None], hard, other)

    def by_fold(self, x: Tensor) -> Tensor:
        """`(F, B)`, for each fold of the leaf layer the entries of its variable in `(..., D)`."""
        return x.reshape(-1, self.num_variables).index_select(1, self.scope).T

    def soft_by_fold(self, log_w: Tensor) -> Tensor:
        """`(F, B, C)`, for each fold of the leaf layer its variable's part of `(..., D, C)`."""
        log_w = log_w.reshape(-1, *log_w.shape[-2:]).to(self.layers[0].log_weight)
        return log_w.transpose(0, 1).index_select(0, self.scope)

    def propagate(
        self,
        leaf_values: Tensor,
        weights: Sequence[Weights] | None = None,
        contract: Contract | None = None,
    ) -> list[Tensor]:
        """Evaluate all layers.

        Args:
            leaf_values: `(F, B, K)`, see `leaf_values`.
            weights: Linear weights in place of the circuit's own.
            contract: What takes the place of `log_einsum_exp`.

        Returns:
            Values of each slot of the schedule, `(R, B, K)`; the last one is the root's.
        """
        values = list(leaf_values.split(self._chunk_sizes))
        for layer, own in zip(self.layers, weights or self.weights(), strict=True):
            values.append(layer(values, own, contract))
        return values

    def _root_values(self, values: list[Tensor]) -> Tensor:
        """`(B, num_classes)` from chunks of leaf values, which are let go when read."""
        nothing = values[0].new_empty(0)
        for layer, weights, spent in zip(self.layers, self.weights(), self._spent, strict=True):
            values.append(layer(values, weights))
            for slot in spent:
                values[slot] = nothing
        return values[-1][0]

    def forward(
        self,
        x: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        log_w: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of evidence for each class.

        Args:
            x: `(..., D)`, values; None means that all evidence is soft.
            mask: `(..., D)` bool, True where `x` is observed; None means everywhere. Elsewhere `x`
                is not read, and the variable is summed out.
            log_w: `(..., D, C)`, soft evidence where `x` is not observed: logarithms of weights of
                the values. All 0 says nothing, and -inf rules a value out.

        Returns:
            `(..., num_classes)`.

        Raises:
            ValueError: A wrong shape or type, a value that a leaf can't have, or no evidence.
        """
        if x is not None and mask is None:
            check_evidence(self, x, mask, log_w)
            folds = self.by_fold(x)
            check_values(self, folds, None)
            root = self._root_values(self.leaf.log_prob_chunks(folds, self._chunk_sizes))
        else:
            leaves = self.leaf_values(x, mask, log_w)
            root = self._root_values(list(leaves.split(self._chunk_sizes)))
        batch = x.shape[:-1] if x is not None else log_w.shape[:-2]  # type: ignore[union-attr]
        return root.view(*batch, self.num_classes)

    def save(self, path: str | Path) -> Path:
        """Write the circuit into a folder: region graph and options as JSON, weights beside it."""
        return self.save_pretrained(path)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> Self:
        """The circuit that `save` wrote."""
        return cls.from_pretrained(path, device=device)

    def extra_repr(self) -> str:
        """Sizes and options in short."""
        sizes = f"num_variables={self.num_variables}, num_units={self.num_units}"
        return f"{sizes}, sum={self.sum!r}, num_classes={self.num_classes}, tie={self.tie!r}"


def _check_options(units: int, leaf_units: int, sum: str, num_classes: int, tie: str) -> None:
    sizes = {"num_units": units, "num_leaf_units": leaf_units, "num_classes": num_classes}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if sum not in SUMS:
        raise ValueError(f"sum: got {sum!r}, expected one of {tuple(SUMS)}")
    if tie not in TIES:
        raise ValueError(f"tie: got {tie!r}, expected one of {TIES}")
