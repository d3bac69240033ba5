"""surgery.swap: what carries over, what is reported, and that restore undoes all of it."""

import copy

import pytest
import torch
from torch import nn

from torchzoo.errors import UnknownNameError
from torchzoo.flops import count_flops
from torchzoo.moe import GroupedExperts, MoELayer, TopKGate
from torchzoo.sparsity import SparseFFN
from torchzoo.surgery import Replaced, convert, replace, restore, swap


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))


def like(old):
    return nn.Linear(old.in_features, old.out_features)


def test_match_shares_what_has_the_same_name_and_shape(model):
    weight, x = model[0].weight, torch.randn(3, 4)
    expected = model.eval()(x)
    report = swap(model, nn.Linear, like)
    assert report.names == ("0", "3")
    assert model[0].weight is weight
    assert torch.equal(model(x), expected)
    swap(model, "3", lambda old: nn.Linear(8, 5))
    assert model[3].weight.shape == (5, 8)


def test_match_takes_buffers_but_never_bends_shapes(model):
    model(torch.randn(9, 4))
    old = model[2]
    swap(model, nn.BatchNorm1d, lambda old: nn.BatchNorm1d(8, affine=False))
    assert model[2].running_mean is old.running_mean
    assert model[2].num_batches_tracked.item() == 1


def test_fresh_draws_anew_and_leaves_the_old_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def shared(old):
        new = like(old)
        new.weight = old.weight
        return new

    swap(model, nn.Linear, shared, init="fresh")
    assert not torch.equal(model[0].weight, before["0.weight"])
    restore(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fresh_leaves_a_wrapped_module_alone(model):
    before = model[0].weight.clone()
    swap(model, "0", lambda old: nn.Sequential(old, nn.Linear(8, 8)), init="fresh")
    assert torch.equal(model[0][0].weight, before)


def test_a_function_gets_the_new_module_and_the_old(model):
    def double(new, old):
        new.weight.data = 2 * old.weight.data

    old = model[0].weight.clone()
    swap(model, "0", like, init=double)
    assert torch.equal(model[0].weight, 2 * old)


@pytest.mark.parametrize("init", ["old", None, 3])
def test_another_init_is_refused(model, init):
    with pytest.raises(ValueError, match="init: expected 'match', 'fresh' or a function"):
        swap(model, nn.Linear, like, init=init)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    swap(model, "head", lambda old: nn.Linear(4, 6, bias=False))
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 1


def test_hooks_move_and_their_handles_go_on_working(model):
    seen = []
    first = model[0]
    forward = first.register_forward_hook(lambda module, args, out: seen.append(module))
    before = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("pre"), with_kwargs=True
    )
    backward = first.register_full_backward_hook(lambda module, gin, gout: seen.append("back"))
    swap(model, nn.Linear, like)
    model(torch.randn(3, 4)).sum().backward()
    assert seen == ["pre", model[0], "back"]
    assert model[0] is not first
    for handle in (forward, before, backward):
        handle.remove()
    model(torch.randn(3, 4)).sum().backward()
    assert len(seen) == 3


def test_hooks_of_a_wrapped_module_are_called_once(model):
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(1))
    swap(model, "0", lambda old: nn.Sequential(old))
    model(torch.randn(3, 4))
    assert seen == [1]


def test_restore_undoes_several_swaps_in_the_copy_too(model):
    x = torch.randn(3, 4)
    expected, parts = model.eval()(x), list(model)
    swap(model, nn.ReLU, lambda old: nn.Tanh())
    swap(model, nn.Tanh, lambda old: nn.PReLU())
    swap(model, nn.Linear, like, init="fresh")
    copied = copy.deepcopy(model)
    assert not torch.equal(model(x), expected)
    for one in (copied, model):
        assert restore(one) == ("0", "1", "3")
        assert torch.equal(one(x), expected)
    assert all(a is b for a, b in zip(model, parts, strict=True))
    assert copied[0] is not model[0]
    with pytest.raises(ValueError, match="none that was swapped"):
        restore(model)


def test_what_returns_is_in_the_mode_and_dtype_of_now(model):
    swap(model, nn.Linear, like, init="fresh")
    model.double().eval()
    restore(model)
    assert model[0].weight.dtype is torch.float64
    assert not model[0].training


def test_what_returns_is_like_what_it_takes_the_place_of(model):
    swap(model, "3", like, init="fresh")
    model[3].double().eval()
    model.add_module("next", nn.Linear(4, 4))
    assert restore(model) == ("3",)
    assert model[3].weight.dtype is torch.float64
    assert [layer.training for layer in model] == [True, True, True, False, True]
    assert model[0].weight.dtype is torch.float32


def test_notes_come_after_those_that_are_there(model):
    def change(model):
        return replace(model, nn.ReLU, lambda old: nn.Tanh())

    report = convert(model, change, notes=("one",)).with_notes("two", "three")
    assert report.notes == ("one", "two", "three")
    assert str(report).splitlines()[-2:] == ["note: two", "note: three"]


def test_restore_puts_back_attributes_hooks_and_added_children(model):
    model.mode = "old"

    def change(model):
        model.mode = "new"
        model.add_module("extra", nn.ReLU())
        model[0].register_forward_pre_hook(lambda module, args: (0 * args[0],))
        return Replaced(("0",))

    x = torch.randn(3, 4)
    expected = model.eval()(x)
    convert(model, change)
    assert not torch.equal(model(x), expected)
    restore(model)
    assert (model.mode, len(model)) == ("old", 4)
    assert torch.equal(model(x), expected)


def test_an_error_halfway_leaves_the_structure_as_it_was(model):
    parts = list(model)

    def fails(model):
        replace(model, nn.ReLU, lambda old: nn.Tanh())
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        convert(model, fails)
    with pytest.raises(RuntimeError):  # the second count of operations meets other shapes
        swap(model, "0", lambda old: nn.Linear(4, 3), inputs=torch.randn(2, 4))
    assert list(model) == parts
    with pytest.raises(ValueError, match="none that was swapped"):
        restore(model)


@pytest.mark.parametrize(("wrong", "near"), [("Relu", "ReLU"), ("block.0", "blocks.0")])
def test_a_selector_that_finds_nothing_names_what_is_near(wrong, near):
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.ReLU(), nn.Linear(2, 2))})
    with pytest.raises(UnknownNameError, match=f"{wrong}.*did you mean .*{near}"):
        swap(model, wrong, lambda old: nn.Tanh())
    with pytest.raises(UnknownNameError, match="'Tanh' selects nothing of ModuleDict"):
        swap(model, nn.Tanh, lambda old: nn.ReLU())


def test_the_report_counts_parameters_and_operations(model):
    report = swap(model, "0", lambda old: nn.Linear(4, 8, bias=False), inputs=torch.randn(5, 4))
    assert report.parameters == (40 + 16 + 36, 32 + 16 + 36)
    assert report.flops == (2 * 5 * 64, 2 * 5 * 64)
    assert [change.parameters for change in report.changes] == [(40, 32)]
    assert report.to_json()["changes"][0]["new"] == "Linear"
    assert "0: Linear → Linear  40 → 32" in str(report)


def test_the_tree_shows_what_is_around_once():
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))})
    report = swap(model, nn.ReLU, lambda old: nn.PReLU())
    assert str(report).splitlines()[1:] == [
        "  a",
        "    0: ReLU → PReLU  0 → 1",
        "    1",
        "      0: ReLU → PReLU  0 → 1",
    ]


@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_operations_of_experts_are_those_of_the_chosen(activation, bias):
    experts = GroupedExperts(6, 10, 4, activation=activation, bias=bias)
    layer = MoELayer(TopKGate(6, 4, 2), experts)
    width = 20 if activation == "swiglu" else 10
    expected = 2 * 7 * 6 * 4 + 2 * 14 * (6 * width + 10 * 6)
    assert count_flops(layer, torch.randn(7, 6)) == expected


@pytest.mark.parametrize(("gated", "on"), [(True, "act"), (True, "product"), (False, "act")])
def test_operations_of_a_sparse_layer_are_those_it_says_it_needs(gated, on):
    layer = SparseFFN(6, 32, gated=gated, threshold=0.2, threshold_on=on, policy="sparse")
    x = torch.randn(7, 6)
    assert count_flops(layer.train(), {"x": x}) == 2 * layer.macs(x)
    assert layer.training
