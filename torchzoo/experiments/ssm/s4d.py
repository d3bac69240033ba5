"""Paper 107: does the initialisation decide what a diagonal state space can learn?

One linear S4D layer learns to repeat its input after a delay, from each of the initialisations and
from two ablations, with the full S4 layer for comparison. A small model with one block then reads
images of digits pixel by pixel, against a GRU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo.data.digits import digits
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.ssm import S4, S4D, S4DBlock, S4DKernel, ssm_param_groups
from torchzoo.trainer import accuracy

LENGTH, DELAY, BAND = 512, 100, 0.1
COPIES, DELAY_STATE, DELAY_BATCH = 32, 16, 8
WIDTH, DIGIT_STATE, DIGIT_BATCH = 32, 16, 64
LR = 1e-2

STRUCTURED = ("lin", "inv", "legs")
ABLATIONS = ("real", "random")
READERS = ("lin", "legs", "GRU")
S4_ARM = "S4"


def mse_name(arm: str) -> str:
    """Name of the figure: error of the delay task, 1 for predicting zero."""
    return f"delay, {arm}: mean squared error"


def accuracy_name(arm: str) -> str:
    """Name of the figure: test accuracy on digits."""
    return f"digits, {arm}: accuracy"


# The delay task


def noise(count: int, generator: torch.Generator) -> Tensor:
    """Sequences `(count, LENGTH)` of unit variance from the lowest tenth of all frequencies."""
    spectrum = torch.zeros(count, LENGTH // 2 + 1, dtype=torch.complex64)
    kept = round(BAND * spectrum.shape[1])
    shape = (count, kept)
    spectrum[:, 1 : kept + 1] = torch.randn(shape, generator=generator, dtype=torch.complex64)
    u = torch.fft.irfft(spectrum, n=LENGTH)
    return u / u.std(1, correction=0, keepdim=True)


class Delay(nn.Module):
    """One linear layer on copies of the input, and a linear read-out."""

    def __init__(self, arm: str):
        super().__init__()
        kind = S4 if arm == S4_ARM else S4D
        init = "legs" if arm == S4_ARM else arm
        self.ssm = kind(COPIES, DELAY_STATE, init=init, activation=None, post=None)
        self.readout = nn.Linear(COPIES, 1)

    def forward(self, u: Tensor) -> Tensor:
        return self.readout(self.ssm(u[..., None].expand(*u.shape, COPIES)))[..., 0]


def delay_error(model: nn.Module, u: Tensor) -> Tensor:
    """Mean squared error from the first step on at which the input was seen."""
    return F.mse_loss(model(u)[:, DELAY:], u[:, :-DELAY])


def delay_trial(arm: str, seed: int, steps: int, test_rows: int) -> float:
    """Test error of one arm; the arms of a seed see the same sequences."""
    torch.manual_seed(seed)
    model = Delay(arm)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(ssm_param_groups(model, LR))
    for _ in range(steps):
        loss = delay_error(model, noise(DELAY_BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return delay_error(model, noise(test_rows, generator)).item()


# Digits, pixel by pixel


class Reader(nn.Module):
    """A classifier of sequences `(N, L, 1)`: one block or a GRU, mean over time, linear."""

    def __init__(self, arm: str, hidden: int = WIDTH):
        super().__init__()
        self.encoder = nn.Linear(1, WIDTH)
        self.block: nn.Module
        if arm == "GRU":
            self.block = nn.GRU(WIDTH, hidden, batch_first=True)
        else:
            self.block = S4DBlock(WIDTH, DIGIT_STATE, init=arm)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.encoder(x))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def reader(arm: str) -> Reader:
    """A reader; the GRU has the fewest hidden units that give it at least S4D's parameters."""
    if arm != "GRU":
        return Reader(arm)
    enough = size(Reader("lin"))
    return next(gru for h in range(1, 99) if size(gru := Reader("GRU", h)) >= enough)


def batches(rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches of row numbers."""
    while True:
        yield from torch.randperm(rows, generator=generator).split(DIGIT_BATCH)


def train_reader(
    model: nn.Module, x: Tensor, y: Tensor, seed: int, *, steps: float, seconds: float
) -> float:
    """Train until either is used up; returns the processor seconds it took."""
    order = batches(len(x), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(ssm_param_groups(model, LR, weight_decay=0.01))
    start, used, step = time.process_time(), 0.0, 0
    while step < steps and used < seconds:
        rows = next(order)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used, step = time.process_time() - start, step + 1
    return used


def digits_trial(seed: int, epochs: int, rows: int) -> dict[str, float]:
    """Accuracies of the arms; the GRU trains for as long as S4D took."""
    data = digits(seed=seed)
    x, y = data.train_x.flatten(1)[:rows, :, None], data.train_y[:rows]
    test_x = data.test_x.flatten(1)[:rows, :, None]
    steps = epochs * -(-len(x) // DIGIT_BATCH)
    figures: dict[str, float] = {}
    used: list[float] = []
    for arm in READERS:
        torch.manual_seed(seed)
        model = reader(arm)
        if arm == "GRU":
            figures["seconds of training"] = sum(used) / len(used)
            limit = {"steps": math.inf, "seconds": figures["seconds of training"]}
        else:
            limit = {"steps": steps, "seconds": math.inf}
        used.append(train_reader(model, x, y, seed, **limit))
        figures[accuracy_name(arm)] = accuracy(model, test_x, data.test_y[:rows])
    return figures


# Speed


@torch.no_grad()
def speed(d_model: int, d_state: int, length: int, tokens: int) -> dict[str, float]:
    """Time of a kernel by `vandermonde` and by all its powers, and tokens a second by steps."""
    kernel = S4DKernel(d_model, d_state)

    def naive() -> Tensor:
        log_Abar, Bbar, C = (part.to(torch.complex64) for part in kernel.discrete())
        powers = (log_Abar[..., None] * torch.arange(length)).exp()
        return 2 * torch.einsum("chn,hnl->chl", C * Bbar, powers).real

    layer = S4D(d_model, d_state).eval()
    layer.setup_step()
    x, state = torch.randn(1, d_model), layer.initial_state(1)
    seconds = {}
    for name, call in {
        "kernel by vandermonde, ms": lambda: kernel(length),
        "kernel by all powers, ms": naive,
    }.items():
        call()
        seconds[name] = 1e3 * min(_seconds(call) for _ in range(5))
    start = time.perf_counter()
    for _ in range(tokens):
        _, state = layer.step(x, state)
    return seconds | {"tokens a second by steps": tokens / (time.perf_counter() - start)}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def trial(context: Context) -> dict[str, float]:
    """All arms of both tasks for one seed."""
    options = context.options
    figures = {}
    for arm in (*STRUCTURED, *ABLATIONS, S4_ARM):
        context.progress(f"delay, {arm}")
        figures[mse_name(arm)] = delay_trial(
            arm, context.seed, options["steps"], options["test_rows"]
        )
    context.progress("digits")
    figures |= digits_trial(context.seed, options["epochs"], options["rows"])
    context.progress("speed")
    return figures | speed(*options["speed"])


# Criteria


def _critical(measured: Measurements) -> tuple[bool, str]:
    holds, texts = True, []
    for ablation in ABLATIONS:
        worse = measured[mse_name(ablation)]
        for arm in STRUCTURED:
            error = measured[mse_name(arm)]
            gain = worse - error
            holds &= gain.mean > gain.std_error and error.mean <= worse.mean / 2
        texts.append(f"{ablation} {worse}")
    texts = [f"{arm} {measured[mse_name(arm)]}" for arm in STRUCTURED] + texts
    return holds, ", ".join(texts)


def _comparable(measured: Measurements) -> tuple[bool, str]:
    ours, theirs = (measured[mse_name(arm)] for arm in ("legs", S4_ARM))
    return ours.mean <= 2 * theirs.mean, f"S4D-LegS {ours}, S4 {theirs}"


def _close(measured: Measurements) -> tuple[bool, str]:
    gap = measured[accuracy_name("lin")] - measured[accuracy_name("legs")]
    return abs(gap.mean) <= 0.03, f"Lin less LegS: {100 * gap.mean:+.1f} points"


def _not_below(measured: Measurements) -> tuple[bool, str]:
    gru = measured[accuracy_name("GRU")]
    gaps = {arm: measured[accuracy_name(arm)] - gru for arm in READERS[:-1]}
    text = ", ".join(f"{arm} {_points(gap)}" for arm, gap in gaps.items())
    seconds = measured["seconds of training"].mean
    return (
        all(gap.mean >= -gap.std_error for gap in gaps.values()),
        f"S4D less GRU: {text} points, {seconds:.1f} s of training each",
    )


def _points(gap: Measurement) -> str:
    return f"{100 * gap.mean:+.1f} ± {100 * gap.std_error:.1f}"


def plot(measured: Measurements, figure: Any) -> None:
    """Errors of the delay task and accuracies on digits, a dot a seed."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    arms = (*STRUCTURED, S4_ARM, *ABLATIONS)
    colours = ["tab:blue"] * 3 + ["tab:green"] + ["tab:red"] * 2
    labels = ["S4D-Lin", "S4D-Inv", "S4D-LegS", "S4-LegS", "S4D-Real", "random"]
    _dots(left, [measured[mse_name(arm)] for arm in arms], colours, labels)
    left.set_yscale("log")
    left.axhline(1, color="0.5", lw=0.8, ls="--")
    left.annotate("predicting zero", (-0.4, 1), (0, 3), textcoords="offset points", fontsize=8)
    left.set_ylim(top=1.8)
    left.set_ylabel("mean squared error")
    left.set_title(f"repeat after {DELAY} steps, one linear layer", fontsize=10)
    names = ["S4D-Lin", "S4D-LegS", "GRU"]
    found = [measured[accuracy_name(arm)] for arm in READERS]
    _dots(right, found, ["tab:blue", "tab:blue", "0.4"], names)
    right.set_ylabel("test accuracy")
    right.set_title("digits by pixels, same training time", fontsize=10)


def _dots(axes: Any, found: list[Measurement], colours: list[str], labels: list[str]) -> None:
    for place, (measurement, colour) in enumerate(zip(found, colours, strict=True)):
        values = measurement.values
        axes.plot([place] * len(values), values, "o", color=colour, alpha=0.5, ms=5)
        axes.plot([place - 0.25, place + 0.25], [measurement.mean] * 2, color=colour, lw=2)
    axes.set_xticks(range(len(found)), labels, fontsize=8)
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.grid(axis="y", alpha=0.3)


EXPERIMENT = Experiment(
    paper=107,
    claim=Claim(
        statement=(
            "The initialisation of a diagonal state matrix is critical: structured ones perform "
            "like S4, real or random ones do not. S4D needs a kernel of two lines only."
        ),
        figure="comparable to S4 in almost all settings; 85 % on average on Long Range Arena",
        source="abstract; the ablations in section 5",
    ),
    setup=(
        f"Delay: noise from the lowest 10 % of frequencies, length {LENGTH}, to be repeated after "
        f"{DELAY} steps by one linear layer on {COPIES} copies of it (N = {DELAY_STATE}) and a "
        "linear read-out; 200 Adam steps at 1e-2, dynamics at 1e-3, batches of 8 new sequences. "
        "Digits: 8 x 8 images as sequences of 64 pixels, one block of width 32, N = 16, mean over "
        "time, 8 epochs of AdamW at 1e-2. A figure of 1 in the delay task is that of predicting "
        "zero. Long Range Arena itself, days of GPU time, is not run."
    ),
    baseline=(
        "the ablations `real` and `random` and S4 with its low-rank part on the same sequences; a "
        "GRU of at least as many parameters that trains for the same processor time"
    ),
    criteria=(
        Criterion(
            "delay: each of Lin, Inv, LegS beats each of real and random by more than a paired "
            "standard error and at most half its error",
            _critical,
        ),
        Criterion("delay: the error of S4D-LegS is no more than twice that of S4", _comparable),
        Criterion("digits: Lin and LegS are within 3 points of each other", _close),
        Criterion(
            "digits: neither Lin nor LegS is below the GRU by more than a paired standard error",
            _not_below,
        ),
    ),
    budgets={
        "full": {
            "seeds": 4,
            "steps": 200,
            "test_rows": 64,
            "epochs": 8,
            "rows": 2000,
            "speed": (256, 64, 1024, 500),
        },
        "smoke": {
            "seeds": 1,
            "steps": 2,
            "test_rows": 2,
            "epochs": 1,
            "rows": 64,
            "speed": (8, 8, 64, 5),
        },
    },
    trial=trial,
    plot=plot,
)
