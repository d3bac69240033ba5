"""Latents from a teacher: counting where they are observed, and the law that they came from."""

import pytest
import torch

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    GaussianLeaf,
    balanced,
    em_step,
    hclt,
    init_from_teacher,
    poon_domingos,
)

F64 = torch.float64
PARENTS = [-1, 0, 0, 1]


def hidden_tree(n, seed=0):
    """Samples of a hidden tree of 4 variables with 3 states, and their latents, by ancestors."""
    generator = torch.Generator().manual_seed(seed)

    def table(*size):
        return torch.empty(size, dtype=F64).exponential_(generator=generator).pow(2)

    root, moves, leaves = table(3), table(4, 3, 3), table(4, 3, 5)
    z, x = (torch.zeros(n, 4, dtype=torch.long) for _ in range(2))
    for i, parent in enumerate(PARENTS):
        rows = root.expand(n, 3) if parent < 0 else moves[i][z[:, parent]]
        z[:, i] = torch.multinomial(rows, 1, generator=generator)[:, 0]
        x[:, i] = torch.multinomial(leaves[i][z[:, i]], 1, generator=generator)[:, 0]
    return x, z, (root, moves, leaves)


def exact_law(root, moves, leaves):
    """`(5, 5, 5, 5)`, probabilities of all states, the latents summed out."""
    root = root / root.sum()
    moves, leaves = (t / t.sum(-1, keepdim=True) for t in (moves, leaves))
    return torch.einsum("a,ab,ac,bd,aw,bx,cy,dz->wxyz", root, moves[1], moves[2], moves[3], *leaves)


def law_of(circuit):
    states = torch.cartesian_prod(*[torch.arange(5)] * 4)
    return circuit.log_prob(states).detach().exp().view(5, 5, 5, 5)


@pytest.mark.claim(
    64,
    "With a teacher that sees the latents, the start is the maximum likelihood estimate with them "
    "observed",
    tolerance=1e-6,
)
def test_the_start_counts_clusters():
    x, z, _ = hidden_tree(500)
    circuit = Circuit(hclt(PARENTS), CategoricalLeaf(5), num_units=3, dtype=F64)
    scattered = (torch.tensor([5.0, -3.0, 40.0])[z] + 0.01 * torch.randn(500, 4))[..., None]
    init_from_teacher(circuit, x, scattered, pseudocount=0.5, leaf_pseudocount=0.25)
    root = z[:, 0].bincount(minlength=3) + 0.5
    moves, leaves = torch.full((4, 3, 3), 0.5, dtype=F64), torch.full((4, 3, 5), 0.25, dtype=F64)
    for i, parent in enumerate(PARENTS):
        for row in range(500):
            leaves[i, z[row, i], x[row, i]] += 1
            if parent >= 0:
                moves[i, z[row, parent], z[row, i]] += 1
    assert (law_of(circuit) - exact_law(root.double(), moves, leaves)).abs().max() < 1e-6


@pytest.mark.claim(
    64,
    "From 20000 samples whose latents the teacher sees the start is within 0.06 of their law in "
    "total variation",
    tolerance=0.06,
)
def test_the_start_is_near_the_law():
    x, z, tables = hidden_tree(20000, seed=1)
    circuit = Circuit(hclt(PARENTS), CategoricalLeaf(5), num_units=3, dtype=F64)
    before = (law_of(circuit) - exact_law(*tables)).abs().sum()
    init_from_teacher(circuit, x, torch.nn.functional.one_hot(z).float())
    after = (law_of(circuit) - exact_law(*tables)).abs().sum() / 2
    assert after < 0.06
    assert after < before / 6


@pytest.mark.parametrize(
    ("graph", "options"),
    [(balanced(4), {}), (poon_domingos((2, 2)), {}), (hclt(PARENTS), {"num_leaf_units": 2})],
)
def test_other_structures_start_above_random_ones_and_learn(graph, options):
    torch.manual_seed(0)
    x, z, _ = hidden_tree(2000)
    circuit = Circuit(graph, CategoricalLeaf(5), num_units=3, dtype=F64, **options)
    random = circuit.log_prob(x).mean().item()
    init_from_teacher(circuit, x, z[..., None].float(), generator=torch.Generator().manual_seed(0))
    states = torch.cartesian_prod(*[torch.arange(5)] * 4)
    assert circuit(states).logsumexp(0).abs().item() < 1e-10
    first = em_step(circuit, x)
    assert first > random + 0.3
    assert em_step(circuit, x) > first


def test_units_differ_where_features_do_not():
    """Fewer distinct features than units leave units that only pseudocounts fill."""
    x = torch.randint(0, 5, (50, 4))
    circuit = Circuit(hclt(PARENTS), CategoricalLeaf(5), num_units=3, dtype=F64)
    init_from_teacher(circuit, x, torch.ones(50, 4, 2))
    assert circuit(x).isfinite().all()


def test_leaves_of_other_kinds():
    _, z, _ = hidden_tree(400)
    x = 10.0 * z + torch.randn(400, 4)
    circuit = Circuit(hclt(PARENTS), GaussianLeaf(), num_units=3)
    init_from_teacher(circuit, x, z[..., None].float())
    assert circuit.log_prob(x).mean() > -4 * (1.42 + 1.1) - 0.5


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"sum": "tucker"}, {}, "circuit: got"),
        ({"tie": "all"}, {}, "circuit: got"),
        ({"num_classes": 2}, {}, "circuit: got"),
        ({}, {"features": torch.zeros(9, 3, 2)}, "features: got shape"),
        ({}, {"features": torch.zeros(9, 4)}, "features: got shape"),
        ({}, {"x": torch.zeros(0, 4, dtype=torch.long)}, "x: got shape"),
        ({}, {"x": torch.full((9, 4), 5)}, "x: got values"),
        ({}, {"pseudocount": 0.0}, "pseudocount: got 0"),
        ({}, {"leaf_pseudocount": -1.0}, "leaf_pseudocount: got -1"),
    ],
)
def test_errors(options, change, message):
    graph = balanced(4) if "sum" in options else hclt(PARENTS)
    circuit = Circuit(graph, CategoricalLeaf(5), num_units=3, **options)
    given = {"x": torch.zeros(9, 4, dtype=torch.long), "features": torch.zeros(9, 4, 2)}
    with pytest.raises(ValueError, match=message):
        init_from_teacher(circuit, **{**given, **change})
