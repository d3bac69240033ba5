"""Paper 145: is CETT the better way to prune, and do relu and SiLU part ways as training goes on?

Two small plain language models, one with relu and one with SiLU, are trained on the same text.
Along the way the share of neurons that is needed for a perplexity of at most 1 % more is measured,
and for relu the share that is not zero, to which the paper's law is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.data.grammar import Grammar
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.experiments.language import Decoder, batches, evaluate, language_loss, train
from torchzoo.sparsity import SparseFFN, SparsingLaw, cett_ppl, uniform_ppl

ACTIVATIONS = ("relu", "silu")
RATIOS, ZEROS, KNOWN = 6, 20, 15
TOKENS_A_STEP = 32 * 32


def checkpoints(steps: int, count: int) -> list[int]:
    """Steps from the end of the first fifth to the last, evenly spread by their logarithm."""
    import numpy as np

    return [round(step) for step in np.geomspace(max(1, steps / 5), steps, count)]


def ratio_name(activation: str, i: int) -> str:
    return f"neurons needed, {activation}, {i + 1}"


def nonzero_name(i: int) -> str:
    return f"neurons not zero, relu, {i + 1}"


@torch.no_grad()
def nonzero(model: nn.Module, tokens: Tensor) -> float:
    """Share of neurons that are not zero, the mean over layers."""
    shares: list[Tensor] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, SparseFFN)
        shares.append((layer.hidden(inputs[0]) != 0).double().mean())

    layers = [layer for layer in model.modules() if isinstance(layer, SparseFFN)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(tokens[:, :-1])
    for handle in handles:
        handle.remove()
    return torch.stack(shares).mean().item()


def forecast_errors(tokens: Sequence[float], ratios: Sequence[float]) -> tuple[float, float]:
    """Root mean squared error beyond the known points: of the law, and of a + b log D."""
    import numpy as np

    d, a = np.asarray(tokens, dtype=float), np.asarray(ratios, dtype=float)
    law = SparsingLaw("relu").fit(d[:KNOWN], a[:KNOWN]).predict(d[KNOWN:]).numpy()
    line = np.polyval(np.polyfit(np.log(d[:KNOWN]), a[:KNOWN], 1), np.log(d[KNOWN:]))
    errors = (float(np.sqrt(np.mean((guess - a[KNOWN:]) ** 2))) for guess in (law, line))
    return next(errors), next(errors)


def rank_correlation(ratios: Sequence[float]) -> float:
    """Spearman's, with the order in training; 0 where the ratio never changes."""
    from scipy.stats import spearmanr

    if len(set(ratios)) == 1:
        return 0.0
    return float(spearmanr(range(len(ratios)), ratios).statistic)


def trial(context: Context) -> dict[str, float]:
    """Train both models; ratios along the way, rival rules at the end, and the law's forecast."""
    options, seed = context.options, context.seed
    source = Grammar()
    text = source.sample(options["rows"], options["length"], seed=2 * seed)
    held_text = source.sample(options["rows"] // 4, options["length"], seed=2 * seed + 1)
    held = next(batches(held_text, size=options["held"], seed=seed))
    measured = next(batches(held_text, size=options["measured"], seed=seed + 1))
    search: dict[str, Any] = {"loss_fn": language_loss, "tol": 1e-3}
    steps, figures = options["steps"], {"entropy": source.entropy}
    dense = checkpoints(steps, ZEROS)
    few = checkpoints(steps, RATIOS)
    for activation in ACTIVATIONS:
        context.progress(activation)
        torch.manual_seed(seed)
        model = Decoder(source.vocab, 64, 2, 4, 256, gated=False, activation=activation)

        def look(step: int, model: Decoder = model, activation: str = activation) -> None:
            for i in range(RATIOS):
                if few[i] == step:
                    report = cett_ppl(
                        model, [measured], num_candidates=options["candidates"], **search
                    )
                    figures[ratio_name(activation, i)] = report.activation_ratio
            for i in range(ZEROS):
                if activation == "relu" and dense[i] == step:
                    figures[nonzero_name(i)] = nonzero(model, held)

        train(model, batches(text, seed=seed), steps, on_step=look)
        figures[f"loss, {activation}"] = evaluate(model, held)
        ratios = [figures[ratio_name(activation, i)] for i in range(RATIOS)]
        figures[f"rank correlation, {activation}"] = rank_correlation(ratios)
        figures[f"dropped by CETT, {activation}"] = 1 - ratios[-1]
        for rule in ("top_k", "epsilon"):
            kept, _ = uniform_ppl(model, [measured], rule=rule, **search)
            figures[f"dropped by {rule}, {activation}"] = 1 - kept
    tokens = [TOKENS_A_STEP * step for step in dense]
    law, line = forecast_errors(tokens, [figures[nonzero_name(i)] for i in range(ZEROS)])
    return figures | {"forecast error, law": law, "forecast error, a + b log D": line}


def _better(measured: Measurements) -> tuple[bool, str]:
    ours = measured["dropped by CETT, silu"]
    rivals = [measured[f"dropped by {rule}, silu"] for rule in ("top_k", "epsilon")]
    best = Measurement(
        "best", tuple(max(pair) for pair in zip(*(rival.values for rival in rivals), strict=True))
    )
    gain = ours - best
    text = (
        f"SiLU: {100 * ours.mean:.1f} % dropped against {100 * rivals[0].mean:.1f} % by top-k and "
        f"{100 * rivals[1].mean:.1f} % by one threshold; gain {100 * gain.mean:+.2f} ± "
        f"{100 * gain.std_error:.2f} points"
    )
    return gain.mean > gain.std_error and gain.mean > 0, text


def _trends(measured: Measurements) -> tuple[bool, str]:
    relu, silu = (measured[f"rank correlation, {activation}"] for activation in ACTIVATIONS)
    last = [measured[ratio_name(activation, RATIOS - 1)] for activation in ACTIVATIONS]
    losses = [measured[f"loss, {activation}"].mean for activation in ACTIVATIONS]
    apart = -relu.mean > relu.std_error and silu.mean > silu.std_error
    lower = all(a < b for a, b in zip(last[0].values, last[1].values, strict=True))
    alike = abs(losses[0] / losses[1] - 1) <= 0.05
    text = (
        f"rank correlations {relu} and {silu}; in the end {100 * last[0].mean:.1f} % and "
        f"{100 * last[1].mean:.1f} %; losses {losses[0]:.3f} and {losses[1]:.3f}"
    )
    return -relu.mean > 0 and silu.mean > 0 and apart and lower and alike, text


def _law(measured: Measurements) -> tuple[bool, str]:
    law, line = measured["forecast error, law"], measured["forecast error, a + b log D"]
    return law.mean < line.mean, f"{law} against {line}"


def plot(measured: Measurements, figure: Any) -> None:
    """Ratios over training, the law's fit, and what three rules drop."""
    trends, fit, bars = figure.subplots(1, 3)
    for activation, colour in zip(ACTIVATIONS, ("tab:blue", "tab:orange"), strict=True):
        rows = [measured[ratio_name(activation, i)] for i in range(RATIOS)]
        x = [step / 500 for step in checkpoints(500, RATIOS)]
        y, error = [100 * row.mean for row in rows], [100 * row.std_error for row in rows]
        trends.errorbar(x, y, yerr=error, fmt="o-", color=colour, capsize=2, label=activation)
    trends.set(xlabel="share of training", ylabel="neurons needed, %", ylim=(0, 100), xscale="log")
    trends.set_xticks([0.2, 0.5, 1.0], ["0.2", "0.5", "1"], minor=False)
    trends.minorticks_off()
    trends.legend(fontsize=8)
    trends.set_title("at 1 % more perplexity", fontsize=10)
    x = [step / 500 for step in checkpoints(500, ZEROS)]
    y = [100 * measured[nonzero_name(i)].mean for i in range(ZEROS)]
    fit.plot(x, y, "o", ms=4, color="tab:blue", label="relu, mean of seeds")
    fit.plot(
        x, SparsingLaw("relu").fit(x[:KNOWN], y[:KNOWN]).predict(x), color="black", label="law"
    )
    fit.axvspan(x[KNOWN] * 0.98, x[-1] * 1.02, color="0.93", zorder=0, label="not fitted")
    fit.set(xlabel="share of training", ylabel="neurons not zero, %", xscale="log")
    fit.set_xticks([0.2, 0.5, 1.0], ["0.2", "0.5", "1"], minor=False)
    fit.minorticks_off()
    fit.legend(fontsize=8)
    fit.set_title("the law's forecast", fontsize=10)
    for place, rule in enumerate(("CETT", "top_k", "epsilon")):
        for shift, activation, colour in (
            (-0.18, "relu", "tab:blue"),
            (0.18, "silu", "tab:orange"),
        ):
            dropped = measured[f"dropped by {rule}, {activation}"]
            bars.bar(
                [place + shift],
                [100 * dropped.mean],
                0.36,
                yerr=[100 * dropped.std_error],
                color=colour,
                capsize=2,
                label=activation if place == 0 else None,
            )
    bars.set_xticks(range(3), ["CETT", "top-k", "one\nthreshold"], fontsize=8)
    bars.set_ylabel("neurons dropped, %")
    bars.set_title("at 1 % more perplexity", fontsize=10)


EXPERIMENT = Experiment(
    paper=145,
    claim=Claim(
        statement=(
            "Thresholds by CETT drop more neurons than top-k or one threshold at the same "
            "perplexity; with more training fewer neurons are needed with relu and more with SiLU, "
            "at comparable loss; the relu ratio follows a power law in log space."
        ),
        figure="limits of 6 to 8 % of neurons for relu, 38 to 41 % for SiLU",
        source="abstract, and the published coefficients",
    ),
    setup=(
        "Two-layer plain decoder, width 64, 256 neurons, on text of a third-order Markov source "
        "with nested brackets: 500 steps of 32 windows of 32. CETT-PPL-1% on 512 held-out tokens "
        "at 6 steps from the end of the first fifth on, spread evenly by logarithm; the share of "
        "non-zero relu neurons at 20. The law and a + b log D are fitted to the first 15 of these."
    ),
    baseline="top-k and one threshold on abs(h) for all layers; a straight line in log D",
    criteria=(
        Criterion(
            "SiLU at 1 % more perplexity: CETT drops more than the better of two rivals, by more "
            "than a standard error of the paired difference",
            _better,
        ),
        Criterion(
            "neurons needed fall for relu and rise for SiLU (rank correlation, by more than a "
            "standard error); in the end fewer for relu on every seed; losses within 5 %",
            _trends,
        ),
        Criterion("the law's error on the last 5 points is below the straight line's", _law),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "steps": 500,
            "rows": 512,
            "length": 1024,
            "held": 256,
            "measured": 16,
            "candidates": 4096,
        },
        "smoke": {
            "seeds": 1,
            "steps": 10,
            "rows": 8,
            "length": 64,
            "held": 4,
            "measured": 1,
            "candidates": 64,
        },
    },
    trial=trial,
    plot=plot,
)
