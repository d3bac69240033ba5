"""Models by name, weights that carry over, and a head that is drawn anew."""

import pytest
import torch
from safetensors.torch import save_file

from torchzoo.errors import TorchzooError, UnknownNameError, WeightsError
from torchzoo.experiments.finetune.jobs import Job, prepare
from torchzoo.experiments.finetune.models import check_classes, head_of, load_model


@pytest.fixture
def saved(tmp_path):
    """A tiny model for 7 classes and the file of its weights."""
    torch.manual_seed(0)
    model, _ = load_model("timm:test_resnet", classes=7, size=32)
    path = tmp_path / "old.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize(
    "name",
    ["timm:test_vit", "timm:test_resnet", "torchvision:squeezenet1_0", "torchvision:mnasnet0_5"],
)
def test_models_give_a_logit_for_each_class(name):
    size = 64 if "vit" not in name else 32
    model, notes = load_model(name, classes=7, size=size)
    check_classes(model, torch.randn(3, size, size), 7, name)
    assert notes == ()
    assert model.training
    with pytest.raises(TorchzooError, match="tells 7 classes apart, the data have 8"):
        check_classes(model, torch.randn(3, size, size), 8, name)
    with pytest.raises(TorchzooError, match=r"takes no rows of shape \(2, 64, 64\)"):
        check_classes(model, torch.randn(2, 64, 64), 7, name)


def test_weights_carry_over_and_only_the_head_is_drawn_anew(saved):
    old, path = saved
    again, notes = load_model("timm:test_resnet", classes=7, size=32, weights=str(path))
    assert notes == ()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in old.state_dict().items())
    new, notes = load_model("timm:test_resnet", classes=3, size=32, weights=str(path))
    assert notes == ("fc was drawn anew: 7 classes in old.safetensors, 3 classes here",)
    changed = {k for k, v in new.state_dict().items() if not torch.equal(v, old.state_dict()[k])}
    assert changed == {"fc.weight", "fc.bias"}
    assert head_of(new)[1].weight.shape[0] == 3


def test_weights_that_do_not_fit(saved, tmp_path):
    _, path = saved
    with pytest.raises(WeightsError, match=r"don't fit: .*missing.*left over"):
        load_model("timm:test_vit", classes=7, size=32, weights=str(path))
    with pytest.raises(WeightsError, match="which runs no code"):
        load_model("timm:test_resnet", classes=7, size=32, weights="old.pt")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="can't be read"):
        load_model("timm:test_resnet", classes=7, size=32, weights=str(path))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm:resnet81", "timm has none; did you mean resnet18"),
        ("torchvision:resnet81", "torchvision has none; did you mean resnet18"),
        ("transformers:vitt", "no such type; did you mean vit"),
        ("timmy:resnet18", "expected timm, torchvision.*did you mean timm"),
        ("resnet18", "expected timm"),
    ],
)
def test_unknown_names_suggest_near_ones(name, near):
    with pytest.raises(UnknownNameError, match=near):
        load_model(name, classes=3, size=32)


def test_model_and_data_have_to_go_together():
    with pytest.raises(TorchzooError, match="zoo:digits-0-4 on data digits: the model takes no"):
        prepare(Job("zoo:digits-0-4", "digits"))
    with pytest.raises(UnknownNameError, match="words are relu"):
        prepare(Job("timm:test_resnet", "digits", swaps=("blocks.*=CRReLU",)))


def test_the_seed_draws_the_weights():
    one, two, other = (prepare(Job("timm:test_resnet", "digits", seed=s)).model for s in (0, 0, 1))
    assert torch.equal(one.fc.weight, two.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)


LLAMA = (
    "transformers:llama(hidden_size=16, intermediate_size=24, num_hidden_layers=1, "
    "num_attention_heads=2)"
)


def test_language_models_have_the_characters_as_vocabulary():
    model, notes = load_model(LLAMA, classes=11, size=8, causal=True)
    assert (model.config.hidden_size, model.config.vocab_size, notes) == (16, 11, ())
    check_classes(model, torch.arange(8), 11, LLAMA)
    with pytest.raises(TorchzooError, match=r"expected transformers:TYPE\(option=value"):
        load_model("transformers:llama(hidden_size=16", classes=11, size=8, causal=True)
    with pytest.raises(TorchzooError, match="expected transformers:TYPE for text"):
        load_model("timm:test_vit", classes=11, size=8, causal=True)
    with pytest.raises(TorchzooError, match="expected options name=value"):
        load_model("transformers:llama(16)", classes=11, size=8, causal=True)


def test_prosparse_gives_relu_to_known_layers():
    ready = prepare(Job(LLAMA, "text", size=8, recipe="prosparse"))
    assert ready.notes == ("1 feed-forward layers have relu now: model.layers.0.mlp",)
    assert ready.model.model.layers[0].mlp.activation == "relu"
    with pytest.raises(TorchzooError, match="recipe prosparse on timm:test_resnet: "):
        prepare(Job("timm:test_resnet", "digits", size=32, recipe="prosparse"))
