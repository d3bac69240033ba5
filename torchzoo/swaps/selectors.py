"""Words for the kinds of layers that a model has, as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchzoo.sparsity.layouts import is_mlp

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": ("ReLU",),
    "gelu": (
        *("GELU", "GELUTanh", "GELUActivation", "NewGELUActivation", "PytorchGELUTanh"),
        *("FastGELUActivation", "QuickGELU", "QuickGELUActivation", "AccurateGELUActivation"),
    ),
    "silu": ("SiLU", "SiLUActivation", "Swish"),
}
"""Class names of torch, timm and transformers; `"activation"` stands for all of them."""

_QUERIES = ("qkv", "q_proj", "query", "q", "c_attn", "q_lin", "to_q", "query_key_value", "Wqkv")


def activation_names(word: str) -> tuple[str, ...]:
    """The classes that a word for activations stands for; none for another word."""
    if word == "activation":
        return tuple(name for names in ACTIVATIONS.values() for name in names)
    return ACTIVATIONS.get(word, ())


def query_of(module: nn.Module) -> nn.Module | None:
    """The projection that makes the queries of an attention layer; None for other modules."""
    for name in _QUERIES:
        child = module._modules.get(name)
        if child is not None and getattr(child, "weight", None) is not None:
            return child
    return None


def inputs_of(linear: Any) -> int:
    """Features that a linear layer takes, `nn.Linear` or transformers' Conv1D of GPT-2."""
    return int(linear.weight.shape[0 if hasattr(linear, "nf") else 1])


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is an attention layer of torch, timm or transformers."""
    return isinstance(module, nn.MultiheadAttention) or query_of(module) is not None


def _is_conv(name: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _of_classes(names: tuple[str, ...]) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: type(module).__name__ in names


WORDS: dict[str, Callable[[str, nn.Module], bool]] = {
    **{word: _of_classes(activation_names(word)) for word in (*ACTIVATIONS, "activation")},
    "mlp": lambda name, module: name != "" and is_mlp(module),
    "attention": is_attention,
    "linear": lambda name, module: type(module) is nn.Linear,
    "conv": _is_conv,
    "norm": lambda name, module: isinstance(module, nn.modules.batchnorm._BatchNorm),
}
"""What each word selects."""


def selector(text: str) -> Callable[[str, nn.Module], bool]:
    """The rule that a text stands for: a word of `WORDS`, a class name, or a glob of dotted names.

    Args:
        text: A word; else a glob where it has a dot or a `*`; else the name of a class or module.

    Example:
        >>> from torchzoo.surgery import find
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh())
        >>> [list(find(model, selector(text))) for text in ("relu", "Tanh", "*")]
        [['1'], ['2'], ['', '0', '1', '2']]
    """

    def rule(name: str, module: nn.Module) -> bool:
        if text in WORDS:
            return WORDS[text](name, module)
        if "." in text or "*" in text:
            return fnmatchcase(name, text)
        return text in (name, type(module).__name__)

    rule.__name__ = text  # for messages
    return rule
