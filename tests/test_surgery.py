"""surgery: the right modules are found, replaced in every place, and watched."""

import pytest
import torch
from torch import nn

from torchzoo.surgery import capture, find, replace


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@pytest.fixture
def model():
    return nn.Sequential(Block(), nn.GELU(), Block())


def test_find_takes_classes_globs_and_predicates(model):
    assert list(find(model, nn.ReLU)) == ["0.act", "2.act"]
    assert list(find(model, (nn.ReLU, nn.GELU))) == ["0.act", "1", "2.act"]
    assert list(find(model, "*.first")) == ["0.first", "2.first"]
    wide = find(model, lambda name, module: getattr(module, "out_features", 0) == 8)
    assert wide == {"0.first": model[0].first, "2.first": model[2].first}
    assert find(model, nn.Tanh) == {}
    assert find(model, "") == {"": model}


@pytest.mark.parametrize("match", [3, int, (nn.ReLU, int), None])
def test_a_rule_that_is_none_is_refused(model, match):
    with pytest.raises(ValueError, match="match: expected module classes"):
        find(model, match)


def test_replace_changes_only_what_was_selected(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    report = replace(model, nn.ReLU, lambda old: nn.Tanh())
    assert (report.count, report.names) == (2, ("0.act", "2.act"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    one, two = model[0], model[2]
    hidden = nn.functional.gelu(one.second(one.first(x).tanh()))
    assert torch.equal(model(x), two.second(two.first(hidden).tanh()))


def test_what_was_shared_stays_shared():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    made = []
    report = replace(model, nn.ReLU, lambda old: made.append(nn.PReLU()) or made[-1])
    assert report.names == ("0",)
    assert len(made) == 1
    assert model[0] is model[2] is made[0]


def test_modules_below_a_replaced_one_are_left_alone(model):
    report = replace(model, (Block, nn.ReLU), lambda old: nn.Sequential(old))
    assert report.names == ("0", "2")
    assert list(find(model, Block)) == ["0.0", "2.0"]
    assert type(model[0][0].act) is nn.ReLU


def test_mode_device_and_dtype_are_those_of_the_old_module():
    model = Block().double().eval()
    replace(model, nn.ReLU, lambda old: nn.PReLU())
    assert model.act.weight.dtype is torch.float64
    assert not model.act.training
    model.first.to(torch.bfloat16)
    replace(model, "first", lambda old: nn.Linear(4, 8))
    assert model.first.weight.dtype is torch.bfloat16
    meta = Block().to("meta")
    replace(meta, nn.ReLU, lambda old: nn.PReLU())
    assert meta.act.weight.is_meta


def test_an_error_leaves_the_model_as_it_was(model):
    acts = [model[0].act, model[2].act]
    makers = iter([nn.Tanh()])
    with pytest.raises(StopIteration):
        replace(model, nn.ReLU, lambda old: next(makers))
    assert [model[0].act, model[2].act] == acts


def test_nothing_selected_names_what_is_there(model):
    for call in (lambda: replace(model, nn.Tanh, lambda old: old), lambda: open_(model, nn.Tanh)):
        with pytest.raises(ValueError, match="4 Linear"):
            call()
    with pytest.raises(ValueError, match="the model itself"):
        replace(model, nn.Sequential, lambda old: old)


def open_(model, match):
    with capture(model, match):
        pass


def test_capture_records_each_call_and_then_stops(model):
    x = torch.randn(3, 4, requires_grad=True)
    with capture(model, "*.act") as outputs:
        model(x)
        model(2 * x)
    first = [torch.relu(model[0].first(value)) for value in (x, 2 * x)]
    assert list(outputs) == ["0.act", "2.act"]
    assert all(torch.equal(a, b) for a, b in zip(outputs["0.act"], first, strict=True))
    outputs["2.act"][1].sum().backward()
    assert x.grad is not None
    model(x)
    assert len(outputs["0.act"]) == 2


def test_capture_stops_after_an_error(model):
    with pytest.raises(RuntimeError), capture(model, nn.ReLU) as outputs:
        model(torch.randn(3, 5))
    model(torch.randn(3, 4))
    assert outputs == {"0.act": [], "2.act": []}
