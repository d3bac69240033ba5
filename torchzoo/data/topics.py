"""English text that every Python has: its language reference, as `help` shows it."""

from __future__ import annotations

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
