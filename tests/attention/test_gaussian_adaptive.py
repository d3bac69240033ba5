"""The Gaussian adaptive gate against plain loops, closed forms and the published formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.gaussian_gates import (
    DIM,
    SHEET,
    random_module,
    reference,
    seeded,  # noqa: F401
    set_parameters,
)
from torchzoo.attention import GaussianAdaptiveAttention, MultiHeadGaussianAdaptiveAttention

options = st.fixed_dictionaries(
    {
        "num_heads": st.integers(1, 3),
        "num_gaussians": st.integers(1, 3),
        "mixing": st.sampled_from(["sum", "product"]),
        "norm_dim": st.sampled_from([-2, -1]),
        "per_feature": st.booleans(),
        "unbiased": st.booleans(),
        "eps": st.sampled_from([0.05, 0.5]),
    }
)
scalings = st.sampled_from([(False, False), (True, False), (True, True)])


@pytest.mark.claim(
    SHEET,
    "Weights and output equal loops over heads, features and Gaussians, whatever the options",
    tolerance=1e-9,
)
@settings(max_examples=25, deadline=None)
@given(options=options, scaling=scalings, n=st.integers(3, 11), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:chunks of fewer than 3")
def test_every_option_equals_plain_loops(options, scaling, n, seed):
    torch.manual_seed(seed)
    module = random_module(**options, normalize=scaling[0], rescale=scaling[1])
    x = 2 * torch.randn(2, n, DIM, dtype=torch.float64) + 1
    y, weights = module(x, return_weights=True)
    expected = torch.stack([reference(module, row) for row in x])
    torch.testing.assert_close(weights, expected, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(y, x * expected, atol=1e-10, rtol=1e-9)


@pytest.mark.claim(
    SHEET,
    "A fresh single Gaussian computes x exp(-(x - mean)^2 / (4 (var + eps))) element by element",
    tolerance=1e-6,
)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("scale", [3.0, 3e-3])  # a variance far above eps and one below
def test_fresh_gate_is_the_closed_form(heads, scale):
    x = scale * (torch.randn(4, 12, DIM) + torch.randn(DIM))
    y, gate = MultiHeadGaussianAdaptiveAttention(DIM, heads)(x, return_weights=True)
    chunks = x.double().view(4, heads, 12 // heads, DIM)
    deviation = chunks - chunks.mean(2, keepdim=True)
    var = deviation.pow(2).mean(2, keepdim=True)
    expected = chunks * torch.exp(-deviation.pow(2) / (var + 1e-5) / 4)
    torch.testing.assert_close(y.double(), expected.view_as(y), atol=1e-6, rtol=1e-6)
    assert 0 < gate.min() <= gate.max() <= 1


def grid_gate(module, low=-4, high=4, n=801):
    """A grid, taken as the sequence, and the gate over it."""
    grid = torch.linspace(low, high, n, dtype=torch.float64)
    _, gate = module(grid[:, None], return_weights=True)
    return grid, gate[:, 0].detach()


def peaks(gate):
    return int(((gate[1:-1] > gate[:-2]) & (gate[1:-1] > gate[2:])).sum())


@pytest.mark.claim(
    SHEET,
    "A product of K Gaussians, normalised, is one Gaussian of precision sum 1/xi_i about "
    "sum (d_i/xi_i) / sum 1/xi_i in z, so it never has two peaks",
    tolerance=1e-6,
)
@pytest.mark.parametrize("k", [2, 4])
def test_product_collapses_to_one_gaussian(k):
    module = random_module(
        GaussianAdaptiveAttention, num_gaussians=k, mixing="product", normalize=True
    )
    x = torch.randn(3, 20, DIM, dtype=torch.float64)
    _, weights = module(x, return_weights=True)
    mean = x.mean(1, keepdim=True)
    sigma = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    inverse = 1 / module.xi[0]  # (K, D)
    precision = inverse.sum(0)
    centre = (module.delta[0] * inverse).sum(0) / precision / sigma
    density = torch.exp(-0.5 * precision * ((x - mean) / sigma - centre) ** 2)
    torch.testing.assert_close(weights, density / density.sum(1, keepdim=True), atol=1e-6, rtol=0)

    for offset in (0.5, 2.0, 3.5):
        far = GaussianAdaptiveAttention(1, num_gaussians=2, mixing="product", dtype=torch.float64)
        set_parameters(far, [[[-offset], [offset]]], 0.1)
        assert peaks(grid_gate(far)[1]) == 1


@pytest.mark.claim(
    SHEET, "A sum of two Gaussians with well separated offsets gates with two peaks, one at each"
)
def test_sum_is_bimodal():
    module = GaussianAdaptiveAttention(1, num_gaussians=2, mixing="sum", dtype=torch.float64)
    set_parameters(module, [[[-2.0], [2.5]]], 0.02)
    grid, gate = grid_gate(module)
    assert peaks(gate) == 2
    assert grid[:400][gate[:400].argmax()].item() == pytest.approx(-2, abs=0.011)
    assert grid[400:][gate[400:].argmax()].item() == pytest.approx(2.5, abs=0.011)
    with torch.no_grad():
        module.omega.copy_(torch.tensor([[0.0, math.log(3)]]))
    _, gate = grid_gate(module)
    assert gate[:400].max().item() == pytest.approx(0.25, abs=1e-4)
    assert gate[400:].max().item() == pytest.approx(0.75, abs=1e-4)


@pytest.mark.claim(
    SHEET,
    "The gate depends on z alone: G(s x + t) with delta times s equals G(x), for s of either sign",
    tolerance=1e-6,
)
@pytest.mark.parametrize("s", [3.0, 0.01, -2.0])
@pytest.mark.parametrize("mixing", ["sum", "product"])
def test_gate_is_invariant_to_shift_and_scale(s, mixing):
    module = random_module(num_heads=2, num_gaussians=2, mixing=mixing, eps=0.0)
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    _, gate = module(x, return_weights=True)
    with torch.no_grad():
        module.delta *= s
    _, moved = module(s * x + 7, return_weights=True)
    torch.testing.assert_close(moved, gate, atol=1e-6, rtol=0)


@pytest.mark.claim(SHEET, "delta is in data units: kept while x is scaled, it changes the gate")
def test_offset_is_in_data_units():
    x = torch.randn(50, 1, dtype=torch.float64)
    sigma = x.std(unbiased=False)
    module = GaussianAdaptiveAttention(1, eps=0.0, dtype=torch.float64)
    set_parameters(module, 0.5 * sigma, 2.0)
    _, gate = module(x, return_weights=True)
    _, scaled = module(3 * x, return_weights=True)
    assert (gate - scaled).abs().max() > 1e-3
    z = (x - x.mean()) / sigma
    torch.testing.assert_close(gate, torch.exp(-((z - 0.5) ** 2) / 4), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled, torch.exp(-((z - 0.5 / 3) ** 2) / 4), atol=1e-12, rtol=0)


@pytest.mark.claim(SHEET, "As xi goes to infinity the output goes to the input", tolerance=1e-4)
@pytest.mark.parametrize("mixing", ["sum", "product"])
@pytest.mark.parametrize("k", [1, 3])
def test_wide_gaussians_let_everything_through(mixing, k):
    module = MultiHeadGaussianAdaptiveAttention(DIM, 2, num_gaussians=k, mixing=mixing)
    set_parameters(module, 0.3, 1e8)
    x = torch.randn(2, 11, DIM)
    torch.testing.assert_close(module(x), x, atol=1e-4, rtol=0)


@pytest.mark.claim(SHEET, "One Gaussian a head costs exactly 2 H d parameters")
@pytest.mark.parametrize(("heads", "dim"), [(8, 1024), (4, 64), (1, 7)])
def test_parameter_count(heads, dim):
    def count(**options):
        module = MultiHeadGaussianAdaptiveAttention(dim, heads, **options)
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    assert count() == {"delta": (heads, 1, dim), "log_xi": (heads, 1, dim)}
    assert sum(math.prod(shape) for shape in count().values()) == 2 * heads * dim
    assert count(num_gaussians=3)["omega"] == (heads, 3)
    assert "omega" not in count(num_gaussians=3, mixing="product")
    scalar = {"delta": (heads, 2, 1), "log_xi": (heads, 2, 1)}
    assert count(num_gaussians=2, mixing="product", per_feature=False) == scalar
    if heads <= dim:
        assert count(num_gaussians=2, mixing="product", norm_dim=-1) == scalar


@pytest.mark.claim(
    SHEET, "A single head is equivariant to permutations along the norm axis", tolerance=1e-10
)
@pytest.mark.parametrize("norm_dim", [-2, -1])
def test_permutation_equivariance(norm_dim):
    module = random_module(GaussianAdaptiveAttention, num_gaussians=2, norm_dim=norm_dim)
    x = torch.randn(3, 8, DIM, dtype=torch.float64)
    order = torch.randperm(x.shape[norm_dim])
    permuted = module(x.index_select(norm_dim, order))
    torch.testing.assert_close(
        permuted, module(x).index_select(norm_dim, order), atol=1e-10, rtol=0
    )


@pytest.mark.claim(
    SHEET, "Gradients to the input and every parameter are those of finite differences"
)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "rescale": True}])
@pytest.mark.parametrize("mixing", ["sum", "product"])
def test_gradcheck(options, mixing):
    module = random_module(dim=2, num_heads=2, num_gaussians=2, mixing=mixing, **options)
    names, values = zip(*module.named_parameters(), strict=True)
    mask = torch.tensor([[True] * 7, [True, False] * 3 + [True]])

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, mask))

    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.claim(SHEET, "Gradients reach delta and xi of every head, Gaussian and feature")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mixing", ["sum", "product"])
@pytest.mark.parametrize("n", [8, 14])
@pytest.mark.filterwarnings("ignore:chunks of fewer than 3")
def test_no_parameter_is_dead(k, mixing, n):
    module = MultiHeadGaussianAdaptiveAttention(DIM, 4, num_gaussians=k, mixing=mixing)
    (module(torch.randn(3, n, DIM)) * torch.randn(3, n, DIM)).sum().backward()
    for parameter in module.parameters():
        assert (parameter.grad.abs() > 1e-6).all()


def test_components_of_a_fresh_sum_differ_but_centre_on_the_papers_start():
    module = GaussianAdaptiveAttention(DIM, num_gaussians=3, init_xi=1.5)
    torch.testing.assert_close(module.xi[0, :, 0], torch.tensor([0.75, 1.5, 3.0]))
    assert not module.delta.any()
    y = module(torch.randn(2, 9, DIM))
    y.square().sum().backward()
    assert (module.log_xi.grad[0, 0] - module.log_xi.grad[0, 2]).abs().max() > 1e-3
    product = GaussianAdaptiveAttention(DIM, num_gaussians=3, mixing="product", init_xi=1.5)
    torch.testing.assert_close(product.xi, torch.full_like(product.xi, 1.5))
    with torch.no_grad():
        module.log_xi.zero_()
        module.omega.zero_()
    module.reset_parameters()
    torch.testing.assert_close(module.xi[0, :, 0], torch.tensor([0.75, 1.5, 3.0]))
    torch.testing.assert_close(module.omega, torch.ones(1, 3))


@pytest.mark.claim(SHEET, "The gate's maximum, which is 1, lies at mean + delta", tolerance=0.011)
@pytest.mark.parametrize("delta", [0.0, 1.2, -2.3])
def test_offset_moves_the_maximum(delta):
    module = GaussianAdaptiveAttention(1, dtype=torch.float64)
    set_parameters(module, delta, 0.7)
    grid, gate = grid_gate(module, low=-3, high=5)
    assert grid[gate.argmax()].item() == pytest.approx(1 + delta, abs=0.011)
    assert gate.max().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.claim(SHEET, "Half-precision input keeps its statistics in float32", tolerance=2e-3)
def test_half_precision_keeps_float32_statistics():
    x = (torch.randn(2, 40, DIM) * 0.05 + 10).bfloat16()  # E[x^2] - mean^2 would be lost
    module = MultiHeadGaussianAdaptiveAttention(DIM, 2)
    y, weights = module(x, return_weights=True)
    assert y.dtype == weights.dtype == torch.bfloat16
    expected = torch.stack([reference(module.double(), row) for row in x.double()])
    torch.testing.assert_close(weights.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.claim(
    SHEET, "A converted state computes what the published module does", tolerance=1e-9
)
@pytest.mark.parametrize("norm_dim", [-2, -1])
def test_from_official_equals_the_published_formula(norm_dim):
    heads, k, dim, n = 3, 2, 9, 11
    state = {}
    for h in range(heads):
        state[f"attention_heads.{h}.mean_offsets"] = torch.randn(k, dtype=torch.float64)
        state[f"attention_heads.{h}.c"] = torch.randn(k, dtype=torch.float64)
    x = torch.randn(2, n, dim, dtype=torch.float64)
    length, parts = x.shape[norm_dim] // heads, []
    for h in range(heads):
        size = length if h < heads - 1 else x.shape[norm_dim] - h * length
        chunk = x.narrow(norm_dim, h * length, size)
        density = torch.ones_like(chunk)
        for offset, c in zip(*(state[f"attention_heads.{h}.{p}"] for p in ("mean_offsets", "c"))):  # noqa: B905
            sigma = (chunk.var(norm_dim, keepdim=True) + 1e-8).sqrt()
            z = (chunk - chunk.mean(norm_dim, keepdim=True) - offset) / sigma
            density = density * torch.exp(-(z**2) / (2 * c**2)) / (2 * math.pi * c**2).sqrt()
        parts.append(chunk * density / density.sum(norm_dim, keepdim=True))
    module = MultiHeadGaussianAdaptiveAttention.from_official(state, dim, norm_dim=norm_dim)
    torch.testing.assert_close(module(x), torch.cat(parts, norm_dim), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("state", [{}, {"attention_heads.0.c": torch.ones(2)}, {"a": 1, "b": 2}])
def test_from_official_refuses_other_states(state):
    with pytest.raises(ValueError, match="state_dict"):
        MultiHeadGaussianAdaptiveAttention.from_official(state, 4)
