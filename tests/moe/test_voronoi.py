"""Voronoi loss on hand-made measures, and the gate diagnostic where the answer is known."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.moe import (
    ActivationDenseToSparseGate,
    DenseToSparseGate,
    MoEParams,
    SoftmaxGate,
    gate_dependence,
    voronoi_cells,
    voronoi_loss,
)
from torchzoo.moe.voronoi import BLOCKS

FIELDS = {"beta1": "beta1", "tau": "temperature", "a": "a", "b": "b", "var": "var"}


def random_params(k, d=2, seed=0, batch=(), temperature=0.7):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    tau = None if temperature is None else torch.full(batch, temperature, dtype=torch.float64)
    return MoEParams(
        beta0=torch.randn(*batch, k, **draw),
        beta1=3 * torch.randn(*batch, k, d, **draw),
        a=3 * torch.randn(*batch, k, d, **draw),
        b=3 * torch.randn(*batch, k, **draw),
        var=torch.rand(*batch, k, **draw) + 0.5,
        temperature=tau,
    )


def atoms(params, order):
    """The atoms in another order, or some of them several times."""
    fields = [value if name == "temperature" else value[order] for name, value in fields_of(params)]
    return MoEParams(*fields)


def fields_of(params):
    return params._asdict().items()


def brute_force(fitted, true, order, top_k=None):
    """The definition, term by term; with top_k the maximum over subsets of true atoms."""
    r = order if isinstance(order, list) else [order] * 5
    tau, true_tau = (1.0 if p.temperature is None else p.temperature.item() for p in (fitted, true))

    def gaps(i, j):
        return [
            (fitted.beta1[i] - true.beta1[j]).norm().item(),
            abs(tau - true_tau),
            (fitted.a[i] - true.a[j]).norm().item(),
            (fitted.b[i] - true.b[j]).abs().item(),
            (fitted.var[i] - true.var[j]).abs().item(),
        ]

    k, num_true = len(fitted.b), len(true.b)
    distance = [[sum(g**2 for g in gaps(i, j)) for j in range(num_true)] for i in range(k)]
    cell_of = [row.index(min(row)) for row in distance]
    terms = []
    for j in range(num_true):
        cell = [i for i in range(k) if cell_of[i] == j]
        w = [(fitted.beta0[i] / tau).exp().item() for i in cell]
        term = abs(sum(w) - (true.beta0[j] / true_tau).exp().item())
        for i, weight in zip(cell, w, strict=True):
            powers = r if len(cell) > 1 else [1] * 5
            term += weight * sum(g**p for g, p in zip(gaps(i, j), powers, strict=True))
        terms.append(term)
    if top_k is None:
        return sum(terms)
    return max(sum(subset) for subset in itertools.combinations(terms, top_k))


@pytest.mark.claim(
    69,
    "The Voronoi loss is 0 for equal mixing measures: under permutation, and under an exact "
    "duplicate with its weight split",
    tolerance=1e-12,
)
def test_loss_is_zero_for_equal_measures():
    true = random_params(3)
    assert voronoi_loss(true, true) == 0
    for order in itertools.permutations(range(3)):
        assert voronoi_loss(atoms(true, list(order)), true).item() == pytest.approx(0, abs=1e-12)
    split = atoms(true, [0, 1, 2, 1])
    share = torch.tensor([1.0, 0.3, 1.0, 0.7], dtype=torch.float64)
    split = split._replace(beta0=split.beta0 + true.temperature * share.log())
    assert voronoi_loss(split, true).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.claim(69, "The Voronoi loss is positive for different mixing measures", tolerance=None)
@pytest.mark.parametrize("field", ["beta0", *FIELDS.values()])
def test_loss_is_positive_for_other_measures(field):
    true = random_params(3)
    other = true._replace(**{field: getattr(true, field) + 1e-3})
    assert voronoi_loss(other, true) > 1e-4
    unsplit = atoms(true, [0, 1, 2, 1])
    assert voronoi_loss(unsplit, true) > 1e-2


@pytest.mark.claim(69, "The Voronoi loss is invariant under relabelling", tolerance=1e-12)
def test_loss_sees_no_labels():
    true, fitted = random_params(3), random_params(4, seed=1)
    value = voronoi_loss(fitted, true).item()
    assert value > 1
    for order in itertools.permutations(range(4)):
        assert voronoi_loss(atoms(fitted, list(order)), true).item() == pytest.approx(
            value, rel=1e-12
        )
    for order in itertools.permutations(range(3)):
        assert voronoi_loss(fitted, atoms(true, list(order))).item() == pytest.approx(
            value, rel=1e-12
        )


@pytest.mark.claim(
    69,
    "Moving one atom by delta in one coordinate adds exp(beta0/tau) |delta| in a cell of one atom "
    "and exp(beta0/tau) |delta|^r in a shared cell",
    tolerance=1e-10,
)
@pytest.mark.parametrize("field", ["beta1", "a", "b", "var"])
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("delta", [0.05, -0.2])
def test_moving_one_atom_adds_its_distance(field, order, delta):
    true = random_params(3)
    weight = (true.beta0 / true.temperature).exp()
    single = true
    shared = atoms(true, [0, 1, 2, 1])
    share = torch.tensor([1.0, 0.3, 1.0, 0.7], dtype=torch.float64)
    shared = shared._replace(beta0=shared.beta0 + true.temperature * share.log())
    for measure, part, power in ((single, 1.0, 1), (shared, 0.3, order)):
        moved = getattr(measure, field).clone()
        moved[(1, 0) if moved.ndim == 2 else 1] += delta
        value = voronoi_loss(measure._replace(**{field: moved}), true, order)
        exact = part * weight[1] * abs(delta) ** power
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-10)


def test_a_move_of_the_temperature_is_counted_at_every_atom():
    true = random_params(3)._replace(beta0=torch.zeros(3, dtype=torch.float64))
    moved = true._replace(temperature=true.temperature + 0.1)
    assert voronoi_loss(moved, true).item() == pytest.approx(0.3)


def test_true_atoms_that_nothing_fits_cost_their_weight():
    true = random_params(3)
    weights = (true.beta0 / true.temperature).exp()
    got = voronoi_loss(atoms(true, [0, 2]), true)
    torch.testing.assert_close(got, weights[1])


@pytest.mark.claim(
    69, "The Voronoi loss equals its definition, summed term by term", tolerance=1e-10
)
@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5),
    num_true=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    order=st.one_of(
        st.sampled_from([1, 2, 3.5]), st.lists(st.floats(0.5, 6), min_size=5, max_size=5)
    ),
    temperature=st.sampled_from([None, 0.4]),
)
def test_loss_is_its_definition(k, num_true, seed, order, temperature):
    fitted = random_params(k, seed=seed, temperature=temperature)
    true = random_params(num_true, seed=seed + 1)
    exact = brute_force(fitted, true, order)
    assert voronoi_loss(fitted, true, order).item() == pytest.approx(exact, rel=1e-10)
    for top_k in range(1, num_true + 1):
        exact = brute_force(fitted, true, order, top_k)
        got = voronoi_loss(fitted, true, order, top_k=top_k, reduce="regions-max")
        assert got.item() == pytest.approx(exact, rel=1e-10)


def test_batches_are_taken_one_by_one():
    fitted, true = random_params(4, batch=(2, 3)), random_params(3, seed=5)
    got, cells = voronoi_loss(fitted, true), voronoi_cells(fitted, true)
    assert got.shape == (2, 3)
    assert cells.shape == (2, 3, 4)
    for i, j in itertools.product(range(2), range(3)):
        one = MoEParams(*(value[i, j] for value in fitted))
        torch.testing.assert_close(got[i, j], voronoi_loss(one, true))
        assert torch.equal(cells[i, j], voronoi_cells(one, true))


def test_cells_break_ties_to_the_lowest_true_atom():
    zero, two = torch.zeros(2), torch.tensor([[1.0], [-1.0]])
    true = MoEParams(zero, two, two * 0, zero, zero + 1)
    middle = MoEParams(zero, two * 0, two * 0, zero, zero + 1)
    assert voronoi_cells(middle, true).tolist() == [0, 0]
    assert voronoi_cells(true, true).tolist() == [0, 1]
    assert voronoi_cells(true, true).dtype == torch.int64


def test_the_loss_is_differentiable():
    fitted, true = random_params(4), random_params(3, seed=1)
    fitted = MoEParams(*(value.requires_grad_() for value in fitted))
    check = lambda *values: voronoi_loss(MoEParams(*values), true)  # noqa: E731
    assert torch.autograd.gradcheck(check, tuple(fitted))


T = random_params(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: voronoi_loss(random_params(3, d=3), T), "params.beta1: expected 2 features"),
        (lambda: voronoi_loss(T._replace(b=T.b[:2]), T), "params.b: expected"),
        (lambda: voronoi_cells(T, T._replace(var=T.var[:2])), "true_params.var: expected"),
        (lambda: voronoi_loss(T, T, [1, 2]), "order: expected a number above 0 or 5"),
        (lambda: voronoi_loss(T, T, 0), "order: expected"),
        (lambda: voronoi_loss(T, T, reduce="mean"), "reduce: expected 'sum' or 'regions-max'"),
        (lambda: voronoi_loss(T, T, reduce="regions-max"), "top_k: expected 1..3"),
        (lambda: voronoi_loss(T, T, top_k=4, reduce="regions-max"), "top_k: .*got 4"),
        (lambda: gate_dependence(SoftmaxGate(3, 2), torch.zeros(5, 2)), r"x: expected \(n, 3\)"),
        (lambda: gate_dependence(SoftmaxGate(3, 2), torch.zeros(0, 3)), r"x: expected \(n, 3\)"),
        (lambda: gate_dependence(SoftmaxGate(3, 1), torch.zeros(5, 3)), "free parameters"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks_are_the_coordinates_of_an_atom():
    assert tuple(FIELDS) == BLOCKS


def cubic(z):
    return z**3


def standard_gate(activation, seed, *, learned=True):
    """Four experts in three dimensions, weights and biases N(0, 1)."""
    if activation == "linear":
        tau = "learned" if learned else 1.0
        gate = DenseToSparseGate(3, 4, temperature=tau, noise=None, bias=True)
    elif activation == "relu":
        with pytest.warns(UserWarning, match="homogeneous"):
            gate = ActivationDenseToSparseGate(3, 4, activation="relu", learn_temperature=True)
    else:
        gate = ActivationDenseToSparseGate(3, 4, activation=activation, learn_temperature=True)
    g = torch.Generator().manual_seed(seed)
    gate = gate.double()
    with torch.no_grad():
        gate.weight.normal_(generator=g)
        gate.bias.normal_(generator=g)
    return gate, 6 * torch.rand(512, 3, generator=g, dtype=torch.float64) - 3


@pytest.mark.claim(
    69,
    "gate_dependence is 0 for linear, ReLU and cubic gates with a learned temperature",
    tolerance=1e-10,
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ["linear", "relu", cubic])
def test_homogeneous_gates_are_degenerate(activation, seed):
    assert gate_dependence(*standard_gate(activation, seed)) < 1e-10


@pytest.mark.claim(
    69,
    "gate_dependence is above 1e-2 for sigmoid, tanh and GELU gates with a learned temperature, "
    "and above 1e-3 for the linear gate with a fixed one",
    tolerance=None,
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu"])
def test_other_gates_are_not_degenerate(activation, seed):
    assert gate_dependence(*standard_gate(activation, seed)) > 1e-2
    assert gate_dependence(*standard_gate("linear", seed, learned=False)) > 1e-3


@pytest.mark.claim(
    69,
    "gate_dependence is the smallest singular value of the weighted, column-normalised Jacobian "
    "by finite differences",
    tolerance=1e-6,
)
def test_dependence_is_the_smallest_singular_value_of_finite_differences():
    gate, x = standard_gate("sigmoid", 0)
    x = x[:20]
    with torch.no_grad():
        root_p = (0.5 * gate.log_probs(x)).exp()
        columns = []
        entries = [(gate.log_tau, ())]
        entries += [(gate.weight, (i, j)) for i in range(4) for j in range(3)]
        entries += [(gate.bias, (i,)) for i in range(3)]
        for parameter, index in entries:
            kept, step = parameter[index].clone(), 1e-5
            parameter[index] = kept + step
            up = gate.log_probs(x)
            parameter[index] = kept - step
            columns.append((root_p * (up - gate.log_probs(x)) / (2 * step)).flatten())
            parameter[index] = kept
        matrix = torch.stack(columns, -1)
        exact = torch.linalg.svdvals(matrix / matrix.norm(dim=0))[-1]
    torch.testing.assert_close(gate_dependence(gate, x), exact, rtol=1e-6, atol=0)


def test_a_parameter_without_effect_is_degenerate():
    gate, x = standard_gate("sigmoid", 0)
    with torch.no_grad():
        gate.weight[:, 0] = 0
    x[:, 0] = 0
    assert gate_dependence(gate, x) == 0
