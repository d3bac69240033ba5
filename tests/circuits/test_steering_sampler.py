"""The hook into samplers: draws have the distribution that formulas give, by pixel and by token."""

import math

import pytest
import torch
from einops import rearrange

from torchzoo.circuits import CategoricalLeaf, Circuit, TractableSteering, hclt
from torchzoo.circuits.decoding import decoded_draws, draw_mixture
from torchzoo.circuits.steering import linear_schedule, nearest_level

F64 = torch.float64
LEVELS = torch.tensor([-1.0, 0.25, 1.0], dtype=F64)


def make(size=2, categories=3, **options):
    torch.manual_seed(4)
    parents = [-1, *range(size - 1)]
    leaf = CategoricalLeaf(categories)
    return Circuit(hclt(parents), leaf, num_units=3, dtype=F64, **options)


def shares(drawn, levels):
    """`(D, C)`, how often each level came."""
    return (drawn[..., None] == levels).double().mean(0)


def normal(x, mean, deviation):
    return math.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


def normalised(weights):
    weights = torch.tensor(weights, dtype=F64)
    return weights / weights.sum()


@pytest.mark.claim(
    64,
    "A steered draw has p_DM^a p_TPM^(1-a) with a(t) = (a_1 - a_0) exp(-kappa t / T) + a_0, and "
    "known pixels come back as given",
    tolerance=0.015,
)
@pytest.mark.parametrize("alpha_bar", [None, 0.6])
def test_draws_of_pixels(alpha_bar):
    circuit = make()
    options = {"mix_start": 0.1, "mix_end": 0.9, "mix_rate": 1.5, "steer_fraction": 0.8}
    steering = TractableSteering(circuit, levels=LEVELS, **options)
    n, t, T = 20000, 30, 100
    mean, variance, x_t = (
        torch.tensor(v, dtype=F64) for v in ([0.2, -0.4], [0.5, 0.3], [0.7, -0.2])
    )
    x_known, mask = torch.tensor([0.3, math.nan], dtype=F64), torch.tensor([True, False])
    drawn = steering.steer(
        *(v.expand(n, 2) for v in (mean, variance, x_t)),
        t,
        T,
        x_known=x_known.expand(n, 2),
        mask=mask,
        alpha_bar=alpha_bar,
        generator=torch.Generator().manual_seed(0),
    )
    assert (drawn[:, 0] == 0.3).all()
    a = 0.8 * math.exp(-1.5 * 0.3) + 0.1
    share = math.exp(-(0.1 * 0.3 + 9.95 * 0.09)) if alpha_bar is None else alpha_bar
    joint = circuit.log_prob(torch.tensor([[1, c] for c in range(3)])).exp()  # 0.3 is near 0.25
    weights = []
    for p, level in zip(joint.tolist(), LEVELS.tolist(), strict=True):
        likelihood = normal(-0.2, math.sqrt(share) * level, math.sqrt(1 - share))
        weights.append(p * likelihood)
    tpm = normalised(weights)
    dm = normalised([normal(level, -0.4, max(0.625, math.sqrt(0.3))) for level in LEVELS.tolist()])
    expected = normalised((dm**a * tpm ** (1 - a)).tolist())
    assert (shares(drawn[:, 1:], LEVELS)[0] - expected).abs().max() < 0.015
    assert (expected - dm).abs().max() > 0.03
    assert (expected - tpm).abs().max() > 0.03


@pytest.mark.claim(64, "Other soft evidence takes the place of that of x_t", tolerance=0.02)
def test_other_evidence():
    circuit = make()
    steering = TractableSteering(circuit, levels=LEVELS, mix_start=0.0, mix_end=0.0)
    n = 8000
    log_w = torch.tensor([[0.0, 0.0, 0.0], [-torch.inf, 0.0, 1.0]], dtype=F64)
    x = torch.zeros(n, 2, dtype=F64)
    mask = torch.tensor([False, False])
    drawn = steering.steer(x, x + 1, x, 1, 1, x_known=x, mask=mask, log_w=log_w.expand(n, 2, 3))
    expected = circuit.posterior_marginals(log_w=log_w)
    assert (shares(drawn, LEVELS) - expected).abs().max() < 0.02
    assert (drawn[:, 1] != -1).all()


def ddim(steering, generator, steps=20):
    """A stochastic sampler on a made-up denoiser, as a user would write it."""
    x = torch.randn(3, 2, 2, generator=generator, dtype=F64)
    x_known = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=F64).expand(3, 2, 2)
    mask = torch.tensor([[True, True], [False, False]])
    for t in range(steps, 0, -1):
        now, before = linear_schedule(t / steps), linear_schedule((t - 1) / steps)
        x_0 = torch.tanh(1.5 * x)
        if steering is not None:
            variance = torch.full_like(x, 1 - now)
            x_0 = steering.steer(
                x_0, variance, x, t, steps, x_known=x_known, mask=mask, generator=generator
            )
        noise = (x - now**0.5 * x_0) / (1 - now) ** 0.5
        fresh = torch.randn(x.shape, generator=generator, dtype=F64)
        x = before**0.5 * x_0 + (1 - before) ** 0.5 * (0.8 * noise + 0.6 * fresh)
    return x


@pytest.mark.claim(
    64, "steer_fraction = 0 leaves a sampler bitwise as it is, its generator included", tolerance=0
)
def test_without_steering_the_sampler_is_the_same():
    circuit = make(4, 5)
    plain = ddim(None, torch.Generator().manual_seed(0))
    for fraction, same in ((0.0, True), (0.1, False)):
        steering = TractableSteering(circuit, steer_fraction=fraction)
        found = ddim(steering, torch.Generator().manual_seed(0))
        assert torch.equal(found, plain) == same


@pytest.mark.claim(64, "Just the noisiest share of the steps is steered, t > (1 - share) T")
def test_which_steps_are_steered():
    steering = TractableSteering(make(), steer_fraction=0.2)
    assert [t for t in range(101) if steering.is_steered(t, 100)] == list(range(81, 101))
    default = TractableSteering(make())
    assert [t for t in range(101) if default.is_steered(t, 100)] == list(range(91, 101))
    assert default.mix(0, 100) == 1
    assert default.mix(100, 100) == pytest.approx(0.8 + 0.2 * math.exp(-2))


CODES = torch.tensor([-0.8, -0.1, 0.3, 0.9], dtype=F64)


class Patches:
    """A codec of 4x4 images into 4 tokens: the mean of a 2x2 patch, in one of 4 grey codes."""

    def encode_logits(self, images):
        mean = rearrange(images, "b 1 (h p) (w q) -> b (h w) (p q)", p=2, q=2).mean(-1)
        return 3 - (mean[..., None] - CODES).square()

    def decode(self, tokens):
        grid = rearrange(CODES[tokens], "b (h w) -> b 1 h w", h=2)
        return grid.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.claim(
    64,
    "Tokens have p_TPM^(1-rho) w^rho with w = softmax(log p(code) / T), T = T_max + rho (T_min - "
    "T_max) and rho the known share of a patch, among the top codes",
    tolerance=0.01,
)
@pytest.mark.parametrize("top_k", [4, 2])
def test_draws_of_tokens(top_k):
    circuit = make(4, 4)
    image = torch.linspace(-1, 0.93, 16, dtype=F64).view(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2, :2] = True  # the first patch is known
    mask[..., 2, 2:] = True  # and half the last one
    rho = torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=F64)
    n = 40000
    images = decoded_draws(
        circuit,
        Patches(),
        image,
        mask,
        None,
        (0.5, 0.2),
        top_k,
        n,
        torch.Generator().manual_seed(0),
    )
    found = shares(images[:, 0, 0, ::2, ::2].flatten(1), CODES)
    logits = Patches().encode_logits(image)[0]
    temperature = (0.5 - 0.3 * rho)[:, None]
    w = (logits.softmax(-1).log() / temperature).exp()
    w = w / w.sum(-1, keepdim=True)
    tpm = circuit.posterior_marginals(log_w=w.log())
    expected = tpm ** (1 - rho[:, None]) * w ** rho[:, None]
    expected = expected / expected.sum(-1, keepdim=True)
    if top_k == 2:
        worse = logits.argsort(-1)[:, :2]
        expected = expected.scatter(-1, worse, 0.0)
        expected = expected / expected.sum(-1, keepdim=True)
    assert (found - expected).abs().max() < 0.01
    given = torch.randn(1, 4, 4, dtype=F64)
    unknown = torch.zeros_like(mask)
    images = decoded_draws(
        circuit,
        Patches(),
        image,
        unknown,
        given,
        (0.5, 0.2),
        4,
        n,
        torch.Generator().manual_seed(0),
    )
    found = shares(images[:, 0, 0, ::2, ::2].flatten(1), CODES)
    assert (found - circuit.posterior_marginals(log_w=given)[0]).abs().max() < 0.01


@pytest.mark.claim(
    64,
    "Decoded draws give a Gaussian of their mean and variance with a floor of 1e-3 on its density, "
    "mixed with the denoiser's cut off at 2 deviations",
    tolerance=0.01,
)
def test_mixture_of_decoded_draws():
    levels = torch.linspace(-1, 1, 9, dtype=F64)
    images = torch.tensor([-0.5, 0.1, 0.4], dtype=F64)  # mean 0, variance 0.21
    n, mean, variance, mix = 40000, 0.4, 0.04, 0.7
    drawn = draw_mixture(
        torch.full((n,), mean, dtype=F64),
        torch.full((n,), variance, dtype=F64),
        images[:, None].expand(3, n),
        levels,
        mix,
        torch.Generator().manual_seed(0),
    )
    dm = [normal(x, mean, 0.2) if abs(x - mean) <= 0.4 else 0.0 for x in levels.tolist()]
    tpm = [normal(x, 0.0, math.sqrt(0.21)) + 1e-3 for x in levels.tolist()]
    expected = normalised([p**mix * q ** (1 - mix) for p, q in zip(dm, tpm, strict=True)])
    assert (shares(drawn[:, None], levels)[0] - expected).abs().max() < 0.01
    narrow = draw_mixture(
        torch.full((n,), 5.0, dtype=F64),
        torch.zeros(n, dtype=F64),
        torch.full((2, n), -1.0, dtype=F64),
        levels,
        0.0,
        torch.Generator().manual_seed(0),
    )
    weights = [normal(x, -1.0, 0.125) + 1e-3 for x in levels.tolist()]
    assert (shares(narrow[:, None], levels)[0] - normalised(weights)).abs().max() < 0.01
    apart = draw_mixture(  # where the draws say nothing, the floor leaves it to the denoiser
        torch.full((n,), 0.6, dtype=F64),
        torch.full((n,), 0.04, dtype=F64),
        torch.full((2, n), -1.0, dtype=F64),
        levels,
        0.5,
        torch.Generator().manual_seed(0),
    )
    dm = [normal(x, 0.6, 0.2) if abs(x - 0.6) <= 0.4 else 0.0 for x in levels.tolist()]
    weights = [
        (p * (normal(x, -1.0, 0.125) + 1e-3)) ** 0.5
        for p, x in zip(dm, levels.tolist(), strict=True)
    ]
    assert (shares(apart[:, None], levels)[0] - normalised(weights)).abs().max() < 0.01


def test_steering_through_a_codec():
    circuit = make(4, 4)
    steering = TractableSteering(circuit, codec=Patches(), mix_start=0.5, mix_end=0.5)
    mean, x_known = torch.zeros(5, 1, 4, 4), torch.rand(5, 1, 4, 4)
    mask = torch.rand(5, 1, 4, 4) < 0.5
    variance = torch.full((1,), 0.1)
    # the codec is of float64
    args = [v.double() for v in (mean, variance, mean)]
    found = steering.steer(*args, 10, 10, x_known=x_known.double(), mask=mask)
    assert torch.equal(found[mask], x_known.double()[mask])
    assert torch.isin(found[~mask].float(), torch.linspace(-1, 1, 256)).all()
    assert (found[~mask].abs() <= 2 * 0.1**0.5 + 0.01).all()


def test_nearest_level():
    found = nearest_level(torch.tensor([-2.0, -0.4, -0.3, 0.6, 0.7, 9.0]), LEVELS.float())
    assert found.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(3, 3, dtype=torch.bool)}, "mask: got shape"),
        ({"mask": torch.zeros(3, 2)}, "mask: got dtype"),
        ({"x_t": torch.zeros(2, 2)}, "x_t: got shape"),
        ({"x_known": torch.zeros(3)}, "x_known: got shape"),
        ({"x0_var": torch.zeros(4, 3, 2)}, "x0_var: got shape"),
        ({"t": 11}, "t: got 11"),
        ({"log_w": torch.zeros(3, 2, 4)}, "log_w: got shape"),
    ],
)
def test_errors_of_a_call(change, message):
    x = torch.zeros(3, 2)
    given = {"x0_mean": x, "x0_var": x, "x_t": x, "x_known": x, "mask": x > 0, "t": 10, "T": 10}
    with pytest.raises(ValueError, match=message):
        TractableSteering(make()).steer(**{**given, **change})


def test_errors_of_sizes():
    x, circuit = torch.zeros(1, 1, 4, 6, dtype=F64), make(4, 4)

    def steer(x, **options):
        mask = torch.zeros(x.shape, dtype=torch.bool)
        steering = TractableSteering(circuit, **options)
        return steering.steer(x, x + 1, x, 1, 1, x_known=x, mask=mask)

    with pytest.raises(ValueError, match=r"x0_mean: got shape .* expected 4 pixels an image"):
        steer(x)
    with pytest.raises(ValueError, match=r"x0_mean: got shape .* of 4 square patches"):
        steer(x, codec=Patches())

    class Wide(Patches):
        def encode_logits(self, images):
            return super().encode_logits(images)[..., :3]

    class Small(Patches):
        def decode(self, tokens):
            return super().decode(tokens)[..., 1:]

    with pytest.raises(ValueError, match="codec: got logits of shape"):
        steer(x[..., :4], codec=Wide())
    with pytest.raises(ValueError, match="codec: got images of shape"):
        steer(x[..., :4], codec=Small())


@pytest.mark.parametrize(
    "options",
    [
        {"mix_start": -0.1},
        {"mix_end": 1.1},
        {"mix_rate": -1},
        {"num_latent_samples": 1},
        {"top_k": 0},
        {"steer_fraction": 1.5},
        {"temperatures": (0.1, 0.0)},
        {"levels": torch.tensor([0.0, 1.0])},
        {"levels": torch.tensor([0.0, 1.0, 1.0])},
    ],
)
def test_errors_of_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        TractableSteering(make(), **options)
