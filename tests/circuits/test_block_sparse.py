"""Sums over blocks of edges against sums over all edges of the same pruned circuit."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    compact,
    em_fit,
    em_step,
    hclt,
    init_from_data,
    prune,
    rat_spn,
)

F64 = torch.float64


class CountProducts(TorchDispatchMode):
    """Counts products of a weight with an input in the sums of a circuit, forward."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operators = torch.ops.torchzoo
        if func in (operators.log_einsum_exp.default, operators.block_log_einsum_exp.default):
            a, w = args[1:3] if func is operators.log_einsum_exp.default else args[:2]
            self.products += a.shape[1] * w.numel()
        return func(*args, **(kwargs or {}))


def pruned(block_size, fraction=0.7, units=8, **options):
    torch.manual_seed(0)
    parents = [-1, 0, 0, 1, 1, 2]
    graph = options.pop("graph", hclt(parents))
    circuit = Circuit(graph, CategoricalLeaf(3), num_units=units, dtype=F64, **options)
    x = circuit.sample(60, generator=torch.Generator().manual_seed(1)) if not options else None
    x = torch.randint(3, (60, circuit.num_variables)) if x is None else x
    labels = torch.arange(60) % 2 if options.get("num_classes") else None
    prune(circuit, x, fraction=fraction, block_size=block_size, labels=labels)
    return circuit, x


@pytest.mark.claim(82, "Blocks give the log-probabilities of the pruned circuit", 1e-12)
@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        (1, {}),
        (4, {}),
        (2, {"num_leaf_units": 4, "num_classes": 2}),
        (3, {"units": 6, "graph": rat_spn(6, depth=2, num_repetitions=2)}),
    ],
)
def test_values_and_gradients_are_those_of_the_masked_circuit(block_size, options):
    circuit, x = pruned(block_size, **options)
    small = compact(circuit, block_size=block_size)
    assert sum(layer.blocks is not None for layer in small.layers) >= len(small.layers) - 1
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    found, expected = small(x, mask), circuit(x, mask)
    assert (found - expected).abs().max() < 1e-12
    slopes = [torch.autograd.grad(c(x, mask).sum(), [*c.parameters()]) for c in (small, circuit)]
    for one, two in zip(*slopes, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


@pytest.mark.claim(82, "After pruning, products are those of the edges that are left", 0)
def test_work_is_that_of_the_blocks_left():
    circuit, x = pruned(4, fraction=0.75, units=16)
    small = compact(circuit, block_size=4)
    edges = sum(int((layer.log_weight > -torch.inf).sum()) for layer in circuit.layers)
    every = sum(layer.log_weight.numel() for layer in circuit.layers)
    found = []
    for one in (circuit, small):
        with CountProducts() as work, torch.no_grad():
            one(x)
        found.append(work.products)
    assert found == [len(x) * every, len(x) * edges]
    assert edges < 0.4 * every
    whole = compact(Circuit(hclt([-1, 0]), CategoricalLeaf(3), num_units=4))
    assert all(layer.blocks is None for layer in whole.layers)


def test_learning_goes_on_as_before():
    circuit, x = pruned(4)
    small = compact(circuit, block_size=4)
    for one in (circuit, small):
        em_step(one, x, pseudocount=0.1)
    for one, two in zip(circuit.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(one.softmax(-1), two.softmax(-1))
    assert any(layer.blocks is not None for layer in small.layers)
    history = torch.tensor(em_fit(small, x, epochs=5))
    assert history.diff().min() > -1e-9
    prune(small, x, fraction=0.3)  # further edges, in blocks that stay
    again = compact(small, block_size=1)
    torch.testing.assert_close(small(x), again(x))


def test_a_compact_circuit_compiles():
    circuit, x = pruned(4)
    small = compact(circuit, block_size=4)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), circuit(x))
    other = compact(circuit.to(torch.float32), block_size=4).to("meta")
    assert other(x.to("meta")).shape == (60, 1)


def test_other_weights_bring_all_edges_back():
    circuit, x = pruned(4)
    fresh = Circuit(hclt([-1, 0, 0, 1, 1, 2]), CategoricalLeaf(3), num_units=8, dtype=F64)
    small = compact(circuit, block_size=4)
    torch.testing.assert_close(copy.deepcopy(small)(x), circuit(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), circuit(x))
    small.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(small(x), fresh(x))
    for change in (lambda c: c.reset_parameters(), lambda c: init_from_data(c, x)):
        small = compact(circuit, block_size=4)
        change(small)
        states = torch.cartesian_prod(*[torch.arange(3)] * 6)
        assert small(states).logsumexp(0).abs().max() < 1e-10
        assert all((layer.log_weight > -torch.inf).all() for layer in small.layers)


def test_whole_blocks_go():
    circuit, _ = pruned(4, fraction=0.5)
    for layer in circuit.layers:
        rows = 4 if layer.log_weight.shape[1] > 1 else 1
        alive = (layer.log_weight > -torch.inf).unflatten(2, (2, 4)).unflatten(1, (-1, rows))
        assert torch.equal(alive.any(4).any(2), alive.all(4).all(2))
        assert alive.any(4).any(3).all()  # every sum has edges


def test_a_sum_keeps_its_last_edges():
    """Edges were pruned one by one before: the busiest block may have none of a sum."""
    circuit, x = pruned(1, fraction=0.85)
    prune(circuit, x, fraction=0.9, block_size=4)
    for layer in circuit.layers:
        assert (layer.log_weight > -torch.inf).any(-1).all()
    assert circuit(x).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: compact(c, block_size=0), "block_size: got 0"),
        (lambda c, x: prune(c, x, fraction=0.5, block_size=0), "block_size: got 0"),
        (
            lambda c, x: compact(Circuit(c.region_graph, c.leaf, tie="sums")),
            "circuit: got sum='cp', tie='sums'",
        ),
        (
            lambda c, x: compact(Circuit(rat_spn(4, depth=1), c.leaf, sum="tucker")),
            "circuit: got sum='tucker'",
        ),
    ],
)
def test_refusals(call, message):
    circuit = Circuit(hclt([-1, 0]), CategoricalLeaf(3), num_units=4)
    with pytest.raises(ValueError, match=message):
        call(circuit, torch.zeros(3, 2, dtype=torch.long))
