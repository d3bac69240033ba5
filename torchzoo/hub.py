"""Saving, loading and sharing: JSON config and safetensors weights, never pickle.

`ZooModel` is the base of every module of the zoo. It builds on `PyTorchModelHubMixin`, whose
folder format it keeps (`config.json`, `model.safetensors`), and adds what that lacks: constructor
arguments that are themselves modules of the zoo are written into the config, and weights are
checked against the manifest and against the model before any of them is copied.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import safetensors
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import save_model
from torch import Tensor, nn

from torchzoo import _card, _config, _weights
from torchzoo._weights import manifest
from torchzoo.errors import WeightsError
from torchzoo.files import write_json

__all__ = ["ZooModel", "from_pretrained", "manifest", "ship"]

Model = TypeVar("Model", bound=nn.Module)
_TRAINING = ("data", "metric", "seed", "command")


class ZooModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="torchzoo",
    license=_card.LICENSE,
    model_card_template=_card.TEMPLATE,
    tags=["torchzoo"],
):
    """Base class of the zoo's modules: an `nn.Module` that remembers how it was built.

    Constructor arguments are noted when the module is made, as plain JSON values that share
    nothing with the arguments, so that `save_pretrained` can write a config from which
    `from_pretrained` builds the module again. `push_to_hub` is the mixin's.

    Source:
        Format and upload: huggingface_hub, `PyTorchModelHubMixin`.

    Example:
        >>> import tempfile, torch
        >>> class Scale(ZooModel):
        ...     def __init__(self, dim: int):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(dim))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Scale(3).save_pretrained(folder)
        ...     again = Scale.from_pretrained(folder)
        >>> again.weight.shape
        torch.Size([3])
    """

    _zoo_config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments. Copying and unpickling come without any and restore the note."""
        self = nn.Module.__new__(cls)
        self.__dict__["_zoo_config"] = _config.capture(cls, args, kwargs)
        return self

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write config, weights and a model card into a folder.

        All is written beside the folder first. A new folder appears whole; in one that exists,
        files of other names and the README stay, and the config, without which a folder is no
        model, is taken away first and put back last.

        Args:
            save_directory: The folder; made where it is missing.
            config: Replaces the model's own config; for `push_to_hub`.
            model_card_kwargs: For the model card: how the model was trained, as `data`, `metric`,
                `seed` and `command`.

        Returns:
            The folder.

        Raises:
            WeightsError: An argument of the constructor can't be written as JSON, the model was
                changed so that its config no longer builds it, or the folder can't be written.
        """
        folder = Path(save_directory)
        config = config or {"format": 1, **_saveable_spec(self)}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".torchzoo-", dir=folder.parent) as beside:
                part = Path(beside) / "model"
                super().save_pretrained(
                    part, config=dict(config), model_card_kwargs=model_card_kwargs
                )
                _weights.install(part, folder)
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"can't write {folder}: {error}") from error
        return folder

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / _weights.TENSORS
        save_model(self, str(path))
        path.chmod(0o644)  # safetensors leaves it to its owner alone

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: the module, its paper and what was measured here, training, license."""
        training = {key: kwargs.pop(key) for key in _TRAINING if key in kwargs}
        return super().generate_model_card(*args, **_card.fields(type(self), training) | kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        *,
        strict: bool = True,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Self:
        """`torchzoo.from_pretrained` that also checks that the model is of this class."""
        folder = _weights.locate(str(name_or_path), revision, token)
        return _load(folder, cls, strict, device, overrides)


def from_pretrained(
    name_or_path: str | Path,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **overrides: Any,
) -> ZooModel:
    """Build a saved model and load its weights; the model comes in evaluation mode.

    Args:
        name_or_path: A shipped name (see `manifest`), a folder that `save_pretrained` wrote, or a
            hub id `owner/name`, looked for in this order.
        strict: Missing and left-over keys are an error; else they are a warning.
        device: Where to build the model.
        revision: Branch, tag or commit of a hub id.
        token: Access token for a hub id; by default the one stored on this machine.
        **overrides: Constructor arguments that replace saved ones. Tensors keep the dtype they
            were saved in unless `dtype` is given here. With another `num_classes` the tensors
            that have one entry a class, the head, are drawn anew, and a warning names them.

    Raises:
        WeightsError: Nothing has this name, the download fails, a file is missing, damaged or not
            the one of the manifest, the class is neither the zoo's nor registered, or the tensors
            don't fit. Nothing is copied into a model before all of this has been checked.

    Example:
        >>> import tempfile, torchzoo
        >>> layer = torchzoo.create("GaussianAdaptiveAttention", dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(from_pretrained(layer.save_pretrained(folder))).__name__
        'GaussianAdaptiveAttention'
    """
    folder = _weights.locate(str(name_or_path), revision, token)
    return _load(folder, ZooModel, strict, device, overrides)


def ship(
    name: str,
    model: ZooModel,
    *,
    data: str,
    metric: Mapping[str, float] | str,
    seed: int,
    command: str,
) -> Path:
    """Write a model into the package's weights and enter it in the manifest.

    Args:
        name: The name to ship it under: lower-case letters, digits, dots and hyphens.
        model: The trained model.
        data: What it was trained on.
        metric: What it reaches, in figures.
        seed: The seed it was trained with.
        command: The command that makes these weights again.

    Returns:
        The folder.

    Raises:
        ValueError: The name has other characters.
        WeightsError: The model can't be saved.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '.' and '-', got {name!r}")
    training = {"data": data, "metric": metric, "seed": seed, "command": command}
    folder = model.save_pretrained(_weights.WEIGHTS / name, model_card_kwargs=training)
    entry = {
        "file": f"{name}/{_weights.TENSORS}",
        "sha256": _weights.sha256(folder / _weights.TENSORS),
        "class": _config.class_path(type(model)),
        **training,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    write_json(
        _weights.WEIGHTS / "manifest.json", dict(sorted({**manifest(), name: entry}.items()))
    )
    return folder


def _saveable_spec(model: ZooModel) -> dict[str, Any]:
    """The model's spec, checked: it has no gap, and what it builds takes the model's tensors."""
    spec = _config.spec(model)
    for where, what in _config.unsaveable(spec):
        raise WeightsError(f"{where.strip('.')}: JSON can't hold it, got {what}")
    try:
        with torch.device("meta"):
            again = _config.build(spec["class"], spec["config"], known=type(model)).state_dict()
    except (NotImplementedError, RuntimeError):
        return spec  # a constructor that needs real memory: no cheap check of its shapes
    if problems := _weights.misfits(again, model.state_dict()):
        kind = type(model).__name__
        raise WeightsError(f"{kind} was changed after it was built: {problems}")
    return spec


def _load(
    folder: Path,
    cls: type[Model],
    strict: bool,
    device: torch.device | str | None,
    overrides: Mapping[str, Any],
) -> Model:
    """Read and check the folder, build the model, check the tensors, and only then copy them."""
    path, config = _weights.read_config(folder)
    loaded = _weights.read_tensors(folder)
    kind = _config.find_class(path, cls)
    if not issubclass(kind, cls):
        raise WeightsError(f"{folder} holds a {kind.__name__}, not a {cls.__name__}")
    with torch.device(device) if device is not None else nullcontext():
        model = cast(Model, _config.build(path, config, overrides, known=cls))
    if device is not None:
        model.to(device)
    own = model.state_dict(keep_vars=True)
    _weights.restore_tied(loaded, own)
    if head := _new_head(own, loaded, config.get("num_classes"), overrides.get("num_classes")):
        names = ", ".join(head)
        warnings.warn(f"{names} of {folder} were drawn anew for other classes", stacklevel=3)
        own, loaded = ({k: v for k, v in t.items() if k not in head} for t in (own, loaded))
    if problems := _weights.misfits(own, loaded, keys=strict):
        raise WeightsError(f"{folder} doesn't fit {kind.__name__}: {problems}")
    if problems := _weights.misfits(own, loaded):
        warnings.warn(f"{folder} doesn't fit {kind.__name__}: {problems}", stacklevel=3)
    if "dtype" not in overrides:
        for key in own.keys() & loaded.keys():
            own[key].data = own[key].data.to(loaded[key].dtype)
    model.load_state_dict(loaded, strict=False)
    return model.eval()


def _new_head(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], old: Any, new: Any
) -> list[str]:
    """The tensors whose shape differs in the number of classes, saved and asked for, alone."""
    if new is None or old is None or old == new:
        return []
    pairs = {
        key: zip(loaded[key].shape, own[key].shape, strict=False)
        for key in own.keys() & loaded.keys()
    }
    return [
        key
        for key, sizes in pairs.items()
        if loaded[key].ndim == own[key].ndim
        and {pair for pair in sizes if pair[0] != pair[1]} == {(old, new)}
    ]
