"""The click head against dense algebra in float64, loops over images, and torch's own KL."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchzoo.gp import GPCISHead, click_violations, gpcis_loss
from torchzoo.testing import CountElements

C = 6


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return GPCISHead(C, **{"num_basis": 32, "hidden": 8, "dtype": torch.float64, **options}).eval()


def scene(batch=2, height=9, width=11, clicks=6):
    """Smooth features and noisy colours, clicks on distinct pixels."""
    features = normal(batch, C, height, width)
    image = 0.7 * normal(batch, 3, height, width, seed=1)
    generator = torch.Generator().manual_seed(2)
    index = torch.stack(
        [torch.randperm(height * width, generator=generator)[:clicks] for _ in range(batch)]
    )
    points = torch.stack([index // width, index % width], -1)
    labels = 1 - 2 * (torch.arange(clicks) % 2).expand(batch, -1)
    return features, image, points, labels


def at(logits, points):
    """Logits at the clicks."""
    rows = torch.arange(len(points))[:, None]
    return logits[rows, 0, points[..., 0], points[..., 1]]


def by_hand(head, features, image, points, labels, jitter):
    """Everything for one image, written out: kernel pair by pair, dense inverse."""
    z = features / features.norm(dim=0)
    x = torch.cat([z, image]).flatten(1).T
    index = points[:, 0] * image.shape[2] + points[:, 1]
    precision, w = head.log_precision.exp(), math.log1p(math.exp(head.raw_weight.item()))

    def k(a, b):
        gap = a[:, None] - b
        near = torch.exp(-0.5 * (precision * gap[..., :C] ** 2).sum(-1))
        return near + w * torch.exp(-0.5 * (gap[..., C:] ** 2).sum(-1))

    phi = (2 / head.num_basis) ** 0.5 * torch.sin(x @ head.theta.weight.T + head.theta.bias)
    prior = phi @ head.omega_mean
    first, _, second = head.click_mlp
    hidden = (x[index] @ first.weight.T + first.bias).relu()
    mu = torch.log1p(torch.exp(hidden @ second.weight.T + second.bias))[:, 0] * labels
    noisy = k(x[index], x[index]) + jitter * torch.eye(len(index)).double()
    v = torch.inverse(noisy) @ (mu - prior[index])
    return prior + k(x, x[index]) @ v, mu, prior, noisy, v


@pytest.mark.claim(
    67,
    "Logits are the learned prior plus K(., Z)(K + eps^2 I)^-1 (mu - prior(Z)), written out image "
    "by image; without the prior they are the regression of mu",
    tolerance=1e-6,
)
@pytest.mark.parametrize("prior", [True, False])
def test_posterior_is_its_formula(prior):
    head, (features, image, points, labels) = make(), scene()
    head.log_precision.data += 0.3 * normal(C, seed=3)
    head.raw_weight.data += 0.4
    if not prior:
        head.omega_mean.data.zero_()
    found = head(features, image, points, labels)
    for i in range(2):
        expected, *_ = by_hand(head, features[i], image[i], points[i], labels[i], 1e-7)
        torch.testing.assert_close(found.logits[i].flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.claim(
    67,
    "At the clicks f(Z) - u = -eps^2 (K + eps^2 I)^-1 (u - prior(Z)), for any eps",
    tolerance=1e-6,
)
@pytest.mark.parametrize("jitter", [1e-7, 0.3])
def test_gap_at_the_clicks(jitter):
    head, (features, image, points, labels) = make(jitter_eval=jitter), scene()
    found = at(head(features, image, points, labels).logits, points)
    for i in range(2):
        _, mu, _, _, v = by_hand(head, features[i], image[i], points[i], labels[i], jitter)
        torch.testing.assert_close(found[i] - mu, -jitter * v, rtol=0, atol=1e-6)
        assert torch.equal(mu.sign(), labels[i].double())


@pytest.mark.claim(
    67,
    "Predictions are right at all clicks, f(Z) = u to 1e-3, where the clicks' kernel matrix has a "
    "least eigenvalue of 1e-4 of the largest gap",
    tolerance=1e-3,
)
def test_clicks_are_obeyed():
    head, inputs = make(), scene(batch=8, height=12, width=12, clicks=48)
    logits = head(*inputs).logits
    features, image, points, labels = inputs
    checked = 0
    for i in range(8):
        _, mu, _, noisy, v = by_hand(head, features[i], image[i], points[i], labels[i], 1e-7)
        least = torch.linalg.eigvalsh(noisy).min()
        if least >= 1e-4 * (noisy @ v).abs().max():
            checked += 1
            found = at(logits, points)[i]
            torch.testing.assert_close(found, mu, rtol=0, atol=1e-3)
            assert (found * labels[i] > 0).all()
    assert checked >= 6
    assert not click_violations(logits, points, labels).any()
    assert click_violations(-logits, points, labels).all()


@pytest.mark.claim(
    67,
    "Padding and the order of clicks change nothing, and without clicks the prior comes back",
    tolerance=1e-6,
)
@pytest.mark.parametrize("kl", ["official", "full"])
def test_padding_and_order(kl):
    head, (features, image, points, labels) = make(kl=kl), scene()
    expected = head(features, image, points, labels)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    far = torch.tensor([[-1, -1], [900, 3], [2, 2]]).expand(2, -1, -1)
    more = torch.cat([far[:, :1], points[:, order], far[:, 1:]], 1)
    zero = torch.zeros(2, 1).long()
    with_more = torch.cat([zero, labels[:, order], zero, zero], 1)
    for one, two in zip(head(features, image, more, with_more), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    none = head(features, image, points, torch.zeros_like(labels))
    empty = head(features, image, points[:, :0], labels[:, :0])
    for i in range(2):
        prior = by_hand(head, features[i], image[i], points[i], labels[i], 1.0)[2]
        torch.testing.assert_close(none.logits[i].flatten(), prior, rtol=0, atol=1e-12)
    for one, two in zip(empty, none, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert none.kl.tolist() == none.click_loss.tolist() == [0, 0]


@pytest.mark.claim(
    67,
    "There is no resampling after the process: with features at a quarter of the size the clicks "
    "are obeyed at full size",
    tolerance=1e-3,
)
def test_features_are_resampled_before():
    head, (_, image, points, labels) = make(), scene(height=16, width=20)
    coarse = normal(2, C, 4, 5, seed=5)
    found = head(coarse, image, points, labels).logits
    unit = coarse / coarse.norm(dim=1, keepdim=True)
    fine = torch.nn.functional.interpolate(unit, (16, 20), mode="bilinear", align_corners=True)
    x = torch.cat([fine, image], 1).flatten(2).mT
    z = x.gather(1, (points[..., 0] * 20 + points[..., 1])[..., None].expand(-1, -1, C + 3))
    means = head.click_means(z, labels)
    torch.testing.assert_close(at(found, points), means, rtol=0, atol=1e-3)


@pytest.mark.claim(
    67,
    "Clicks twice on a pixel, and clicks there that contradict each other, give finite logits and "
    "gradients: those of one click, of the mean value",
    tolerance=1e-3,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_double_clicks(dtype, training):
    head = make(dtype=dtype).train(training)
    features, image, points, labels = (t[:1] for t in scene(clicks=2))
    features, image = features.to(dtype).requires_grad_(), image.to(dtype)
    twice = points[:, [0, 0, 0, 1]]
    for signs in ([1, 1, 1, -1], [1, -1, 0, -1]):
        torch.manual_seed(0)
        found = head(features, image, twice, torch.tensor([signs]))
        gpcis_loss(found, torch.ones_like(found.logits)).backward()
        assert found.logits.isfinite().all()
        assert features.grad.isfinite().all()
        if not training:
            one = head(features, image, points, labels).logits
            here = at(one, points)[0]
            again = at(found.logits, points)[0]
            assert again[1].item() == pytest.approx(here[1].item(), abs=1e-3)
            expected = here[0].item() if signs[1] == 1 else 0.0
            assert again[0].item() == pytest.approx(expected, abs=1e-3)
    assert (found.logits.abs() < 10).all()


def test_near_duplicates_that_contradict_are_reported():
    """Equal features on two pixels: the logit between the labels disobeys one click."""
    head, (features, image, points, _) = make(), scene(batch=1, clicks=2)
    features, image = features.float(), image.float()
    (r0, c0), (r1, c1) = points[0].tolist()
    features[0, :, r1, c1], image[0, :, r1, c1] = features[0, :, r0, c0], image[0, :, r0, c0]
    labels = torch.tensor([[1, -1]])
    logits = head.float()(features, image, points, labels).logits
    assert logits.isfinite().all()
    assert click_violations(logits, points, labels).any()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out


@pytest.mark.claim(
    67,
    "Cost is linear in pixels, with 1 to 48 clicks: twice the height is 1.9 to 2.1 times the "
    "elements, and no tensor is larger than pixels times the waves or clicks",
    tolerance=0.1,
)
@pytest.mark.parametrize("clicks", [1, 48])
def test_cost(clicks):
    head, work = make(dtype=torch.float32), []
    for height in (32, 64):
        features, image, points, labels = scene(1, height, 32, clicks)
        with torch.no_grad(), Largest() as largest, CountElements() as count:
            head(features.float(), image.float(), points, labels)
        work.append(count.elements)
        assert largest.size <= height * 32 * 48
    assert 1.9 < work[1] / work[0] < 2.1


@pytest.mark.claim(
    67,
    "Gradients reach the waves, precisions, weights and the backbone; omega's deviation stays "
    "within 0.01 and 0.05 and is drawn in training only",
    tolerance=None,
)
def test_gradients_and_draws():
    head, (features, image, points, labels) = make(), scene()
    features.requires_grad_()
    first = head(features, image, points, labels).logits
    assert torch.equal(first, head(features, image, points, labels).logits)
    assert head.omega_std.item() == pytest.approx(0.025)
    for raw, std in ((0.0, 0.01), (0.03, 0.03), (1.0, 0.05)):
        head.raw_omega_std.data.fill_(raw)
        assert head.omega_std.item() == pytest.approx(std)
    # without clicks the prior alone is drawn: its deviation at a pixel is |phi| times omega's
    none = torch.zeros_like(labels)
    drawn = head.sample(features, image, points, none, 800)
    phi = head.basis(head.embed(features, image)).norm(dim=-1)
    ratio = drawn.std(0).flatten(1) / (0.05 * phi)
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    tight = head.sample(features, image, points, labels, 400)
    std = at(tight.std(0), points)
    assert std.mean().item() == pytest.approx(0.01, rel=0.05)  # that of u
    generator = torch.Generator().manual_seed(0)
    one = head.variance(features, image, points, labels, 400, generator=generator)
    assert one.mean() > 3 * at(one, points).mean()
    head.raw_omega_std.data.fill_(0.03)
    found = head.train()(features, image, points, labels)
    assert not torch.equal(found.logits, head(features, image, points, labels).logits)
    gpcis_loss(found, (image[:, :1] > 0).double()).backward()
    leaves = [features, *head.parameters()]
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.claim(
    67,
    "The full divergence is that of torch for the two normals, and never below 0; the official one "
    "is mu^T K^-1 mu / m with K held",
    tolerance=1e-8,
)
def test_divergences():
    head, (features, image, points, labels) = make(kl="full", jitter_eval=1e-3), scene()
    labels = labels.clone()
    labels[1, 4:] = 0
    full = head(features, image, points, labels)
    held = make(jitter_eval=1e-3)
    features.requires_grad_()
    official = held(features, image, points, labels)
    for i, m in enumerate((6, 4)):
        parts = by_hand(head, features[i], image[i], points[i, :m], labels[i, :m], 1e-3)
        mu, noisy = parts[1].detach(), parts[3].detach()
        q = MultivariateNormal(mu, 0.01**2 * torch.eye(m).double())
        expected = kl_divergence(q, MultivariateNormal(torch.zeros(m).double(), noisy))
        assert full.kl[i].item() == pytest.approx(expected.item(), rel=1e-8)
        assert full.kl[i] >= 0
        quadratic = (mu @ torch.linalg.solve(noisy, mu) / m).item()
        assert official.kl[i].item() == pytest.approx(quadratic, rel=1e-8)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        lost = entropy(mu, (labels[i, :m].double() + 1) / 2).item()
        assert official.click_loss[i].item() == pytest.approx(lost, rel=1e-8)
    official.kl.sum().backward()
    assert held.log_precision.grad is None
    assert held.click_mlp[0].weight.grad.abs().sum() > 0


def test_start():
    head = GPCISHead(48, num_basis=4096)
    assert head.omega_mean.std().item() == pytest.approx(0.25, rel=0.1)
    assert head.log_precision.tolist() == [1.0] * 48
    assert head.weight.item() == pytest.approx(math.log(2))
    assert (head.jitter_train, head.jitter_eval, head.kl) == (1e-2, 1e-7, "official")
    assert GPCISHead().num_basis == 256
    assert GPCISHead().click_mlp[0].weight.shape == (96, 51)


def test_channels_last():
    head, (features, image, points, labels) = make(), scene()
    last = make(channels_last=True)
    moved = [t.movedim(1, -1) for t in (features, image)]
    found = last(*moved, points, labels).logits
    expected = head(features, image, points, labels).logits
    torch.testing.assert_close(found, expected.movedim(1, -1))
    assert last.variance(*moved, points, labels, 2).shape == found.shape


def test_errors():
    head, (features, image, points, labels) = make(), scene()
    with pytest.raises(ValueError, match=r"labels: expected 1, -1 or 0, got \[2\]"):
        head(features, image, points, 2 * labels.abs())
    for wrong in ([9, 0], [0, 11], [-1, 0]):
        with pytest.raises(ValueError, match="points: expected rows below 9 and columns below 11"):
            head(features, image, torch.tensor(wrong).expand_as(points), labels)
    with pytest.raises(ValueError, match=r"features: expected .* got"):
        head(features[:1], image, points, labels)
    with pytest.raises(ValueError, match="n: expected at least 2"):
        head.variance(features, image, points, labels, 1)
