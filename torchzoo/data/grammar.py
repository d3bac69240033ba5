"""Endless text of known entropy: letters of a third-order Markov source between nested brackets.

With l open brackets the next symbol opens one with probability p where l < depth, closes the last
one with probability q where l > 0, and else is a letter, drawn given the last three letters; the
brackets between them don't count. Openers are drawn evenly from B kinds; what closes is decided by
what is open. The number of open brackets is a birth-death chain with weights μ_l ∝ (p/q)^l,
independent in the long run of the last three letters, whose weights are π; so a symbol has entropy

    Σ_l μ_l [H(letter, open, close | l) + P(open | l) ln B + P(letter | l) Σ_c π_c H(letter | c)].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPENERS, CLOSERS = "([{<", ")]}>"


class _State(NamedTuple):
    """What the next symbol depends on, a row a text.

    Attributes:
        context: The last three letters, the newest last, `(N, 3)`.
        stack: Kinds of the open brackets, the outermost first, `(N, depth)`.
        level: How many are open, `(N,)`.
    """

    context: Tensor
    stack: Tensor
    level: Tensor


class Grammar:
    """A fixed source of text; symbols are numbers, letters first, then openers, then closers.

    A text begins with no open bracket, as if three times the first letter had come before it.

    Args:
        letters: How many letters, 2 to 26.
        brackets: How many kinds B of brackets, 1 to 4.
        depth: How many brackets may be open.
        p_open: Probability p to open a bracket, > 0.
        p_close: Probability q to close one, > 0; p + q < 1.
        sharpness: Standard deviation of the letters' scores, whose softmax their probabilities
            are. A score is the sum of four normal numbers: one for each of the last three letters
            alone, and one for the three together.
        seed: Seed of these log-probabilities; it fixes the source.

    Attributes:
        vocab: Number of symbols.
        entropy: Entropy of a symbol given all before it, in nats, in the long run: what no model
            can beat.

    Raises:
        ValueError: A number out of its range.

    Example:
        >>> source = Grammar()
        >>> text = source.sample(1, 24, seed=0)
        >>> len(source.decode(text[0])), source.vocab
        (24, 14)
    """

    def __init__(
        self,
        *,
        letters: int = 8,
        brackets: int = 3,
        depth: int = 4,
        p_open: float = 0.12,
        p_close: float = 0.16,
        sharpness: float = 3.0,
        seed: int = 0,
    ):
        _check_range("letters", letters, 2, len(LETTERS))
        _check_range("brackets", brackets, 1, len(OPENERS))
        _check_range("depth", depth, 1, 64)
        if not (p_open > 0 and p_close > 0 and p_open + p_close < 1):
            raise ValueError(
                f"p_open, p_close: expected > 0 and less than 1 together, got {p_open}, {p_close}"
            )
        self.letters, self.brackets, self.depth = letters, brackets, depth
        self.p_open, self.p_close = p_open, p_close
        generator = torch.Generator().manual_seed(seed)
        shape = (letters,) * 4
        scores = torch.randn(shape, generator=generator, dtype=torch.float64)
        for place in range(3):
            alone = torch.randn(letters, letters, generator=generator, dtype=torch.float64)
            scores += alone.view([letters if i in (place, 3) else 1 for i in range(4)])
        self.transitions = (sharpness * scores / 2).softmax(-1)
        self.vocab = letters + 2 * brackets
        self.entropy = self._entropy()

    def sample(self, rows: int, length: int, *, seed: int) -> Tensor:
        """Draw texts.

        Args:
            rows: How many, N.
            length: Symbols in each, T.
            seed: Seed of the texts.

        Returns:
            Symbols `(N, T)`, int64.
        """
        generator = torch.Generator().manual_seed(seed)
        state, drawn = self._start(rows), []
        for _ in range(length):
            drawn.append(self._next(state).multinomial(1, generator=generator)[:, 0])
            state = self._after(state, drawn[-1])
        return torch.stack(drawn, -1)

    def nll(self, texts: Tensor) -> Tensor:
        """The surprise −ln P(symbol | all before it) of each symbol, in nats.

        Args:
            texts: Whole texts, from their beginning.

        Shape:
            - texts: `(N, T)`
            - output: `(N, T)`, float64; infinite from a symbol on that the source never gives
        """
        state, surprise = self._start(len(texts)), []
        dead = torch.zeros(len(texts), dtype=torch.bool)
        for symbol in texts.unbind(-1):
            p = self._next(state).gather(-1, symbol[:, None])[:, 0]
            dead = dead | (p == 0)
            surprise.append(torch.where(dead, torch.inf, -p.log()))
            state = self._after(state, symbol)
        return torch.stack(surprise, -1)

    def decode(self, text: Tensor) -> str:
        """One text `(T,)` as a string."""
        b = self.brackets
        return "".join(
            (LETTERS[: self.letters] + OPENERS[:b] + CLOSERS[:b])[i] for i in text.tolist()
        )

    def _start(self, rows: int) -> _State:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return _State(zeros(rows, 3), zeros(rows, self.depth), zeros(rows))

    def _actions(self, level: Tensor) -> Tensor:
        """Probabilities of a letter, an opener and a closer with so many open, `(..., 3)`."""
        opens = self.p_open * (level < self.depth).double()
        closes = self.p_close * (level > 0).double()
        return torch.stack([1 - opens - closes, opens, closes], -1)

    def _next(self, state: _State) -> Tensor:
        """Probabilities of the next symbol, `(N, vocab)`."""
        letter, opens, closes = self._actions(state.level).unbind(-1)
        kind = state.stack.gather(-1, (state.level[:, None] - 1).clamp_min(0))
        closers = torch.zeros(len(kind), self.brackets, dtype=torch.float64)
        return torch.cat(
            [
                letter[:, None] * self.transitions[tuple(state.context.T)],
                (opens / self.brackets)[:, None].expand(-1, self.brackets),
                closers.scatter(-1, kind, closes[:, None]),
            ],
            -1,
        )

    def _after(self, state: _State, symbol: Tensor) -> _State:
        opener = symbol - self.letters
        is_letter, is_closer = opener < 0, opener >= self.brackets
        is_opener = ~is_letter & ~is_closer
        shifted = torch.cat([state.context[:, 1:], symbol[:, None]], -1)
        places = torch.arange(self.depth) == state.level[:, None]
        return _State(
            torch.where(is_letter[:, None], shifted, state.context),
            torch.where(places & is_opener[:, None], opener[:, None], state.stack),
            state.level + is_opener.long() - is_closer.long(),
        )

    def _entropy(self) -> float:
        """The formula of the module's docstring."""
        levels = torch.arange(self.depth + 1)
        mu = (self.p_open / self.p_close) ** levels.double()
        actions = self._actions(levels)
        pi = torch.full((self.letters,) * 3, self.letters**-3.0, dtype=torch.float64)
        for _ in range(10_000):  # every probability is positive: the weights converge
            before, pi = pi, torch.einsum("abc,abcd->bcd", pi, self.transitions)
            if (pi - before).abs().sum() < 1e-14:
                break
        letter = (pi * torch.special.entr(self.transitions).sum(-1)).sum()
        kinds = actions[:, 1] * math.log(self.brackets)
        of_level = torch.special.entr(actions).sum(-1) + kinds + actions[:, 0] * letter
        return float((mu / mu.sum()) @ of_level)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
