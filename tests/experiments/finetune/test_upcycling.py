"""Upcycling: every arm starts as the dense model, and pairs cost a token the same."""

import json
import sys

import pytest
import torch

from torchzoo.experiments.finetune import upcycling
from torchzoo.experiments.finetune.upcycling import ARMS, SETTINGS, compare_arms, widen
from torchzoo.flops import count_flops
from torchzoo.moe import MoELayer
from torchzoo.surgery import find


@pytest.fixture(scope="module", params=SETTINGS)
def result(request):
    return compare_arms(request.param, smoke=True)


def test_all_start_as_the_dense_model(result):
    for run in result["runs"]:
        assert all(run[arm]["gap"] <= 1e-5 for arm in ARMS)


def test_pairs_cost_the_same_but_for_the_router(result):
    run = result["runs"][0]
    for one, other in upcycling.PAIRS:
        assert 1 < run[one]["flops"] / run[other]["flops"] < 1.02
    assert run["wide"]["flops"] > 1.3 * run["dense"]["flops"]
    assert run["experts-1"]["parameters"] == run["experts-2"]["parameters"]


def test_differences_are_those_of_the_last_losses(result):
    for pair in (("experts-1", "dense"), ("experts-2", "wide"), ("experts-2", "dense")):
        mean, error = result["differences"][" - ".join(pair)]["loss"]
        one, two = (run[pair[0]]["loss"][-1] - run[pair[1]]["loss"][-1] for run in result["runs"])
        assert mean == pytest.approx((one + two) / 2)
        assert error == pytest.approx(abs(one - two) / 2)


def test_arms_go_different_ways_from_one_start(result):
    for run in result["runs"]:
        assert len({run[arm]["loss"][-1] for arm in ("before", *ARMS)}) == 1 + len(ARMS)


@pytest.mark.parametrize("name", SETTINGS)
def test_models_have_a_feed_forward_layer_a_block_to_change(name):
    setting = SETTINGS[name](0, smoke=True)
    model = setting.build()
    assert ARMS["experts-2"](model).count == 2
    assert [layer.gate.k for layer in find(model, MoELayer).values()] == [2, 2]
    if name == "text":  # the label of a character is the next one
        x, y = setting.train.tensors
        assert torch.equal(x[:, 1:], y[:, :-1])
    train, test = ({tuple(row.flatten().tolist()) for row in d.tensors[0]} for d in setting[1:3])
    assert not train & test


@pytest.mark.parametrize("gated", [False, True])
def test_wider_layers_start_equal_and_learn_with_their_new_neurons(gated):
    from timm.layers import Mlp, SwiGLU

    torch.manual_seed(0)
    mlp = (SwiGLU if gated else Mlp)(4, 6)
    x = torch.randn(9, 4)
    wide = widen(mlp, 3)
    torch.testing.assert_close(wide(x), mlp(x))
    assert count_flops(wide, x) == 3 * count_flops(mlp, x)
    optimizer = torch.optim.SGD(wide.parameters(), 0.5)
    for _ in range(2):  # the first step moves what reads the new neurons, the second themselves
        old = {name: p.detach().clone() for name, p in wide.named_parameters()}
        optimizer.zero_grad()
        wide(x).square().sum().backward()
        optimizer.step()
    assert all((p[-1] != old[n][-1]).any() for n, p in wide.named_parameters())
    new = wide.fc2.weight[:, 6:]
    assert (new != new[:, :1]).any()
    assert mlp.fc2.in_features == 6


def test_the_command_writes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upcycling, "compare_arms", lambda name, smoke, tell: {name: smoke})
    monkeypatch.setattr(sys, "argv", ["upcycling", "--smoke", "--out", str(tmp_path / "r.json")])
    upcycling.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["text"], found["images"]) == ({"text": True}, {"images": True})
    assert found["versions"]["torch"] == torch.__version__
