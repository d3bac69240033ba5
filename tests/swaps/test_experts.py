"""Sparse upcycling and Mixtral's experts: equal at the start, whatever the router does."""

import pytest
import torch
from torch import nn

from torchzoo.errors import UnknownNameError
from torchzoo.moe import GroupedExperts, MoELayer, TopKGate
from torchzoo.surgery import find, restore
from torchzoo.swaps import (
    CopiedExperts,
    from_mixtral_block,
    swap_experts,
    to_mixtral_block,
    to_mixtral_state,
    upcycle,
)

EXPERTS = {"llama": GroupedExperts, "gpt2": CopiedExperts, "vit": GroupedExperts}


def test_upcycled_models_compute_what_they_did(host, request):
    expected = host.output()
    before = sum(p.numel() for p in host.model.parameters())
    report = swap_experts(host.model, num_experts=3, k=2)
    assert report.names == host.mlps
    assert report.parameters[0] == before < report.parameters[1]
    torch.testing.assert_close(host.output(), expected, atol=1e-5, rtol=1e-5)
    kind = EXPERTS.get(request.node.callspec.params["host"], GroupedExperts)
    layers = find(host.model, MoELayer).values()
    assert all(type(layer.experts) is kind for layer in layers)
    for layer in layers:  # another choice of experts and other weights
        nn.init.normal_(layer.gate.weight)
    torch.testing.assert_close(host.output(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        next(iter(next(iter(layers)).experts.parameters()))[0] *= 1.5
    assert (host.output() - expected).abs().max() > 1e-3
    assert restore(host.model) == host.mlps
    assert torch.equal(host.output(), expected)


def test_upcycled_models_learn(host):
    swap_experts(host.model, num_experts=3)
    host.call().square().sum().backward()
    layer = next(iter(find(host.model, MoELayer).values()))
    assert layer.gate.weight.grad.shape == (3, 16)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_those_of_the_layer(dtype):
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype).eval()
    layer = upcycle(mlp)
    x = torch.randn(6, 4, dtype=dtype)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(layer(x), mlp(x), **tolerance)
    assert not layer.experts.training


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()])
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_taken_over_and_left_as_it_was(activation, training):
    mlp = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 4)).train(training)
    layer = upcycle(mlp)
    assert {module.training for one in (mlp, layer) for module in one.modules()} == {training}


def test_layers_on_the_meta_device_have_a_stacked_form():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to("meta")
    layer = upcycle(mlp, num_experts=3)
    assert layer.experts.w_in.shape == (3, 4, 8)
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_biases_of_one_layer_only():
    mlp = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 4))
    layer = upcycle(mlp, num_experts=2, k=1)
    assert isinstance(layer.experts, GroupedExperts)
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), mlp(x))


@pytest.mark.parametrize("middle", [nn.Tanh(), nn.GELU("tanh"), nn.Dropout(0.5)])
def test_what_has_no_stacked_form_is_copied(middle):
    mlp = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 4)).eval()
    layer = upcycle(mlp, num_experts=2)
    assert isinstance(layer.experts, CopiedExperts)
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), mlp(x))


def test_a_layer_that_only_looks_like_a_known_one_is_copied():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x):
            return 1.01 * self.fc2(self.act(self.fc1(x)))

    mlp = Scaled()
    layer = upcycle(mlp)
    assert isinstance(layer.experts, CopiedExperts)
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), mlp(x))


def test_copied_experts_serve_their_rows_and_pad_with_zeros():
    experts = CopiedExperts(nn.Linear(3, 2), 3)
    for index, expert in enumerate(experts.experts):
        nn.init.constant_(expert.weight, index + 1.0)
        nn.init.zeros_(expert.bias)
    y = experts(torch.ones(5, 3), torch.tensor([2, 2, 4]))
    assert y[:, 0].tolist() == [3, 3, 9, 9, 0]


def test_fresh_experts_differ():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    swap_experts(model, init="fresh")
    assert not torch.equal(model[0].experts.w_in[0], model[0].experts.w_in[1])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="expected a feed-forward layer, got ReLU"):
        upcycle(nn.ReLU())
    with pytest.raises(ValueError, match="k:"):
        upcycle(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), k=9)
    with pytest.raises(UnknownNameError):
        swap_experts(nn.Sequential(nn.Linear(2, 2)))


@pytest.fixture
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes, vocab_size=20, num_hidden_layers=2, num_local_experts=4, num_key_value_heads=1
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.normal_(std=0.4)
    return model


def test_mixtral_goes_over_and_back(mixtral):
    ids = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        expected = mixtral(ids).logits
        report = swap_experts(mixtral, lambda name, m: type(m).__name__ == "MixtralSparseMoeBlock")
        assert report.names == ("model.layers.0.mlp", "model.layers.1.mlp")
        assert report.parameters[0] == report.parameters[1]
        torch.testing.assert_close(mixtral(ids).logits, expected, atol=1e-5, rtol=1e-5)
        layer = mixtral.model.layers[0].mlp
        restore(mixtral)
        block = mixtral.model.layers[0].mlp
        old = {name: value.clone() for name, value in block.state_dict().items()}
        for weight in block.parameters():
            weight.fill_(torch.nan)
        layer.gate.weight.copy_(old["gate.weight"])  # the two shared it
        to_mixtral_block(layer, block)
    assert all(torch.equal(old[name], value) for name, value in block.state_dict().items())


def test_names_of_checkpoints_there_and_back(mixtral):
    block = mixtral.model.layers[1].mlp
    experts = from_mixtral_block(block).experts
    state = to_mixtral_state(experts)
    x = torch.randn(5, 16)
    for index in range(4):
        w1, w2, w3 = (state[f"experts.{index}.w{part}.weight"] for part in (1, 2, 3))
        gate_up, down = block.experts.gate_up_proj[index], block.experts.down_proj[index]
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        expected = (nn.functional.silu(gate) * up) @ down.T
        torch.testing.assert_close((nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T, expected)
    again = GroupedExperts.from_mixtral({f"model.mlp.{key}": v for key, v in state.items()})
    assert torch.equal(again.w_in, experts.w_in)
    assert torch.equal(again.w_out, experts.w_out)


def test_what_mixtral_has_no_place_for_is_refused(mixtral):
    block = mixtral.model.layers[0].mlp
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock, got Linear"):
        from_mixtral_block(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="swiglu without biases"):
        to_mixtral_state(GroupedExperts(4, 6, 2, bias=True))
    gate = TopKGate(16, 4, 2)
    with pytest.raises(ValueError, match="no bias"):
        to_mixtral_block(MoELayer(gate, GroupedExperts(16, 24, 4)), block)
    small = MoELayer(TopKGate(16, 4, 2, bias=False), GroupedExperts(16, 25, 4))
    old = block.gate.weight.clone()
    with pytest.raises(ValueError, match=r"expected \(4, 48, 16\), got \(4, 50, 16\)"):
        to_mixtral_block(small, block)
    assert torch.equal(block.gate.weight, old)
