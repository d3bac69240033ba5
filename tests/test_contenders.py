"""Layers and their peers from text."""

import copy

import pytest
import torch
from torch import nn

from torchzoo import registry
from torchzoo.contenders import contests, maker
from torchzoo.errors import TorchzooError, UnknownNameError


def test_the_card_says_sizes_and_peers():
    (contest,) = contests("CRReLU")
    assert contest.name == "512x4096"
    assert list(contest.modules) == ["CRReLU", "ReLU", "GELU", "SiLU"]
    assert contest.inputs[0].requires_grad


def test_a_card_without_peers_falls_back_on_its_example():
    assert "rules" in registry.card("KnowledgeCircuit").compare
    (contest,) = contests("KnowledgeCircuit")
    assert list(contest.modules) == ["KnowledgeCircuit"]
    assert [tuple(x.shape) for x in contest.inputs] == [(5, 4)]


def test_peers_may_be_layers_of_the_zoo_by_name():
    (contest,) = contests("ChebyshevBasis")
    assert list(contest.modules) == ["ChebyshevBasis", "BSplineBasis(grid_size=5)"]
    assert contest.modules["BSplineBasis(grid_size=5)"].grid_size == 5


def test_options_sizes_and_rivals():
    rivals = ["S5", "LSTM", "torch.nn.GRU(input_size=8, hidden_size=4)"]
    found = contests("S4D(d_model=8, d_state=6)", against=rivals, shapes=["2x5x8", "3x8"])
    assert [[tuple(x.shape) for x in contest.inputs] for contest in found] == [
        [(2, 5, 8)],
        [(3, 8)],
    ]
    modules = found[0].modules
    assert list(modules) == ["S4D(d_model=8, d_state=6)", *rivals]
    assert modules["S5"].d_model == modules["LSTM"].hidden_size == 8
    assert isinstance(modules[rivals[2]], nn.GRU)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("S4", {"shapes": ["3y"]}, TorchzooError, "shapes '3y': expected 1 as in '4x1024x256'"),
        ("S4", {"shapes": ["3x4,5"]}, TorchzooError, "expected 1 as in"),
        ("S4", {"shapes": ["3x4x5"]}, TorchzooError, r"S4 on inputs of shapes 3x4x5: x: expected"),
        ("CRReL", {}, UnknownNameError, "no module 'CRReL'"),
        ("CRReLU(", {}, TorchzooError, "expected Layer or Layer"),
        ("CRReLU(1)", {}, TorchzooError, "expected options name=value"),
        ("CRReLU(init='a')", {}, TorchzooError, r"CRReLU\(init='a'\): "),
        ("CRReLU", {"against": ["Foo"]}, UnknownNameError, "no peer 'Foo': expected one of"),
        ("CRReLU", {"against": ["ReLu"]}, UnknownNameError, "did you mean ReLU"),
        ("CRReLU", {"against": ["os.path.join"]}, UnknownNameError, "no peer 'os.path.join'"),
        ("CRReLU", {"against": ["torch.nn.ReLU(slope=1)"]}, TorchzooError, "slope"),
    ],
)
def test_errors(text, options, error, message):
    with pytest.raises(error, match=message):
        contests(text, **options)


COMPARED = [card.key for card in registry.cards() if callable(card.compare)]


def test_every_card_names_peers_or_says_why_there_are_none():
    silent = [card.key for card in registry.cards() if not card.compare]
    assert not silent
    assert all(callable(card.compare) or len(card.compare) > 20 for card in registry.cards())
    assert len(COMPARED) >= 78


@pytest.mark.parametrize("key", COMPARED)
def test_peers_do_the_same_job(key):
    comparison = registry.card(key).compare()
    modules = build(key, comparison).values()
    assert len(modules) == 1 + len(comparison.peers) > 1
    assert len({output_shape(module, comparison.inputs) for module in modules}) == 1


def build(key, comparison):
    makers = {
        rival: maker(rival, comparison.peers, comparison.kwargs) for rival in comparison.peers
    }
    return {key: registry.card(key).cls(**comparison.kwargs)} | {
        rival: make() for rival, make in makers.items()
    }


def output_shape(module, inputs):
    """By shapes alone, since sizes are those of a benchmark, where that is possible and quick."""
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):  # meta unrolls its steps
        return shape_on(module, inputs, "cpu")
    try:
        return shape_on(copy.deepcopy(module), inputs, "meta")
    except (RuntimeError, ValueError):  # what depends on values
        return shape_on(module, inputs, "cpu")


def shape_on(module, inputs, device):
    with torch.no_grad():
        output = module.to(device).eval()(*[x.to(device) for x in inputs])
    output = output[0] if isinstance(output, tuple) else output
    return (output if isinstance(output, torch.Tensor) else output.mean).shape
