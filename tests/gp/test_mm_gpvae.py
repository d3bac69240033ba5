"""The multi-modal autoencoder: its bound, fusion, missing data and costs."""

import pytest
import torch
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

from torchzoo.gp import (
    MMGPVAE,
    BernoulliLikelihood,
    FourierGPPrior,
    GaussianLikelihood,
    PoissonLikelihood,
    PoissonLoadingDecoder,
    StepMLP,
)
from torchzoo.gp.mm_gpvae_blocks import Expert, fuse
from torchzoo.testing import assert_within_se
from torchzoo.testing.work import CountElements

STEPS = 12


def make(names=("a", "b"), *, shared=1, linear=True, seed=0, num_steps=STEPS, **options):
    """Counts of 5 neurons as `"a"` and 4 real values as `"b"`; one private latent each."""
    torch.manual_seed(seed)
    k = 1 + shared
    decoder = PoissonLoadingDecoder(k, 4) if linear else StepMLP([k, 6, 4])
    parts = {
        "a": (StepMLP([5, 6, 2 * k]), PoissonLoadingDecoder(k, 5), PoissonLikelihood()),
        "b": (StepMLP([4, 6, 2 * k]), decoder, GaussianLikelihood(0.5)),
    }
    prior = FourierGPPrior(shared + len(names), num_steps, min_lengthscale=4, lengthscale_init=5)
    model = MMGPVAE(
        {name: parts[name] for name in names},
        num_private=dict.fromkeys(names, 1),
        num_shared=shared,
        num_steps=num_steps,
        prior=prior,
        **options,
    )
    for layer in model.logstds.values():  # they start at 0
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model.double()


def series(batch=3, num_steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.ones(batch, num_steps, 5), generator).double()
    return {"a": counts, "b": torch.randn(batch, num_steps, 4, generator=generator).double()}


@pytest.mark.parametrize("linear", [True, False])
def test_the_bound_is_that_of_samples(linear):
    """E_q[log p(data | z) + log p(a) - log q(a)], all terms sampled."""
    model, data = make(linear=linear), series(1)
    with torch.no_grad():
        mean, logstd = model.encode(data)
        torch.manual_seed(0)
        q, p = Normal(mean, logstd.exp()), Normal(0.0, model.prior.spectrum().sqrt())
        a = q.sample((4000,))
        z = a.mT @ model.prior.basis  # (samples, 1, P, T)
        sampled = (p.log_prob(a) - q.log_prob(a)).sum((-2, -1))
        for name, columns in {"a": [0, 1], "b": [1, 2]}.items():
            output = model.decoders[name](z[..., columns, :].mT)
            target = data[name].expand(len(a), -1, -1, -1)
            sampled += model.likelihoods[name](output, target).sum(-1)
        many = {name: x.expand(1 if linear else 4000, -1, -1) for name, x in data.items()}
        bound = model.elbo(many)
    if linear:
        assert_within_se(sampled, bound)
    else:
        apart = torch.cat([sampled[:, 0], -bound]).reshape(2, -1).sum(0)
        assert_within_se(apart, 0.0)


def test_a_sampled_term_has_the_exact_one_as_its_mean():
    """The same linear decoder with and without its moments."""
    model, data = make(("b",), shared=1), series(1)
    torch.nn.init.normal_(model.logstds["b"].weight, std=0.5)
    exact = model.elbo({"b": data["b"]})
    sampled = StepMLP([2, 4]).double()
    sampled.layers[0].load_state_dict(model.decoders["b"].loading.state_dict())
    model.decoders["b"] = sampled
    found = model.elbo({"b": data["b"].expand(4000, -1, -1)})
    assert_within_se(found, exact[0])


@pytest.mark.claim(94, "Averaged experts do not depend on their order", 1e-12)
def test_fusion_is_symmetric():
    torch.manual_seed(0)
    one, two = (Expert(torch.randn(7, 2), torch.randn(7, 2), torch.ones(1, 1)) for _ in range(2))
    alone = torch.randn(7, 2)
    for fusion in ("mean", "poe"):
        pairs = zip(fuse([one, two], alone, fusion), fuse([two, one], alone, fusion), strict=True)
        for left, right in pairs:
            torch.testing.assert_close(left, right)
    mean, logstd = fuse([one, two], alone, "mean")
    torch.testing.assert_close(mean, (one.mean + two.mean) / 2)
    torch.testing.assert_close(logstd, (one.logstd + two.logstd) / 2)


@pytest.mark.claim(
    94, "A product of experts is the normalised product of densities, narrower than each", None
)
def test_a_product_of_experts():
    torch.manual_seed(0)
    one, two = (Expert(torch.randn(7, 2), torch.randn(7, 2), torch.ones(1, 1)) for _ in range(2))
    mean, logstd = fuse([one, two], torch.randn(7, 2), "poe")
    assert (logstd < torch.minimum(one.logstd, two.logstd)).all()
    x = torch.linspace(-1, 1, 5)[:, None, None]
    p, q, both = (Normal(m, s.exp()) for m, s in (one[:2], two[:2], (mean, logstd)))
    ratio = p.log_prob(x) + q.log_prob(x) - both.log_prob(x)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.claim(
    94,
    "With one modality missing the shared latents are those of the other's encoder, and the "
    "missing one's private latents return to the prior",
    1e-12,
)
@pytest.mark.parametrize("fusion", ["mean", "poe"])
def test_a_missing_modality(fusion):
    model, data = make(fusion=fusion), series()
    mean, logstd = model.encode({"a": data["a"]})
    steps = model.encoders["a"](data["a"]).mT
    torch.testing.assert_close(mean[..., :2], model.means["a"](steps[:, :2]).mT)
    torch.testing.assert_close(logstd[..., :2], model.logstds["a"](steps[:, 2:]).mT)
    assert (mean[..., 2] == 0).all()
    variance = (2 * logstd[..., 2]).exp()
    torch.testing.assert_close(variance, model.prior.spectrum()[:, 2].expand_as(variance))
    bound = model.elbo({"a": data["a"]})
    bound.sum().backward()
    assert bound.isfinite().all()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(model.infer(data, only=["a"]).mean, model.prior.to_time(mean))
    with pytest.raises(ValueError, match=r"only: got \['c'\]"):
        model.infer(data, only=["a", "c"])
    assert (model({"a": data["a"]})["kl"][:, 2].abs() < 1e-9).all()


@pytest.mark.parametrize("fusion", ["mean", "poe"])
def test_masks_hide_steps_and_trials(fusion):
    model, data = make(fusion=fusion), series()
    mask = {"b": torch.ones(3, STEPS, dtype=torch.bool)}
    mask["b"][1], mask["b"][2, 8:] = False, False
    hidden = {**data, "b": torch.where(mask["b"][..., None], data["b"], float("nan"))}
    bound = model.elbo(hidden, mask=mask)
    torch.testing.assert_close(bound[:1], model.elbo(data)[:1])
    torch.testing.assert_close(bound[1:2], model.elbo({"a": data["a"]})[1:2])
    other = {**data, "b": torch.where(mask["b"][..., None], data["b"], 7.0)}
    torch.testing.assert_close(bound, model.elbo(other, mask=mask))
    assert not torch.isclose(bound[2], model.elbo(data)[2])
    steps = model.encoders["b"](data["b"])[2] * mask["b"][2, :, None]
    private = model.means["b"](steps[:, 1])
    torch.testing.assert_close(model.encode(hidden, mask=mask)[0][2, :, 2], private)
    mean = model.infer(hidden, mask=mask).mean
    torch.testing.assert_close(mean[1], model.infer({"a": data["a"]}).mean[1])
    bound.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.claim(
    94, "Without shared latents the bound is the sum of those of the modalities alone", 1e-5
)
@pytest.mark.parametrize("linear", [True, False])
def test_without_shared_latents_modalities_are_independent(linear):
    model, data = make(shared=0, linear=linear), series()
    generator = torch.Generator()
    total = model.elbo(data, generator=generator.manual_seed(1))
    alone = []
    for index, name in enumerate("ab"):
        single = make((name,), shared=0, linear=linear)
        state = {key: value for key, value in model.state_dict().items() if f".{name}." in key}
        state |= {f"prior.{key}": value for key, value in model.prior.state_dict().items()}
        state["prior.log_lengthscale"] = model.prior.log_lengthscale[[index]]
        single.load_state_dict(state)
        alone.append(single.elbo(data[name], generator=generator.manual_seed(1)))
    torch.testing.assert_close(sum(alone), total, rtol=0, atol=1e-5)


@pytest.mark.claim(
    94, "Lengths get a gradient from the divergence alone, that of finite differences", 1e-6
)
@pytest.mark.parametrize("linear", [True, False])
def test_lengths_learn_from_the_divergence(linear):
    model, data = make(linear=linear), series(1)
    length = model.prior.log_lengthscale
    (found,) = torch.autograd.grad(model.elbo(data).sum(), length)
    coefficients = [x.detach() for x in model.encode(data)]
    (expected,) = torch.autograd.grad(-model.prior.kl(*coefficients).sum(), length)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        for latent in range(3):
            values = []
            for step in (1e-5, -2e-5):
                length[latent] += step
                values.append(-model.prior.kl(*coefficients).sum())
            length[latent] += 1e-5
            slope = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(found[latent], slope, rtol=1e-6, atol=1e-6)


class Watch(TorchDispatchMode):
    """Notes the operators and the two last sizes of what they give."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        if isinstance(out, torch.Tensor):
            self.sizes.add(tuple(out.shape[-2:]))
        return out


@pytest.mark.claim(94, "No matrix of steps by steps is formed and none is factorised", None)
def test_no_matrix_over_steps():
    model = MMGPVAE.neural_behavior(15, 9, num_steps=50)
    with Watch() as watch:
        model.elbo(
            {"spikes": torch.ones(2, 50, 15), "behavior": torch.ones(2, 50, 9)}
        ).sum().backward()
    assert (50, 50) not in watch.sizes
    assert (50, 1) not in watch.sizes or len(model.prior.basis) < 50
    factors = ("cholesky", "linalg", "svd", "eigh", "solve", "inverse", "qr")
    assert not [name for name in watch.names if any(part in name for part in factors)]


@pytest.mark.claim(94, "Four times the steps are at most eight times the work", 8.0)
def test_work_by_steps():
    work = []
    for num_steps in (60, 240):
        model = make(num_steps=num_steps)
        data = series(20, num_steps)
        with CountElements() as count:
            model.elbo(data).sum().backward()
        work.append(count.elements)
    assert 4 <= work[1] / work[0] <= 8


def test_outputs_and_predictions():
    model, data = make(), series()
    found = model(data)
    assert list(found) == ["latents", "variance", "kl", "shared", "private", "recon"]
    torch.testing.assert_close(found["shared"], found["latents"][..., 1:2])
    torch.testing.assert_close(found["private"]["b"], found["latents"][..., 2:])
    again = model(data["a"], data["b"])
    torch.testing.assert_close(again["recon"]["b"], found["recon"]["b"])
    inferred = model.infer({"b": data["b"]})
    output = model.decoders["a"].moments(inferred.mean[..., :2], inferred.variance[..., :2])
    expected = (output.mean + output.variance / 2).exp()
    torch.testing.assert_close(model.predict("a", {"b": data["b"]}), expected)


def test_the_model_of_the_paper():
    model = MMGPVAE.neural_behavior(100, 36 * 36)
    sizes = {
        name: [layer.out_features for layer in part.layers] for name, part in model.encoders.items()
    }
    assert sizes == {"behavior": [784, 512, 256, 256, 4], "spikes": [80, 40, 20, 4]}
    assert model.prior.num_latents == 3
    assert model.prior.lengthscale.tolist() == pytest.approx([30.0] * 3)
    assert model.means["spikes"].bias is not None
    assert model.logstds["spikes"].bias is None
    spikes = 50 * torch.ones(2, 60, 100)
    assert (model.encode({"spikes": spikes})[1][..., 2] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3, STEPS + 1, 5)}, r"data.*\(3, 12, 5\).*\(3, 13, 5\)"),
        ({"a": torch.ones(3, STEPS, 6)}, "data.*5.*6"),
        ({"a": torch.ones(2, STEPS, 5)}, "data"),
        ({"a": -torch.ones(3, STEPS, 5)}, "'a' that PoissonLikelihood.*-1"),
        ({"a": torch.full((3, STEPS, 5), 0.5)}, "'a' that PoissonLikelihood.*0.5"),
        ({"c": torch.ones(3, STEPS, 5)}, "data.*'c'"),
    ],
)
def test_series_that_do_not_fit(change, message):
    data = {"b": series()["b"], **{name: x.double() for name, x in change.items()}}
    with pytest.raises(ValueError, match=message):
        make().elbo(data)


def test_calls_that_do_not_fit():
    model, data = make(), series()
    with pytest.raises(ValueError, match=r"data.*none"):
        model.elbo({})
    with pytest.raises(ValueError, match="others"):
        model.elbo(data["a"])
    with pytest.raises(ValueError, match="mask"):
        model.elbo(data, mask={"a": torch.ones(3, STEPS)})
    with pytest.raises(ValueError, match="target"):
        model.predict("c", data)
    wrong = (StepMLP([5, 3]), PoissonLoadingDecoder(1, 5), BernoulliLikelihood())
    with pytest.raises(ValueError, match="modalities: expected 2 outputs of the encoder of 'a'"):
        MMGPVAE({"a": wrong}, num_private={"a": 1}, num_shared=0, num_steps=3)
