"""Paper 141: are accepted predictions of an SDM estimator right under shift, and strangers refused?

A head on frozen random features of digits 0 to 7 is trained and calibrated, and then sees rotated,
noisy and inverted digits, and the digits 8 and 9.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.activations import SDMCalibrator, SDMHead, train_sdm_head
from torchzoo.data.digits import digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements

ALPHA = 0.95
KNOWN, STRANGE = tuple(range(8)), (8, 9)
FEATURES, EXEMPLAR = 256, 64
TEST = "test"
SHIFTS = (
    *(f"rotation {degrees}°" for degrees in (5, 10, 15, 30)),
    *(f"noise {sigma}" for sigma in (1, 2, 4)),
    "inversion",
)
SDM, CENTROID, CONFORMAL = "SDM", "SDM without its band", "conformal singletons"
NOMINAL = ("softmax at 0.95", "temperature at 0.95")
MATCHED = ("softmax, matched", "temperature, matched", "distance, matched")
METHODS = (SDM, CENTROID, *NOMINAL, CONFORMAL, *MATCHED)
ENOUGH_SHIFTED, ENOUGH_OF_A_CLASS = 50, 20


def shifted(x: Tensor, shift: str, generator: torch.Generator) -> Tensor:
    """Images `(N, 1, 8, 8)` in [0, 1] after a shift; noise is in grey levels of 16."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    kind, _, amount = shift.partition(" ")
    if kind == "rotation":
        return rotate(x, float(amount.rstrip("°")), InterpolationMode.BILINEAR)
    if kind == "noise":
        return x + float(amount) / 16 * torch.randn(x.shape, generator=generator)
    return 1 - x if kind == "inversion" else x


class Embedding:
    """Frozen random features: `relu(W x + b)` with Gaussian W and b."""

    def __init__(self, generator: torch.Generator) -> None:
        self.weight = torch.randn(FEATURES, 64, generator=generator) / 8
        self.bias = torch.randn(FEATURES, generator=generator) / 8

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias).relu()


def temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature of least cross entropy."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_t), y))

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)


class Baselines:
    """What else may say which predictions to accept, fitted on the same calibration points."""

    @torch.no_grad()
    def __init__(self, head: SDMHead, e: Tensor, y: Tensor, acceptance: float) -> None:
        self.head = head
        logits = head(e).logits
        self.t = temperature(logits, y)
        own = logits.softmax(-1)[range(len(y)), y]
        rank = min(math.ceil((len(y) + 1) * ALPHA), len(y))
        self.quantile = float((1 - own).sort().values[rank - 1])
        count = round(acceptance * len(y))
        self.least = {}
        for name, score in self.scores(e).items():
            ranked = score.sort(descending=True).values
            self.least[name] = float(ranked[count - 1]) if count else math.inf

    @torch.no_grad()
    def scores(self, e: Tensor) -> dict[str, Tensor]:
        """Confidence of each prediction by the matched baselines."""
        logits, exemplar = self.head(e)
        values = (
            logits.softmax(-1).amax(-1),
            (logits / self.t).softmax(-1).amax(-1),
            -self.head.neighbours(exemplar, 1)[0][:, 0],
        )
        return dict(zip(MATCHED, values, strict=True))

    @torch.no_grad()
    def accept(self, e: Tensor) -> dict[str, Tensor]:
        scores = self.scores(e)
        accepted = {name: score >= self.least[name] for name, score in scores.items()}
        for name, plain in zip(NOMINAL, MATCHED, strict=False):
            accepted[name] = scores[plain] >= ALPHA
        sets = 1 - self.head(e).logits.softmax(-1) <= self.quantile
        accepted[CONFORMAL] = sets.sum(-1) == 1
        return accepted


def _accepted(calibrator: SDMCalibrator, baselines: Baselines, e: Tensor) -> dict[str, Tensor]:
    ours = {SDM: calibrator.predict(e), CENTROID: calibrator.predict(e, bound="centroid")}
    return {name: found.accept for name, found in ours.items()} | baselines.accept(e)


def trial(context: Context) -> dict[str, float]:
    generator = torch.Generator().manual_seed(context.seed)
    data = digits(KNOWN, seed=context.seed, test_fraction=0.3)
    embed = Embedding(generator)
    e, y = embed(data.train_x), data.train_y
    order = torch.randperm(len(y), generator=generator)
    training, calibration = order.tensor_split([round(len(y) * 4 / 7)])
    held = e[calibration], y[calibration]

    head = SDMHead(FEATURES, len(KNOWN), exemplar_dim=EXEMPLAR)
    train_sdm_head(
        head,
        (e[training], y[training]),
        held,
        epochs=context.options["epochs"],
        generator=generator,
    )
    calibrator = SDMCalibrator(ALPHA).fit(head, [held])
    baselines = Baselines(head, *held, calibrator.predict(held[0]).accept.float().mean().item())

    figures = {"empty region": float(calibrator.accepts_nothing)}
    for kind in (TEST, *SHIFTS):
        context.progress(kind)
        seen = embed(shifted(data.test_x, kind, generator))
        found = calibrator.predict(seen)
        right = found.label == data.test_y
        for name, accepted in _accepted(calibrator, baselines, seen).items():
            figures[f"{name}: accepted, {kind}"] = accepted.sum().item()
            figures[f"{name}: right, {kind}"] = (accepted & right).sum().item()
        figures[f"accuracy without refusals, {kind}"] = right.float().mean().item()
        if kind == TEST:
            for c in KNOWN:
                mine = found.accept & (found.label == c)
                figures[f"{SDM}: accepted as {c}"] = mine.sum().item()
                figures[f"{SDM}: right as {c}"] = (mine & right).sum().item()
            figures["test images"] = len(right)
    strange = digits(STRANGE, seed=context.seed)
    seen = embed(torch.cat([strange.train_x, strange.test_x]))
    for name, accepted in _accepted(calibrator, baselines, seen).items():
        figures[f"{name}: accepted of 8 and 9"] = accepted.float().mean().item()
    return figures


def pooled(measured: Measurements, method: str, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Accepted and rightly accepted images, over seeds and kinds."""
    return tuple(
        round(sum(sum(measured[f"{method}: {what}, {kind}"].values) for kind in kinds))
        for what in ("accepted", "right")
    )  # type: ignore[return-value]


def _share(right: int, accepted: int) -> float:
    return right / accepted if accepted else math.nan


def _shift(measured: Measurements) -> tuple[bool | None, str]:
    counts = {name: pooled(measured, name, SHIFTS) for name in METHODS}
    shares = {name: _share(right, accepted) for name, (accepted, right) in counts.items()}
    text = ", ".join(f"{name} {shares[name]:.4f} of {counts[name][0]}" for name in METHODS)
    if counts[SDM][0] < ENOUGH_SHIFTED:
        return None, text
    return shares[SDM] >= ALPHA and all(not shares[name] >= ALPHA for name in NOMINAL), text


def _in_distribution(measured: Measurements) -> tuple[bool, str]:
    failed = sum(measured["empty region"].values)
    texts, holds = [], failed == 0
    judged = 0
    for c in KNOWN:
        accepted, right = (
            round(sum(measured[f"{SDM}: {what} as {c}"].values)) for what in ("accepted", "right")
        )
        texts.append(f"{c}: {right} of {accepted}")
        if accepted >= ENOUGH_OF_A_CLASS:
            judged += 1
            holds &= _share(right, accepted) >= ALPHA
    total = sum(measured["test images"].values)
    for name in METHODS:
        accepted, right = pooled(measured, name, (TEST,))
        texts.append(f"{name} {_share(right, accepted):.4f} of {100 * accepted / total:.0f} %")
    return holds and judged > 0, f"{failed:.0f} seeds with an empty region; " + ", ".join(texts)


def _strangers(measured: Measurements) -> tuple[bool, str]:
    shares = {name: measured[f"{name}: accepted of 8 and 9"] for name in METHODS}
    ours = shares[SDM]
    to_softmax, to_distance = ours - shares[MATCHED[0]], ours - shares[MATCHED[2]]
    holds = to_softmax.mean < -to_softmax.std_error and to_distance.mean <= to_distance.std_error
    text = ", ".join(f"{name} {share}" for name, share in shares.items())
    return holds, f"{text}; SDM less softmax {to_softmax}, less distance {to_distance}"


def plot(measured: Measurements, figure: Any) -> None:
    """Accuracy of what is accepted and how much that is, by shift, and strangers accepted."""
    accuracy, share, strange = figure.subplots(1, 3, width_ratios=(2, 2, 1.3))
    kinds = (TEST, *SHIFTS)
    rows = range(len(kinds))
    total = sum(measured["test images"].values)
    colours = dict(zip(METHODS, [f"C{i}" for i in range(len(METHODS))], strict=True))
    for name in (SDM, CENTROID, *NOMINAL, MATCHED[0], MATCHED[2]):
        counts = [pooled(measured, name, (kind,)) for kind in kinds]
        style = {"color": colours[name], "label": name, "ms": 4, "lw": 1}
        accuracy.plot([_share(right, n) for n, right in counts], rows, "-o", **style)
        share.plot([100 * n / total for n, _ in counts], rows, "-o", **style)
    plain = [measured[f"accuracy without refusals, {kind}"].mean for kind in kinds]
    accuracy.plot(plain, rows, ":", color="0.4", label="no refusals")
    accuracy.axvline(ALPHA, color="0.6", lw=0.8)
    for axes in (accuracy, share):
        axes.set_yticks(rows, kinds, fontsize=8)
        axes.invert_yaxis()
    share.set_yticklabels([])
    accuracy.set_xlabel("accuracy of the accepted", fontsize=9)
    share.set_xlabel("accepted, %", fontsize=9)
    accuracy.legend(fontsize=7, loc="upper left")
    for place, name in enumerate(METHODS):
        values = [100 * v for v in measured[f"{name}: accepted of 8 and 9"].values]
        strange.plot(values, [place] * len(values), "o", color=colours[name], alpha=0.5, ms=4)
    strange.set_yticks(range(len(METHODS)), METHODS, fontsize=7)
    strange.invert_yaxis()
    strange.set_xlim(left=0)
    strange.set_xlabel("8 and 9 accepted, %", fontsize=9)


EXPERIMENT = Experiment(
    paper=141,
    claim=Claim(
        statement=(
            "The estimator's uncertainty is remarkably robust to distribution shift and to inputs "
            "out of distribution, and suits selective classification."
        ),
        figure="accepted predictions stay right at the level asked for, under shift too",
        source="abstract",
    ),
    setup=(
        "Digits 0 to 7, 40 % for training, 30 % for calibration, 30 % for test; embeddings are 256 "
        "frozen random ReLU features, the head is linear to 64 exemplar entries and 8 classes, "
        "alpha is 0.95 and the decision is by the lower bound. Test images are shifted by "
        "rotation, noise of 1, 2 and 4 of 16 grey levels, and inversion; digits 8 and 9 are out "
        "of distribution. Counts are pooled over the seeds. Decisions by the middle of the band "
        "are shown and not judged."
    ),
    baseline=(
        "the same head's softmax and temperature-scaled softmax at 0.95, and split conformal "
        "singletons; softmax, temperature and distance to the nearest training point at "
        "thresholds that accept as many calibration points as SDM"
    ),
    criteria=(
        Criterion(
            "shifted images that are accepted, pooled: SDM right on at least 95 %, softmax and "
            "temperature at 0.95 on fewer; void with fewer than 50 accepted",
            _shift,
        ),
        Criterion(
            "test images that are accepted: right on at least 95 % for every predicted class with "
            "20 or more, pooled, and no seed with an empty region",
            _in_distribution,
        ),
        Criterion(
            "share of the digits 8 and 9 accepted: SDM below softmax at matched acceptance by more "
            "than one standard error, and not above the distance by more than one",
            _strangers,
        ),
    ),
    budgets={
        "full": {"seeds": 5, "epochs": 50},
        "smoke": {"seeds": 1, "epochs": 2},
    },
    trial=trial,
    plot=plot,
)
