"""The three steps of ProSparse: conversion, penalty with its schedule, thresholds."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchzoo.sparsity import (
    ActivationL1,
    FATReLU,
    SineSparsityScheduler,
    SparseFFN,
    fatrelu,
    load_prosparse_config,
    prosparse_convert,
)

STAGES = [(100, 0.01), (300, 0.05), (400, 0.05), (900, 0.2)]


@pytest.mark.claim(
    122, "The schedule equals its closed form at probe points of every stage", tolerance=1e-12
)
def test_schedule_equals_the_closed_form():
    schedule = SineSparsityScheduler(STAGES)
    root = math.sqrt(0.5)
    probes = {
        0: 0.01,
        100: 0.01,
        150: 0.01 + 0.04 * (1 - root) / 2,  # η = 1/4: sin(−π/4)
        200: 0.03,
        250: 0.01 + 0.04 * (1 + root) / 2,
        350: 0.05,
        400 + 500 / 3: 0.05 + 0.15 * 0.25,  # η = 1/3: sin(−π/6) = −1/2
        650: 0.125,
        900: 0.2,
        5000: 0.2,
    }
    for t, expected in probes.items():
        assert schedule.value_at(t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.claim(
    122, "The schedule is continuous and monotone, and flat at the end of every stage"
)
def test_schedule_is_smooth():
    schedule = SineSparsityScheduler(STAGES)
    values = [schedule.value_at(t / 4) for t in range(4000)]
    rises = [b - a for a, b in pairwise(values)]
    steepest = 0.15 / 500 * math.pi / 2
    assert min(rises) >= 0
    assert max(rises) < steepest
    for end, weight in STAGES:
        for shift in (-1e-4, 1e-4):
            slope = (schedule.value_at(end + shift) - weight) / shift
            assert abs(slope) < 1e-6 * max(weight, 0.15) / 100
    assert schedule.value_at(650) - schedule.value_at(640) > 9 * steepest  # no straight line


def test_published_schedules():
    large = SineSparsityScheduler.published("llama2-7b")
    assert [large.value_at(t) for t in (0, 5000, 6000, 10000, 11000, 12000, 16000, 16500)] == [
        *(0.0, 0.0, 5e-3, 5e-2, 5e-2, 5e-2, 0.2, 0.2)
    ]
    assert large.value_at(14000) == pytest.approx(0.125)
    assert SineSparsityScheduler.published("llama2-13b").value_at(1e6) == 2e-2
    assert SineSparsityScheduler.published("minicpm-1b").value_at(12500) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="name"):
        SineSparsityScheduler.published("llama3")


def test_schedule_steps_and_resumes():
    schedule = SineSparsityScheduler([(1, 0.0), (3, 1.0)])
    assert schedule.value == 0.0
    assert [schedule.step() for _ in range(4)] == [0.0, 0.5, 1.0, 1.0]
    schedule = SineSparsityScheduler([(1, 0.0), (3, 1.0)])
    schedule.step()
    schedule.step()
    again = SineSparsityScheduler([(9, 9.0)])
    again.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    assert (again.value, again.step()) == (0.5, 1.0)


@pytest.mark.parametrize(
    "stages", [[], [(5, 0.1), (5, 0.2)], [(5, 0.1), (4, 0.2)], [(-1, 0.1)], [(1, -0.1)]]
)
def test_bad_stages_are_refused(stages):
    with pytest.raises(ValueError, match="stages"):
        SineSparsityScheduler(stages)


@pytest.mark.claim(122, "FATReLU at 0 is relu, bit for bit, with its gradient", tolerance=0)
def test_fatrelu_at_zero_is_relu():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([0.0, torch.inf, -torch.inf])]).requires_grad_()
    weights = torch.arange(1003.0).cos()
    assert torch.equal(FATReLU(0.0)(x), torch.relu(x))
    (ours,) = torch.autograd.grad(FATReLU(0.0)(x), x, weights)
    (theirs,) = torch.autograd.grad(torch.relu(x), x, weights)
    assert torch.equal(ours, theirs)
    assert FATReLU(0.0)(torch.tensor(torch.nan)).isnan()


@pytest.mark.claim(
    122, "FATReLU drops values up to its threshold and does not shift the others", tolerance=0
)
def test_fatrelu_keeps_values():
    x = torch.tensor([0.25, 0.5, 0.75, -0.75])
    assert FATReLU(0.5)(x).tolist() == [0, 0, 0.75, 0]
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.01, 0.5):
        assert torch.equal(fatrelu(x, t), F.threshold(x, t, 0.0))
    assert torch.equal(FATReLU()(x), F.threshold(x, 0.01, 0.0))
    per_neuron = torch.linspace(0, 2, 40)
    layer = FATReLU(per_neuron.tolist(), per_neuron=True)
    expected = torch.stack([F.threshold(x[:, i], float(t), 0.0) for i, t in enumerate(per_neuron)])
    assert torch.equal(layer(x), expected.T)
    assert layer.state_dict()["threshold"].shape == (40,)
    away = torch.tensor([0.1, 0.4, 0.6, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fatrelu(z, 0.5), away)


def test_fatrelu_refuses_bad_thresholds():
    for bad in ({"threshold": -1.0}, {"threshold": [0.1]}, {"threshold": 0.1, "per_neuron": True}):
        with pytest.raises(ValueError, match="threshold"):
            FATReLU(**bad)
    with pytest.raises(ValueError, match="threshold"):
        fatrelu(torch.zeros(2), -0.1)
    with pytest.raises(ValueError, match="x"):
        FATReLU([0.1, 0.2], per_neuron=True)(torch.zeros(2, 3))


class Net(nn.Module):
    """Two feed-forward layers, checkpointed if asked for."""

    def __init__(self, reentrant=None, **ffn):
        super().__init__()
        self.layers = nn.ModuleList(SparseFFN(6, 10, bias=True, **ffn) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.claim(
    122, "The penalty is the mean of |x1| over tokens and neurons, summed over layers", tolerance=0
)
def test_penalty_is_the_mean_summed_over_layers():
    torch.manual_seed(0)
    model, x = Net(policy="sparse"), torch.randn(3, 5, 6)
    with ActivationL1(model) as l1, ActivationL1(model, reduction="token_mean") as summed:
        with pytest.raises(ValueError, match="value"):
            l1.value()
        for _ in range(2):  # every forward anew
            out = model(x)
        first = model.layers[0].hidden(x)
        second = model.layers[1].hidden(x + model.layers[0](x))
        expected = first.abs().sum() / 150 + second.abs().sum() / 150
        torch.testing.assert_close(l1.value(), expected)
        torch.testing.assert_close(summed.value(), 10 * expected)
    torch.testing.assert_close(model(x), out)
    with pytest.raises(ValueError, match="value"):
        l1.value()
    assert not any(layer._watchers or layer.down_proj._forward_pre_hooks for layer in model.layers)


@pytest.mark.claim(
    122, "The penalty's gradient by x1 is its sign over the count; neurons at 0 get none"
)
def test_gradient_of_the_penalty():
    torch.manual_seed(1)
    model, x = SparseFFN(6, 10), torch.randn(4, 6)
    with ActivationL1(model) as l1:
        model(x)
        value = l1.value()
    h = model.hidden(x)
    (by_h,) = torch.autograd.grad(h.abs().mean(), h, retain_graph=True)
    assert torch.equal(by_h, h.sign() / 40)
    expected = torch.autograd.grad((h * h.detach().sign()).sum() / 40, model.gate_proj.weight)[0]
    (got,) = torch.autograd.grad(value, model.gate_proj.weight)
    torch.testing.assert_close(got, expected)
    off = (h == 0).all(0)
    assert off.any()
    assert torch.equal(got[off], torch.zeros_like(got[off]))


def test_penalty_with_checkpointing_counts_once():
    torch.manual_seed(2)
    model, x = Net(), torch.randn(4, 6, requires_grad=True)

    def gradients(model):
        with ActivationL1(model) as l1:
            loss = model(x).square().mean() + 3 * l1.value()
            before = l1.value().item()
            found = torch.autograd.grad(loss, [x, *model.parameters()])
            assert l1.value().item() == before
        return found

    expected = gradients(model)
    model.reentrant = False
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want)
    model.reentrant = True
    with ActivationL1(model) as l1:
        model(x)
        with pytest.raises(ValueError, match="use_reentrant=False"):
            l1.value()
    with pytest.raises(ValueError, match="reduction"):
        ActivationL1(model, reduction="sum")


def test_a_forward_that_failed_is_over():
    model, x = Net(), torch.randn(4, 6)
    model.layers[1].down_proj.weight = nn.Parameter(torch.zeros(6, 3))
    with ActivationL1(model) as l1:
        with pytest.raises((RuntimeError, ValueError)):
            model(x)
        before = l1.value().item()
        model.layers[0](x)  # by itself: no part of a forward of the model
        assert l1.value().item() == before


def test_penalty_of_layers_that_are_not_ours():
    mlp = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))
    x = torch.randn(5, 3)
    with ActivationL1(mlp) as l1:
        mlp(x)
        torch.testing.assert_close(l1.value(), mlp[1](mlp[0](x)).abs().mean())


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_llama_is_the_same_with_its_activation_kept(llama):
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    converted = copy.deepcopy(llama)
    for layer in converted.model.layers:
        layer.mlp = SparseFFN.from_mlp(layer.mlp, policy="sparse")
        assert layer.mlp.activation == "silu"
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)


def test_llama_with_relu_generates_the_same_tokens(llama):
    relu = copy.deepcopy(llama)
    for layer in relu.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    converted = copy.deepcopy(llama)
    report = prosparse_convert(converted)
    assert report.names == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert (converted.config.hidden_act, llama.config.hidden_act) == ("relu", "silu")
    weight = converted.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight, llama.model.layers[1].mlp.down_proj.weight)
    ids = torch.tensor([[1, 7, 3]])
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    dense, sparse = (model.generate(ids, **options) for model in (relu, converted))
    assert torch.equal(dense, sparse)
    assert len(set(sparse[0, 3:].tolist())) > 2


def test_conversion_shares_parameters_and_sets_thresholds(llama):
    model = copy.deepcopy(llama)
    mlp = model.model.layers[0].mlp
    report = prosparse_convert(model, threshold=0.02, match="*layers.0.mlp")
    assert report.count == 1
    ffn = model.model.layers[0].mlp
    assert ffn.down_proj.weight is mlp.down_proj.weight
    assert torch.equal(ffn.threshold, torch.full((64,), 0.02))
    x = torch.randn(3, 32)
    gate = mlp.gate_proj(x)
    h = torch.where(gate > 0.02, gate, 0.0) * mlp.up_proj(x)
    torch.testing.assert_close(ffn(x), mlp.down_proj(h))
    assert (model.config.hidden_act, model.config.hidden_act_param) == ("fatrelu", 0.02)
    assert load_prosparse_config(model.config) == {"activation": "fatrelu", "threshold": 0.02}
    with pytest.raises(ValueError, match="match"):
        prosparse_convert(nn.Sequential(nn.Linear(2, 2)))


def test_published_configurations():
    assert load_prosparse_config({"hidden_act": "relu"})["activation"] == "relu"
    assert load_prosparse_config({"hidden_act": "swish"})["activation"] == "silu"
    for bad in ({}, {"hidden_act": "gelu"}, {"hidden_act": "fatrelu"}):
        with pytest.raises(ValueError, match="hidden_act"):
            load_prosparse_config(bad)
