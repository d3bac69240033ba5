"""Universal verification: which predictions of an SDM head are right with probability alpha.

Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025. On calibration points with
SDM outputs p and predictions yhat:

    v_c = G_c(p_c), G_c the empirical distribution of p_c over points whose true class is c
    qt  = v_yhat ln(2 + q)                                        soft bin; floor(qt) = 0 is outside
    pt  = softmax(ln(2 + qt) W v)                                 rescaled, W fitted on these points
    psi_c = the 1 - alpha quantile of pt_c over points of true class c with qt >= qt_min

with the least qt_min for which all psi_c >= alpha. A prediction is accepted if floor(qt) > 0,
qt >= qt_min, argmax pt = yhat and {c : pt_c >= psi_c} = {yhat}. By default it is judged at the
lower end of a band around G: v_yhat - eps_yhat and v_c + eps_c for the others, where
eps_c = sqrt(ln(2 / (1 - alpha)) / (2 n_c)) (Dvoretzky, Kiefer, Wolfowitz) and n_c counts the
calibration points of class c in lower bins.

Deviations from the paper: W starts at the identity and is fitted on all points at once, a convex
problem, instead of one by one from a random start.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchzoo.activations.sdm import sdm_softmax
from torchzoo.activations.sdm_head import Batches, SDMHead
from torchzoo.activations.sdm_region import (
    SDMRegion,
    bin_medians,
    cauchy_spread,
    dkw_band,
    find_region,
    fit_rescaler,
    rescale,
)
from torchzoo.activations.sdm_tables import cdf, class_table, room_for
from torchzoo.activations.sdm_training import train_sdm_head, view_calibration
from torchzoo.hub import ZooModel


class SDMPrediction(NamedTuple):
    """What a calibrator says of points, `(N,)` each.

    Attributes:
        label: The class of the largest logit.
        p_lower: Estimate of the probability that it is right.
        accept: Whether the point is in the region.
        qt: Soft bin; 0 where the estimate would rather have another class.
        q: Similarity to the training set.
        d: Distance quantile.
        neighbours: Indices of the nearest training points, `(N, k)`; the first q of them are why.
    """

    label: Tensor
    p_lower: Tensor
    accept: Tensor
    qt: Tensor
    q: Tensor
    d: Tensor
    neighbours: Tensor


class _Run(NamedTuple):
    """One calibration: tables, rescaler and region, and the medians of the bins."""

    outputs: tuple[Tensor, Tensor]
    bins: tuple[Tensor, Tensor]
    rescaler: Tensor
    region: SDMRegion
    medians: Tensor


class SDMCalibrator(ZooModel):
    """Selective classification with an SDM head: an answer only where it is right enough.

    Args:
        alpha: Probability of being right that an accepted prediction is to have, above 1/2.
        num_runs: Number of random splits and trainings whose spread widens the bounds; with 1 a
            trained head is calibrated as it is.
        head: The head, for loading a state dict; `fit` sets it.
        calibration_size: Number of calibration points to make room for; `fit` sets it.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025.

    Example:
        >>> e, y = torch.randn(400, 4), torch.arange(400) % 2
        >>> e[:, 0] += 8 * y
        >>> train, calibration = (e[:200], y[:200]), (e[200:], y[200:])
        >>> head = SDMHead(4, 2, exemplar_dim=8)
        >>> _ = train_sdm_head(head, train, calibration, epochs=10)
        >>> found = SDMCalibrator().fit(head, [calibration]).predict(e)
        >>> bool((found.label == y)[found.accept].all())
        True
    """

    head: SDMHead | None
    outputs: Tensor
    output_counts: Tensor
    bins: Tensor
    bin_counts: Tensor
    rescaler: Tensor
    psi: Tensor
    qt_min: Tensor
    offsets: Tensor

    def __init__(
        self,
        alpha: float = 0.95,
        num_runs: int = 1,
        *,
        head: SDMHead | None = None,
        calibration_size: int = 0,
    ):
        super().__init__()
        if not 0.5 < alpha < 1:
            raise ValueError(f"alpha: expected a probability above 1/2 and below 1, got {alpha}")
        if num_runs < 1:
            raise ValueError(f"num_runs: expected at least 1, got {num_runs}")
        self.alpha = alpha
        self.num_runs = num_runs
        self._set_head(head, calibration_size)

    def _set_head(self, head: SDMHead | None, room: int) -> None:
        """Take a head, with empty tables of its number of classes."""
        self.head = head
        classes = head.num_classes if head else 0
        top = _num_bins(head) if head else 0
        like = head.mean if head else torch.zeros(())
        for name, shape in (
            ("outputs", (classes, room)),
            ("bins", (classes, room)),
            ("rescaler", (classes, classes)),
            ("psi", (classes,)),
            ("offsets", (classes, top)),
            ("qt_min", ()),
        ):
            self.register_buffer(name, like.new_zeros(shape))
        self.register_buffer("output_counts", like.new_zeros(classes, dtype=torch.int64))
        self.register_buffer("bin_counts", like.new_zeros(classes, dtype=torch.int64))

    def fit(
        self,
        head: SDMHead,
        loader: Batches,
        *,
        epochs: int = 50,
        batch_size: int = 50,
        lr: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> SDMCalibrator:
        """Calibrate a head, which from then on measures distances against these points.

        Args:
            head: The head. With `num_runs=1` trained and with its training points; with more it is
                trained here, and ends as the run with the largest median similarity left it.
            loader: Batches of embeddings and labels: calibration points, or with more runs all
                points, of which each run trains on a random half and calibrates on the other.
            epochs: Epochs of a run's training, as the next three.
            batch_size: Rows a step.
            lr: Learning rate.
            generator: Draws halves, initial weights and the order of the rows.

        Returns:
            The calibrator. `accepts_nothing` tells that no region was found.

        Raises:
            ValueError: The head has no training points, or a class has no calibration points.
        """
        e, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        if self.num_runs == 1:
            runs, best = [self._calibrate(head, e, y)], 0
        else:
            options = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
            runs, best = self._repeat(head, e, y, options, generator)
        self._keep(head, runs, runs[best])
        return self

    def _repeat(
        self, head: SDMHead, e: Tensor, y: Tensor, options: Any, generator: torch.Generator | None
    ) -> tuple[list[_Run], int]:
        """Split, train and calibrate again and again; gives the runs and which is the best."""
        runs, best, most, state = [], 0, -math.inf, head.state_dict()
        for number in range(self.num_runs):
            order = torch.randperm(len(y), generator=generator).to(y.device)
            train, rest = order.tensor_split(2)
            candidate = copy.deepcopy(head)
            with torch.random.fork_rng():
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                candidate.reset_parameters()
            history = train_sdm_head(
                candidate, (e[train], y[train]), (e[rest], y[rest]), generator=generator, **options
            )
            runs.append(self._calibrate(candidate, e[rest], y[rest]))
            median_q = max(epoch.median_q for epoch in history)
            if median_q >= most:
                best, most, state = number, median_q, candidate.state_dict()
        head.load_state_dict(state)
        return runs, best

    @torch.no_grad()
    def _calibrate(self, head: SDMHead, e: Tensor, y: Tensor) -> _Run:
        classes = head.num_classes
        missing = (y.bincount(minlength=classes) == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"loader: expected points of every class, got none of {missing}")
        view = view_calibration(head, e, y)
        outputs = class_table(view.sdm.gather(1, y.unsqueeze(-1)).squeeze(-1), y, classes)
        v = cdf(*outputs, view.sdm, saturate=True)
        qt = _soft_bin(v, view.q, view.pred)
        weight = fit_rescaler(v, qt, y)
        p = rescale(v, weight, qt)
        inside = (qt >= 1) & (p.argmax(-1) == view.pred)
        region = find_region(p[inside], qt[inside], y[inside], self.alpha)
        hard = torch.where(inside, qt, 0).long()
        medians = bin_medians(p, view.pred, hard, _num_bins(head))
        return _Run(outputs, class_table(qt, y, classes), weight, region, medians)

    def _keep(self, head: SDMHead, runs: list[_Run], best: _Run) -> None:
        """Take over the best run, with bounds widened by how far the runs differ."""
        self._set_head(head, best.bins[0].shape[1])
        self.outputs, self.output_counts = best.outputs
        self.bins, self.bin_counts = best.bins
        self.rescaler, self.psi = best.rescaler, best.region.psi
        least = torch.stack([run.region.qt_min for run in runs])
        self.qt_min = best.region.qt_min + cauchy_spread(least, self.alpha)
        medians = torch.stack([run.medians for run in runs])
        for c, b in (~medians.isnan()).any(0).nonzero().tolist():
            some = medians[:, c, b]
            self.offsets[c, b] = cauchy_spread(some[~some.isnan()], self.alpha)
        same = SDMCalibrator(
            self.alpha, self.num_runs, head=head, calibration_size=self.bins.shape[1]
        )
        self._zoo_config = same._zoo_config

    @property
    def accepts_nothing(self) -> bool:
        """Whether no region was found in which every class reaches alpha."""
        return not bool(self.qt_min.isfinite())

    @torch.no_grad()
    def predict(
        self, e: Tensor, *, bound: Literal["lower", "centroid"] = "lower", neighbours: int = 10
    ) -> SDMPrediction:
        """Predict, and say which predictions to accept.

        Args:
            e: Embeddings, `(N, in_features)`.
            bound: Whether to judge by the lower end of the band or by its middle.
            neighbours: How many training points to return with each.

        Returns:
            `SDMPrediction`.

        Raises:
            ValueError: The calibrator is not fitted, or an unknown bound.
        """
        if self.head is None or not self.bins.shape[1]:
            raise ValueError("head: expected a calibrated one, got none; call fit first")
        if bound not in ("lower", "centroid"):
            raise ValueError(f"bound: expected 'lower' or 'centroid', got {bound!r}")
        if e.ndim != 2:
            raise ValueError(f"e: expected (N, in_features), got {tuple(e.shape)}")
        logits, exemplars = self.head(e)
        label = logits.argmax(-1)
        distances, indices = self.head.neighbours(exemplars, self.head.q_max)
        q, d = self.head.run_length(indices, label), self.head.quantile(distances[:, 0])
        sdm = sdm_softmax(logits, q, d)
        kept = torch.where(sdm.argmax(-1) == label, q, 0)
        v = cdf(self.outputs, self.output_counts, sdm, saturate=True)
        qt, p = self._estimate(v, kept, label)
        if bound == "lower":
            qt, p = self._estimate(self._lowered(v, qt, label), kept, label)
        own = label.unsqueeze(-1)
        least = self.offsets[label, qt.long().clamp_max(self.offsets.shape[1] - 1)]
        p = p.scatter(1, own, (p.gather(1, own) - least.unsqueeze(-1)).clamp(0, 1))
        inside = p >= self.psi
        single = inside.gather(1, own).squeeze(-1) & (inside.sum(-1) == 1)
        accept = single & (qt >= 1) & (qt >= self.qt_min)
        probability = p.gather(1, own).squeeze(-1)
        return SDMPrediction(label, probability, accept, qt, q, d, indices[:, :neighbours])

    def _estimate(self, v: Tensor, q: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Soft bin, 0 where the rescaled output has its maximum elsewhere, and that output."""
        qt = _soft_bin(v, q, label)
        p = rescale(v, self.rescaler, qt)
        return torch.where(p.argmax(-1) == label, qt, 0), p

    def _lowered(self, v: Tensor, qt: Tensor, label: Tensor) -> Tensor:
        """The quantiles at the end of their band that is worst for the label."""
        below = torch.searchsorted(self.bins, qt.expand(len(self.bins), -1).contiguous()).T
        band = dkw_band(below, self.alpha).to(v.dtype)
        sign = torch.ones_like(v).scatter(1, label.unsqueeze(-1), -1.0)
        return (v + sign * band).clamp(0, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many calibration points as come."""
        room_for(self, state_dict, prefix, ("outputs", "bins"))
        self._zoo_config["calibration_size"] = self.bins.shape[1]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, num_runs={self.num_runs}"


def _soft_bin(v: Tensor, q: Tensor, label: Tensor) -> Tensor:
    """`v_yhat ln(2 + q)`, `(N,)`."""
    return v.gather(1, label.unsqueeze(-1)).squeeze(-1) * torch.log(2 + q.to(v.dtype))


def _num_bins(head: SDMHead) -> int:
    """How many values `floor(qt)` has."""
    return int(math.log(2 + head.q_max)) + 1


class SDMNetwork(nn.Module):
    """A frozen encoder with a fitted calibrator behind it: verified answers on raw inputs.

    Args:
        encoder: Gives embeddings `(N, in_features)`; it is put in evaluation mode and not trained.
        calibrator: A fitted `SDMCalibrator`.

    Source:
        Schmaltz, "Similarity-Distance-Magnitude Universal Verification", 2025.
    """

    def __init__(self, encoder: nn.Module, calibrator: SDMCalibrator):
        super().__init__()
        self.encoder = encoder
        self.calibrator = calibrator
        self.requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def verify(self, x: Tensor, *, bound: Literal["lower", "centroid"] = "lower") -> SDMPrediction:
        """Predictions for inputs of the encoder, each with whether to accept it."""
        return self.calibrator.predict(self.encoder(x), bound=bound)

    def select(self, x: Tensor, *, bound: Literal["lower", "centroid"] = "lower") -> Tensor:
        """Labels `(N,)` where the prediction is accepted, and -1 where it is better not to say."""
        found = self.verify(x, bound=bound)
        return torch.where(found.accept, found.label, -1)

    def forward(self, x: Tensor) -> SDMPrediction:
        return self.verify(x)
