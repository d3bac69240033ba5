"""English text that every Python has: its language reference, as `help` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Topics(NamedTuple):
    """Text as numbers of characters, `(T,)` int64, and the characters, by number.

    Attributes:
        train: The topics to train on, one after the other.
        validation: The others.
        characters: Every character of both sides, sorted.
    """

    train: Tensor
    validation: Tensor
    characters: str

    def decode(self, text: Tensor) -> str:
        """Some of the text `(T,)` as a string."""
        return "".join(self.characters[i] for i in text.tolist())


class TopicWindows(NamedTuple):
    """Pieces of topics as bytes, `(N, length)` int64, and which topic each is from, `(N,)`.

    Attributes:
        train_x, train_y: Overlapping pieces.
        test_x, test_y: Pieces side by side, of other parts of the topics.
        names: The topics, by label.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    names: tuple[str, ...]


_LONG_TOPICS = (
    "compound",
    "debugger",
    "formatstrings",
    "specialnames",
    "string-methods",
    "types",
    "typesmapping",
    "typesseq",
)


def topic_windows(length: int = 256, *, names: Sequence[str] = _LONG_TOPICS) -> TopicWindows:
    """Pieces of long topics of `pydoc_data.topics`, to be told apart by their bytes.

    A topic is cut into blocks of four pieces' length; every fourth block is for the test, and no
    piece reaches over the end of its block.

    Args:
        length: Bytes of a piece.
        names: The topics.

    Raises:
        ValueError: A topic is unknown, or too short for four blocks.

    Example:
        >>> data = topic_windows(64)
        >>> data.train_x.shape[1], data.names[0]
        (64, 'compound')
    """
    from pydoc_data.topics import topics as by_name

    parts: list[list[Tensor]] = [[], [], [], []]
    for label, name in enumerate(names):
        if name not in by_name:
            raise ValueError(f"names: expected topics of pydoc_data, got {name!r}")
        text = torch.frombuffer(bytearray(by_name[name].encode()), dtype=torch.uint8).long()
        if not 1 <= length <= len(text) // 16:
            raise ValueError(
                f"length: expected 1 to {len(text) // 16}, a sixteenth of {name!r}, got {length}"
            )
        blocks = text.unfold(0, 4 * length, 4 * length)
        held = torch.arange(len(blocks)) % 4 == 3
        train = blocks[~held].unfold(1, length, max(1, length // 4)).flatten(0, 1)
        test = blocks[held].unfold(1, length, length).flatten(0, 1)
        labels = (torch.full((len(side),), label) for side in (train, test))
        for found, part in zip(parts, (train, next(labels), test, next(labels)), strict=True):
            found.append(part)
    train_x, train_y, test_x, test_y = (torch.cat(part) for part in parts)
    return TopicWindows(train_x, train_y, test_x, test_y, tuple(names))


def topics(*, every: int = 10) -> Topics:
    r"""The texts of `pydoc_data.topics`, about half a million characters, split by topic.

    The text differs a little from one version of Python to the next.

    Args:
        every: Each `every`-th of the topics, by name, is for validation; texts that occur under
            two names are kept once.

    Raises:
        ValueError: `every` is below 2.

    Source:
        The Python Software Foundation, The Python Language Reference.

    Example:
        >>> text = topics()
        >>> text.decode(text.train[:25])
        'The "assert" statement\n**'
    """
    if every < 2:
        raise ValueError(f"every: expected at least 2, got {every}")
    from pydoc_data.topics import topics as by_name

    texts = list(dict.fromkeys(by_name[name] for name in sorted(by_name)))
    sides = [
        "".join(t for i, t in enumerate(texts) if (i % every == every - 1) is held)
        for held in (False, True)
    ]
    characters = "".join(sorted(set("".join(sides))))
    number = {character: i for i, character in enumerate(characters)}
    train, validation = (torch.tensor([number[c] for c in side]) for side in sides)
    return Topics(train, validation, characters)
