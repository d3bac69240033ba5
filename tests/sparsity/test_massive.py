"""The meter of massive activations against NumPy and planted spikes, and interventions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchzoo.sparsity import MassiveActivationMeter, find_blocks, intervene, massive_mask
from torchzoo.sparsity.massive import exact_median


class Block(nn.Module):
    """Puts out what it was given plus a table of its own, alone or in a tuple."""

    def __init__(self, shape, *, pair=False):
        super().__init__()
        self.norm = nn.LayerNorm(shape[-1])
        self.table = nn.Parameter(torch.zeros(shape))
        self.pair = pair

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return (x + self.table, "cache") if self.pair else x + self.table


def stream(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_ratio(h):
    """Ratio of means over the sequences in the first dimension."""
    sizes = np.abs(h.detach().double().numpy()).reshape(len(h), -1)
    return sizes.max(1).mean() / np.median(sizes, axis=1).mean()


@pytest.mark.claim(
    57,
    "A planted spike gives its size over the normal median, at its place, and is all that is "
    "flagged",
    tolerance=0.02,
)
@pytest.mark.parametrize("pair", [False, True])
def test_planted_spike(pair):
    model = nn.Sequential(Block((50, 40), pair=pair), Block((50, 40), pair=pair))
    model[1].table.data[7, 31] = -5000.0
    x = stream(3, 50, 40)
    with MassiveActivationMeter(model, rule="sun2024") as meter:
        model(x)
    assert meter.ratios[1].item() == pytest.approx(5000 / 0.6745, rel=0.02)
    assert meter.ratios[0].item() < 10
    assert meter.positions[1, 0].tolist() == [7, 31]
    assert meter.counts.tolist() == [0, 3]
    expected = torch.zeros(3, 50, 40, dtype=torch.bool)
    expected[:, 7, 31] = True
    assert torch.equal(massive_mask(x + model[1].table), expected)


@pytest.mark.claim(57, "Both conditions on a massive activation count, as Sun et al. state them")
def test_rules():
    h = torch.full((5, 5), 0.1)
    h[0, 0], h[1, 1], h[2, 2] = 100.0, 99.9, 100.1
    assert massive_mask(h).nonzero().tolist() == [[2, 2]]  # above 100, not at 100
    assert massive_mask(h, abs_min=0.0).nonzero().tolist() == [[0, 0], [2, 2]]
    h[2, 2] = 200.0
    assert not massive_mask(2.01 * h)[1, 1]
    assert massive_mask(2.01 * torch.where(h == 200, 100.0, h))[2, 2]  # exactly 1000 medians
    loud = torch.ones(5, 5)
    loud[3, 3] = 200.0  # large, but not beside the rest of its own sequence
    assert massive_mask(torch.stack([h, loud, h])).sum((1, 2)).tolist() == [1, 0, 1]
    model = nn.Sequential(Block((5, 5)))
    for rule, count in (("ratio", 2), ("sun2024", 1)):
        with MassiveActivationMeter(model, rule=rule) as meter:
            model(h)
        assert meter.counts.tolist() == [count]
        assert "massive" in str(meter.compute())


@pytest.mark.claim(57, "Medians are NumPy's, for even and odd numbers of entries", tolerance=0.0)
@given(n=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_median(n, seed):
    values = stream(3, n, seed=seed).double()
    expected = np.median(values.numpy(), axis=-1)
    np.testing.assert_array_equal(exact_median(values).numpy(), expected)


@pytest.mark.claim(
    57, "Ratios are NumPy's over all sequences of all calls, by either average", tolerance=1e-6
)
@pytest.mark.parametrize("width", [3, 4])
def test_ratios(width):
    model = nn.Sequential(Block((5, width)), Block((5, width)))
    model[1].table.data = stream(5, width, seed=9)
    batches = [stream(b, 5, width, seed=b) for b in (2, 3)]
    whole = [torch.cat(batches) + table for table in (0, model[1].table)]
    with MassiveActivationMeter(model, top=2) as meter:
        for x in batches:
            model(x)
    assert meter.ratios.tolist() == pytest.approx([numpy_ratio(h) for h in whole], rel=1e-6)
    by_step = [[numpy_ratio(x + t) for t in (0, model[1].table)] for x in batches]
    np.testing.assert_allclose(meter.history.numpy(), by_step, rtol=1e-6)
    for row, h in enumerate(whole):
        sizes = h.detach().abs()
        largest = sizes.flatten().topk(2)
        torch.testing.assert_close(meter.topk[row], largest.values)
        for (token, channel), size in zip(
            meter.positions[row].tolist(), largest.values, strict=True
        ):
            assert (sizes[:, token, channel] == size).any()
    with MassiveActivationMeter(model, average="mean_of_ratios") as other:
        for x in batches:
            model(x)
    expected = np.mean([numpy_ratio(h[None]) for h in whole[0]])
    assert other.ratios[0].item() == pytest.approx(expected, rel=1e-6)
    report = meter.compute()
    assert report.sequences == 5
    assert report.names == ("0", "1")
    medians = [np.median(h.detach().abs().flatten(1).numpy(), axis=1).mean() for h in whole]
    assert report.medians.tolist() == pytest.approx(medians, rel=1e-6)


@pytest.mark.claim(57, "Ratios don't change when the stream is scaled", tolerance=1e-12)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_scale_invariance(scale, seed):
    model = nn.Sequential(Block((6, 4))).double()
    x = stream(2, 6, 4, seed=seed).double()
    with MassiveActivationMeter(model) as meter:
        model(x)
        model(scale * x)
    first, second = meter.history[:, 0].tolist()
    assert first == pytest.approx(second, rel=1e-12)


@pytest.mark.claim(
    57, "A compiled model is measured as it is eagerly, a bfloat16 one in float32", tolerance=0.0
)
def test_compiled_and_half_precision():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    x, graphs = stream(2, 5, 8), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), MassiveActivationMeter(model) as eager:
        model(x)
    with torch.no_grad():
        before = compiled(x)
        made = len(graphs)
        with MassiveActivationMeter(compiled) as meter:
            compiled(x)
        torch.testing.assert_close(compiled(x), before)
    assert made == len(graphs) > 0
    assert torch.equal(meter.ratios, eager.ratios)
    assert torch.equal(meter.positions, eager.positions)

    half = nn.Sequential(Block((5, 8))).bfloat16()
    h = x.bfloat16()
    with MassiveActivationMeter(half) as meter:
        half(h)
    assert meter.ratios.item() == pytest.approx(numpy_ratio(h.float()), rel=1e-6)
    assert meter.topk.dtype == torch.float32


def test_sampled_median_is_as_good_as_stated():
    """Standard error 1.17 / sqrt(n) of the median, for normal values; no draws of the model's."""
    model, n = nn.Sequential(Block((200, 100))), 400
    errors = []
    state = torch.random.get_rng_state()
    for seed in range(200):
        x = stream(1, 200, 100, seed=seed)
        with MassiveActivationMeter(model, sample=n) as meter:
            meter._generators[x.device] = torch.Generator().manual_seed(seed)
            model(x)
        errors.append(meter.compute().medians.item() / 0.67449 - 1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.std(errors) == pytest.approx(1.17 / np.sqrt(n), rel=0.2)
    assert abs(np.mean(errors)) < 4 * 1.17 / np.sqrt(n * 200)


def test_every_and_reset():
    model = nn.Sequential(Block((3, 4)))
    meter = MassiveActivationMeter(model, every=3)
    with meter:
        for seed in range(7):
            model(stream(1, 3, 4, seed=seed))
    expected = [numpy_ratio(stream(1, 3, 4, seed=seed)) for seed in (0, 3, 6)]
    assert meter.history[:, 0].tolist() == pytest.approx(expected)
    model(stream(1, 3, 4))
    assert len(meter.history) == 3  # outside: not measured
    with MassiveActivationMeter(model) as other:
        model(torch.zeros(0, 3, 4))
        model(stream(2, 3, 4))
    assert other.compute().sequences == 2
    meter.reset()
    with pytest.raises(ValueError, match="nothing measured"):
        _ = meter.ratios


@pytest.mark.claim(
    57,
    "An intervention changes the flagged entries and no others, and leaves no trace",
    tolerance=0.0,
)
@pytest.mark.parametrize("mode", ["zero", "mean", "clamp"])
@pytest.mark.parametrize("pair", [False, True])
def test_interventions(mode, pair):
    model = nn.Sequential(Block((6, 8), pair=pair))
    x = stream(3, 6, 8)
    x[0, 2, 5], x[1, 3, 5], x[1, 0, 1] = 900.0, 1100.0, -700.0
    run = lambda: model(x)[0] if pair else model(x)  # noqa: E731
    before = run()
    mask = massive_mask(before, ratio=500.0)
    assert mask.sum() == 3
    with intervene(model, mode, ratio=500.0):
        changed = run()
    assert torch.equal(run(), before)
    assert torch.equal(changed[~mask], before[~mask])
    limits = before.abs().masked_fill(mask, 0).amax((1, 2)).tolist()
    expected = {
        "zero": [0.0, 0.0, 0.0],
        "mean": [1000.0, -700.0, 1000.0],
        "clamp": [limits[0], -limits[1], limits[1]],
    }[mode]
    assert changed[mask].tolist() == pytest.approx(expected)
    if mode == "clamp":
        with intervene(model, mode, ratio=500.0, limit=800.0):
            assert run()[mask].tolist() == pytest.approx([800.0, -700.0, 800.0])


def test_other_libraries(host):
    """Ratios are those of the outputs that the blocks themselves give."""
    streams = {}

    def record(name):
        return lambda module, inputs, out: streams.update(
            {name: out[0] if isinstance(out, tuple) else out}
        )

    first = lambda out: out if isinstance(out, torch.Tensor) else out[0]  # noqa: E731
    with torch.no_grad():
        before = first(host.model(*host.inputs))
    blocks = find_blocks(host.model)
    handles = [block.register_forward_hook(record(name)) for name, block in blocks.items()]
    with torch.no_grad(), MassiveActivationMeter(host.model) as meter:
        host.model(*host.inputs)
    for handle in handles:
        handle.remove()
    assert meter.names == host.blocks
    expected = [numpy_ratio(streams[name]) for name in host.blocks]
    assert meter.ratios.tolist() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad(), intervene(host.model, "zero", abs_min=0.0, ratio=1.5):
        changed = first(host.model(*host.inputs))
    assert not torch.equal(before, changed)
    with torch.no_grad():
        assert torch.equal(before, first(host.model(*host.inputs)))


def test_bad_arguments():
    model = nn.Sequential(Block((3, 4)))
    for options in ({"top": 0}, {"every": 0}, {"sample": 0}, {"rule": "x"}, {"average": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MassiveActivationMeter(model, **options)
    with pytest.raises(ValueError, match="blocks: expected a rule that selects"):
        MassiveActivationMeter(model, "nothing")
    for call, message in (
        (lambda: massive_mask(torch.ones(3)), "h: expected shape"),
        (lambda: massive_mask(torch.ones(0, 3)), "h: expected shape"),
        (lambda: intervene(model, "drop").__enter__(), "mode"),
        (lambda: intervene(model, "zero", limit=1.0).__enter__(), "limit"),
        (lambda: intervene(model, "clamp", limit=-1.0).__enter__(), "limit"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with (
        pytest.raises(ValueError, match=r"blocks: expected 0\.norm to put out"),
        MassiveActivationMeter(model, "0.norm"),
    ):
        model[0].norm(torch.ones(4))
