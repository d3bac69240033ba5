"""Layers and their peers from text."""

import pytest
import torch
from torch import nn

from torchzoo import registry
from torchzoo.contenders import contests
from torchzoo.errors import TorchzooError, UnknownNameError


def test_the_card_says_sizes_and_peers():
    (contest,) = contests("CRReLU")
    assert contest.name == "512x4096"
    assert list(contest.modules) == ["CRReLU", "ReLU", "GELU", "SiLU"]
    assert contest.inputs[0].requires_grad


def test_a_card_without_peers_falls_back_on_its_example():
    (contest,) = contests("GroupedExperts")
    assert list(contest.modules) == ["GroupedExperts"]
    assert [tuple(x.shape) for x in contest.inputs] == [(7, 6), (3,)]
    assert contest.inputs[1].dtype == torch.int32


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


def test_every_comparison_on_a_card_runs():
    compared = [card for card in registry.cards() if card.compare]
    assert len(compared) >= 14
    for card in compared:
        comparison = card.compare()
        modules = [card.cls(**comparison.kwargs)]
        modules += [make(**comparison.kwargs) for make in comparison.peers.values()]
        assert len(modules) > 1
        with torch.device("meta"):
            inputs = [torch.empty_like(x, device="meta") for x in comparison.inputs]
        shapes = set()
        for module in modules:
            output = module.to("meta").eval()(*inputs)
            shapes.add((output[0] if isinstance(output, tuple) else output).shape)
        assert len(shapes) == 1, card.key
