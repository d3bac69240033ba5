"""Putting activations into models of other libraries, in place of modules and of functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.activations import CRReLU, HybridClippedReLU, base, replace_activation


def test_modules_keep_mode_device_and_dtype():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.GELU(), nn.Tanh()), nn.Linear(4, 2)
    ).double()
    model[2].eval()
    report = replace_activation(model, (nn.ReLU, nn.GELU), CRReLU)
    assert (report.count, report.names) == (2, ("1", "2.0"))
    assert model[1].eps.dtype == model[2][0].eps.dtype == torch.float64
    assert model[1].training
    assert not model[2][0].training
    assert isinstance(model[2][1], nn.Tanh)


def test_the_model_computes_with_the_new_activation():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    other = copy.deepcopy(model)
    replace_activation(other, nn.ReLU, lambda: CRReLU(init=0.5))
    x = torch.randn(5, 3)
    h = model[0](x)
    expected = model[2](h.relu() + 0.5 * h * (-h.square() / 2).exp())
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU(), nn.GELU()])
def test_transformer_layers_compute_with_it_in_training_and_in_the_fast_path(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = stack.eval()(x)
    report = replace_activation(stack, (nn.ReLU, nn.GELU), lambda: CRReLU(init=3.0))
    assert report.names == ("layers.0.activation", "layers.1.activation")
    slow = stack.train()(x)
    with torch.no_grad():
        fast = stack.eval()(x)
    torch.testing.assert_close(fast, slow)
    assert (fast - before).abs().max() > 0.1


def test_the_fast_path_computes_what_took_the_place_of_relu_and_gelu():
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, act, batch_first=True)
        for act in ("gelu", nn.ReLU())
    ]
    model = nn.Sequential(*layers).eval()
    assert replace_activation(model, nn.GELU, nn.ReLU).names == ("0.activation",)
    assert not layers[0].activation.training
    assert layers[1].activation_relu_or_gelu == 1, "its activation stayed"
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model.train()(x))


@pytest.mark.parametrize(("function", "twin"), base._TWINS.items())
def test_functions_and_their_modules_compute_the_same(function, twin):
    x = torch.linspace(-8, 8, 65)
    torch.testing.assert_close(twin()(x), function(x))


def test_functions_of_other_kinds_stay():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu)
    with pytest.raises(ValueError, match="match: expected"):
        replace_activation(layer, nn.ReLU, CRReLU)
    assert layer.activation is F.gelu
    assert layer.activation_relu_or_gelu == 2


def test_models_of_timm_and_transformers():
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert replace_activation(vit, (nn.ReLU, nn.GELU), CRReLU).names == (
        "blocks.0.mlp.act",
        "blocks.1.mlp.act",
    )
    assert vit(torch.randn(1, 3, 32, 32)).isfinite().all()
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=8)
    gpt = transformers.GPT2LMHeadModel(config)
    activation = type(gpt.transformer.h[0].mlp.act)
    assert replace_activation(gpt, activation, CRReLU).count == 2
    gpt(torch.arange(8)[None]).logits.sum().backward()
    assert all(block.mlp.act.eps.grad is not None for block in gpt.transformer.h)


def test_a_failing_factory_leaves_the_model_as_it_computes():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="bound"):
        replace_activation(model, nn.ReLU, lambda: HybridClippedReLU(-1.0))
    assert isinstance(model[1], nn.ReLU)


def test_reset_goes_back_to_the_first_values():
    for module in (CRReLU(num_parameters=3), HybridClippedReLU([1.0, 2.0], learnable=False)):
        first = {name: value.clone() for name, value in module.state_dict().items()}
        for value in module.state_dict().values():
            value.add_(1)
        module.reset_parameters()
        assert all(torch.equal(first[n], value) for n, value in module.state_dict().items())
