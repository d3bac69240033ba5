"""Items with conditional Gaussians, against covariances, samples and their own formula."""

import copy
import math

import numpy as np
import pytest
import torch

from torchzoo.experiments.splatting.hyper import through_covariance
from torchzoo.ops.hyper_condition import condition
from torchzoo.splatting import HyperGaussian
from torchzoo.testing import CountElements

DOUBLE = torch.float64


def joint(num=6, m=3, d=5, seed=0):
    """Means and covariances of random joint distributions, the attribute first."""
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(num, m + d, m + d, generator=random, dtype=DOUBLE)
    covariance = root @ root.mT + 0.2 * torch.eye(m + d, dtype=DOUBLE)
    return torch.randn(num, m + d, generator=random, dtype=DOUBLE), covariance


def moved(num=6, d=5, m=3, seed=0, dtype=DOUBLE):
    """Items whose parameters are all away from where they begin."""
    items = HyperGaussian(num, d, m, dtype=dtype)
    random = torch.Generator().manual_seed(seed)
    for parameter in items.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=random, dtype=DOUBLE))
    return items


def latents(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def blocks(items, n):
    """L11 and L21 of item n, entry by entry."""
    m = items.mean_out.shape[1]
    l11, entries = np.zeros((m, m)), iter(items.raw_l11[n].tolist())
    for i in range(m):
        for j in range(i + 1):
            value = next(entries)
            l11[i, j] = math.exp(value) if i == j else value
    return l11, items.l21[n].detach().numpy()


@pytest.mark.claim(
    63,
    "Made from joint distributions, items give the conditional mean and the Schur complement of "
    "the covariance, as numpy does",
    tolerance=1e-10,
)
@pytest.mark.parametrize(("m", "d"), [(1, 3), (3, 5), (4, 2), (6, 4)])
def test_is_the_covariance_form(m, d):
    mean, covariance = joint(m=m, d=d)
    items = HyperGaussian.from_joint(mean, covariance, out_dim=m)
    z = latents(2, 6, d)
    found = items(z)
    for n in range(6):
        mu, s = mean[n].numpy(), covariance[n].numpy()
        gain = s[:m, m:] @ np.linalg.inv(s[m:, m:])
        schur = s[:m, :m] - gain @ s[m:, :m]
        for b in range(2):
            expected = mu[:m] + gain @ (z[b, n].numpy() - mu[m:])
            np.testing.assert_allclose(found.mean[b, n].detach(), expected, atol=1e-10)
        np.testing.assert_allclose(items.condition_covariance()[n].detach(), schur, atol=1e-10)
        root = found.scale_tril[n].detach().numpy()
        np.testing.assert_allclose(root @ root.T, schur, atol=1e-10)
        assert not np.tril(root, -1).any()


@pytest.mark.claim(
    63,
    "The log-uncertainty is the log-determinant of the Schur complement, and neither it nor the "
    "covariance changes with the latent",
    tolerance=1e-10,
)
def test_uncertainty():
    mean, covariance = joint()
    items = HyperGaussian.from_joint(mean, covariance, out_dim=3)
    one, two = items(latents(5, seed=1)), items(100 * latents(5, seed=2))
    s = covariance.numpy()
    schur = s[:, :3, :3] - s[:, :3, 3:] @ np.linalg.solve(s[:, 3:, 3:], s[:, 3:, :3])
    np.testing.assert_allclose(
        one.log_uncertainty.detach(), np.linalg.slogdet(schur)[1], atol=1e-10
    )
    assert torch.equal(one.log_uncertainty, two.log_uncertainty)
    assert torch.equal(one.scale_tril, two.scale_tril)
    assert not torch.allclose(one.mean, two.mean)


@pytest.mark.claim(
    63,
    "The mean is affine in the latent, with slope -L11^-T L21^T",
    tolerance=1e-12,
)
def test_affine():
    items, a = moved(), 0.3
    one, two = latents(5, seed=1), latents(5, seed=2)
    between = a * items(one).mean + (1 - a) * items(two).mean
    assert (items(a * one + (1 - a) * two).mean - between).abs().max() <= 1e-12
    rise = items(one[None] + torch.eye(5, dtype=DOUBLE)).mean - items(one).mean  # (d, N, m)
    for n in range(6):
        l11, l21 = blocks(items, n)
        slope = -np.linalg.inv(l11).T @ l21.T
        np.testing.assert_allclose(rise[:, n].detach().numpy().T, slope, atol=1e-12)


@pytest.mark.claim(
    63,
    "At first the output is what it is told to be, bit by bit and for every latent; the gradient "
    "reaches L21 and not yet the latents",
    tolerance=0,
)
def test_start():
    start = latents(6, 3)
    items = HyperGaussian(6, 5, 3, init_output=start, dtype=DOUBLE)
    z = (30 * latents(4, 5)).requires_grad_()
    found = items(z)
    assert torch.equal(found.mean, start.expand(4, 6, 3))
    assert torch.equal(found.scale_tril, torch.eye(3, dtype=DOUBLE).expand(6, 3, 3))
    assert not found.log_uncertainty.any()
    found.mean.sum().backward()
    assert items.l21.grad.abs().min() > 0
    assert not z.grad.any()
    assert not items.mean_latent.grad.any()
    items.reset_parameters()
    assert not items(z).mean.any()


@pytest.mark.claim(
    63,
    "Regressing attributes on latents over 200,000 samples of the joint distribution, with any "
    "L22, finds the conditional's slope, level and covariance",
    tolerance=3,
)
def test_regression_on_samples():
    count, m, d = 200_000, 3, 4
    items, random = moved(1, d, m), np.random.default_rng(0)
    l22 = torch.from_numpy(np.tril(random.normal(size=(1, d, d)), -1) + 1.5 * np.eye(d))
    factor = np.linalg.cholesky(items.joint_precision(l22)[0].detach().numpy())
    mean = torch.cat([items.mean_out[0], items.mean_latent[0]]).detach().numpy()
    samples = mean + np.linalg.solve(factor.T, random.normal(size=(m + d, count))).T
    o, design = samples[:, :m], np.column_stack([np.ones(count), samples[:, m:]])
    gram = np.linalg.inv(design.T @ design)
    fitted = gram @ design.T @ o
    residual = o - design @ fitted
    spread = residual.T @ residual / (count - d - 1)
    level = items(torch.zeros(d, dtype=DOUBLE)).mean[0].detach().numpy()
    unit = items(torch.eye(d, dtype=DOUBLE)).mean[:, 0].detach().numpy()
    expected = np.vstack([level, unit - level])
    errors = np.sqrt(np.outer(np.diag(gram), np.diag(spread)))
    assert (np.abs(fitted - expected) <= 3 * errors).all()
    covariance = items.condition_covariance()[0].detach().numpy()
    diagonal = np.diag(covariance)
    errors = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / count)
    assert (np.abs(spread - covariance) <= 3 * errors).all()


def test_joint_precision_is_the_inverse_covariance():
    mean, covariance = joint()
    items = HyperGaussian.from_joint(mean, covariance, out_dim=3)
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
    precision = items.joint_precision(factor[:, 3:, 3:])
    eye = torch.eye(8, dtype=DOUBLE).expand(6, 8, 8)
    torch.testing.assert_close(precision @ covariance, eye, rtol=0, atol=1e-10)
    plain = items.joint_precision() - items.joint_precision(torch.zeros(6, 5, 5, dtype=DOUBLE))
    torch.testing.assert_close(plain[:, 3:, 3:], eye[:, 3:, 3:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="l22: got"):
        items.joint_precision(torch.eye(5, dtype=DOUBLE))


@pytest.mark.claim(
    63,
    "With as many latents as items, two dimensions are a batch, and with per_item its diagonal",
    tolerance=0,
)
def test_shapes():
    items, z = moved(), latents(6, 5)
    batch, own = items(z).mean, items(z, per_item=True).mean
    assert batch.shape == (6, 6, 3)
    assert torch.equal(own, batch.diagonal().mT)
    assert torch.equal(items(z[None]).mean[0], own)
    assert torch.equal(items(z[2]).mean, batch[2])
    assert items(latents(2, 3, 6, 5), per_item=True).mean.shape == (2, 3, 6, 3)


@pytest.mark.parametrize(
    ("shape", "per_item"),
    [((4,), False), ((2, 4), False), ((2, 4, 5), False), ((1, 1, 6, 5), False), ((5,), True),
     ((1, 5), True)],
)  # fmt: skip
def test_what_does_not_fit(shape, per_item):
    with pytest.raises(ValueError, match=r"z: got .*N=6, d=5"):
        moved()(torch.zeros(shape, dtype=DOUBLE), per_item=per_item)


def test_what_no_joint_is():
    mean, covariance = joint()
    for out_dim in (0, 8):
        with pytest.raises(ValueError, match=f"mean: got .*out_dim={out_dim}"):
            HyperGaussian.from_joint(mean, covariance, out_dim=out_dim)
    with pytest.raises(ValueError, match="covariance: got"):
        HyperGaussian.from_joint(mean, covariance[1:], out_dim=3)


@pytest.mark.claim(
    63,
    "Items that are kept or duplicated give what they gave, and keep their optimiser's moments",
    tolerance=0,
)
def test_edits():
    items, z = moved(), latents(5)
    optimizer = torch.optim.Adam(items.parameters())
    items(z).mean.square().sum().backward()
    optimizer.step()
    before = items(z)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in items.parameters()]
    items.keep(torch.tensor([4, 0, 2]), optimizer)
    items.duplicate(torch.tensor([1]), optimizer)
    rows, after = torch.tensor([4, 0, 2, 0]), items(z)
    for one, two in zip(after, before, strict=True):
        torch.testing.assert_close(one, two[rows], rtol=0, atol=1e-15)
    for parameter, old in zip(items.parameters(), moments, strict=True):
        state = optimizer.state[parameter]
        assert torch.equal(state["exp_avg"][:3], old[rows[:3]])
        assert not state["exp_avg"][3].any()
        assert state["step"] == 1
    assert "4, latent_dim=5" in repr(items)


def test_loading_and_saving_after_edits(tmp_path):
    items = HyperGaussian(6, 5, 3, init_output=latents(6, 3), dtype=DOUBLE)
    items.l21.data.normal_()
    items.duplicate(torch.tensor([0, 3]))
    twin = moved()
    twin.load_state_dict(copy.deepcopy(items.state_dict()))
    again = HyperGaussian.from_pretrained(twin.save_pretrained(tmp_path / "items"))
    z = latents(5)
    assert torch.equal(again(z).mean, items(z).mean)
    assert list(items.state_dict()) == ["mean_out", "mean_latent", "raw_l11", "l21"]


@pytest.mark.claim(
    63,
    "Conditioning through the precision, backward pass included, touches a fifth of the numbers "
    "that conditioning through a covariance of 32 latents does, and holds a quarter of the bytes",
    tolerance=None,
)
def test_cost():
    num, m, d = 50, 3, 32
    items = moved(num, d, m, dtype=torch.float32)
    z = latents(num, d).float()
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(num, m + d, generator=random).requires_grad_()
    factor = torch.randn(num, m + d, m + d, generator=random) + 6 * torch.eye(m + d)
    theirs = [mean, factor.requires_grad_()]
    ours = list(items.parameters())
    calls = {
        "precision": (lambda: condition(z[None], *ours), ours),
        "covariance": (lambda: through_covariance(z, *theirs, m), theirs),
    }
    elements, held = {}, {}
    for name, (call, parameters) in calls.items():
        kept = {}

        def note(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with CountElements() as work, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            call().sum().backward()
        elements[name] = work.elements
        held[name] = sum(kept.values()) + sum(p.nbytes + p.grad.nbytes for p in parameters)
    assert elements["covariance"] >= 5 * elements["precision"]
    assert held["covariance"] >= 4 * held["precision"]
