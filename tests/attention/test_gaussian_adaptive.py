import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.attention import (
    GaussianAdaptiveAttention,
    GaussianAdaptiveTransformerBlock,
    GroupedQueryGaussianAttention,
    ImportanceTracker,
    MultiHeadGaussianAdaptiveAttention,
    importance_factor,
)

SHEET = 48
DIM = 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_module(cls=MultiHeadGaussianAdaptiveAttention, dim=DIM, spread=0.5, **kwargs):
    """A double-precision module with parameters away from their start."""
    module = cls(dim, **{"dtype": torch.float64, **kwargs})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn_like(parameter)
    return module


def reference(module, x, mask=None):
    """The weights of one unbatched x (n, D) in plain loops over heads, Gaussians and features."""
    if module.norm_dim == -1:
        weights = reference_chunks(module, x.T)
        return weights.T if mask is None else weights.T * mask[:, None]
    if mask is None:
        return reference_chunks(module, x)
    assert module.num_heads == 1
    weights = torch.zeros_like(x)
    if mask.any():
        weights[mask] = reference_chunks(module, x[mask])
    return weights


def reference_chunks(module, x):
    n, heads = len(x), module.num_heads
    starts = [h * (n // heads) for h in range(heads)] + [n]
    weights = torch.zeros_like(x)
    for h in range(heads):
        for d in range(x.shape[1]):
            column = x[starts[h] : starts[h + 1], d]
            var = column.var(unbiased=module.unbiased) if len(column) > 1 else 0 * column[0]
            total = torch.zeros_like(column) if module.mixing == "sum" else torch.ones_like(column)
            for i in range(module.num_gaussians):
                at = d if module.delta.shape[2] > 1 else 0
                xi = module.log_xi[h, i, at].exp()
                z = (column - column.mean() - module.delta[h, i, at]) / (var + module.eps).sqrt()
                gauss = torch.exp(-(z**2) / (2 * xi))
                if module.mixing == "product":
                    total = total * gauss
                elif module.num_gaussians > 1:
                    total = total + torch.softmax(module.omega[h], 0)[i] * gauss
                else:
                    total = gauss
            if module.normalize:
                total = total / total.sum() * (len(column) if module.rescale else 1)
            weights[starts[h] : starts[h + 1], d] = total
    return weights.detach()


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


def set_parameters(module, delta, xi):
    with torch.no_grad():
        module.delta.copy_(torch.as_tensor(delta).expand_as(module.delta))
        module.log_xi.copy_(torch.as_tensor(xi, dtype=torch.float64).log().expand_as(module.log_xi))
    return module


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


@pytest.mark.claim(
    SHEET, "Normalised weights sum to one along the norm axis of each head", tolerance=1e-6
)
@pytest.mark.parametrize("norm_dim", [-2, -1])
@pytest.mark.parametrize("mixing", ["sum", "product"])
def test_normalised_weights_sum_to_one(norm_dim, mixing):
    options = {"num_heads": 2, "num_gaussians": 2, "norm_dim": norm_dim, "mixing": mixing}
    module = random_module(dim=7, normalize=True, dtype=torch.float32, **options)
    x = torch.randn(3, 7, 7)
    x[0, :, 0] *= 1e4
    _, weights = module(x, return_weights=True)
    for part in (weights.narrow(norm_dim, 0, 3), weights.narrow(norm_dim, 3, 4)):
        total = part.sum(norm_dim)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_normalised_weights_survive_the_underflow_of_every_gaussian():
    module = GaussianAdaptiveAttention(1, normalize=True, eps=0.0)
    set_parameters(module, 40.0, 0.01)  # every density is exp(-60000) or less
    _, weights = module(torch.tensor([[-1.0], [1.0]]).repeat(3, 1), return_weights=True)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 1 / 3]).repeat(3))


@pytest.mark.claim(
    SHEET, "Rescaling multiplies by the number of kept elements of each chunk", tolerance=1e-7
)
def test_rescale_multiplies_by_the_kept_length_of_the_chunk():
    options = {"num_heads": 2, "normalize": True}
    plain, scaled = random_module(**options), random_module(**options, rescale=True)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    length = torch.tensor([4.0] * 4 + [5.0] * 5)[:, None]
    torch.testing.assert_close(scaled(x), plain(x) * length)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, [0, 6, 7]] = False
    torch.testing.assert_close(
        scaled(x, mask), plain(x, mask) * torch.tensor([3.0] * 4 + [3.0] * 5)[:, None]
    )


@pytest.mark.claim(
    SHEET,
    "A padded batch with a mask gives each sequence's own unpadded result, and zero on padding",
    tolerance=1e-6,
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("padding", [0.0, 50.0, math.nan])
def test_padding_takes_no_part(normalize, unbiased, padding):
    options = {"num_gaussians": 2, "normalize": normalize, "rescale": normalize}
    module = random_module(GaussianAdaptiveAttention, unbiased=unbiased, **options)
    sequences = [torch.randn(n, DIM, dtype=torch.float64) + 2 for n in (3, 9, 6)]
    x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=padding)
    mask = torch.arange(9) < torch.tensor([3, 9, 6])[:, None]
    x.requires_grad_()
    y, weights = module(x, mask, return_weights=True)
    for row, row_weights, sequence in zip(y, weights, sequences, strict=True):
        n = len(sequence)
        torch.testing.assert_close(row[:n], module(sequence), atol=1e-6, rtol=0)
        assert not row[n:].any()
        assert not row_weights[n:].any()
    if padding == 0:  # what counting the padding would give is far off
        assert (module(x)[0, :3] - y[0, :3]).abs().max() > 1e-2
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"normalize": True, "rescale": True}])
def test_gaps_in_the_mask_and_rows_without_any_kept_element(options):
    module = random_module(GaussianAdaptiveAttention, **options)
    x = torch.randn(3, 8, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 8) > 0.4
    mask[1] = False
    y, weights = module(x, mask, return_weights=True)
    expected = torch.stack(
        [reference(module, *pair) for pair in zip(x.detach(), mask, strict=True)]
    )
    torch.testing.assert_close(weights, expected)
    assert not y[1].any()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_masked_positions_of_feature_statistics_are_zero_and_the_rest_unchanged():
    module = random_module(num_heads=1, norm_dim=-1)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.5
    torch.testing.assert_close(module(x, mask), module(x) * mask[..., None])


@pytest.mark.claim(
    SHEET,
    "H heads are H single modules on contiguous chunks, the last with the remainder",
    tolerance=1e-10,
)
@pytest.mark.parametrize(("heads", "n"), [(2, 6), (4, 14), (3, 9), (5, 19)])
@pytest.mark.parametrize("norm_dim", [-2, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_are_single_modules_on_chunks(heads, n, norm_dim, masked):
    dim = DIM if norm_dim == -2 else n
    x = torch.randn(2, 20 if norm_dim == -1 else n, dim, dtype=torch.float64)
    mask = torch.rand(x.shape[:-1]) > 0.3 if masked else None
    options = {"num_gaussians": 2, "norm_dim": norm_dim}
    module = random_module(dim=dim, num_heads=heads, **options)
    length, parts = n // heads, []
    for h in range(heads):
        rows = slice(h * length, n if h == heads - 1 else (h + 1) * length)
        chunk = x[:, rows] if norm_dim == -2 else x[..., rows]
        single = GaussianAdaptiveAttention(chunk.shape[-1], **options, dtype=torch.float64)
        single.load_state_dict({k: v[h : h + 1] for k, v in module.state_dict().items()})
        part_mask = mask[:, rows] if masked and norm_dim == -2 else mask
        parts.append(single(chunk, part_mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = module(x, mask)
    torch.testing.assert_close(result, torch.cat(parts, norm_dim), atol=1e-10, rtol=0)


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


@pytest.mark.claim(SHEET, "Constant sequences give finite values and gradients")
@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"normalize": True}])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.filterwarnings("ignore:chunks of fewer than 3")
def test_constant_sequences(options, n):
    module = MultiHeadGaussianAdaptiveAttention(DIM, 1, **options)
    x = torch.full((2, n, DIM), 3.0, requires_grad=True)
    y, weights = module(x, return_weights=True)
    gate = 1 / n if "normalize" in options else 1.0
    torch.testing.assert_close(weights, torch.full_like(x, gate))
    y.sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad.isfinite().all()
    set_parameters(module, 1.0, 2.0)
    assert module(x).isfinite().all()


@pytest.mark.claim(
    SHEET,
    "The importance factor lies in [0, 1], reaches both ends, is invariant to an affine map of the "
    "weights, and is zero for constant weights",
    tolerance=1e-10,
)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-5, 5),
    n=st.integers(2, 9),
)
def test_importance_factor(seed, scale, shift, n):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    factor = importance_factor(weights)
    assert (factor.min(), factor.max()) == (0, 1)
    span = weights.max() - weights.min()
    torch.testing.assert_close(factor * span + weights.min(), weights, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        importance_factor(scale * weights + shift), factor, atol=1e-10, rtol=0
    )
    rows = torch.stack([importance_factor(row) for row in weights])
    torch.testing.assert_close(importance_factor(weights, dim=1), rows)
    assert not importance_factor(torch.full((n, 3), shift)).any()
    with pytest.raises(ValueError, match="weights"):
        importance_factor(torch.empty(0, 3))


@pytest.mark.claim(
    SHEET, "The tracker averages weights over all batches and kept positions", tolerance=1e-7
)
def test_importance_tracker_averages_over_batches_and_masks():
    tracker = ImportanceTracker()
    batches = [torch.rand(b, 2, 6, DIM) for b in (3, 1, 0, 4)]
    for batch in batches:
        tracker.update(batch)
    everything = torch.cat(batches).double().mean((0, 1))
    torch.testing.assert_close(tracker.mean, everything)
    torch.testing.assert_close(tracker.compute(), importance_factor(everything))

    tracker.reset()
    masks = [torch.rand(batch.shape[:-1]) > 0.5 for batch in batches]
    for batch, mask in zip(batches, masks, strict=True):
        tracker.update(batch, mask)
    kept = torch.cat(masks)[..., None].double()
    expected = (torch.cat(batches) * kept).sum((0, 1)) / kept.sum((0, 1))
    torch.testing.assert_close(tracker.mean, expected)
    tracker.reset()
    tracker.update(batches[0][0, 0])
    torch.testing.assert_close(tracker.mean, batches[0][0, 0].double())


def test_importance_tracker_refuses_bad_shapes():
    tracker = ImportanceTracker()
    with pytest.raises(ValueError, match="weights"):
        tracker.compute()
    with pytest.raises(ValueError, match="weights"):
        tracker.update(torch.rand(3))
    with pytest.raises(ValueError, match="mask"):
        tracker.update(torch.rand(2, 3, 4), torch.ones(2, 3))
    tracker.update(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match="weights"):
        tracker.update(torch.rand(2, 4, 4))


@pytest.mark.claim(
    SHEET,
    "On chunks of two with delta 0 the gate is exp(-1 / (2 xi)) whatever the input",
    tolerance=1e-4,
)
@pytest.mark.parametrize("xi", [2.0, 0.5])
def test_chunks_of_two_have_a_constant_gate(xi):
    x = 10 * torch.randn(3, 8, DIM)
    x[..., 1::2, :] = x[..., ::2, :] + 5 * torch.randn(3, 4, DIM).sign()
    module = MultiHeadGaussianAdaptiveAttention(DIM, 4, init_xi=xi)
    with pytest.warns(UserWarning, match="chunks of fewer than 3"):
        _, gate = module(x, return_weights=True)
    torch.testing.assert_close(gate, torch.full_like(x, math.exp(-1 / (2 * xi))), atol=1e-4, rtol=0)


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


def test_short_chunks_warn_once():
    x = torch.randn(2, 8, DIM)
    module = MultiHeadGaussianAdaptiveAttention(DIM, 4)
    with pytest.warns(UserWarning, match="num_heads=4 on 8"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
        pickle.loads(pickle.dumps(module))(x)
        MultiHeadGaussianAdaptiveAttention(DIM, 2)(x)
        short = MultiHeadGaussianAdaptiveAttention(DIM, 4)
        torch.compile(short, backend="aot_eager", fullgraph=True)(x)


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


@pytest.mark.claim(
    SHEET,
    "The block is x + gate(LN x), then h + FFN(LN h), and its kept outputs ignore padding",
    tolerance=1e-7,
)
def test_block_is_prenorm_gate_and_feed_forward_with_residuals():
    block = random_module(GaussianAdaptiveTransformerBlock, dim=6, num_heads=2, mlp_ratio=3)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    p = dict(block.named_parameters())
    normed = F.layer_norm(x, (6,), p["norm1.weight"], p["norm1.bias"])
    gate = torch.stack([reference(block.attention, row) for row in normed.detach()])
    h = x + normed * gate
    hidden = F.gelu(F.linear(F.layer_norm(h, (6,), p["norm2.weight"], p["norm2.bias"]),
                             p["mlp.0.weight"], p["mlp.0.bias"]))  # fmt: skip
    expected = h + F.linear(hidden, p["mlp.3.weight"], p["mlp.3.bias"])
    assert hidden.shape[-1] == 18
    torch.testing.assert_close(block(x), expected)
    other = x.clone()
    mask = torch.rand(2, 9) > 0.3
    other[~mask] = 99.0
    torch.testing.assert_close(block(x, mask)[mask], block(other, mask)[mask])


def test_block_dropout_and_reset():
    block = GaussianAdaptiveTransformerBlock(8, 2, dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(7.0)
    block.reset_parameters()
    assert not any((parameter == 7).any() for parameter in block.parameters())
    assert not block.attention.delta.any()


def grouped_query_attention(module, g, mask=None):
    """Plain grouped-query attention of g (L, D) with the module's projections, head by head."""
    width = g.shape[-1] // module.num_heads
    share = module.num_heads // module.num_kv_heads
    outputs = []
    for h in range(module.num_heads):
        rows, kv = (
            slice(h * width, (h + 1) * width),
            slice(h // share * width, (h // share + 1) * width),
        )
        q, k, v = (
            g @ module.query.weight[rows].T,
            g @ module.key.weight[kv].T,
            g @ module.value.weight[kv].T,
        )
        scores = q @ k.T / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ module.out.weight.T


@pytest.mark.claim(
    SHEET,
    "Queries, keys and values are projections of the gated input, padding being no key",
    tolerance=1e-7,
)
def test_grouped_query_attention_sees_the_gated_input():
    module = random_module(GroupedQueryGaussianAttention, dim=16, num_kv_heads=2, gaussian_heads=2)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    gated = torch.stack([row * reference(module.gate, row) for row in x])
    expected = torch.stack([grouped_query_attention(module, g) for g in gated])
    torch.testing.assert_close(module(x), expected)

    mask = torch.rand(2, 9) > 0.3
    y = module(x, mask)
    for row, g, keep in zip(y, module.gate(x, mask), mask, strict=True):
        torch.testing.assert_close(row[keep], grouped_query_attention(module, g, keep)[keep])
        assert not row[~keep].any()


@pytest.mark.claim(
    SHEET,
    "With xi to infinity the gated attention is plain grouped-query attention",
    tolerance=1e-4,
)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_wide_gates_leave_plain_grouped_query_attention(kv_heads):
    module = GroupedQueryGaussianAttention(16, 8, kv_heads, dtype=torch.float64)
    set_parameters(module.gate, 0.0, 1e8)
    x = torch.randn(24, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x), grouped_query_attention(module, x), atol=1e-4, rtol=0)


def test_grouped_query_attention_of_a_row_that_keeps_nothing_is_zero():
    module = GroupedQueryGaussianAttention(8, 4, gaussian_heads=2)
    x = torch.randn(2, 7, 8, requires_grad=True)
    mask = torch.tensor([[True] * 7, [False] * 7])
    y = module(x, mask)
    assert not y[1].any()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_grouped_query_reset():
    module = GroupedQueryGaussianAttention(8, 4, gaussian_heads=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    module.reset_parameters()
    assert not any((parameter == 7).any() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_gaussians": 0}, "num_gaussians"),
        ({"norm_dim": -3}, "norm_dim"),
        ({"norm_dim": -1, "num_heads": 9}, "num_heads"),
        ({"mixing": "mean"}, "mixing"),
        ({"rescale": True}, "rescale"),
        ({"init_xi": 0.0}, "init_xi"),
        ({"init_xi": math.nan}, "init_xi"),
        ({"eps": -1e-9}, "eps"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        MultiHeadGaussianAdaptiveAttention(**{"dim": 8, **options})


def test_bad_inputs_are_named():
    module = MultiHeadGaussianAdaptiveAttention(DIM)
    with pytest.raises(ValueError, match=r"num_heads=8 with x\.shape\[-2\]=5"):
        module(torch.randn(2, 5, DIM))
    for bad in (torch.randn(2, 9, 4), torch.randn(DIM), torch.ones(2, 9, DIM, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"x: expected .*\(\.\.\., n, 5\)"):
            module(bad)
    x = torch.randn(2, 24, DIM)
    for mask in (torch.ones(2, 24), torch.ones(24, dtype=torch.bool), torch.ones_like(x).bool()):
        with pytest.raises(ValueError, match="mask"):
            module(x, mask)


@pytest.mark.parametrize(
    ("cls", "options", "name"),
    [
        (GaussianAdaptiveTransformerBlock, {"mlp_ratio": 0}, "mlp_ratio"),
        (GaussianAdaptiveTransformerBlock, {"dropout": 1.0}, "dropout"),
        (GroupedQueryGaussianAttention, {"num_heads": 3}, "num_heads"),
        (GroupedQueryGaussianAttention, {"num_kv_heads": 3}, "num_kv_heads"),
        (GroupedQueryGaussianAttention, {"gaussian_heads": 0}, "gaussian_heads"),
    ],
)
def test_bad_options_of_the_blocks_are_named(cls, options, name):
    with pytest.raises(ValueError, match=name):
        cls(8, **options)
