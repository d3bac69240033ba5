"""Models of other libraries by name: `timm:`, `torchvision:`, `transformers:`, `zoo:`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from torchzoo import _weights
from torchzoo.catalogue import suggest
from torchzoo.errors import TorchzooError, UnknownNameError, WeightsError
from torchzoo.finetuning import logits_of
from torchzoo.hub import from_pretrained
from torchzoo.options import parse_options

SOURCES = ("timm", "torchvision", "transformers", "zoo")


def load_model(
    text: str, *, classes: int, size: int, weights: str | None = None, causal: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a model that tells so many classes apart, by default with weights drawn at random.

    Args:
        text: `timm:NAME`, `torchvision:NAME`, `transformers:TYPE` (an image classifier of this
            type) or `transformers:TYPE(hidden_size=64, …)` with options of its configuration, or
            `zoo:NAME` as for `torchzoo.from_pretrained`.
        classes: Number of classes.
        size: Height and width of the images, for models that are made for one.
        weights: A safetensors file; `pretrained`, the library's own, which are downloaded; or for
            transformers a folder or a hub id. A head for other classes is drawn anew.
        causal: A language model, whose vocabulary the classes are; of transformers only.

    Returns:
        The model, and what should be said of its weights.

    Raises:
        UnknownNameError: No such source or model.
        WeightsError: Weights that can't be read or don't fit.
    """
    source, _, name = text.partition(":")
    if source not in SOURCES or not name:
        near = suggest(source, SOURCES)
        raise UnknownNameError(f"model {text!r}: expected {', '.join(SOURCES)} and :NAME{near}")
    if source == "zoo":
        if weights is not None:
            raise TorchzooError(f"model {text}: expected no weights, as it has some, got {weights}")
        return from_pretrained(name), ()
    if source == "transformers":
        return _transformers(text, name, classes, size, weights, causal)
    if causal:
        raise TorchzooError(f"model {text}: expected transformers:TYPE for text, as in llama")
    pretrained = weights == "pretrained"
    make = _timm if source == "timm" else _torchvision
    try:
        model = make(text, name, classes if not pretrained else None, size, pretrained)
    except TorchzooError:
        raise
    except Exception as error:  # the hub's client and the constructors have many of their own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"model {text}: can't be made: {reason}") from error
    if pretrained:
        return model, _new_head(model, classes)
    return model, () if weights is None else load_weights(model, Path(weights))


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a safetensors file; a head of another number of classes stays as it was drawn.

    Returns:
        What should be said of the head, if anything.

    Raises:
        WeightsError: The file can't be read, or something else than the head doesn't fit.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"weights {path}: expected a .safetensors file, which runs no code")
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"weights {path}: can't be read: {error}") from error
    own = model.state_dict(keep_vars=True)
    _weights.restore_tied(loaded, own)
    name, head = head_of(model)
    keys = [f"{name}.{key}" for key in head.state_dict()]
    given = loaded.get(f"{name}.weight")
    notes: tuple[str, ...] = ()
    if given is not None and given.shape != head.weight.shape:
        there, here = _classes(given), _classes(head.weight)
        notes = (f"{name} was drawn anew: {there} in {path.name}, {here} here",)
        own = {key: value for key, value in own.items() if key not in keys}
        loaded = {key: value for key, value in loaded.items() if key not in keys}
    if problems := _weights.misfits(own, loaded):
        raise WeightsError(f"weights {path} don't fit: {problems}")
    model.load_state_dict(loaded, strict=False)
    return notes


def head_of(model: nn.Module) -> tuple[str, Any]:
    """The layer that gives the logits: the last linear one."""
    layers = [pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear)]
    if not layers:
        raise TorchzooError("model: expected a linear layer that gives the logits, got none")
    return layers[-1]


@torch.no_grad()
def check_classes(model: nn.Module, row: torch.Tensor, classes: int, names: str) -> None:
    """Raise a TorchzooError unless a model gives a logit for each class of the data."""
    mode = model.training
    try:
        found = logits_of(model.eval()(row[None])).shape[-1]
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TorchzooError(
            f"{names}: the model takes no rows of shape {tuple(row.shape)}: {reason}"
        ) from error
    finally:
        model.train(mode)
    if found != classes:
        raise TorchzooError(
            f"{names}: the model tells {found} classes apart, the data have {classes}"
        )


def _classes(weight: torch.Tensor) -> str:
    return f"{weight.shape[0]} classes"


def _new_head(model: nn.Module, classes: int) -> tuple[str, ...]:
    """Give a pretrained model a head of so many classes, unless it has one."""
    name, head = head_of(model)
    if head.out_features == classes:
        return ()
    parent, _, key = name.rpartition(".")
    new = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    setattr(model.get_submodule(parent), key, new)
    return (f"{name} was drawn anew: {_classes(head.weight)} pretrained, {classes} classes here",)


def _timm(text: str, name: str, classes: int | None, size: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError(f"model {text}: timm has none{suggest(name, timm.list_models())}")
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "img_size" in inspect.signature(type(timm.create_model(name))).parameters:
        options["img_size"] = size
    return timm.create_model(name, pretrained=pretrained, **options)


def _torchvision(
    text: str, name: str, classes: int | None, size: int, pretrained: bool
) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        near = suggest(name, models.list_models())
        raise UnknownNameError(f"model {text}: torchvision has none{near}")
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **options)


def _transformers(
    text: str, name: str, classes: int, size: int, weights: str | None, causal: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, _, rest = name.partition("(")
    if kind not in CONFIG_MAPPING_NAMES:
        near = suggest(kind, CONFIG_MAPPING_NAMES)
        raise UnknownNameError(f"model {text}: transformers has no such type{near}")
    if rest and not rest.endswith(")"):
        raise TorchzooError(f"model {text}: expected transformers:TYPE(option=value, …)")
    given = parse_options(rest[:-1], f"model {text}")
    auto = AutoModelForCausalLM if causal else AutoModelForImageClassification
    options: dict[str, Any] = {"vocab_size" if causal else "num_labels": classes}
    if causal:  # characters alone
        options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        if weights is not None and not weights.endswith(".safetensors"):
            model = auto.from_pretrained(
                weights, **options, **given, ignore_mismatched_sizes=True, use_safetensors=True
            )
            return model, ()
        config = AutoConfig.for_model(kind, **options, **given)
        if hasattr(config, "image_size"):
            config.image_size = size
        model = auto.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"model {text}: {reason}") from error
    return model, () if weights is None else load_weights(model, Path(weights))
