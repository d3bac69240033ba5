"""Sparse upcycling against dense training: a small Llama on text, a small ViT on digits.

A dense model is trained. Then four copies of it, which compute the same, each learn on for as many
steps again, from the same rows in the same order:

    dense      as it is
    wide       with twice the neurons; the new ones are drawn anew, and their outputs weigh nothing
    experts-1  four experts in the place of a feed-forward layer, one of them a token
    experts-2  the same with two of them a token

A token costs `experts-1` the multiplications of `dense`, and `experts-2` those of `wide`, beside
what the router needs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchzoo.data.digits import digits
from torchzoo.data.topics import topics
from torchzoo.experiment import describe, versions
from torchzoo.experiments.finetune.compare import mean_and_error
from torchzoo.files import write_json
from torchzoo.finetuning import Recipe, classification, finetune, logits_of
from torchzoo.flops import count_flops
from torchzoo.sparsity import mlp_parts
from torchzoo.surgery import swap
from torchzoo.swaps import WORDS, balanced, swap_experts

COMMAND = "python -m torchzoo.experiments.finetune.upcycling"
LENGTH = 64  # characters a text
EXPERTS = 4
PAIRS = (("experts-1", "dense"), ("experts-2", "wide"))
"""What costs a token the same."""


class Setting(NamedTuple):
    """A model to be built, and what it learns."""

    build: Callable[[], nn.Module]
    train: TensorDataset
    test: TensorDataset
    recipe: Recipe


def text(seed: int, *, smoke: bool = False) -> Setting:
    """A Llama of two layers that learns the next character of Python's reference."""
    data = topics()
    generator = torch.Generator().manual_seed(seed)

    def rows(side: Tensor, most: int) -> TensorDataset:
        windows = side.unfold(0, LENGTH + 1, LENGTH)
        windows = windows[torch.randperm(len(windows), generator=generator)[:most]]
        return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(data.characters),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    train, test = (64, 16) if smoke else (1600, 600)
    recipe = Recipe(epochs=2, batch_size=32, lr=3e-3)
    return Setting(build, rows(data.train, train), rows(data.validation, test), recipe)


def images(seed: int, *, smoke: bool = False) -> Setting:
    """A ViT of two layers that tells digits apart."""
    data = digits(seed=seed)
    train, test = (64, 32) if smoke else (None, None)

    def build() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=32,
            depth=2,
            num_heads=4,
        )

    return Setting(
        build,
        TensorDataset(data.train_x[:train], data.train_y[:train]),
        TensorDataset(data.test_x[:test], data.test_y[:test]),
        Recipe(epochs=2, batch_size=16) if smoke else Recipe(epochs=10, batch_size=64, lr=2e-3),
    )


SETTINGS: Mapping[str, Callable[..., Setting]] = {"text": text, "images": images}
SEEDS = range(3)


TASK = balanced(classification())
"""A label for each image, or for each character the next one; models with gates even out loads."""


@torch.no_grad()
def widen(mlp: nn.Module, times: int = 2) -> nn.Module:
    """A copy of a feed-forward layer with more neurons, which computes the same at first.

    Args:
        mlp: A layer that `mlp_parts` knows, of `nn.Linear`s.
        times: How many times as many neurons.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> x, wide = torch.randn(5, 4), widen(mlp)
        >>> torch.testing.assert_close(wide(x), mlp(x))
        >>> wide[0].out_features, wide[2].in_features
        (16, 16)
    """
    wide = copy.deepcopy(mlp)
    parts: Any = mlp_parts(wide)
    more = (times - 1) * parts.down.in_features
    for layer in (parts.up, parts.gate):
        if layer is None:
            continue
        drawn = torch.randn(more, layer.in_features).to(layer.weight) * layer.weight.std()
        layer.weight = nn.Parameter(torch.cat([layer.weight, drawn]))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.cat([layer.bias, layer.bias.new_zeros(more)]))
        layer.out_features += more
    parts.down.weight = nn.Parameter(F.pad(parts.down.weight, (0, more)))
    parts.down.in_features += more
    return wide


ARMS: Mapping[str, Callable[[nn.Module], Any]] = {
    "dense": lambda model: None,
    "wide": lambda model: swap(model, WORDS["mlp"], widen),
    "experts-1": lambda model: swap_experts(model, num_experts=EXPERTS, k=1),
    "experts-2": lambda model: swap_experts(model, num_experts=EXPERTS, k=2),
}


def train_arms(setting: Setting, seed: int) -> dict[str, dict[str, Any]]:
    """Train the dense model, then each arm from it.

    Returns:
        For each arm `parameters`, `flops` of a row's forward, `gap`, the largest difference of its
        outputs from the dense model's before it learns, and after each epoch `loss` and `accuracy`
        on the test rows; the dense model's training before that is `before`.
    """
    _, train, test, recipe = setting
    torch.manual_seed(seed)
    dense = setting.build()
    first = dataclasses.replace(recipe, seed=2 * seed)
    run = finetune(dense, TASK, train, test, first, device="cpu")
    found: dict[str, dict[str, Any]] = {"before": _curves(run.history)}
    x = test[:16][0]
    for name, change in ARMS.items():
        model = copy.deepcopy(dense)
        torch.manual_seed(seed)
        change(model)
        with torch.no_grad():
            gap = (logits_of(model(x)) - logits_of(dense(x))).abs().max().item()
        start: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": count_flops(model, x[:1]),
            "gap": gap,
        }
        second = dataclasses.replace(recipe, seed=2 * seed + 1)
        run = finetune(model, TASK, train, test, second, device="cpu")
        found[name] = start | _curves(run.history)
    return found


def _curves(history: list[dict[str, float]]) -> dict[str, list[float]]:
    names = {"loss": "test_loss", "accuracy": "accuracy"}
    return {name: [row[key] for row in history] for name, key in names.items()}


def compare_arms(
    name: str, *, smoke: bool = False, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All seeds of a setting.

    Args:
        name: A key of `SETTINGS`.
        smoke: Two seeds and few rows.
        tell: Called with a line after each seed.

    Returns:
        `runs`, what `train_arms` gives for each seed, and `differences`: for each pair that costs
        the same, of the last losses and accuracies, seed by seed, mean and standard error.
    """
    runs = []
    for seed in range(2) if smoke else SEEDS:
        runs.append(train_arms(SETTINGS[name](seed, smoke=smoke), seed))
        losses = ", ".join(f"{arm} {runs[-1][arm]['loss'][-1]:.4f}" for arm in ARMS)
        tell(f"{name}, seed {seed}: {losses}")
    return {
        "recipe": dataclasses.asdict(SETTINGS[name](0, smoke=smoke).recipe),
        "runs": runs,
        "differences": {
            f"{one} - {other}": {
                what: mean_and_error([run[one][what][-1] - run[other][what][-1] for run in runs])
                for what in ("loss", "accuracy")
            }
            for one, other in (*PAIRS, ("experts-2", "dense"))
        },
    }


def main() -> None:
    """Train and compare, and write what came out as JSON."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file")
    parser.add_argument("--smoke", action="store_true", help="few rows and seeds, in seconds")
    options = parser.parse_args()
    result: dict[str, Any] = {"device": describe("cpu"), "versions": versions()}
    for name in SETTINGS:
        result[name] = compare_arms(name, smoke=options.smoke, tell=print)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
