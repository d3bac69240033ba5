"""Swaps of activations, feed-forward layers, norms and attention: how they start, and undo."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchzoo import swaps
from torchzoo.activations import CRReLU, EvoNormS0
from torchzoo.attention import MultiHeadGaussianAdaptiveAttention
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.sparsity import SparseFFN, mlp_parts
from torchzoo.surgery import find, restore


def test_activations_of_every_library_are_found(host):
    expected = host.output()
    report = swaps.swap_activations(host.model, "activation", CRReLU)
    assert report.count == 2 or len(find(host.model, CRReLU)) == 1  # a shared one is one
    assert not find(host.model, swaps.selector("activation"))
    assert (host.output() - expected).abs().max() > 1e-3
    restore(host.model)
    assert torch.equal(host.output(), expected)


def test_functions_held_as_attributes_are_swapped_and_come_back():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected = model(x)
    report = swaps.swap_activations(model, "relu", lambda: CRReLU(0.5))
    assert [(change.name, change.old) for change in report.changes] == [("activation", "function")]
    assert not torch.allclose(model(x), expected)
    restore(model)
    assert model.activation is F.relu
    torch.testing.assert_close(model(x), expected)
    assert model.activation_relu_or_gelu == 1


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("relu=CRReLU(init=0.0)", "CRReLU starts as ReLU"),
        ("relu=CRReLU(init=1.0)", "CRReLU starts within 0.61 of ReLU"),  # e^{-1/2} at 1
        ("0.1=CRReLU(num_parameters=5)", "CRReLU can't be compared with ReLU on one feature"),
    ],
)
def test_the_note_says_how_far_from_the_old_it_starts(text, note):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert swaps.apply(model, text).notes == (note,)


def test_sparse_layers_share_weights_and_keep_what_they_compute(host):
    for module in host.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = host.output()
    weights = {id(p) for p in host.model.parameters()}
    layer = host.model.get_submodule(host.mlps[0])
    if mlp_parts(layer).activation == "silu":
        swaps.swap_sparse_ffn(host.model, activation=None)
        torch.testing.assert_close(host.output(), expected, atol=1e-5, rtol=1e-5)
        restore(host.model)
    report = swaps.swap_sparse_ffn(host.model)
    assert report.names == host.mlps
    assert "became relu: fine-tune the model" in report.notes[0]
    if "Conv1D" not in repr(layer):  # whose weights are transposed
        assert {id(p) for p in host.model.parameters()} == weights
    parts, new = mlp_parts(layer), host.model.get_submodule(host.mlps[0])
    x = torch.randn(4, 16)
    h = F.relu(parts.up(x)) if parts.gate is None else F.relu(parts.gate(x)) * parts.up(x)
    torch.testing.assert_close(new(x), parts.down(h), atol=1e-4, rtol=1e-4)
    restore(host.model)
    assert torch.equal(host.output(), expected)


def test_pairs_of_norm_and_activation_become_evonorms_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    with pytest.warns(UserWarning, match="fine-tune the model"):
        report = swaps.apply(model, "norm=EvoNormS0(group_size=4)")
    assert isinstance(model[1], EvoNormS0)
    assert report.names == ("1",)
    assert report.notes
    restore(model)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="that an activation follows"):
        swaps.swap_evonorm(nn.Sequential(nn.BatchNorm2d(8), nn.Tanh()))


def test_gates_start_as_the_identity_and_learn(host):
    expected, names = host.output(), set(host.model.state_dict())
    report = swaps.add_gaussian_gate(host.model)
    assert report.names == host.attentions
    assert torch.equal(host.output(), expected)
    assert names <= set(host.model.state_dict())
    host.call().square().sum().backward()
    gates = find(host.model, swaps.GaussianPreGate)
    assert len(gates) == 2
    assert all(gate.scale.grad.abs() > 0 for gate in gates.values())
    with torch.no_grad():
        for gate in gates.values():
            gate.scale.fill_(0.5)
    assert (host.output() - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="attention layers without a gate"):
        swaps.add_gaussian_gate(host.model)
    restore(host.model)
    assert torch.equal(host.output(), expected)
    assert set(host.model.state_dict()) == names


def test_a_gated_language_model_stays_causal():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=20, **sizes)).eval()
    swaps.add_gaussian_gate(model)
    torch.nn.init.ones_(model.model.layers[0].self_attn.gaussian_gate.scale)
    ids = torch.randint(0, 20, (1, 6))
    whole, part = model(ids).logits, model(ids[:, :1]).logits
    torch.testing.assert_close(whole[:, :1], part)


def test_the_gate_is_what_it_says_and_cross_attention_keeps_its_keys():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"cross": layer})
    q, kv = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    weights = MultiHeadGaussianAdaptiveAttention(8, 2, norm_dim=-1, init_xi=0.7)
    gated = q + 0.3 * weights(q)
    expected, itself = layer(gated, kv, kv)[0], layer(gated, gated, gated)[0]
    swaps.add_gaussian_gate(model, num_heads=2, init_xi=0.7)
    nn.init.constant_(layer.gaussian_gate.scale, 0.3)
    torch.testing.assert_close(layer(q, kv, value=kv)[0], expected)
    torch.testing.assert_close(layer(query=q, key=q, value=q)[0], itself)


def test_a_gate_is_not_bypassed_by_torchs_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        swaps.add_gaussian_gate(model)
        model.self_attn.gaussian_gate.scale.fill_(1.0)
        assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relu", "expected selector=Layer"),
        ("relu=CRReLU(0.1)", "expected options name=value"),
        ("relu=CRReLU(init=open)", "expected options name=value"),
        ("relu=CRReLU(init=0.1", "expected selector=Layer"),
        ("relu=CRReLU(start=0.1)", "unexpected keyword argument 'start'"),
        ("relu=CRReLU(num_parameters=0)", "num_parameters: expected 1 or more"),
        ("relu=CReLU", "no layer 'CReLU'; did you mean .*CRReLU"),
        ("mlp=MoELayer(experts=4)", "'experts'"),
        ("Linear=DeltaLinear(threshold=-1.0)", "threshold: expected a number ≥ 0"),
        ("gelu=CRReLU", "no such activation|selects nothing|got none"),
        ("layer.*.act=CRReLU", "words are relu, gelu"),
    ],
)
def test_swaps_that_cannot_be(text, message):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    parts = list(model[0])
    with pytest.raises(TorchzooError, match=message) as raised:
        swaps.apply(model, text)
    assert text in str(raised.value) or "no layer" in str(raised.value)
    assert list(model[0]) == parts


@pytest.mark.parametrize(
    "text", ["mlp=MoELayer", "mlp=SparseFFN", "attention=GaussianAdaptiveAttention"]
)
def test_named_swaps_reach_their_functions(text, host):
    for module in host.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings(action="error"):
        report = swaps.apply(host.model, text, inputs=host.x)
    assert report.names == (host.attentions if "attention" in text else host.mlps)
    assert report.flops is not None
    assert all(flops > 0 for flops in report.flops)


def test_named_delta_and_class_names():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    assert swaps.apply(model, "conv=DeltaConv2d(threshold=0.1)").names == ("0",)
    assert model[0].threshold == 0.1
    assert swaps.apply(model, "Linear=DeltaLinear").names == ("2",)
    assert swaps.apply(model, "DeltaLinear=KANLinear(in_features=12, out_features=2)")


def test_a_sparse_layer_is_a_layer_that_can_be_swapped_again():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model, x = nn.Sequential(mlp), torch.randn(3, 4)
    expected = model(x)
    swaps.swap_sparse_ffn(model)
    assert isinstance(model[0], SparseFFN)
    swaps.swap_experts(model)
    torch.testing.assert_close(model(x), expected)
    restore(model)
    assert model[0] is mlp


def test_a_missing_word_is_an_unknown_name():
    with pytest.raises(UnknownNameError):
        swaps.apply(nn.Sequential(nn.Linear(2, 2)), "attention=GaussianAdaptiveAttention")
