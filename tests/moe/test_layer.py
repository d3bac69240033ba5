"""The layer against a loop over tokens, and what a routed layer must not break."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchzoo.moe import (
    ActivationDenseToSparseGate,
    DenseToSparseGate,
    GroupedExperts,
    MoELayer,
    NoisyTopKGate,
    Routing,
    SoftmaxGate,
    TopKGate,
    moe_layer,
)

DIM, E = 6, 4
GATES = {
    "softmax": lambda **kw: SoftmaxGate(DIM, E, bias=True, **kw),
    "topk": lambda **kw: TopKGate(DIM, E, 2, **kw),
    "switch": lambda **kw: TopKGate(DIM, E, 1, renormalize=False, **kw),
    "noisy": lambda **kw: NoisyTopKGate(DIM, E, 2, **kw).eval(),
    "pruned": lambda **kw: DenseToSparseGate(DIM, E, threshold=0.24, noise=None, **kw),
    "dense_to_sparse": lambda **kw: DenseToSparseGate(
        DIM, E, temperature="learned", noise=None, **kw
    ),
    "activation": lambda **kw: ActivationDenseToSparseGate(DIM, E, learn_temperature=True, **kw),
}
every_gate = pytest.mark.parametrize("name", GATES)


def made(name, *, capacity_factor=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    gate = GATES[name](dtype=dtype)
    if name == "noisy":
        nn.init.normal_(gate.weight)
    experts = GroupedExperts(DIM, 8, E, bias=True, dtype=dtype)
    return MoELayer(gate, experts, capacity_factor=capacity_factor, **options)


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert(layer, e, x):
    """Expert e on one token, from its own matrices."""
    w = layer.experts
    gate, up = F.linear(x, w.w_in[e].T, w.b_in[e]).chunk(2)
    return F.linear(gate * torch.sigmoid(gate) * up, w.w_out[e].T, w.b_out[e])


def by_token(layer, x):
    """One token and one slot at a time."""
    routing = layer.gate(x)
    rows = []
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for s in range(routing.mask.shape[1]):
            if routing.mask[t, s]:
                y = y + routing.weights[t, s] * expert(layer, int(routing.experts[t, s]), token)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def gradients(y, inputs):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (y * upstream).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.claim(69, "The softmax-gated layer is sum_e p_e FFN_e(x)", tolerance=1e-6)
def test_dense_equivalence():
    layer, x = made("softmax", dtype=torch.float32), tokens(9, DIM, dtype=torch.float32)
    z = (x @ layer.gate.weight.T + layer.gate.bias).exp()
    p = z / z.sum(-1, keepdim=True)
    expected = torch.stack(
        [sum(p[t, e] * expert(layer, e, x[t]) for e in range(E)) for t in range(9)]
    )
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.claim(
    69, "Outputs and all gradients equal those of a loop over tokens", tolerance=1e-12
)
@every_gate
@pytest.mark.parametrize("count", [0, 1, 11])
def test_equals_loop_over_tokens(name, count):
    layer, x = made(name), tokens(count, DIM).requires_grad_()
    ours = layer(x)
    oracle = by_token(layer, x)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    if not count:
        assert gradients(ours, [x])[0].shape == (0, DIM)
        return
    inputs = [x, *layer.parameters()]
    for a, b in zip(gradients(ours, inputs), gradients(oracle, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_equals_loop_with_empty_experts():
    layer, x = made("topk"), tokens(11, DIM).requires_grad_()
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
    assert layer.gate(x).load.tolist() == [11, 0, 11, 0]
    inputs = [x, *layer.parameters()]
    ours, oracle = layer(x), by_token(layer, x)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)
    for a, b in zip(gradients(ours, inputs), gradients(oracle, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.claim(69, "Without capacity, permuted tokens give permuted outputs", tolerance=1e-12)
@every_gate
def test_permutation_equivariance(name):
    layer, x = made(name), tokens(20, DIM)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=0, atol=1e-12)


def test_capacity_breaks_equivariance():
    layer, x = made("topk", capacity_factor=0.5), tokens(20, DIM)
    order = torch.arange(19, -1, -1)
    assert (layer(x[order]) - layer(x)[order]).abs().max() > 1e-3


@pytest.mark.claim(
    69, "A capacity factor of E / k drops nothing and changes nothing", tolerance=0.0
)
@pytest.mark.parametrize(("name", "factor"), [("topk", E / 2), ("switch", E), ("softmax", 1.0)])
def test_enough_capacity(name, factor):
    layer, free, x = made(name, capacity_factor=factor), made(name), tokens(20, DIM)
    y, routing = layer(x, return_routing=True)
    assert routing.dropped_fraction.item() == 0
    assert torch.equal(y, free(x))


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_capacity(policy):
    layer = made("switch", capacity_factor=1.0, drop_policy=policy)
    with torch.no_grad():
        layer.gate.bias[1] = 5.0  # all go to expert 1, which takes ceil(10 / 4) = 3
    x = tokens(10, DIM)
    y, routing = layer(x, return_routing=True)
    assert routing.load.tolist() == [0, 3, 0, 0]
    assert routing.dropped_fraction.item() == pytest.approx(0.7)
    weights = layer.gate(x).weights[:, 0]
    kept = weights.topk(3).indices.sort().values if policy == "probs" else torch.arange(3)
    assert torch.equal(routing.mask[:, 0].nonzero()[:, 0], kept)
    assert (y[~routing.mask[:, 0]] == 0).all()
    torch.testing.assert_close(y[kept], made_free(layer)(x)[kept])


def made_free(layer):
    return MoELayer(layer.gate, layer.experts)


@pytest.mark.claim(69, "One graph, and no recompilation when the loads shift", tolerance=1e-6)
@pytest.mark.parametrize(
    ("name", "capacity_factor"),
    [("topk", None), ("topk", 1.25), ("pruned", None), ("activation", None)],
)
def test_compiles_in_one_graph(name, capacity_factor):
    layer = made(name, capacity_factor=capacity_factor, dtype=torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    loads = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = tokens(3, 7, DIM, dtype=torch.float32, seed=seed)
            y, routing = layer(x, return_routing=True)
            torch.testing.assert_close(compiled(x), y, rtol=0, atol=1e-6)
            loads.add(tuple(routing.load.tolist()))
    assert counter.frame_count == 1
    assert len(loads) > 1 or name == "activation"


def test_compiled_gradients():
    layer, x = made("pruned"), tokens(9, DIM).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [x, *layer.parameters()]
    ours, eager = gradients(compiled(x), inputs), gradients(layer(x), inputs)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_exports():
    layer, x = made("pruned"), tokens(9, DIM)
    program = torch.export.export(layer, (x,))
    other = tokens(9, DIM, seed=5)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=0, atol=1e-12)


@pytest.mark.claim(
    69, "bfloat16 autocast is close to float32, with the same experts", tolerance=2e-2
)
@every_gate
def test_autocast(name):
    layer, x = made(name, dtype=torch.float32), tokens(32, DIM, dtype=torch.float32)
    y, routing = layer(x, return_routing=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_routing = layer(x, return_routing=True)
    assert half.dtype == torch.bfloat16
    assert torch.equal(routing.experts, half_routing.experts)
    assert torch.equal(routing.mask, half_routing.mask)
    assert (half - y).norm() / y.norm() < 2e-2


class Recording(nn.Module):
    """Experts that remember how many rows they saw."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.rows = 0

    def forward(self, x, offs):
        self.rows = x.shape[0]
        return self.experts(x, offs)


@pytest.mark.claim(69, "Experts see exactly the slots in use, no row more", tolerance=0.0)
@every_gate
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_sparse_is_sparse(name, capacity_factor):
    layer = made(name, capacity_factor=capacity_factor)
    layer.experts = Recording(layer.experts)
    _, routing = layer(tokens(5, 8, DIM), return_routing=True)
    assert layer.experts.rows == int(routing.load.sum())
    if name in ("topk", "switch", "pruned") or capacity_factor:
        assert layer.experts.rows < 40 * E


@pytest.mark.claim(69, "Weights of an expert without tokens don't matter, NaN included")
@pytest.mark.parametrize("compiled", [False, True])
def test_idle_expert_may_hold_nan(compiled):
    layer, x = made("pruned"), tokens(9, DIM).requires_grad_()
    with torch.no_grad():
        layer.gate.weight.mul_(0.01)
        layer.gate.weight[3] = 0
    bias = torch.tensor([1.0, 0.9, 1.1, -9.0], dtype=torch.float64)
    layer.gate.bias = nn.Parameter(bias)
    clean, routing = layer(x, return_routing=True)
    assert routing.load[3] == 0
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[3] = torch.nan
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    y = run(x)
    assert torch.equal(y, clean)
    for gradient in gradients(y, [x, *layer.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0, 3), (1, 2, 2)])
def test_leading_dimensions(lead):
    layer, x = made("topk"), tokens(*lead, DIM)
    y = layer(x)
    assert y.shape == x.shape
    flat = layer(x.reshape(-1, DIM))
    torch.testing.assert_close(y.reshape(-1, DIM), flat, rtol=0, atol=1e-12)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(layer(strided), y)


def test_shared_expert_is_added():
    shared, x = nn.Linear(DIM, DIM, dtype=torch.float64), tokens(3, 5, DIM)
    layer = made("topk", shared_expert=shared)
    assert torch.equal(layer(x), made("topk")(x) + shared(x))


def test_experts_of_another_width():
    torch.manual_seed(0)
    weight = torch.randn(E, 2, DIM, dtype=torch.float64)
    gate = GATES["softmax"](dtype=torch.float64)
    x = tokens(2, 3, DIM)

    def experts(rows, offs):
        groups = torch.searchsorted(offs, torch.arange(rows.shape[0], dtype=offs.dtype), right=True)
        return torch.einsum("nof,nf->no", weight[groups], rows)

    y, routing = moe_layer(x, gate, experts)
    p = routing.probs.reshape(2, 3, E)
    torch.testing.assert_close(y, torch.einsum("ble,eof,blf->blo", p, weight, x))


def test_vmap_over_sequences():
    layer, x = made("topk"), tokens(3, 5, DIM)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=0, atol=1e-12)


def test_routing_is_returned_not_stored():
    layer, x = made("topk"), tokens(2, 5, DIM)
    before = dict(layer.__dict__)
    y, routing = layer(x, return_routing=True)
    assert torch.equal(y, layer(x))
    assert isinstance(routing, Routing)
    assert routing.load.sum() == 20
    assert layer.__dict__ == before


@every_gate
def test_copies_and_state(name):
    layer, x = made(name), tokens(5, DIM)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other = made(name)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor: expected a finite number above 0, got 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor: expected"),
        ({"drop_policy": "random"}, "drop_policy: expected one of .* got 'random'"),
        ({"experts": GroupedExperts(DIM, 8, 3)}, "experts: expected 4 experts, as the gate has"),
    ],
)
def test_bad_options(options, message):
    good = {"gate": SoftmaxGate(DIM, E), "experts": GroupedExperts(DIM, 8, E)}
    with pytest.raises(ValueError, match=message):
        MoELayer(**good | options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 6\), got \(3, 5\)"):
        made("topk")(tokens(3, 5))
