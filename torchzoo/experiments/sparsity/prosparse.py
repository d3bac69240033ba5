"""Paper 122: does a slowly rising penalty make a SiLU model sparse at no loss?

A small gated language model is trained with SiLU, and then further in four ways, equally long: with
SiLU still, with relu, with relu and a constant penalty, and with relu and the paper's schedule. The
last is measured with FATReLU too. One token through a large layer as sparse is then timed.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.data.grammar import Grammar
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.experiments.language import Decoder, batches, evaluate, train
from torchzoo.ops.library import backend
from torchzoo.sparsity import (
    ActivationL1,
    SineSparsityScheduler,
    SparseFFN,
    prosparse_convert,
)

ARMS = ("SiLU", "relu", "constant penalty", "rising penalty", "with FATReLU")
WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
WEIGHT = 1.0  # what `smallest_weight` finds
THRESHOLD = 0.01


class Text:
    """Training and validation text of one seed."""

    def __init__(self, seed: int, options: Mapping[str, Any]):
        self.source = Grammar()
        self.rows = self.source.sample(options["rows"], options["length"], seed=2 * seed)
        held = self.source.sample(options["rows"] // 4, options["length"], seed=2 * seed + 1)
        self.held = next(batches(held, size=options["held"], seed=seed))

    def batches(self, seed: int) -> Iterator[Tensor]:
        return batches(self.rows, seed=seed)


def pretrained(text: Text, options: Mapping[str, Any]) -> Decoder:
    """The SiLU model that every arm starts from."""
    model = Decoder(text.source.vocab, 64, 2, 4, 256, activation="silu")
    train(model, text.batches(1), options["pretrain"])
    return model


def schedule(weight: float, steps: int) -> SineSparsityScheduler:
    """The paper's stages for LLaMA2-7B, brought to these steps and this last weight."""
    return SineSparsityScheduler.published("llama2-7b").scaled(steps, weight)


def go_on(
    model: Decoder, text: Text, options: Mapping[str, Any], weight_at: Callable[[float], float]
) -> Decoder:
    """Train a copy of the model further, with a penalty whose weight follows the steps."""
    steps, model = options["steps"], copy.deepcopy(model)
    with ActivationL1(model) as l1:
        train(
            model,
            text.batches(2),
            steps,
            lr=1e-3,
            warmup=10,
            penalty=lambda step: weight_at(step + 1) * l1.value(),
        )
    return model


def to_relu(model: nn.Module, threshold: float | None = None) -> Any:
    """A copy whose layers have relu, or FATReLU."""
    model = copy.deepcopy(model)
    prosparse_convert(model, threshold=threshold)
    return model


@torch.no_grad()
def sparsity(model: nn.Module, tokens: Tensor) -> float:
    """Share of exact zeros among the values x1 that go into the down-projections."""
    zeros: list[Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, SparseFFN)]

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, SparseFFN)
        zeros.append((layer.hidden(inputs[0]) == 0).double().mean())

    handles = [layer.register_forward_hook(count) for layer in layers]
    model(tokens[:, :-1])
    for handle in handles:
        handle.remove()
    return torch.stack(zeros).mean().item()


def smallest_weight(options: Mapping[str, Any], seed: int = 1000) -> float:
    """The least of `WEIGHTS` with which a constant penalty passes a sparsity of 85 %.

    Called once, on a seed that no verdict sees.
    """
    torch.manual_seed(seed)
    text = Text(seed, options)
    start = to_relu(pretrained(text, options))
    for weight in WEIGHTS:
        model = go_on(start, text, options, lambda t, weight=weight: weight)  # type: ignore[misc]
        if sparsity(model, text.held) > 0.85:
            return weight
    return WEIGHTS[-1]


def trial(context: Context) -> dict[str, float]:
    """Sparsity and loss of each arm, and the time of a layer that is as sparse."""
    options = context.options
    text = Text(context.seed, options)
    context.progress("pretraining")
    parent = pretrained(text, options)
    relu, nothing = to_relu(parent), schedule(0.0, options["steps"])
    rising = schedule(WEIGHT, options["steps"])
    models: dict[str, nn.Module] = {}
    for arm, start, weight_at in (
        (ARMS[0], parent, nothing.value_at),
        (ARMS[1], relu, nothing.value_at),
        (ARMS[2], relu, lambda t: WEIGHT),
        (ARMS[3], relu, rising.value_at),
    ):
        context.progress(arm)
        models[arm] = go_on(start, text, options, weight_at)
    models[ARMS[4]] = to_relu(models[ARMS[3]], THRESHOLD)
    figures = {"entropy": text.source.entropy, "loss, parent": evaluate(parent, text.held)}
    for arm, model in models.items():
        figures[f"sparsity, {arm}"] = sparsity(model, text.held)
        figures[f"loss, {arm}"] = evaluate(model, text.held)
    last = figures[f"loss, {ARMS[4]}"]
    figures["perplexity, with FATReLU / parent"] = math.exp(last - figures["loss, parent"])
    figures["perplexity, with FATReLU / SiLU"] = math.exp(last - figures[f"loss, {ARMS[0]}"])
    context.progress("timing")
    figures["native"] = float(backend("sparse_ffn")[0] == "native")
    share = 1 - figures[f"sparsity, {ARMS[4]}"]
    figures["time, dense / sparse"] = speed(
        share, context.seed, options["layer"], options["repeats"]
    )
    return figures


@torch.no_grad()
def speed(share: float, seed: int, layer_size: tuple[int, int], repeats: int) -> float:
    """Time of a dense layer over that of `SparseFFN` for a token with this share of neurons."""
    torch.manual_seed(seed)
    dim, hidden = layer_size
    layer = SparseFFN(dim, hidden, policy="sparse", bias=True).eval()
    assert layer.gate_proj is not None
    x = torch.randn(1, dim)
    z = layer.gate_proj(x)
    below = z.flatten().kthvalue(min(hidden, max(1, round((1 - share) * hidden)))).values
    layer.gate_proj.bias -= below
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for _ in range(repeats):
        for name, call in (("sparse", partial(layer, x)), ("dense", partial(plain, layer, x))):
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["dense"]) / statistics.median(times["sparse"])


def plain(layer: SparseFFN, x: Tensor) -> Tensor:
    """The usual gated layer with relu: three products."""
    assert layer.gate_proj is not None
    return layer.down_proj(torch.relu(layer.gate_proj(x)) * layer.up_proj(x))


def _sparse(measured: Measurements) -> tuple[bool, str]:
    gain = measured["sparsity, with FATReLU"] - measured["sparsity, relu"]
    losses = [measured[f"loss, {arm}"].mean for arm in (ARMS[4], ARMS[0])]
    over = losses[0] / losses[1] - 1
    text = (
        f"{100 * measured['sparsity, with FATReLU'].mean:.1f} % against "
        f"{100 * measured['sparsity, relu'].mean:.1f} %; loss {losses[0]:.4f}, "
        f"{100 * over:+.2f} % over SiLU's"
    )
    return gain.mean >= 0.2 and over <= 0.02, text


def _rising(measured: Measurements) -> tuple[bool, str]:
    gap = measured["loss, constant penalty"] - measured["loss, rising penalty"]
    less = measured["sparsity, constant penalty"] - measured["sparsity, rising penalty"]
    holds = gap.mean > gap.std_error and gap.mean > 0 and less.mean <= 0.03
    return holds, f"loss lower by {gap}, sparsity lower by {100 * less.mean:.1f} points"


def _fast(measured: Measurements) -> tuple[bool | None, str]:
    share = 1 - measured["sparsity, with FATReLU"].mean
    ratio = measured["time, dense / sparse"]
    text = f"{ratio}; weights read allow {3 / (1 + 2 * share):.2f}"
    return None if measured["native"].mean < 1 else ratio.mean >= 1.5, text


def plot(measured: Measurements, figure: Any) -> None:
    """Loss against sparsity of every arm, and the time of a layer."""
    plane, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, arm in enumerate(ARMS):
        x = [100 * value for value in measured[f"sparsity, {arm}"].values]
        plane.plot(x, measured[f"loss, {arm}"].values, "os^Dv"[place], label=arm, alpha=0.8)
    plane.set(xlabel="zeros among neurons, %", ylabel="validation loss, nats", xlim=(-4, 104))
    plane.legend(fontsize=8)
    plane.grid(alpha=0.3)
    plane.set_title("after as many steps", fontsize=10)
    share = 1 - measured["sparsity, with FATReLU"].mean
    ratio = measured["time, dense / sparse"]
    bars.bar([0, 1], [ratio.mean, 3 / (1 + 2 * share)], 0.6, color=["tab:blue", "0.8"])
    bars.errorbar([0], [ratio.mean], yerr=[ratio.std_error], color="black", capsize=3)
    bars.axhline(1, color="0.5", lw=0.8)
    bars.set_xticks([0, 1], ["measured", "weights\nread"])
    bars.set_ylabel("times as fast as the dense layer")
    bars.set_title("one token, 2048 × 5632", fontsize=10)


EXPERIMENT = Experiment(
    paper=122,
    claim=Claim(
        statement=(
            "Relu in place of Swish, a penalty on activations that rises along sine curves, and a "
            "shifted threshold make language models far sparser than relu alone does, at "
            "performance comparable to the originals; constant penalties do worse."
        ),
        figure="89.32 % and 88.80 % zeros in LLaMA2-7B and 13B, 66.98 % with relu alone",
        source="abstract and table of constant factors",
    ),
    setup=(
        "Two-layer gated decoder, width 64, 256 neurons, context 32, on text of a third-order "
        "Markov source with nested brackets, whose entropy is known. 250 steps of 32 windows with "
        "SiLU, then 200 steps an arm from there, the same batches for each; the stages of "
        f"LLaMA2-7B, shortened. Last weight of both penalties {WEIGHT:g}: the least of "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)} that takes the constant one past 85 % on a seed "
        "that is not among these. FATReLU at 0.01. The penalty is a mean over tokens and neurons, "
        "summed over layers."
    ),
    baseline="SiLU, relu without penalty, and a constant penalty, for as many steps",
    criteria=(
        Criterion(
            "sparsity with FATReLU at least 20 points above relu's, loss within 2 % of SiLU's",
            _sparse,
        ),
        Criterion(
            "rising penalty: loss below the constant one's by more than a standard error, sparsity "
            "not lower by more than 3 points",
            _rising,
        ),
        Criterion(
            "one token through a layer of 2048 × 5632 as sparse: at least 1.5 times as fast as the "
            "dense layer on this processor (void without the native kernel)",
            _fast,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "pretrain": 250,
            "steps": 200,
            "rows": 256,
            "length": 1024,
            "layer": (2048, 5632),
            "held": 256,
            "repeats": 21,
        },
        "smoke": {
            "seeds": 1,
            "pretrain": 3,
            "steps": 3,
            "rows": 8,
            "length": 64,
            "layer": (64, 128),
            "held": 4,
            "repeats": 3,
        },
    },
    trial=trial,
    plot=plot,
)
