"""Benchmarks of activations and KAN layers: what they compare computes the same."""

import pytest
import torch

from torchzoo.activations import AFKANLayer, KANLinear, SKANLinear
from torchzoo.experiments.ops import activations, kan

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (lambda: KANLinear(6, 3), kan.plain_kan),
        (lambda: SKANLinear(6, 3), kan.plain_s_kan),
        (lambda: AFKANLayer(6, 3), kan.plain_af_kan),
    ],
)
def test_plain_forms_of_kan_layers_are_the_same_functions(layer, plain):
    torch.manual_seed(0)
    layer = layer().double()
    x = (2 * torch.rand(5, 6, dtype=torch.float64) - 1).requires_grad_()
    leaves, gradients = [x, *layer.parameters()], []
    for run in (layer, lambda x: plain(layer, x)):
        y = run(x)
        gradients.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    torch.testing.assert_close(*map(list, gradients), rtol=1e-6, atol=1e-8)


def test_steps_of_kan_layers_run_and_move_the_parameters():
    for case in kan.BENCH.cases:
        calls = case.make(CPU, batch=4)
        layer = calls["torchzoo"].args[0]
        before = [p.detach().clone() for p in layer.parameters()]
        for call in calls.values():
            call()
        assert any(
            not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True)
        )


def test_every_activation_runs_in_every_eager_way(monkeypatch):
    monkeypatch.setattr(activations, "SHAPES", {"rows": (4, 8), "images": (2, 256, 2, 2)})
    for name in activations.ACTIVATIONS:
        for kind in ("forward", "forward and backward"):
            for call in activations.contenders(CPU, name, kind).values():
                assert call() is None
    kinds = {case.name.rpartition(", ")[2] for case in activations.BENCH.cases}
    assert kinds == set(activations.KINDS)
    assert {case.bar for case in activations.BENCH.cases if "compiled" in case.name} == {1 / 1.1}
