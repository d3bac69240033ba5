"""What is built on the Gaussian adaptive gate: importance, a block, grouped-query attention."""

import math

import pytest
import torch
import torch.nn.functional as F
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
from torchzoo.attention import (
    GaussianAdaptiveTransformerBlock,
    GroupedQueryGaussianAttention,
    ImportanceTracker,
    importance_factor,
)

# Importance


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


# The block


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


# Grouped-query attention


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
