"""S-KAN: its phases, what pruning leaves, and whether it chooses the families that were planted."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import torchzoo.activations.kan as kan
from torchzoo.activations import (
    SKAN,
    BSplineBasis,
    ChebyshevBasis,
    KANLinear,
    PrunedKANLinear,
    SConvKAN2d,
    SKANLinear,
    SKANTrainer,
    WaveletBasis,
    make_basis,
)
from torchzoo.activations.kan import _FAMILIES

POOL = ("bspline", "rbf", "chebyshev", "wavelet")
SIZES = {"bspline": 8, "rbf": 8, "chebyshev": 5, "wavelet": 8}


def numbers(*shape, seed=0, dtype=torch.float64):
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1).to(dtype)


def layer_of(width=6, out=3, *, winners=None, pool=POOL, seed=0, **options):
    """A layer with random gates; `winners` gets the largest gate at each node."""
    torch.manual_seed(seed)
    layer = SKANLinear(width, out, pool=pool, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        layer.gate_weight.copy_(0.3 * torch.rand_like(layer.gate_weight))
        for node, winner in enumerate(winners or ()):
            layer.gate_weight[node, pool.index(winner)] = 1.0
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


WINNERS = ("bspline", "wavelet", "chebyshev", "wavelet", "rbf", "bspline")


def by_hand(layer, x):
    """The sum over nodes and families, with the gates as they are."""
    y = 0 if layer.bias is None else layer.bias
    for m, name in enumerate(layer.pool):
        values = layer.bases[name](x)
        y = y + torch.einsum("nik,oik,i->no", values, layer.coef[name], layer.gates[:, m])
    return y


def test_the_layer_is_the_gated_sum_in_both_phases():
    layer, x = layer_of(), numbers(20, 6)
    assert torch.equal(layer.gates, layer.gate_weight)
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=0, atol=1e-12)
    layer.select(0.3)
    expected = (layer.gate_weight / 0.3).softmax(-1)
    torch.testing.assert_close(layer.gates, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=0, atol=1e-12)


def test_fresh_gates_and_the_variance_of_each_family():
    torch.manual_seed(0)
    layer = SKANLinear(40, 400)
    assert torch.equal(layer.gates, torch.full((40, 4), 0.25))
    assert (layer.phase, layer.bias.abs().sum().item()) == (1, 0)
    for name, basis, coef in layer.families():
        low, high = basis.grid_range
        x = low + (high - low) * torch.rand(500, 40)
        part = torch.einsum("nik,oik->no", basis(x), coef)
        assert part.square().mean().item() == pytest.approx(1, rel=0.1), name


@pytest.mark.claim(
    10,
    "A pool of one family equals a KANLinear with that basis, before and after pruning",
    tolerance=1e-6,
)
@pytest.mark.parametrize("name", list(_FAMILIES))
def test_a_pool_of_one(name):
    torch.manual_seed(0)
    layer = SKANLinear(5, 3, pool=(name,), bias=False)
    plain = KANLinear(5, 3, name, base_weight=False)
    plain.coef.data.copy_(layer.coef[name])
    plain.basis.load_state_dict(layer.bases[name].state_dict())
    x = numbers(20, 5, dtype=torch.float32)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-6)
    layer.select(0.5)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.prune()(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.claim(
    10,
    "One-hot gates give the sum of single-family layers on their own nodes, and pruning them "
    "changes nothing",
    tolerance=1e-6,
)
def test_hard_gates_and_pruning():
    layer, x = layer_of(winners=WINNERS), numbers(20, 6)
    layer.select(0.2, hard=True)
    assert torch.equal(layer.gates.detach().round(), layer.gates.detach())
    assert torch.equal(layer.gates.sum(-1), torch.ones(6, dtype=torch.float64))
    expected = layer.bias.expand(20, 3)
    for name in POOL:
        nodes = [i for i, winner in enumerate(WINNERS) if winner == name]
        single = KANLinear(
            len(nodes), 3, layer.bases[name].select(torch.tensor(nodes)), base_weight=False
        ).double()
        single.coef.data.copy_(layer.coef[name][:, nodes])
        expected = expected + single(x[:, nodes])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    pruned = layer.prune()
    torch.testing.assert_close(pruned(x), layer(x), rtol=0, atol=1e-5)
    assert {r.node: r.family for r in pruned.report()} == dict(enumerate(WINNERS))
    assert pruned.phase == 3
    assert torch.equal(pruned.gates.sum(-1), torch.ones(6))


def test_soft_gates_are_folded_in_and_thresholds_keep_more():
    layer, x = layer_of(winners=WINNERS), numbers(20, 6)
    layer.select(1.0)
    gates = layer.gates
    top = layer.prune()
    expected = layer.bias.expand(20, 3)
    for i, name in enumerate(WINNERS):
        part = torch.einsum("nk,ok->no", layer.bases[name](x)[:, i], layer.coef[name][:, i])
        expected = expected + gates[i, POOL.index(name)] * part
    torch.testing.assert_close(top(x), expected, rtol=0, atol=1e-12)
    everything = layer.prune("threshold", threshold=1e-9)
    torch.testing.assert_close(everything(x), layer(x), rtol=0, atol=1e-12)
    some = layer.prune("threshold", threshold=gates.median().item())
    kept = sum(len(index) for index in some.nodes.values())
    wanted = (gates >= gates.median()) | F.one_hot(gates.argmax(-1), 4).bool()
    assert 6 < kept == wanted.sum().item() < 24
    nothing_more = layer.prune("threshold", threshold=2.0)
    torch.testing.assert_close(nothing_more(x), top(x))


def test_the_straight_through_gate_has_the_gradient_of_the_softmax():
    layer = layer_of(winners=WINNERS)
    upstream = torch.randn(6, 4, dtype=torch.float64)
    layer.select(0.4, hard=True)
    (hard,) = torch.autograd.grad((layer.gates * upstream).sum(), layer.gate_weight)
    soft = (layer.gate_weight / torch.tensor(0.4).double()).softmax(-1)
    (expected,) = torch.autograd.grad((soft * upstream).sum(), layer.gate_weight)
    torch.testing.assert_close(hard, expected)


@pytest.mark.claim(
    10,
    "A pruned layer has O sum K + 2 * 8 a wavelet node + bias parameters, and that many products",
    tolerance=0,
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_cost_of_a_pruned_layer(bias):
    layer = layer_of(winners=WINNERS, bias=bias)
    layer.select()
    pruned = layer.prune()
    functions = sum(SIZES[name] for name in WINNERS)
    count = sum(p.numel() for p in pruned.parameters())
    assert count == 3 * functions + 2 * 8 * WINNERS.count("wavelet") + 3 * bias
    assert pruned.macs == 3 * functions
    assert layer.macs == 3 * 6 * sum(SIZES.values())
    flops = []
    for model in (layer, pruned):
        with FlopCounterMode(display=False) as counter:
            model(numbers(10, 6))
        flops.append(counter.get_total_flops())
    assert flops == [2 * 10 * layer.macs, 2 * 10 * pruned.macs]


def planted(seed, rows=1000):
    """Inputs, and one function of each: spline, T_4, Mexican hat, sin(6 x); of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 4, generator=generator) - 1
    hat = WaveletBasis(1)(x[:, 2:3])[:, 0, 4].detach()
    parts = [
        BSplineBasis()(x[:, 0]) @ torch.randn(8, generator=generator),
        ChebyshevBasis(4)(x[:, 1])[:, 4],
        hat,
        torch.sin(6 * x[:, 3]),
    ]
    f = torch.stack(parts, -1)
    return x, (f - f.mean(0)) / f.std(0)


def error_alone(name, x, f):
    """How far a family alone stays from f (N,), by least squares with a constant."""
    basis = make_basis(name, 1)(x[:, None])[:, 0].detach()
    design = torch.cat([basis, torch.ones(len(x), 1)], -1).double().numpy()
    solution = np.linalg.lstsq(design, f.double().numpy(), rcond=None)[0]
    return float(np.sqrt(np.mean((design @ solution - f.double().numpy()) ** 2)))


FOUR = ("bspline", "chebyshev", "wavelet", "fourier")


@pytest.fixture(scope="module")
def chosen():
    """The layers that were trained on planted functions, with what the training saw."""
    found = []
    for seed in range(3):
        x, f = planted(seed)
        torch.manual_seed(seed)
        trainer = SKANTrainer(SKANLinear(4, 1, pool=FOUR), (150, 150, 20), hard=True)
        fit = trainer.fit(
            lambda model, x, y: F.mse_loss(model(x)[:, 0], y), (x, f.sum(-1)), lr=1e-2
        )
        found.append((x, f, trainer.model, fit))
    return found


@pytest.mark.claim(
    10,
    "Of four planted functions, at least three nodes choose the planted family or one whose own "
    "best fit is within 5 % of the function's deviation",
    tolerance=0.05,
)
def test_planted_families_are_chosen(chosen):
    planted_families = ("bspline", "chebyshev", "wavelet", "fourier")
    for x, f, pruned, _ in chosen:
        family = {report.node: report.family for report in pruned.report()}
        good = [
            family[i] == planted_families[i] or error_alone(family[i], x[:, i], f[:, i]) <= 0.05
            for i in range(4)
        ]
        assert sum(good) >= 3, family


@pytest.mark.claim(
    10,
    "Gates of phase 2 sum to 1, their entropy falls, and nodes choose differently",
    tolerance=1e-6,
)
def test_the_choice_sharpens_and_differs_between_nodes(chosen):
    different = 0
    for _, _, pruned, fit in chosen:
        assert len(fit.entropies) == 150
        assert fit.entropies[-1] < 0.9 * fit.entropies[0]
        assert fit.jump == pytest.approx(fit.losses[150] - fit.losses[149])
        assert fit.losses[300] < 2 * fit.losses[299] + 1e-2  # pruning hard gates changes nothing
        different += len(pruned.pool) > 1
    assert different >= 2
    layer = layer_of()
    layer.select(0.3)
    torch.testing.assert_close(layer.gates.sum(-1), torch.ones(6, dtype=torch.float64))
    p = layer.gates.detach().numpy()
    entropy = -(p * np.log(p)).sum(-1).mean()
    assert layer.selection_entropy().item() == pytest.approx(entropy, rel=1e-6)


@pytest.mark.claim(
    10, "SConvKAN2d equals unfolding, a SKANLinear on each patch, and folding", tolerance=0
)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "gate"),
    [(3, 1, 1, "channel"), ((2, 3), (2, 1), (0, 1), "node"), (1, 2, 0, "layer")],
)
def test_convolution_is_patches(kernel, stride, padding, gate):
    torch.manual_seed(0)
    conv = SConvKAN2d(2, 3, kernel, stride, padding, gate=gate, dtype=torch.float64)
    torch.nn.init.normal_(conv.linear.gate_weight)
    x = numbers(2, 2, 6, 5)
    patches = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    shape = F.conv2d(x, torch.zeros(3, 2, *conv.kernel_size, dtype=x.dtype), None, stride, padding)
    expected = F.fold(conv.linear(patches.mT).mT, shape.shape[-2:], 1)
    assert torch.equal(conv(x), expected)
    positions = conv.kernel_size[0] * conv.kernel_size[1]
    groups = {"channel": 2, "node": 2 * positions, "layer": 1}[gate]
    assert conv.linear.gate_weight.shape == (groups, 4)
    repeated = conv.linear.gate_weight.repeat_interleave(2 * positions // groups, 0)
    assert torch.equal(conv.linear.gates, repeated)
    last = SConvKAN2d(
        2, 3, kernel, stride, padding, gate=gate, channels_last=True, dtype=torch.float64
    )
    last.load_state_dict(conv.state_dict())
    assert torch.equal(last(x.movedim(1, -1)).movedim(-1, 1), expected)


@pytest.mark.claim(10, "A state_dict round trip keeps outputs in every phase", tolerance=0)
@pytest.mark.parametrize("phase", [1, 2, "hard", 3])
def test_states_of_all_phases(phase):
    layer, other, x = layer_of(winners=WINNERS), layer_of(seed=1), numbers(5, 6)
    if phase != 1:
        layer.select(0.2, hard=phase == "hard")
    if phase == 3:
        layer = layer.prune()
        other = PrunedKANLinear(6, 3, layer.nodes, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert other.phase == layer.phase


def test_scores_and_reports():
    layer, x = layer_of(winners=WINNERS), numbers(50, 6)
    layer.select(0.5)
    scores = layer.scores(x)
    for i in range(6):
        for m, name in enumerate(POOL):
            part = layer.bases[name](x)[:, i] @ layer.coef[name][:, i].T
            expected = layer.gates[i, m] * part.abs().mean()
            torch.testing.assert_close(scores[i, m], expected)
    report = layer.report(x)
    assert [entry.family for entry in report] == list(WINNERS)
    assert report[2].gate == pytest.approx(layer.gates[2, 2].item())
    assert report[2].scores["wavelet"] == pytest.approx(scores[2, 3].item())
    assert layer.report()[0].scores == {}


def test_a_layers_gate_is_shared():
    layer = SKANLinear(4, 2, gate="layer")
    assert layer.gate_weight.shape == (1, 4)
    assert layer.gates.shape == (4, 4)


def test_phases_of_a_training():
    model = SKAN((2, 3, 1), pool=("rbf", "chebyshev"))
    trainer = SKANTrainer(model, (2, 3, 2), (1.0, 0.25), entropy_weight=0.5)
    on_step, penalty = trainer.callbacks()
    assert [round(trainer.temperature(s), 6) for s in range(6)] == [1, 1, 1, 0.5, 0.25, 0.25]
    seen = []
    for step in range(7):
        changed = on_step(step)
        phases = {layer.phase for layer in model.layers}
        seen.append((changed, phases.pop()))
        if 2 <= step < 5:
            entropies = [layer.selection_entropy() for layer in model.layers]
            torch.testing.assert_close(penalty(), 0.25 * sum(entropies))
            assert model.layers[0].tau == pytest.approx(trainer.temperature(step))
        else:
            assert penalty().item() == 0
    assert seen == [(False, 1)] * 2 + [(False, 2)] * 3 + [(True, 3), (False, 3)]
    assert all(isinstance(layer, PrunedKANLinear) for layer in model.layers)


def test_fit_prunes_even_without_a_third_phase_and_takes_batches():
    torch.manual_seed(0)
    x = numbers(40, 2, dtype=torch.float32)
    conv = torch.nn.Sequential(SConvKAN2d(1, 2, 2, pool=("rbf", "chebyshev")), torch.nn.Flatten())
    trainer = SKANTrainer(conv, (0, 2, 0))
    fit = trainer.fit(
        lambda model, x: model(x.view(-1, 1, 2, 1).expand(-1, -1, 2, 2)).square().mean(),
        (x,),
        batch_size=8,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(fit.losses) == 2
    assert fit.jump == 0
    assert isinstance(conv[0].linear, PrunedKANLinear)


def test_tiles_change_nothing(monkeypatch):
    layer = layer_of(winners=WINNERS)
    layer.select(0.5)
    models = (layer, layer.prune())
    x = numbers(30, 6)
    before = [model(x) for model in models]
    monkeypatch.setattr(kan, "TILE", 400)
    for model, y in zip(models, before, strict=True):
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: SKANLinear(3, 2, pool=()), "pool: expected distinct names"),
        (ValueError, lambda: SKANLinear(3, 2, pool=("rbf", "rbf")), "pool: expected distinct"),
        (ValueError, lambda: SKANLinear(3, 2, pool=("rbf", "sine")), "pool: .*got 'sine'"),
        (ValueError, lambda: SKANLinear(3, 2, gate="edge"), "gate: expected one of node, layer"),
        (ValueError, lambda: SKANLinear(3, 2, group_size=2), "group_size: expected a divisor"),
        (ValueError, lambda: SKANLinear(3, 2)(torch.zeros(4, 2)), r"x: expected .*3\), got"),
        (ValueError, lambda: SKANLinear(3, 2).select(0.0), "tau: expected a number above 0"),
        (RuntimeError, lambda: SKANLinear(3, 2).prune(), "prune: expected a layer in phase 2"),
        (ValueError, lambda: SKANLinear(3, 2).prune("top2"), "mode: expected one of top1"),
        (ValueError, lambda: PrunedKANLinear(3, 2, {}), "nodes: expected inputs"),
        (ValueError, lambda: PrunedKANLinear(3, 2, {"rbf": [3]}), "nodes: expected distinct"),
        (ValueError, lambda: PrunedKANLinear(3, 2, {"rbf": [1, 1]}), "nodes: expected distinct"),
        (ValueError, lambda: SKAN((3,)), "widths: expected at least two"),
        (ValueError, lambda: SConvKAN2d(1, 1, 3)(torch.zeros(1, 2, 2)), "x: expected an image of"),
        (ValueError, lambda: SConvKAN2d(1, 1, 3)(torch.zeros(2, 2, 2)), r"x: expected .*1, H, W"),
        (ValueError, lambda: SConvKAN2d(1, 1, (1, 2, 3)), "kernel_size: expected one number"),
        (ValueError, lambda: SKANTrainer(torch.nn.ReLU(), (1, 1, 1)), "model: expected one with"),
        (ValueError, lambda: SKANTrainer(SKAN((1, 1)), (1, 0, 1)), "steps: expected an integer"),
        (ValueError, lambda: SKANTrainer(SKAN((1, 1)), (1, 1)), "steps: expected three"),
        (ValueError, lambda: SKANTrainer(SKAN((1, 1)), (1, 1, 1), (1, 0)), "tau: expected two"),
        (
            ValueError,
            lambda: SKANTrainer(SKAN((1, 1)), (1, 1, 1), entropy_weight=-1),
            "entropy_weight: expected",
        ),
    ],
)
def test_bad_input_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()
