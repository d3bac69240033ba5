"""The experiment on predicted filters: its rivals, its criteria, and a short run."""

import pytest
import torch
from matplotlib.figure import Figure

from torchzoo import experiment
from torchzoo.data.digits import digits
from torchzoo.experiment import Measurement
from torchzoo.experiments.sparsity import channel_gate as unit
from torchzoo.sparsity import FTWTConv2d, ftwt_loss


def synthetic(*, gains=(0.02, 0.03, 0.025), gap=0.03, rival="static"):
    """Measurements of three seeds: at 50 % the rivals have 0.9, one of them the more by `gains`."""
    figures = {"dense: accuracy": (0.98,) * 3, "dense: reduction": (0.05,) * 3}
    for place, which in enumerate(unit.ARMS["FTWT"]):
        saved = (0.35, 0.5)[place]
        figures[unit.name("FTWT", which, "threshold")] = (0.8,) * 3
        figures[unit.name("FTWT", which, "reduction")] = (saved,) * 3
        figures[unit.name("FTWT", which, "estimated reduction")] = (saved, saved - gap, saved)
        figures[unit.name("FTWT", which, "accuracy")] = (0.92, 0.93, 0.925)
    for arm in ("static", "penalty"):
        lost = (0.02, 0.03, 0.025) if arm != rival else gains
        for place, which in enumerate(unit.ARMS[arm]):
            saved, rise = 0.3 + 0.2 * place, 0.04 * (1 - place)
            figures[unit.name(arm, which, "reduction")] = (saved,) * 3
            own = (0.92, 0.93, 0.925)
            heights = tuple(a - b + rise for a, b in zip(own, lost, strict=True))
            figures[unit.name(arm, which, "accuracy")] = heights
    return {name: Measurement(name, values) for name, values in figures.items()}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (synthetic(), [True, True]),
        (synthetic(gains=(-0.01, -0.02, -0.01)), [False, True]),
        (synthetic(gains=(-0.01, -0.02, -0.01), rival="penalty"), [False, True]),
        (synthetic(gains=(0.03, -0.02, 0.005)), [False, True]),
        (synthetic(gap=0.051), [True, False]),
        (synthetic(gap=-0.051), [True, False]),
    ],
)
def test_criteria_can_fail(measured, expected):
    assert [c.test(measured)[0] for c in unit.EXPERIMENT.criteria] == expected
    unit.plot(measured, Figure())


def test_rivals_are_interpolated_at_the_same_multiplications():
    measured = synthetic()
    at = Measurement("at", (0.4, 0.175, 0.99))
    found = unit.interpolated(measured, "static", at).values
    first = [measured[unit.name("static", w, "accuracy")].values for w in unit.ARMS["static"]]
    assert found[0] == pytest.approx((first[0][0] + first[1][0]) / 2)
    assert found[1] == pytest.approx((0.98 + first[0][1]) / 2)
    assert found[2] == first[-1][2]


def test_static_pruning_keeps_the_strongest_filters():
    torch.manual_seed(0)
    dense = unit.network().eval()
    same = unit.pruned(dense, 1.0).eval()
    x = digits().test_x[:5]
    assert torch.equal(same(x), dense(x))
    small = unit.pruned(dense, 0.5).eval()
    first = dense[0]
    kept = first.weight.abs().sum((1, 2, 3)).topk(8).indices.sort().values
    assert torch.equal(small[0].weight, first.weight[kept])
    # filters that were pruned give nothing to the rest: the same model with them at 0
    zeroed = unit.network().eval()
    zeroed.load_state_dict(dense.state_dict())
    for conv, bn in ((zeroed[i], zeroed[i + 1]) for i in (0, 3, 7, 10)):
        strength = conv.weight.abs().sum((1, 2, 3))
        gone = strength.topk(len(strength) // 2, largest=False).indices
        bn.weight.data[gone] = bn.bias.data[gone] = 0.0
    torch.testing.assert_close(small(x), zeroed(x), rtol=1e-4, atol=1e-5)
    assert unit.multiplications(small, x) < unit.multiplications(dense, x) / 2


def test_heads_are_frozen_after_the_cooldown():
    data = digits()
    data = data._replace(train_x=data.train_x[:40], train_y=data.train_y[:40])
    torch.manual_seed(0)
    dense = unit.network()
    model = unit.gated(dense, data, 0.7, "decoupled")
    seen = []

    def extra(model):
        seen.append([p.detach().clone() for p in model[0].predictor.parameters()])
        return ftwt_loss(model)

    unit.refine(model, data, 4, 0, extra, freeze=True)
    assert len(seen) == 2  # of four epochs of one step
    assert not torch.equal(seen[0][0], seen[1][0])
    heads = [p for m in model if isinstance(m, FTWTConv2d) for p in m.predictor.parameters()]
    assert not any(p.requires_grad for p in heads)


def test_penalty_closes_gates():
    data = digits()
    few = data._replace(train_x=data.train_x[:256], train_y=data.train_y[:256])
    torch.manual_seed(0)
    dense = unit.network()
    saved = []
    for weight in (0.0, 100.0):
        model = unit.gated(dense, data, 0.9, "joint")
        whole = unit.multiplications(dense, data.test_x)
        assert unit.measured_flops(model, [data.test_x]).macs > 0.95 * whole
        unit.refine(model, few, 5, 0, lambda m, w=weight: unit.sparsity_penalty(m, w))
        saved.append(unit.measured_flops(model, [data.test_x]).reduction)
    assert saved[1] > saved[0] + 0.1


def test_smoke_run():
    result = experiment.reproduce(unit.EXPERIMENT, budget="smoke")
    assert len(result.criteria) == 2
    measured = result.measured()
    assert len(measured) == 2 + 2 * 4 + 4 * 2 + 3 * 2 + 3
    assert measured["timm ResNet: gathered off by"].mean < 1e-4
    assert 0 < measured["timm ResNet: reduction"].mean < 1
    unit.plot(measured, Figure())
