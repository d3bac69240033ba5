"""Paper 3: CRReLU against other activations, trained from scratch and swapped in for fine-tuning.

A small vision transformer on digits, and a small language model that is trained with GELU on one
source of text and fine-tuned on another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzoo import trainer
from torchzoo.activations import CRReLU, replace_activation
from torchzoo.data.digits import digits
from torchzoo.data.grammar import Grammar
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurements
from torchzoo.experiments import language
from torchzoo.experiments.patches import PatchTransformer

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "PReLU": nn.PReLU,
    "CRReLU": CRReLU,
    "ELU": nn.ELU,
    "Mish": nn.Mish,
    "SiLU": nn.SiLU,
    "CELU": nn.CELU,
}
SHORT = ("ReLU", "GELU", "PReLU", "CRReLU")
ARMS = ("GELU", "ReLU", "CRReLU")  # what the language model is fine-tuned with
LENGTH = 32


class CausalModel(nn.Module):
    """A language model of two pre-norm blocks whose activations are modules that can be swapped.

    Shape:
        tokens: (N, L) int64; output logits (N, L, vocab).
    """

    def __init__(self, vocab: int, dim: int = 32, heads: int = 4, hidden: int = 128):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(dim, heads, hidden, 0.0, nn.GELU()), batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def sizes(model: nn.Module) -> list[float]:
    """The learned ε of each CRReLU."""
    return [m.eps.item() for m in model.modules() if isinstance(m, CRReLU)]


def vision(context: Context) -> dict[str, float]:
    """Test accuracies in percent; the same weights at first and the same batches for all."""
    data, figures = digits(seed=context.seed), {}
    for name in context.options["activations"]:
        context.progress(f"vision, {name}")
        torch.manual_seed(context.seed)
        model = PatchTransformer(32, 2, 64, activation=ACTIVATIONS[name])
        trainer.fit(
            model,
            cross_entropy,
            (data.train_x, data.train_y),
            epochs=context.options["epochs"],
            batch_size=128,
            lr=3e-3,
            generator=torch.Generator().manual_seed(context.seed),
        )
        figures[accuracy(name)] = 100 * trainer.accuracy(model, data.test_x, data.test_y)
        for block, eps in enumerate(sizes(model)):
            figures[f"vision: eps of block {block}"] = eps
    return figures


def fine_tuning(context: Context) -> dict[str, float]:
    """Losses on the second source, in nats, after fine-tuning with each activation."""
    options, seed = context.options, context.seed
    texts = [Grammar(seed=source).sample(64, 512, seed=seed) for source in (0, 1)]
    held_out = Grammar(seed=1).sample(256, LENGTH + 1, seed=seed + 1000)
    torch.manual_seed(seed)
    context.progress("language, GELU on the first source")
    model = CausalModel(Grammar().vocab)
    first = language.batches(texts[0], length=LENGTH, seed=seed)
    language.train(model, first, options["pretrain_steps"])
    figures = {}
    for name in ARMS:
        context.progress(f"language, fine-tuning with {name}")
        tuned = copy.deepcopy(model)
        if name != "GELU":
            replace_activation(tuned, nn.GELU, ACTIVATIONS[name])
        second = language.batches(texts[1], length=LENGTH, seed=seed + 1)
        language.train(tuned, second, options["tune_steps"], lr=1e-3)
        figures[loss(name)] = language.evaluate(tuned, held_out)
        for block, eps in enumerate(sizes(tuned)):
            figures[f"language: eps of block {block}"] = eps
    return figures


def trial(context: Context) -> dict[str, float]:
    return vision(context) | fine_tuning(context)


def accuracy(name: str) -> str:
    return f"vision: accuracy with {name}"


def loss(name: str) -> str:
    return f"language: loss with {name}"


def _vision(measured: Measurements) -> tuple[bool, str]:
    ours = measured[accuracy("CRReLU")]
    gaps = {name: ours - measured[accuracy(name)] for name in ("ReLU", "PReLU")}
    text = "; ".join(f"{gap} points above {name}" for name, gap in gaps.items())
    means = ", ".join(
        f"{name} {measured[accuracy(name)]}" for name in ACTIVATIONS if accuracy(name) in measured
    )
    return all(gap.mean > gap.std_error for gap in gaps.values()), f"{text} ({means})"


def _fine_tuning(measured: Measurements) -> tuple[bool, str]:
    gap = measured[loss("GELU")] - measured[loss("CRReLU")]
    means = ", ".join(f"{name} {measured[loss(name)]}" for name in ARMS)
    return gap.mean > gap.std_error, f"{gap} nats below GELU ({means})"


def plot(measured: Measurements, figure: Any) -> None:
    """Differences seed by seed: of accuracies to ReLU, of losses to GELU."""
    left, right = figure.subplots(1, 2)
    trained = [name for name in ACTIVATIONS if accuracy(name) in measured and name != "ReLU"]
    rows = [(name, measured[accuracy(name)] - measured[accuracy("ReLU")]) for name in trained]
    _differences(left, rows, f"accuracy less ReLU's, {measured[accuracy('ReLU')]} % (points)")
    tuned = [(name, measured[loss(name)] - measured[loss("GELU")]) for name in ARMS[1:]]
    _differences(right, tuned, f"loss less GELU's, {measured[loss('GELU')]} (nats)")
    left.set_title("vision transformer on digits, more is better", fontsize=10)
    right.set_title("fine-tuned language model, less is better", fontsize=10)
    for axes, part in ((left, "vision"), (right, "language")):
        learned = ", ".join(f"{measured[f'{part}: eps of block {b}'].mean:+.3f}" for b in (0, 1))
        axes.set_xlabel(f"learned ε of CRReLU, by block: {learned}", fontsize=9)


def _differences(axes: Any, rows: list[tuple[str, Any]], label: str) -> None:
    for place, (name, gap) in enumerate(rows):
        colour = "tab:blue" if name == "CRReLU" else "0.5"
        axes.plot([place] * len(gap.values), gap.values, ".", color=colour, alpha=0.4)
        axes.errorbar([place], [gap.mean], [gap.std_error], fmt="o", color=colour, capsize=4)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel(label, fontsize=9)


EXPERIMENT = Experiment(
    paper=3,
    claim=Claim(
        statement=(
            "CRReLU is better than existing corrections of ReLU in vision transformers trained "
            "from scratch, and than GELU in fine-tuning language models."
        ),
        figure="accuracies on CIFAR-10, CIFAR-100 and ImageNet-1K, and LLM fine-tuning",
        source="abstract",
    ),
    setup=(
        "Vision: a transformer of two blocks on 16 patches of 8×8 digits, width 32, 64 hidden "
        "units, batches of 128, 15 epochs of AdamW at 0.003; the same first weights and batches "
        "for all activations of a seed; accuracy on 450 images in percent. Language: two blocks of "
        "width 32 with 128 hidden units and GELU, 300 steps on texts of a grammar; then the "
        "activation is swapped and 150 steps follow on a grammar of other transitions, at 0.001; "
        "loss in nats on fresh text of that. Whoever is trained, ε starts at 0.01."
    ),
    baseline="ReLU, GELU and PReLU; with the budget `all` also ELU, Mish, SiLU and CELU",
    criteria=(
        Criterion(
            "vision: CRReLU above ReLU and above PReLU, the best other correction, each by more "
            "than a standard error of the paired difference",
            _vision,
        ),
        Criterion(
            "language: loss with CRReLU below GELU's by more than a standard error of the paired "
            "difference",
            _fine_tuning,
        ),
    ),
    budgets={
        "full": {
            "seeds": 5,
            "activations": SHORT,
            "epochs": 15,
            "pretrain_steps": 300,
            "tune_steps": 150,
        },
        "all": {
            "seeds": 5,
            "activations": tuple(ACTIVATIONS),
            "epochs": 15,
            "pretrain_steps": 300,
            "tune_steps": 150,
        },
        "smoke": {
            "seeds": 1,
            "activations": SHORT,
            "epochs": 1,
            "pretrain_steps": 2,
            "tune_steps": 2,
        },
    },
    trial=trial,
    plot=plot,
)
