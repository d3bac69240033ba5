"""time_modules: each module's own costs, and inputs and parameters left as they were."""

import pytest
import torch
from torch import nn

from torchzoo import timing
from torchzoo.timing import save_plot, time_modules


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0.0)


def test_costs_are_those_of_each_module(tmp_path):
    modules = {"small": nn.Linear(8, 2), "large": nn.Linear(8, 2048)}
    found = time_modules(modules, [torch.randn(16, 8)], rounds=3)
    assert found["large"]["parameters"] == 9 * 2048
    assert found["large"]["flops"] == 2 * 16 * 8 * 2048
    assert 0 < found["small"]["step"]["seconds"]["low"] < found["large"]["step"]["seconds"]["high"]
    assert all(module.weight.grad is None for module in modules.values())
    save_plot(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


class Watched(nn.Module):
    """Notes what it is asked for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return {"numbers": torch.arange(3), "scores": (3 * x,)}


def test_forward_is_evaluation_and_step_is_training():
    module, x = Watched(), torch.randn(4).requires_grad_()
    found = time_modules({"one": module}, [x], rounds=3)
    assert list(found["one"]) == ["parameters", "flops", "forward", "step"]
    assert set(module.calls) == {(False, False), (True, True)}
    assert x.grad is None
    module.calls.clear()
    found = time_modules({"one": module}, [x], rounds=3, backward=False)
    assert list(found["one"]) == ["parameters", "flops", "forward"]
    assert set(module.calls) == {(False, False)}


def test_compiled_costs_come_beside(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    layer = nn.Linear(3, 3)
    found = time_modules({"one": layer}, [torch.randn(2, 3)], rounds=3, compiled=True)
    assert compiled == [layer]
    assert [*found["one"]][-2:] == ["compiled forward", "compiled step"]
