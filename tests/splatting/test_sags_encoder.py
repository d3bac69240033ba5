"""The structure-aware encoder against matrices of all points with all."""

import pytest
import torch
from torch import nn

from torchzoo.splatting import StructureAwareEncoder
from torchzoo.splatting.sags_encoder import _weights, knn_edges

DOUBLE = torch.float64
PLACE = 4
"""Numbers of two levels."""


def encoder_of(variant="code", *, dim=5, k=6, seed=0):
    """An encoder as after training."""
    torch.manual_seed(seed)
    encoder = StructureAwareEncoder(dim, k=k, levels=2, variant=variant, log2_table=8, dtype=DOUBLE)
    nn.init.normal_(encoder.grid.table)
    if variant == "code":
        nn.init.normal_(encoder.alpha)
        nn.init.normal_(encoder.beta)
    return encoder


def inputs_of(count, *, dim=5, seed=1):
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=random, dtype=DOUBLE)
    return points, torch.randn(count, dim, generator=random, dtype=DOUBLE)


def adjacency(points, k):
    """Entry (i, j): whether j is one of the k nearest of i, itself among them."""
    nearest = torch.cdist(points, points).topk(k, largest=False).indices
    return torch.zeros(len(points), len(points), dtype=torch.bool).scatter(1, nearest, True)


def dense(encoder, points, feats, k):
    """The codes from matrices over all pairs of points."""
    near, own = adjacency(points, k), torch.eye(len(points), dtype=torch.bool)
    low, high = points.min(0).values, points.max(0).values
    place = encoder.grid((points - low) / (high - low))
    distance = (points[:, None] - points).square().sum(-1).add(own).sqrt()
    weights = (near & ~own) / distance
    weights = weights / weights.sum(1, keepdim=True)
    greatest = feats.max(0).values.expand_as(feats)
    if encoder.variant == "code":
        rises = feats[:, None] - feats  # (i, c)
        highest = rises.where(near.T[..., None], -torch.inf).max(1).values
        local = feats + 0.5 / k * weights @ highest
        return encoder.alpha * torch.cat([place, local, greatest], 1) + encoder.beta
    pairs = torch.cat(
        [
            place.expand(len(points), -1, -1),
            feats - feats[:, None],  # (i, j): f_j - f_i
            greatest.expand(len(points), -1, -1),
        ],
        -1,
    )
    return (weights[..., None] * encoder.h(pairs)).sum(1).relu()


@pytest.mark.claim(
    134,
    "The encoder equals one made of matrices of all points with all, values and gradients",
    tolerance=1e-10,
)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_dense_reference(variant):
    encoder, (points, feats) = encoder_of(variant), inputs_of(200)
    found, expected = [], []
    for made, forward in (
        (found, encoder),
        (expected, lambda p, f: dense(encoder, p, f, 6)),
    ):
        leaves = [points.clone().requires_grad_(), feats.clone().requires_grad_()]
        codes = forward(*leaves)
        wanted = torch.linspace(-1, 2, codes.numel(), dtype=DOUBLE).view_as(codes)
        gradients = torch.autograd.grad((codes * wanted).sum(), [*leaves, *encoder.parameters()])
        made += [codes, *gradients]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    assert encoder.code_dim == found[0].shape[1] == PLACE + 2 * 5


@pytest.mark.claim(
    134,
    "A code depends on features of neighbours' neighbours as the authors' code has it, of "
    "neighbours alone as the paper has it, and on none beyond but for the greatest",
    tolerance=0,
)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_reach(variant):
    encoder, (points, feats) = encoder_of(variant, k=4), inputs_of(60)
    near = adjacency(points, 4)
    if variant == "paper":
        encoder.h[0].weight.data[:, -5:] = 0.0  # blind to the greatest
        allowed = near
    else:
        allowed = near | ((near.long() @ near.T.long()) > 0)
    jacobian = torch.autograd.functional.jacobian(lambda f: encoder(points, f), feats)
    columns = slice(PLACE, PLACE + 5) if variant == "code" else slice(None)
    used = jacobian[:, columns].abs().amax((1, 3)) > 0
    assert not (used & ~allowed).any()
    others = ~torch.eye(60, dtype=torch.bool)
    assert (used & others).any(1).float().mean() > 0.8
    assert (used & ~near).any() == (variant == "code")  # the second hop


@pytest.mark.claim(
    134,
    "At first, with features 0, a code is that of the hash grid alone; weights of neighbours sum "
    "to 1 and leave out the point itself and points at the same place",
    tolerance=1e-12,
)
def test_start_and_weights():
    torch.manual_seed(0)
    encoder = StructureAwareEncoder(5, k=6, levels=2, log2_table=8, dtype=DOUBLE)
    points, feats = inputs_of(50)
    low, high = points.amin(0), points.amax(0)
    codes = encoder(points, torch.zeros_like(feats))
    assert torch.equal(codes[:, :PLACE], encoder.grid((points - low) / (high - low)))
    assert codes[:, PLACE:].eq(0).all()
    points[1] = points[0]
    edges = knn_edges(points, 6)
    weights = _weights(points, *edges, torch.ones(300, dtype=torch.bool)).view(50, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=DOUBLE), atol=1e-12, rtol=0)
    same = (points[edges[0]] == points[edges[1]]).all(1).view(50, 6)
    assert same.sum() == 52
    assert torch.equal(weights == 0, same)
    reach = (points[edges[0]] - points[edges[1]]).norm(dim=1).view(50, 6)
    ratio = (weights * reach).where(~same, torch.nan)  # the same for all of a point's neighbours
    torch.testing.assert_close(
        ratio, ratio.nanmean(1, keepdim=True).expand(-1, 6).where(~same, torch.nan), equal_nan=True
    )


@pytest.mark.claim(
    134,
    "Codes follow a permutation of the points; moving or scaling the cloud changes none, as the "
    "hash grid's box goes with it",
    tolerance=1e-9,
)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_symmetries(variant):
    encoder, (points, feats) = encoder_of(variant), inputs_of(80)
    codes, order = encoder(points, feats), torch.randperm(80)
    close = {"atol": 1e-9, "rtol": 0}
    torch.testing.assert_close(encoder(points[order], feats[order]), codes[order], **close)
    torch.testing.assert_close(encoder(points + 3.0, feats), codes, **close)
    torch.testing.assert_close(encoder(points * 0.5, feats), codes, **close)
    turned = encoder(points.flip(1), feats)
    assert (turned - codes)[:, :PLACE].abs().max() > 1e-3


def test_lone_points():
    """With no neighbours the authors' code gives each point its own features."""
    encoder, (points, feats) = encoder_of(k=1), inputs_of(20)
    nn.init.ones_(encoder.alpha)
    nn.init.zeros_(encoder.beta)
    codes = encoder(points, feats)
    assert torch.equal(codes[:, PLACE:-5], feats)
    assert torch.equal(codes[:, -5:], feats.amax(0).expand(20, -1))


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_subset(variant):
    """The codes of a subset are those of the graph it is, in the box of all points."""
    encoder, (points, feats) = encoder_of(variant), inputs_of(60)
    feats, edges = feats - 5.0, knn_edges(points, 6)  # the greatest are below 0
    subset = torch.arange(60) % 3 > 0
    subset[torch.cat([points.argmin(0), points.argmax(0)])] = True  # the same box
    found = encoder(points, feats, edges, subset)
    rows = subset.cumsum(0) - 1
    induced = rows[edges[:, subset[edges].all(0)]]
    expected = encoder(points[subset], feats[subset], induced)
    torch.testing.assert_close(found[subset], expected, atol=1e-12, rtol=0)
    assert found[~subset].eq(0).all()
    assert (found - encoder(points, feats, edges))[subset].abs().max() > 1e-3
    empty = encoder(points, feats, edges, torch.zeros(60, dtype=torch.bool))
    empty.sum().backward()
    assert empty.eq(0).all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_bad_input():
    encoder, (points, feats) = encoder_of(), inputs_of(20)
    edges = knn_edges(points, 6)
    subset = torch.ones(20, dtype=torch.bool)
    for arguments, message in (
        ((points[:5], feats[:5]), "points: got 5, expected at least k=6"),
        ((points * torch.nan, feats), "points: got some that are NaN"),
        ((points, feats, edges + 1), "edges: got rows 1 to 20, expected 0 to 19"),
        ((points, feats, edges - 1), "edges: got rows -1 to 18"),
        ((points, feats, edges.int()), r"edges: got \(2, 120\) of torch.int32"),
        ((points, feats, edges, subset[1:]), r"subset: got \(19,\)"),
        ((points, feats, edges, subset.long()), "subset: got"),
        ((points[:0], feats[:0]), r"points: got \(0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(*arguments)
