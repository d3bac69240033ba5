"""HyReLU against its closed form, the range of activations, and progressive training."""

import copy
import itertools
import math

import pytest
import torch
from scipy.special import lambertw
from torch import nn
from torch.autograd import gradcheck

from torchzoo.activations import (
    ClipAct,
    FitAct,
    HybridClippedReLU,
    ProActTrainer,
    Ranger,
    convert_clipped,
    hyrelu,
    range_bounds,
)
from torchzoo.activations.proact_trainer import DECAYS

DOUBLE = torch.float64


@pytest.mark.claim(
    121,
    "1 or more below the bound HyReLU is ReLU, 1 or more above it is 0, both up to 2.1e-9 x; at it "
    "half the bound; for x <= 0 exactly 0",
    tolerance=2.1e-9,
)
@pytest.mark.parametrize("bound", [0.5, 1.3, 7.0])
def test_shape(bound):
    x = torch.linspace(-5, 30, 7001, dtype=DOUBLE)
    y = hyrelu(x, bound)
    low, high = (x <= bound - 1) & (x > 0), x >= bound + 1
    assert ((y - x).abs()[low] < 2.1e-9 * x[low]).all()
    assert (y[high] < 2.1e-9 * x[high]).all()
    assert (y[x <= 0] == 0).all()
    middle = hyrelu(torch.tensor(bound, dtype=DOUBLE), bound)
    torch.testing.assert_close(middle, torch.tensor(bound / 2, dtype=DOUBLE), rtol=1e-15, atol=0)


@pytest.mark.claim(
    121,
    "Its maximum is W(exp(kappa lambda - 1)) / kappa; 1.0956461713 at lambda = 1.3",
    tolerance=1e-9,
)
@pytest.mark.parametrize("bound", [0.05, 0.4, 1.3, 5.0])
@pytest.mark.parametrize("kappa", [20.0, 5.0])
def test_peak(bound, kappa):
    peak = lambertw(torch.tensor(kappa * bound - 1, dtype=DOUBLE).exp()).real / kappa
    # the derivative is 0 where kappa x sigmoid(-t) = 1
    x = torch.linspace(0, bound + 3, 2_000_001, dtype=DOUBLE)
    found = hyrelu(x, bound, sharpness=kappa).max().item()
    assert found == pytest.approx(float(peak), abs=1e-9)
    if (bound, kappa) == (1.3, 20.0):
        assert found == pytest.approx(1.0956461713, abs=1e-9)


@pytest.mark.claim(
    121, "It is max(0, x - x sigmoid(20 (x - lambda))), as the paper writes it", tolerance=1e-12
)
def test_equals_the_published_form():
    x = torch.linspace(-3, 6, 901, dtype=DOUBLE)
    expected = (x - x * torch.sigmoid(20 * (x - 1.3))).clamp_min(0)
    torch.testing.assert_close(
        HybridClippedReLU(1.3, dtype=DOUBLE)(x), expected, rtol=0, atol=1e-12
    )


@pytest.mark.claim(121, "gradcheck in float64 in x and in the bound", tolerance=1e-6)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 1), (2, 4)])
def test_gradcheck(shape):
    x = torch.randn(3, 2, 4, dtype=DOUBLE)
    x = (x + 0.1 * x.sign()).requires_grad_()
    bound = (torch.rand(shape, dtype=DOUBLE) + 0.3).requires_grad_()
    assert gradcheck(lambda *args: hyrelu(*args, sharpness=4.0), (x, bound))


@pytest.mark.claim(
    121,
    "The derivative by the bound is x kappa s (1 - s), s = sigmoid(kappa (x - lambda))",
    tolerance=1e-8,
)
def test_derivative_by_the_bound():
    x = torch.linspace(-1, 3, 401, dtype=DOUBLE)
    bound = torch.full((401,), 1.2, dtype=DOUBLE, requires_grad=True)
    hyrelu(x, bound).sum().backward()
    s = torch.sigmoid(20 * (x - 1.2))
    expected = torch.where(x > 0, x * 20 * s * (1 - s), 0.0)
    torch.testing.assert_close(bound.grad, expected, rtol=0, atol=1e-8)


@pytest.mark.claim(
    121,
    "Infinity, the largest numbers and NaN give 0, with gradients of 0; NaN passes if asked for",
    tolerance=0.0,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_faults_leave(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, top, -top, torch.nan], dtype=dtype, requires_grad=True)
    act = HybridClippedReLU(1.3)
    y = act(x)
    y.sum().backward()
    assert y.tolist() == x.grad.tolist() == [0.0] * 5
    assert act.bound.grad.item() == 0
    plain = hyrelu(x, 1.3, nan_to_zero=False)
    assert plain.isnan().tolist() == [False] * 4 + [True]
    for kind, large in ((Ranger, 1.5), (ClipAct, 0.0)):
        assert kind(1.5)(x).tolist() == [large, 0.0, large, 0.0, 0.0]


def test_baselines():
    x = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 2.5, 100.0]])
    bound = [2.0, 2.0, 0.5]
    assert Ranger(bound)(x).tolist() == [[0.0, 0.0, 0.5], [2.0, 2.0, 0.5]]
    assert ClipAct(bound)(x).tolist() == [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    hard = HybridClippedReLU(bound, hard=True)
    assert torch.equal(hard(x), ClipAct(bound)(x))
    assert torch.equal(FitAct(bound)(x), HybridClippedReLU(bound)(x))
    assert not list(Ranger(1.0).parameters())


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8)),
        *(nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)),
    )


def data(seed=0, batches=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 1, 6, 6, generator=generator),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(batches)
    ]


def proact(net, batches, kind="proact", per_neuron=("last",)):
    model = copy.deepcopy(net)
    convert_clipped(model, range_bounds(net, batches, per_neuron=per_neuron), kind)
    return model


@pytest.mark.claim(
    121,
    "One activation, the last one to be called, has a bound for each neuron; there are "
    "(layers - 1) plus its width more parameters",
    tolerance=0.0,
)
def test_hybrid_bounds():
    net, batches = network(), data()
    model = proact(net, batches)
    bounds = {n: m.bound for n, m in model.named_modules() if isinstance(m, HybridClippedReLU)}
    assert {name: tuple(b.shape) for name, b in bounds.items()} == {"2": (), "5": (), "7": (6,)}
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(model) - count(net) == 2 + 6
    everywhere = proact(net, batches, "fitact", ("all",))
    assert count(everywhere) - count(net) == 3 * 4 * 4 + 8 + 6
    assert {tuple(b.shape) for b in everywhere[2].parameters()} == {(3, 4, 4)}


@pytest.mark.claim(
    121,
    "Bounds start at the largest activation on the data: of the layer, of the neuron in the last",
    tolerance=1e-6,
)
def test_range_of_activations():
    net, batches = network(), data()
    bounds = range_bounds(net, batches)
    net.eval()
    with torch.no_grad():
        x = torch.cat([x for x, _ in batches])
        first = net[:3](x)
        last = net[:8](x)
    torch.testing.assert_close(bounds["2"], first.max())
    torch.testing.assert_close(bounds["7"], last.amax(0).clamp_min(1e-6))
    model = proact(net, batches).eval()
    hard = copy.deepcopy(model)
    for module in hard.modules():
        if isinstance(module, HybridClippedReLU):
            module.hard = True
    torch.testing.assert_close(hard(x), net(x))  # no activation is above its bound


class Backwards(nn.Module):
    """Its activations are called in the reverse of their order in the module, one of them twice."""

    def __init__(self):
        super().__init__()
        self.late, self.early = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.late(self.early(self.early(x - 1) + 1)[:, :2])


def test_order_is_that_of_calls():
    x = torch.tensor([[3.0, 1.0, -4.0], [0.5, 2.0, 7.0]])
    model = Backwards().train()
    bounds = range_bounds(model, [x[:1], x[1:]])
    assert list(bounds) == ["early", "late"]
    assert bounds["early"].item() == 7
    assert bounds["late"].tolist() == [3.0, 2.0]
    assert model.training
    assert range_bounds(model, [x], per_neuron=("early",))["early"].tolist() == [3.0, 2.0, 7.0]


def test_an_activation_that_is_called_again_is_in_order_of_its_last_call():
    first, second = nn.ReLU(), nn.ReLU()
    model = nn.Sequential(first, second, first)
    assert list(range_bounds(model, [torch.ones(2, 3)])) == ["1", "0"]


@pytest.mark.parametrize(
    ("kind", "module", "shared"),
    [
        ("proact", HybridClippedReLU, False),
        ("fitact", FitAct, False),
        ("ranger", Ranger, True),
        ("clipact", ClipAct, True),
    ],
)
def test_what_each_kind_puts_in(kind, module, shared):
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    convert_clipped(model, {"0": torch.tensor(3.0), "1": torch.tensor([1.0, 4.0])}, kind)
    assert [type(m) for m in model] == [module, module]
    assert [m.bound.tolist() for m in model] == [3.0, 4.0 if shared else [1.0, 4.0]]


@pytest.mark.claim(
    121,
    "Training changes nothing but bounds, bit for bit; visits the last layer first, one at a time; "
    "and ends within the tolerance",
    tolerance=0.0,
)
def test_training_changes_bounds_only():
    net, batches = network(), data()
    model = proact(net, batches)
    before = copy.deepcopy(model.state_dict())
    visited = []

    class Watched(ProActTrainer):
        def loss(self, x, y):
            assert not self.model.training
            now = {n: v.clone() for n, v in self.model.state_dict().items() if "bound" in n}
            visited.append(now)
            return super().loss(x, y)

    trainer = Watched(model, net, tolerance=3.0, decays=(4e-2, 4e-5), epochs=2)
    report = trainer.fit(batches, data(1))
    assert [layer.name for layer in report.layers] == ["7", "5", "2"]
    assert model.training
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) != ("bound" in name), name
    assert abs(report.final - report.initial) <= 3.0
    for layer in report.layers:
        assert torch.equal(layer.initial, before[f"{layer.name}.bound"])
        assert torch.equal(layer.final, after[f"{layer.name}.bound"])
        assert set(layer.accepted) <= {4e-2, 4e-5}
    changes = [
        {n for n in one if not torch.equal(one[n], two[n])}
        for one, two in itertools.pairwise(visited)
    ]
    turns = [next(iter(c)) for c in changes if c]
    assert all(len(c) <= 1 for c in changes)
    order = ["7.bound", "5.bound", "2.bound"]
    assert [order.index(n) for n in turns] == sorted(order.index(n) for n in turns)


@pytest.mark.claim(
    121, "An epoch outside of the tolerance is undone, and the next decay tried", tolerance=0.0
)
def test_rejected_epochs_are_undone():
    net, batches = network(), data()
    model = proact(net, batches)
    accuracies = iter([50.0, 50.1, 50.3, 49.7, 49.9, *[70.0] * 99])
    taken = []

    class Scripted(ProActTrainer):
        def _accuracy(self, val):
            taken.append(self.model[7].bound.detach().clone())
            return next(accuracies)

    report = Scripted(model, net, decays=(1e-2, 1e-3, 1e-4), epochs=2).fit(batches, batches)
    last = report.layers[0]
    # decay 1: kept, undone; decay 2: undone at once; decay 3: kept, undone
    assert last.accepted == (1e-2, 1e-4)
    assert torch.equal(last.final, taken[4])
    assert not torch.equal(taken[1], taken[4])
    assert all(torch.equal(layer.final, layer.initial) for layer in report.layers[1:])


def test_learning_rates():
    """0.001 for neurons and 0.01 for layers, over two steps of warm-up and half a cosine."""
    rates = []

    class Watched(ProActTrainer):
        def _step(self, bounds, optimizer, x, y):
            rates.append([group["lr"] for group in optimizer.param_groups])
            super()._step(bounds, optimizer, x, y)

    net, batches = network(), data()
    model = proact(net, batches)
    trainer = Watched(model, net, tolerance=100, decays=(0.0,), epochs=10, progressive=False)
    trainer.fit(batches, batches)
    share = [0.5, 1.0] + [(1 + math.cos(math.pi * i / 28)) / 2 for i in range(28)]
    expected = [[0.001 * s, 0.01 * s, 0.01 * s] for s in share]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


@pytest.mark.claim(
    121, "With the loss switched off decay alone makes every bound smaller", tolerance=0.0
)
@pytest.mark.parametrize("progressive", [True, False])
def test_decay_shrinks_every_bound(progressive):
    class DecayOnly(ProActTrainer):
        def loss(self, x, y):
            return 0 * super().loss(x, y).nan_to_num()

    net, batches = network(), data()
    model = proact(net, batches)
    trainer = DecayOnly(
        model, net, tolerance=100, decays=(4e-5,), epochs=3, progressive=progressive
    )
    report = trainer.fit(batches, batches)
    for layer in report.layers:
        above = layer.initial > 1e-5
        assert (layer.final[above] < layer.initial[above]).all()
        assert (layer.final > 0).all()


@pytest.mark.claim(
    121,
    "The loss is cross-entropy to the labels plus that to the fault-free network's softmax",
    tolerance=1e-6,
)
def test_loss():
    net, batches = network().eval(), data()
    model = proact(net, batches).eval()
    x, y = batches[0]
    log = model(x).log_softmax(-1)
    soft = net(x).softmax(-1)
    expected = -log[torch.arange(16), y].mean() - (soft * log).sum(-1).mean()
    torch.testing.assert_close(ProActTrainer(model, net).loss(x, y), expected)
    assert ProActTrainer(model, net).tolerance == 0.2
    assert pytest.approx([4 * 10.0**-k for k in range(5, 16)]) == DECAYS


@pytest.mark.claim(
    121,
    "The top exponent bit of a weight before an activation: ReLU's logits exceed 1e20 or are NaN, "
    "clipped ones stay within abs(b) + sum abs(w) times the peak of the last activation",
    tolerance=None,
)
@pytest.mark.parametrize("weight", ["0.weight", "4.weight", "6.weight"])
def test_a_flipped_exponent_is_contained(weight):
    net, batches = network(1).eval(), data()
    model = proact(net, batches).eval()
    x = batches[0][0]
    peak = lambertw((20 * model[7].bound.detach().double() - 1).exp()).real / 20
    limit = model[8].bias.abs() + model[8].weight.abs() @ peak.float() + 1e-4
    worst = 0.0
    for place in range(3):
        for one in (net, model):
            words = one.get_parameter(weight).detach().view(torch.int32).view(-1)
            words[place] ^= 1 << 30
            logits = one(x)
            words[place] ^= 1 << 30
            if one is model:
                assert (logits.abs() <= limit).all()
            else:
                large = logits.abs().max()
                worst = max(worst, torch.inf if large.isnan() else large.item())
    assert worst > 1e20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HybridClippedReLU(0.0), "bound: expected numbers > 0, got 0.0"),
        (lambda: HybridClippedReLU([1.0, -2.0]), "bound: expected numbers > 0, got the smallest"),
        (lambda: Ranger(torch.nan), "bound: expected numbers > 0"),
        (lambda: FitAct([1.0, 1.0])(torch.ones(3)), r"x: expected .*bound, \(2,\), got \(3,\)"),
        (lambda: ClipAct([1.0, 1.0])(torch.ones(3, 1)), r"x: expected .*, got \(3, 1\)"),
        (lambda: hyrelu(torch.ones(3), torch.ones(2)), r"x: expected .* got \(3,\)"),
        (lambda: hyrelu(torch.ones(3), 1.0, sharpness=0.0), "sharpness: expected .* got 0.0"),
        (lambda: range_bounds(nn.Linear(2, 2), [torch.ones(1, 2)]), "model: expected an activat"),
        (
            lambda: range_bounds(network(), data(), per_neuron=("first",)),
            "per_neuron: expected last, all or names of .*, got 'first'",
        ),
        (
            lambda: range_bounds(
                Backwards(), [torch.ones(1, 3), torch.ones(1, 4)], per_neuron=["all"]
            ),
            "per_neuron: expected one shape of early, got several",
        ),
        (lambda: convert_clipped(network(), {"9": torch.ones(())}), "bounds: .* got '9'"),
        (lambda: convert_clipped(network(), {}, "relu6"), "kind: expected one of .*'relu6'"),
        (lambda: ProActTrainer(network(), network()), "model: expected HybridClippedReLU"),
        (
            lambda: ProActTrainer(HybridClippedReLU(1.0, hard=True), network()),
            "model: expected HybridClippedReLU",
        ),
        (
            lambda: ProActTrainer(HybridClippedReLU(1.0, learnable=False), network()),
            "model: expected HybridClippedReLU",
        ),
        (
            lambda: ProActTrainer(HybridClippedReLU(1.0), network(), tolerance=-1),
            "tolerance: expected .* got -1",
        ),
        (
            lambda: ProActTrainer(HybridClippedReLU(1.0), network(), epochs=0),
            "epochs: expected 1 or more, got 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
