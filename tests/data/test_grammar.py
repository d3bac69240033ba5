import itertools
import math

import numpy as np
import pytest
import torch

from torchzoo.data.grammar import CLOSERS, LETTERS, OPENERS, Grammar


def brute_force_entropy(source):
    """Entropy of the next symbol over all states, from the rules and the stationary state."""
    stacks = [
        stack
        for size in range(source.depth + 1)
        for stack in itertools.product(range(source.brackets), repeat=size)
    ]
    states = list(itertools.product(itertools.product(range(source.letters), repeat=3), stacks))
    place = {state: i for i, state in enumerate(states)}
    matrix, entropy = np.zeros((len(states), len(states))), np.zeros(len(states))
    for (context, stack), i in place.items():
        opens = source.p_open if len(stack) < source.depth else 0.0
        closes = source.p_close if stack else 0.0
        moves = [(((context, (*stack, kind))), opens / source.brackets) for kind in range(3)]
        moves = moves[: source.brackets] if opens else []
        moves += [((context, stack[:-1]), closes)] if closes else []
        for letter in range(source.letters):
            chance = source.transitions[(*context, letter)].item()
            moves.append((((*context[1:], letter), stack), (1 - opens - closes) * chance))
        assert sum(p for _, p in moves) == pytest.approx(1, abs=1e-12)
        for state, p in moves:
            matrix[i, place[state]] += p
        entropy[i] = -sum(p * math.log(p) for _, p in moves)
    system = np.vstack([matrix.T - np.eye(len(states)), np.ones(len(states))])
    stationary = np.linalg.lstsq(system, np.append(np.zeros(len(states)), 1), rcond=None)[0]
    return stationary @ entropy


@pytest.mark.parametrize(
    "options",
    [
        {"letters": 2, "brackets": 1, "depth": 1},
        {"letters": 3, "brackets": 2, "depth": 2, "p_open": 0.3, "p_close": 0.2},
        {"letters": 2, "brackets": 3, "depth": 3, "sharpness": 5.0, "seed": 4},
    ],
)
def test_entropy_equals_the_sum_over_all_states(options):
    source = Grammar(**options)
    assert source.entropy == pytest.approx(brute_force_entropy(source), abs=1e-10)


def test_letters_without_preference_have_the_closed_form():
    source = Grammar(letters=8, brackets=4, depth=1, p_open=0.25, p_close=0.25, sharpness=0.0)
    # half of the time nothing is open: opener or letter; else closer or letter
    expected = 0.5 * (0.25 * math.log(4)) + 0.75 * math.log(8)
    expected += -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert source.entropy == pytest.approx(expected, abs=1e-12)


def test_the_mean_surprise_of_a_long_text_is_the_entropy():
    source = Grammar()
    surprise = source.nll(source.sample(512, 600, seed=3))[:, 100:].mean(-1)
    error = surprise.std().item() / math.sqrt(len(surprise))
    assert error < 0.005
    assert surprise.mean().item() == pytest.approx(source.entropy, abs=4 * error)


def test_brackets_are_nested_and_never_too_deep():
    source = Grammar(letters=5, brackets=3, depth=2, p_open=0.3, p_close=0.3)
    deepest = 0
    for text in source.sample(50, 200, seed=0):
        stack = []
        for character in source.decode(text):
            if character in OPENERS[:3]:
                stack.append(character)
            elif character in CLOSERS[:3]:
                assert OPENERS.index(stack.pop()) == CLOSERS.index(character)
            else:
                assert character in LETTERS[:5]
            deepest = max(deepest, len(stack))
    assert deepest == 2


def test_letters_follow_the_last_three_letters_whatever_brackets_are_between():
    source = Grammar(letters=2, brackets=2, depth=3, p_open=0.3, p_close=0.3, sharpness=2.0)
    counts = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    for text in source.sample(40, 3000, seed=1):
        letters = text[text < 2].unfold(0, 4, 1)
        counts += torch.bincount(letters @ torch.tensor([8, 4, 2, 1]), minlength=16).view(
            2, 2, 2, 2
        )
    seen = counts.sum(-1, keepdim=True)
    p = source.transitions
    errors = (counts / seen - p).abs() / (p * (1 - p) / seen).sqrt()
    assert errors.max() < 4.5
    assert (p - p.flip(-1)).abs().max() > 0.5  # preferences that could be missed are there


def test_surprise_of_a_short_text_by_hand():
    source = Grammar(letters=2, brackets=2, depth=2, p_open=0.2, p_close=0.3)
    a, b, opener, closer = 0, 1, 3, 5  # the second kind of bracket
    text = torch.tensor([[b, opener, a, closer, b, closer, a]])
    p = source.transitions
    expected = [0.8 * p[0, 0, 0, 1], 0.1, 0.5 * p[0, 0, 1, 0], 0.3, 0.8 * p[0, 1, 0, 1]]
    got = source.nll(text)[0]
    np.testing.assert_allclose(got[:5].numpy(), [-math.log(value) for value in expected])
    assert got[5:].tolist() == [math.inf, math.inf]  # nothing was open
    assert source.nll(torch.tensor([[opener, 4]]))[0, 1] == math.inf  # another kind is open
    assert source.decode(text[0]) == "b[a]b]a"


def test_seeds_decide_source_and_text():
    source, other = Grammar(), Grammar(seed=1)
    assert torch.equal(source.transitions, Grammar().transitions)
    assert not torch.equal(source.transitions, other.transitions)
    text = source.sample(3, 50, seed=7)
    assert torch.equal(text, Grammar().sample(3, 50, seed=7))
    assert not torch.equal(text, source.sample(3, 50, seed=8))
    assert (text.min() >= 0, text.max() < source.vocab) == (True, True)


@pytest.mark.parametrize(
    "options",
    [{"letters": 1}, {"letters": 27}, {"brackets": 0}, {"brackets": 5}, {"depth": 0}],
)
def test_sizes_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Grammar(**options)


@pytest.mark.parametrize("options", [{"p_open": 0.0}, {"p_close": 0.0}, {"p_open": 0.84}])
def test_probabilities_are_checked(options):
    with pytest.raises(ValueError, match="p_open, p_close"):
        Grammar(**options)
