"""What the Gaussian adaptive gate normalises: chunks, masks, degenerate sequences and bad input."""

import math
import pickle
import warnings

import pytest
import torch

from tests.attention.gaussian_gates import (
    DIM,
    SHEET,
    random_module,
    reference,
    seeded,  # noqa: F401
    set_parameters,
)
from torchzoo.attention import GaussianAdaptiveAttention, MultiHeadGaussianAdaptiveAttention

# Normalisation


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


# Padding


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


# Chunks


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


# Bad input


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
