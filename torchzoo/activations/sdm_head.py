"""A classifier head that looks at its training points: similarity and distance for SDM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.sdm_tables import cdf, class_table, room_for
from torchzoo.hub import ZooModel
from torchzoo.ops import knn
from torchzoo.registry import Comparison, Example, register

Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of embeddings `(B, in_features)` and labels `(B,)`."""


class SDMOutput(NamedTuple):
    """What an `SDMHead` makes of embeddings.

    Attributes:
        logits: `(..., C)`.
        exemplar: The vector that neighbours are searched with, `(..., exemplar_dim)`.
    """

    logits: Tensor
    exemplar: Tensor


@register(
    paper=141,
    example=lambda: Example(
        {"in_features": 6, "num_classes": 3, "exemplar_dim": 5},
        (torch.randn(4, 6),),
        bad_options={
            "in_features": 0,
            "num_classes": 1,
            "exemplar_dim": 0,
            "adaptor": "mlp",
            "q_max": 0,
            "support_size": -1,
            "distance_size": -1,
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 512, "num_classes": 10}, (torch.randn(256, 512),), peers.HEADS
    ),
)
class SDMHead(ZooModel):
    """A classifier on frozen embeddings that knows its training points.

    Args:
        in_features: Length of an embedding.
        num_classes: Number of classes C.
        exemplar_dim: Length M of the exemplar.
        adaptor: How the exemplar is made: `"linear"`, or `"conv"`, a convolution whose kernel
            covers the embedding. They compute the same; the names of the weights differ.
        q_max: How many neighbours are looked at, so the largest similarity.
        normalize: Whether embeddings are standardised by one mean and one deviation over all
            entries of the training set.
        support_size: Number of training points to make room for; `fit_support` sets it.
        distance_size: Room for distances a class, set likewise.
        device: Where the tensors are.
        dtype: Dtype of the parameters.

    Shape:
        - e: `(..., in_features)`

    Returns:
        `SDMOutput`: logits `(..., C)` and exemplars `(..., M)`.

    Raises:
        ValueError: An option out of its range, or embeddings of another length.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025.

    Example:
        >>> head = SDMHead(4, 2, exemplar_dim=8)
        >>> e = torch.tensor([[2.0, 0, 0, 0], [2.1, 0, 0, 0], [0, 0, 0, 2.0]])
        >>> y = head(e).logits.argmax(-1)  # as if all were right
        >>> head.fit_support([(e, y)]).distance(head(e).exemplar).tolist()[0] >= 0
        True
    """

    index: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    """Search in place of `torchzoo.ops.knn`: exemplars `(N, M)` and k to distances and indices."""

    support: Tensor
    support_labels: Tensor
    support_predictions: Tensor
    distances: Tensor
    distance_counts: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        exemplar_dim: int = 1000,
        adaptor: Literal["linear", "conv"] = "linear",
        q_max: int = 1000,
        normalize: bool = True,
        support_size: int = 0,
        distance_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("num_classes", num_classes, 2),
            ("exemplar_dim", exemplar_dim, 1),
            ("q_max", q_max, 1),
            ("support_size", support_size, 0),
            ("distance_size", distance_size, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {value}")
        if adaptor not in ("linear", "conv"):
            raise ValueError(f"adaptor: expected 'linear' or 'conv', got {adaptor!r}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.exemplar_dim = exemplar_dim
        self.q_max = q_max
        self.normalize = normalize
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adaptor: nn.Linear | nn.Conv1d = (
            nn.Linear(in_features, exemplar_dim, **factory)
            if adaptor == "linear"
            else nn.Conv1d(1, exemplar_dim, in_features, in_features, **factory)
        )
        self.classifier = nn.Linear(exemplar_dim, num_classes, **factory)
        indices = torch.empty(support_size, dtype=torch.int64, device=device)
        self.register_buffer("mean", torch.zeros((), **factory))
        self.register_buffer("std", torch.ones((), **factory))
        self.register_buffer("support", torch.zeros(support_size, exemplar_dim, **factory))
        self.register_buffer("support_labels", torch.zeros_like(indices))
        self.register_buffer("support_predictions", torch.zeros_like(indices))
        self.register_buffer("distances", torch.zeros(num_classes, distance_size, **factory))
        counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.register_buffer("distance_counts", counts)

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does, and forget the training points."""
        self.adaptor.reset_parameters()
        self.classifier.reset_parameters()
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)
        self.support = self.support[:0]
        self.support_labels = self.support_labels[:0]
        self.support_predictions = self.support_predictions[:0]
        self.distances = self.distances[:, :0]
        self.distance_counts = torch.zeros_like(self.distance_counts)

    def forward(self, e: Tensor) -> SDMOutput:
        if e.ndim == 0 or e.shape[-1] != self.in_features:
            raise ValueError(f"e: expected (..., {self.in_features}), got {tuple(e.shape)}")
        if self.normalize:
            e = (e - self.mean) / self.std
        # a convolution of one place is a linear map
        exemplar = F.linear(e, self.adaptor.weight.flatten(1), self.adaptor.bias)
        return SDMOutput(self.classifier(exemplar), exemplar)

    def fit_normalization(self, loader: Batches) -> SDMHead:
        """Set mean and deviation (n - 1) to those of all entries of the embeddings; do it first."""
        entries = torch.cat([e.flatten() for e, _ in loader]).double()
        with torch.no_grad():
            self.mean.copy_(entries.mean())
            self.std.copy_(entries.std())
        return self

    @torch.no_grad()
    def fit_support(self, loader: Batches, *, dtype: torch.dtype | None = None) -> SDMHead:
        """Remember the training points as the present weights see them.

        Args:
            loader: Batches of embeddings and labels.
            dtype: Dtype to keep exemplars in, for example `torch.float16`.

        Returns:
            The head; `distance` refers to the training points until a calibrator has been fitted.

        Raises:
            ValueError: Fewer than 2 points, or labels that are no classes.
        """
        outputs = [(*self(e), y) for e, y in loader]
        logits, exemplars, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        if len(labels) < 2:
            raise ValueError(f"loader: expected at least 2 training points, got {len(labels)}")
        _check_labels(labels, self.num_classes)
        self.remember(SDMOutput(logits, exemplars.to(dtype or exemplars.dtype)), labels)
        return self

    def remember(self, output: SDMOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Set the training points, and give nearest distance and similarity of each, `(N,)`."""
        self.support = output.exemplar
        self.support_labels = labels.to(self.support.device, torch.int64)
        self.support_predictions = output.logits.argmax(-1)
        self._zoo_config["support_size"] = len(labels)
        nearest, run = self.search(self.support, self.support_predictions, exclude_self=True)
        self.set_distances(nearest, self.support_labels, run)
        return nearest, run

    def set_distances(self, nearest: Tensor, labels: Tensor, q: Tensor) -> None:
        """Set the distributions F_c from nearest distances, labels and similarities, all `(N,)`."""
        self.distances, self.distance_counts = class_table(
            nearest.to(self.mean.dtype), labels, self.num_classes, keep=q > 0
        )
        self._zoo_config["distance_size"] = self.distances.shape[1]

    def neighbours(self, h: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
        """Distances and indices `(N, k)` of the training points nearest to exemplars `(N, M)`."""
        if not len(self.support):
            raise ValueError("support: expected training points, got none; call fit_support first")
        k = min(k, len(self.support) - exclude_self)
        if self.index is None:
            return knn(h.to(self.support.dtype), self.support, k, exclude_self=exclude_self)
        if not exclude_self:
            return self.index(h, k)
        distances, indices = self.index(h, k + 1)
        other = indices != torch.arange(len(h), device=h.device).unsqueeze(-1)
        other[:, -1] &= ~other.all(-1)  # the point itself was not among them
        return distances[other].view(-1, k), indices[other].view(-1, k)

    def search(
        self, h: Tensor, pred: Tensor, *, exclude_self: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Distance to the nearest training point, and similarity q, both `(N,)`."""
        distances, indices = self.neighbours(h, self.q_max, exclude_self=exclude_self)
        return distances[:, 0], self.run_length(indices, pred)

    def run_length(self, indices: Tensor, pred: Tensor) -> Tensor:
        """How many of the neighbours `(N, k)`, from the first on, have and got this label."""
        right = self.support_labels == self.support_predictions
        agree = right[indices] & (self.support_labels[indices] == pred.unsqueeze(-1))
        return agree.cumprod(-1).sum(-1)

    @torch.no_grad()
    def similarity(self, h: Tensor, pred: Tensor, *, exclude_self: bool = False) -> Tensor:
        """The similarity q of points to the training set.

        Args:
            h: Exemplars, `(..., M)`.
            pred: Their predictions, `(...)`.
            exclude_self: Whether `h` are the training points themselves, in order.

        Returns:
            int64 counts up to `q_max`, `(...)`.

        Raises:
            ValueError: The support is not fitted, or shapes don't fit.
        """
        rows = self._rows(h)
        if pred.shape != h.shape[:-1]:
            raise ValueError(f"pred: expected shape {tuple(h.shape[:-1])}, got {tuple(pred.shape)}")
        return self.search(rows, pred.flatten(), exclude_self=exclude_self)[1].view(pred.shape)

    @torch.no_grad()
    def distance(self, h: Tensor, *, exclude_self: bool = False) -> Tensor:
        """The distance quantile d of points.

        Args:
            h: Exemplars, `(..., M)`.
            exclude_self: Whether `h` are the training points themselves, in order.

        Returns:
            Quantiles in [0, 1], `(...)`: 0 where it is farther off than any known point of some
            class, or a class has no known point.

        Raises:
            ValueError: The support is not fitted, or shapes don't fit.
        """
        rows = self._rows(h)
        nearest = self.neighbours(rows, 1, exclude_self=exclude_self)[0][:, 0]
        return self.quantile(nearest).view(h.shape[:-1])

    def quantile(self, nearest: Tensor) -> Tensor:
        """The quantile d of distances to the nearest training point, both `(N,)`."""
        values = nearest.to(self.distances.dtype).unsqueeze(-1).expand(-1, self.num_classes)
        remaining = 1 - cdf(self.distances, self.distance_counts, values)
        return torch.where(self.distance_counts > 0, remaining, 0).amin(-1)

    def _rows(self, h: Tensor) -> Tensor:
        if h.ndim == 0 or h.shape[-1] != self.exemplar_dim:
            raise ValueError(f"h: expected (..., {self.exemplar_dim}), got {tuple(h.shape)}")
        return h.reshape(-1, self.exemplar_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many training points as come."""
        room_for(self, state_dict, prefix, ("support", "support_labels", "support_predictions"))
        room_for(self, state_dict, prefix, ("distances",))
        self._zoo_config["support_size"] = len(self.support)
        self._zoo_config["distance_size"] = self.distances.shape[1]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, q_max={self.q_max}"


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point() or (labels < 0).any() or (labels >= num_classes).any():
        got = labels.unique().tolist()
        raise ValueError(f"labels: expected integers in 0..{num_classes - 1}, got {got[:10]}")
