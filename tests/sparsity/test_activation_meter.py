"""The meters of active neurons against counts by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchzoo.ops import delta_linear_step
from torchzoo.sparsity import (
    ActivationMeter,
    SparseFFN,
    SparsityMeter,
    TopKFFN,
    activation_ratio,
    find_ffns,
)


def mlp(seed=0, features=6, hidden=20):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features)
    ).requires_grad_(False)


@pytest.mark.claim(
    149,
    "Shares of non-zeros by layer and step, frequencies of neurons, and their tables are those "
    "counted by hand",
    tolerance=1e-6,
)
def test_counts():
    model = nn.Sequential(mlp(0), mlp(1, hidden=12))
    with torch.no_grad():
        model[0][0].bias[:3] = -100.0  # dead
        model[0][0].bias[3:7] = 100.0  # always on
    batches = [torch.randn(b, 5, 6) for b in (2, 3)]
    with ActivationMeter(model) as meter:
        for x in batches:
            model(x)
    model(batches[0])  # outside: not counted
    first = [F.relu(model[0][0](x)).flatten(0, 1) > 0 for x in batches]
    second = [F.relu(model[1][0](model[0](x))).flatten(0, 1) > 0 for x in batches]
    assert meter.names == ("0", "1")
    steps = [[(a[i].double().mean()) for a in (first, second)] for i in range(2)]
    torch.testing.assert_close(meter.history.double(), torch.tensor(steps).double())
    pooled = [torch.cat(a).double() for a in (first, second)]
    torch.testing.assert_close(meter.shares, torch.stack([a.mean() for a in pooled]))
    for found, a in zip(meter.frequencies.values(), pooled, strict=True):
        torch.testing.assert_close(found, a.mean(0))
    total = sum(a.sum() for a in pooled) / sum(a.numel() for a in pooled)
    assert meter.active == pytest.approx(total.item())

    report = meter.report()
    row = report.layers[0]
    assert (row.tokens, row.neurons) == (25, 20)
    assert row.dead == (pooled[0].sum(0) == 0).double().mean().item() >= 3 / 20
    assert row.rare == (pooled[0].mean(0) < 0.01).double().mean().item()
    assert row.frequent == (pooled[0].mean(0) > 0.5).double().mean().item() >= 4 / 20
    assert f"{100 * row.active:.1f}%" in str(report)


@pytest.mark.claim(149, "What fewer than 1 % of the tokens use is rare, more than half frequent")
def test_tables_at_their_bounds():
    model = nn.Sequential(nn.Identity())
    a = torch.zeros(200, 4)
    a[:1, 0], a[:2, 1], a[:100, 2], a[:101, 3] = 1.0, -1.0, 2.0, 3.0
    with ActivationMeter(model, nn.Identity) as meter:
        model(a)
    row = meter.report().layers[0]
    assert (row.dead, row.rare, row.frequent) == (0.0, 0.25, 0.25)
    assert row.active == pytest.approx((1 + 2 + 100 + 101) / 800)


@pytest.mark.claim(149, "The union over a window counts neurons that any of its tokens needs")
def test_union_and_bound():
    x = torch.randn(7, 5)
    model = nn.Sequential(nn.Identity())
    with ActivationMeter(model, "0", eps=0.8, window=3) as meter:
        model(x)
    active = x.abs() > 0.8
    expected = (active[:3].any(0).double().mean() + active[3:6].any(0).double().mean()) / 2
    assert meter.report().layers[0].union == pytest.approx(expected.item())
    assert meter.shares.item() == pytest.approx(active.double().mean().item())
    torch.testing.assert_close(activation_ratio(x, 0.8), active.float().mean(-1))
    assert activation_ratio(torch.tensor([0.0, -0.5, math.nan, 0.0])).item() == 0.5
    with ActivationMeter(model, "0", window=8) as meter:
        model(x)
    assert math.isnan(meter.report().layers[0].union)


def test_layers_of_other_libraries(host):
    seen = {name: [] for name in host.ffns}
    handles = [
        ffn.down.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs))
        for name, ffn in find_ffns(host.model).items()
    ]
    with torch.no_grad(), ActivationMeter(host.model) as meter:
        host.model(*host.inputs)
    for handle in handles:
        handle.remove()
    expected = [(seen[name][0][0] != 0).double().mean() for name in host.ffns]
    assert meter.names == host.ffns
    torch.testing.assert_close(meter.shares, torch.stack(expected))
    assert (meter.active < 0.9) == host.relu
    host.model(*host.inputs)
    assert len(meter.history) == 1  # nothing is left of the hooks


def test_own_layers_and_compiled_models():
    torch.manual_seed(0)
    layer, x = TopKFFN(6, 32, 4, policy="sparse"), torch.randn(10, 6)
    compiled = torch.compile(layer, backend="aot_eager")
    before = compiled(x)
    with torch.no_grad(), ActivationMeter(layer) as meter:
        torch.testing.assert_close(layer(x), before)
    with torch.no_grad(), ActivationMeter(compiled) as other:
        compiled(x)
    assert meter.active == other.active == (layer.hidden(x) > 0).double().mean().item()
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.claim(
    145,
    "The summary's CETT is that of the neurons called needed, by the definition",
    tolerance=1e-5,
)
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_needed_neurons(activation, gated):
    torch.manual_seed(0)
    layer = SparseFFN(6, 40, gated=gated, activation=activation).requires_grad_(False)
    x = torch.randn(300, 6)
    with SparsityMeter(layer, target=0.15, sample=200) as meter:
        layer(x[:120])
        layer(x[120:])
    assert torch.equal(meter.samples[""], layer.hidden(x)[:200])
    row = meter.summary().layers[0]
    h, w = meter.samples[""].double(), layer.down_proj.weight.double()
    m = h.abs() * w.norm(dim=0)
    tau = m.flatten().sort(descending=True).values[round(row.needed * m.numel()) - 1]
    keep = m >= tau
    assert keep.double().mean().item() == pytest.approx(row.needed, abs=1e-3)
    tail = (torch.where(keep, 0.0, h) @ w.mT).norm(dim=1) / (h @ w.mT).norm(dim=1)
    assert tail.mean().item() == pytest.approx(row.cett, abs=2e-3)
    assert 0.1 < row.cett <= 0.15
    assert row.needed < row.activity.active
    assert row.activity.active == pytest.approx((layer.hidden(x) != 0).double().mean().item())


@pytest.mark.claim(
    149,
    "Multiplications left are those of rows of active neurons, delta steps as they ran",
    tolerance=0.0,
)
def test_multiplications():
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    for gated, on in ((False, "act"), (True, "act"), (True, "product")):
        layer = SparseFFN(6, 40, gated=gated, threshold=0.05, threshold_on=on)
        x_ref, acc, weight_t = torch.randn(9), torch.zeros(5), torch.randn(9, 5)
        moved = torch.where(torch.arange(9) < 4, x_ref + 1, x_ref)
        with torch.no_grad(), SparsityMeter(layer) as meter:
            layer(x)
            delta_linear_step(moved, x_ref, acc, weight_t)
        summary = meter.summary()
        row = summary.layers[0]
        assert row.macs == layer.macs(x)
        assert row.dense_macs == 30 * 40 * 6 * (3 if gated else 2)
        assert (summary.delta_macs, summary.dense_delta_macs) == (20, 45)
        left = (row.macs + 20) / (row.dense_macs + 45)
        assert summary.skipped == pytest.approx(1 - left)
        assert "delta steps" in str(summary)
        meter.reset()
        assert meter.summary() == ((), 0.2, 0, 0)


def test_a_layer_that_gives_nothing():
    layer = SparseFFN(4, 8, gated=False).requires_grad_(False)
    layer.up_proj.weight.zero_()
    with SparsityMeter(layer) as meter:
        layer(torch.randn(5, 4))
    row = meter.summary().layers[0]
    assert (row.needed, row.cett, row.activity.dead) == (0.0, 0.0, 1.0)
    assert row.macs == row.dense_macs // 2


def test_plot():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    layers = [SparseFFN(4, 8, gated=False), SparseFFN(4, 8, activation="silu")]
    model = nn.Sequential(*layers)
    x_ref = torch.zeros(3)
    with torch.no_grad(), SparsityMeter(model) as meter:
        model(torch.randn(20, 4))
        delta_linear_step(x_ref + 1, x_ref, torch.zeros(2), torch.randn(3, 2))
    figure = Figure()
    assert meter.plot(figure) is figure
    shares, macs, values, often = figure.axes
    summary = meter.summary()
    widths = [bar.get_width() for bar in shares.patches]
    expected = [100 * row.activity.active for row in summary.layers]
    expected += [100 * row.needed for row in summary.layers]
    assert widths == pytest.approx(expected)
    assert [bar.get_width() for bar in macs.patches[-2:]] == [6, 6]
    assert len(values.patches) == 2
    assert often.lines[1].get_ydata().tolist() == [100.0] * 8
    assert isinstance(meter.plot(), Figure)


def test_bad_arguments():
    model = mlp()
    for make, options in (
        (ActivationMeter, {"eps": -1.0}),
        (ActivationMeter, {"window": 0}),
        (ActivationMeter, {"match": "nothing"}),
        (SparsityMeter, {"target": 1.0}),
        (SparsityMeter, {"sample": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(model, **options)
    with pytest.raises(ValueError, match="model: expected feed-forward layers"):
        ActivationMeter(nn.Linear(2, 2))
    pair = nn.Sequential(nn.LSTM(2, 2))
    with (
        pytest.raises(ValueError, match="match: expected 0 to put out a tensor"),
        ActivationMeter(pair, nn.LSTM),
    ):
        pair(torch.randn(3, 2))
    twice = nn.Sequential(mlp(), mlp())
    with ActivationMeter(twice) as meter:
        twice[0](twice(torch.randn(3, 6)))
    with pytest.raises(ValueError, match="history: expected layers called equally often"):
        _ = meter.history
