"""Data sets by name: `digits`, `folder:PATH`, `torchvision:NAME` of images, `text`, `text:PATH`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from torchzoo.catalogue import suggest
from torchzoo.data.digits import digits
from torchzoo.data.topics import topics
from torchzoo.errors import TorchzooError, UnknownNameError

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what pretrained weights expect
_TEST_FOLDERS = ("test", "val", "valid", "validation")


class Rows(NamedTuple):
    """Rows to train on and to test on.

    Attributes:
        train, test: Images `(3, S, S)` with a label, or characters `(S,)` with the next ones.
        classes: Names of the classes; of text the characters.
        size: S.
        text: Whether it is text.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    size: int
    text: bool = False


def load_data(text: str, *, size: int | None = None, seed: int = 0) -> Rows:
    """Load a data set: images as RGB of one size, or a text in pieces, to say the next character.

    Args:
        text: `digits` (scikit-learn's, 32 pixels by default), `folder:PATH` with a folder a class,
            or such folders in `PATH/train` and `PATH/test`, `torchvision:NAME`, kept where
            `TORCHZOO_DATA` says, `text` (Python's reference), or `text:PATH`, a file in UTF-8 of
            which the last tenth is for testing.
        size: Height and width, by default 32 for digits, else 224; of text the characters of a
            piece, by default 64.
        seed: Seed of the split where the data have none: a quarter is for testing.

    Raises:
        UnknownNameError: No such kind of data, or no such data set in torchvision.
        TorchzooError: A folder that is missing or has no classes, classes that differ between
            training and test, a file that is missing or too short, or a download that failed.
    """
    kind, _, rest = text.partition(":")
    if kind == "digits" and not rest:
        return _digits(size or 32, seed)
    if kind == "folder" and rest:
        return _folder(Path(rest).expanduser(), size or 224, seed)
    if kind == "torchvision" and rest:
        return _torchvision(rest, size or 224, seed)
    if kind == "text":
        return _text(Path(rest).expanduser() if rest else None, size or 64)
    near = suggest(kind, ("digits", "folder", "torchvision", "text"))
    raise UnknownNameError(
        f"data {text!r}: expected digits, folder:PATH, torchvision:NAME, text or text:PATH{near}"
    )


def _digits(size: int, seed: int) -> Rows:
    split = digits(seed=seed)
    mean, std = split.train_x.mean(), split.train_x.std()

    def images(x: Tensor) -> Tensor:
        larger = torch.nn.functional.interpolate(
            (x - mean) / std, size=(size, size), mode="bilinear"
        )
        return larger.expand(-1, 3, -1, -1)

    train = TensorDataset(images(split.train_x), split.train_y)
    test = TensorDataset(images(split.test_x), split.test_y)
    return Rows(train, test, tuple(str(digit) for digit in range(10)), size)


def _transform(size: int) -> v2.Compose:
    """Shorter side to `size`, the centre of it, as RGB; the same each time, so runs can resume."""
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(size, antialias=True),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )


def _folder(path: Path, size: int, seed: int) -> Rows:
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TorchzooError(
            f"data folder:{path}: there is no such folder{suggest(path.name, siblings)}"
        )
    train = path / "train" if (path / "train").is_dir() else path
    test = next((path / name for name in _TEST_FOLDERS if (path / name).is_dir()), None)
    data = _image_folder(train, size)
    classes = tuple(data.classes)
    if train == path or test is None:
        return Rows(*_split(data, seed), classes, size)
    tested = _image_folder(test, size)
    if tuple(tested.classes) != classes:
        other = sorted(set(classes) ^ set(tested.classes))
        raise TorchzooError(
            f"data folder:{path}: {train.name} has {len(classes)} classes and {test.name} "
            f"{len(tested.classes)}; only one of them has {', '.join(other[:5])}"
        )
    return Rows(data, tested, classes, size)


def _image_folder(path: Path, size: int) -> Any:
    try:
        return datasets.ImageFolder(path, transform=_transform(size))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise TorchzooError(
            f"data folder:{path}: expected a folder of images for each class; {reason}"
        ) from error


def _split(data: Dataset[Any], seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Three quarters to train on, one to test on."""
    rows: Sequence[int] = torch.randperm(
        len(data),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),
    ).tolist()
    cut = len(rows) // 4
    return Subset(data, rows[cut:]), Subset(data, rows[:cut])


def _torchvision(name: str, size: int, seed: int) -> Rows:
    known: dict[str, Any] = {
        n: value for n in datasets.__all__ if inspect.isclass(value := getattr(datasets, n))
    }
    if name not in known:
        raise UnknownNameError(f"data torchvision:{name}: no such data set{suggest(name, known)}")
    arguments = inspect.signature(known[name]).parameters
    options: dict[str, Any] = {"transform": _transform(size)}
    if "root" in arguments:
        cache = Path.home() / ".cache" / "torchzoo" / "data"
        options["root"] = os.environ.get("TORCHZOO_DATA", str(cache))
    if "download" in arguments:
        options["download"] = True
    try:
        if "train" in arguments:
            parts = [known[name](**options, train=train) for train in (True, False)]
        elif "split" in arguments:
            parts = [known[name](**options, split=split) for split in ("train", "test")]
        else:
            parts = list(_split(known[name](**options), seed))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TorchzooError(f"data torchvision:{name}: can't be loaded: {reason}") from error
    data: Any = getattr(parts[0], "dataset", parts[0])
    classes = getattr(data, "classes", None) or range(getattr(data, "num_classes", 0))
    if not classes:
        raise TorchzooError(f"data torchvision:{name}: expected one with classes")
    return Rows(parts[0], parts[1], tuple(str(one) for one in classes), size)


def _text(path: Path | None, size: int) -> Rows:
    """Pieces side by side, and the same a character further."""
    if path is None:
        found = topics()
        sides, characters = (found.train, found.validation), found.characters
    else:
        sides, characters = _read(path)

    def pieces(side: Tensor) -> TensorDataset:
        if len(side) <= size:
            raise TorchzooError(
                f"data text:{path}: expected more than {size} characters on each side, "
                f"got {len(side)}"
            )
        windows = side.unfold(0, size + 1, size)
        return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    train, test = (pieces(side) for side in sides)
    return Rows(train, test, tuple(characters), size, text=True)


def _read(path: Path) -> tuple[tuple[Tensor, Tensor], str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TorchzooError(f"data text:{path}: can't be read: {error}") from error
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text], dtype=torch.int64)
    cut = len(numbers) - len(numbers) // 10
    return (numbers[:cut], numbers[cut:]), characters
