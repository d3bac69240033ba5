"""What a model is made of, as a tree with the parameters of each part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from torchzoo.experiments.quickstart.model import ZooVisionModel


@dataclass(frozen=True)
class Part:
    """A module of a model.

    Attributes:
        name: What it is called.
        text: What it is.
        parameters: Its parameters, its parts' included.
        parts: What it is made of.
    """

    name: str
    text: str
    parameters: int
    parts: list[Part] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count(*modules: nn.Module) -> int:
    """Parameters of modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


def composition(model: ZooVisionModel) -> Part:
    """The tree of a model's parts.

    Example:
        >>> tree = composition(ZooVisionModel(5, depth=1))
        >>> [part.name for part in tree.parts], tree.parameters
        (['PatchEmbedding', 'block 1', 'LayerNorm', 'Linear'], 30981)
    """
    embedding = model.embedding
    side = embedding.patch_size
    tokens = f"{side} x {side} pixels to {embedding.tokens} tokens of {model.norm.weight.numel()}"
    blocks = [_block(index, block) for index, block in enumerate(model.blocks, 1)]
    parts = [
        Part("PatchEmbedding", tokens, count(embedding)),
        *blocks,
        Part("LayerNorm", "", count(model.norm)),
        Part("Linear", f"all tokens to {model.head.out_features} classes", count(model.head)),
    ]
    return Part(type(model).__name__, "", count(model), parts)


def _block(index: int, block: Any) -> Part:
    attention, gate, experts = block.attention, block.moe.gate, block.moe.experts
    cooling = f"temperature {gate.initial_temperature:g} to {gate.final_temperature:g}"
    inside = [
        Part("LayerNorm", "before each of the two", count(block.norm1, block.norm2)),
        Part(type(attention).__name__, f"{attention.num_heads} heads", count(attention)),
        Part(
            type(block.moe).__name__,
            "",
            count(block.moe),
            [
                Part(type(gate).__name__, cooling, count(gate)),
                Part(
                    type(experts).__name__,
                    f"{experts.num_experts} of {experts.dim}-{experts.hidden_dim}-{experts.dim}",
                    count(experts),
                ),
            ],
        ),
    ]
    return Part(f"block {index}", "residual", count(block), inside)
