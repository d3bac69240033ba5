"""Random-feature attention against loops in NumPy, scikit-learn and Monte Carlo."""

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from torchzoo.attention import (
    BiasedRandomFeatureAttention,
    RandomFeatureAttention,
    RandomFeatureMLP,
    rfa_features,
    rfa_kernel,
    rfa_target,
)
from torchzoo.testing import assert_within_se, check_module

PAPER = 168
DOUBLE = torch.float64


def inputs(n, num_keys, dim, seed=0):
    """Queries and keys of various lengths, in double precision."""
    draw = torch.randn(
        n, num_keys + 1, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE
    )
    return draw[:, 0], draw[:, 1:]


def filled(module, seed=0):
    """The module with values other than 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        value = torch.randn(module.value.shape, generator=generator)
        module.value.copy_(value)
    return module


def loop_features(query, keys, weight):
    """One row's features by the definition, plain NumPy."""
    out = np.zeros((len(weight), len(query) + 1))
    q = np.append(query, 1.0)
    for m, w in enumerate(weight):
        for key in keys:
            k = np.append(key, 1.0)
            score = sum(q[a] * w[a, b] * k[b] for a in range(len(q)) for b in range(len(k)))
            out[m] += max(score, 0.0) * k / len(keys)
    return out


@pytest.mark.claim(PAPER, "features are the mean of keys weighted by ReLU scores", tolerance=1e-10)
@pytest.mark.parametrize("heads_at_once", [512, 3])
def test_features_are_the_triple_loop(heads_at_once, monkeypatch):
    monkeypatch.setattr("torchzoo.attention.random_feature._HEADS_AT_ONCE", heads_at_once)
    query, keys = inputs(4, 5, 3)
    weight = RandomFeatureAttention(3, 7, seed=1, dtype=DOUBLE).weight
    expected = [
        loop_features(*row, weight.numpy()) for row in zip(query.numpy(), keys.numpy(), strict=True)
    ]
    np.testing.assert_allclose(rfa_features(query, keys, weight), expected, atol=1e-10)


@pytest.mark.claim(
    PAPER,
    "the output is the sum over heads of the features' products with the values",
    tolerance=1e-10,
)
def test_forward_is_linear_in_the_features():
    query, keys = inputs(4, 5, 3)
    layer = filled(RandomFeatureAttention(3, 7, 2, seed=1, dtype=DOUBLE))
    features = np.stack(
        [
            loop_features(*row, layer.weight.numpy())
            for row in zip(query.numpy(), keys.numpy(), strict=True)
        ]
    )
    expected = sum(features[:, m] @ layer.value[m].detach().numpy() for m in range(7))
    np.testing.assert_allclose(layer(query, keys).detach(), expected, atol=1e-10)


@pytest.mark.claim(
    PAPER, "the order of the keys does not matter, that of query and key does", tolerance=1e-6
)
def test_permutation_of_the_keys():
    query, keys = inputs(6, 5, 3)
    layer = filled(RandomFeatureAttention(3, 40, seed=0, dtype=DOUBLE))
    y = layer(query, keys)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(query, keys[:, order]), y, atol=1e-6, rtol=0)
    swapped = torch.cat([query[:, None], keys[:, 1:]], 1)
    assert ((layer(keys[:, 0], swapped) - y).abs() > 1e-3).all()


@pytest.mark.claim(PAPER, "masked keys are as if they were not there", tolerance=1e-6)
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_masked_keys_equal_removed_keys(activation):
    query, keys = inputs(4, 6, 3)
    layer = filled(RandomFeatureAttention(3, 9, activation=activation, seed=0, dtype=DOUBLE))
    mask = torch.tensor([True, False, True, True, False, True]).expand(4, 6)
    torch.testing.assert_close(
        layer(query, keys.masked_fill(~mask[..., None], math.nan), mask),
        layer(query, keys[:, mask[0]]),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.claim(
    PAPER, "a row without real keys gives 0 and passes no gradient, never NaN", tolerance=0
)
def test_all_masked_row():
    query, keys = (x.requires_grad_() for x in inputs(2, 3, 4))
    layer = filled(BiasedRandomFeatureAttention(4, 6, seed=0, dtype=DOUBLE))
    mask = torch.tensor([[False] * 3, [True] * 3])
    y = layer(query, keys, mask)
    y.sum().backward()
    assert y[0].item() == 0
    assert y[1].item() != 0
    for x in (query, keys):
        assert torch.equal(x.grad[0], torch.zeros_like(x.grad[0]))
        assert x.grad[1].abs().min() > 0
    assert layer.value.grad.isfinite().all()


# Fitting

MODELS = pytest.mark.parametrize(
    "model",
    [
        RandomFeatureAttention(3, 6, 2, seed=0, dtype=DOUBLE),
        BiasedRandomFeatureAttention(3, 6, 2, seed=0, dtype=DOUBLE),
        RandomFeatureMLP(3, 4, 24, 2, seed=0, dtype=DOUBLE),
    ],
    ids=lambda model: type(model).__name__,
)


@pytest.mark.claim(PAPER, "fit is ridge regression on the features, primal as dual", tolerance=1e-6)
@MODELS
@pytest.mark.parametrize("n", [15, 80])
def test_fit_is_ridge_regression(model, n):
    query, keys = inputs(n, 4, 3)
    y = torch.randn(n, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    features = model.features(query, keys).flatten(1)
    peer = Ridge(alpha=0.3, fit_intercept=False, solver="svd").fit(features.numpy(), y.numpy())
    for solver in ("auto", "primal", "dual", "cg"):
        assert model.fit(query, keys, y, ridge=0.3, solver=solver, chunk=7) is model
        value = model.value.detach().reshape(-1, 2).numpy()
        np.testing.assert_allclose(value, peer.coef_.T, atol=1e-6)
        np.testing.assert_allclose(
            model(query, keys).detach(), peer.predict(features.numpy()), atol=1e-6
        )


def test_fit_uses_the_mask():
    query, keys = inputs(30, 6, 3)
    mask = torch.tensor([True, True, False, True, False, True]).expand(30, 6)
    y = rfa_target(query, keys, torch.ones(3, dtype=DOUBLE), power=2)
    masked, cut = (RandomFeatureAttention(3, 5, seed=0, dtype=DOUBLE) for _ in range(2))
    masked.fit(query, keys, y, mask, ridge=0.1, chunk=8)
    cut.fit(query, keys[:, mask[0]], y, ridge=0.1)
    torch.testing.assert_close(masked.value, cut.value)


@pytest.mark.claim(PAPER, "gradient descent on the values finds the ridge solution", tolerance=1e-3)
def test_adam_converges_to_the_fit():
    query, keys = inputs(60, 4, 2)
    y = rfa_target(query, keys, torch.tensor([1.0, -2.0], dtype=DOUBLE), power=1)
    layer = filled(RandomFeatureAttention(2, 3, seed=0, dtype=DOUBLE))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.996)
    for _ in range(1500):
        loss = (layer(query, keys)[:, 0] - y).square().sum() + layer.value.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    learned = layer.value.detach().clone()
    exact = layer.fit(query, keys, y, ridge=1.0).value
    assert ((learned - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.claim(
    PAPER, "a target of the same weights is predicted exactly on new inputs", tolerance=1e-5
)
@pytest.mark.parametrize("cls", [RandomFeatureAttention, BiasedRandomFeatureAttention])
def test_exact_representability(cls):
    truth = filled(cls(3, 5, seed=2, dtype=DOUBLE))
    query, keys = inputs(2 * 5 * 4, 4, 3)
    layer = cls(3, 5, seed=2, dtype=DOUBLE)
    layer.fit(query, keys, truth(query, keys).detach(), ridge=1e-10)
    new = inputs(100, 7, 3, seed=9)
    np.testing.assert_allclose(layer(*new).detach(), truth(*new).detach(), atol=1e-5)


# The frozen weights


@pytest.mark.claim(
    PAPER,
    "weights have standard deviation 0.5 and, if biased, the identity block as their mean",
    tolerance=0.02,
)
@pytest.mark.parametrize("biased", [False, True])
def test_scale_of_the_weights(biased):
    cls = BiasedRandomFeatureAttention if biased else RandomFeatureAttention
    weight = cls(4, 20000, seed=0).weight
    mean = torch.diag(torch.tensor([1.0, 1, 1, 1, 0])) if biased else torch.zeros(5, 5)
    np.testing.assert_allclose(weight.std(0), 0.5, rtol=0.02)
    assert_within_se(weight, mean, n_se=5)
    assert torch.equal(cls(4, 3, seed=0, weight_std=1e-30).weight.round()[0], mean)


@pytest.mark.claim(PAPER, "weights never learn, and come back from the state", tolerance=0)
def test_weights_are_frozen():
    query, keys = inputs(10, 4, 3)
    layer = RandomFeatureAttention(3, 5, seed=0, dtype=DOUBLE)
    before = layer.weight.clone()
    assert [name for name, _ in layer.named_parameters()] == ["value"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(query, keys).sum().backward()
    optimizer.step()
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, before)
    assert layer.value.abs().min() > 0
    other = RandomFeatureAttention(3, 5, seed=1, dtype=DOUBLE)
    assert not torch.equal(other.weight, before)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(query, keys), layer(query, keys))
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, before)


def test_a_seed_gives_the_same_weights_in_every_type_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, two = (RandomFeatureAttention(3, 5, seed=7, dtype=t) for t in (torch.float32, DOUBLE))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(one.weight.double(), two.weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(RandomFeatureAttention(3, 5).weight, RandomFeatureAttention(3, 5).weight)


def test_mlp_is_a_network_on_the_flattened_input():
    query, keys = inputs(4, 5, 3)
    model = filled(RandomFeatureMLP(3, 5, 11, seed=0, dtype=DOUBLE))
    row = torch.cat([query, keys.flatten(1), torch.ones(4, 1, dtype=DOUBLE)], 1)
    expected = (row @ model.weight.mT).clamp_min(0) @ model.value
    torch.testing.assert_close(model(query, keys), expected)
    wide = RandomFeatureMLP(3, 5, 5000, seed=0).weight
    np.testing.assert_allclose(wide.std() * math.sqrt(19), 1, rtol=0.02)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_targets(power):
    query, keys = inputs(3, 4, 5)
    beta = torch.randn(5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    for row, x0 in enumerate(query):
        along = [x @ beta for x in keys[row]]
        mean = sum(a**power for a in along) / 4
        correlation = sum((x0 @ x) ** power * a for x, a in zip(keys[row], along, strict=True)) / 4
        for kind, expected in (("mean", mean), ("correlation", correlation)):
            got = rfa_target(query, keys, beta, power=power, kind=kind)[row]
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cls", [RandomFeatureAttention, BiasedRandomFeatureAttention])
def test_contract_with_values(cls):
    """The values of a fresh layer are 0, which hides what the contract looks for."""
    example = torch.randn(3, 4), torch.randn(3, 5, 4)
    check_module(
        lambda **kw: filled(cls(4, 6, 2, **kw)),
        example,
        exempt=[
            "pretrained_round_trip",
            "docstring_sections",
            "doctest_runs",
            "meta_device",
            "factory_kwargs",
        ],
    )


Q, K = torch.randn(4, 16), torch.randn(4, 8, 16)
LAYER = RandomFeatureAttention(16, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LAYER(Q, K[..., :15]), r"keys: expected \(..., N, 16\), got \(4, 8, 15\)"),
        (lambda: LAYER(Q[:, :15], K), r"query: expected \(..., 16\), got \(4, 15\)"),
        (lambda: LAYER(Q, K[:, :0]), r"keys: expected at least one, got \(4, 0, 16\)"),
        (lambda: LAYER(Q[:3], K), r"keys: expected the leading dimensions of the query"),
        (lambda: LAYER(Q, K, torch.ones(4, 8)), "mask: expected bool"),
        (lambda: LAYER(Q, K, torch.ones(4, 7, dtype=torch.bool)), "mask: expected bool"),
        (lambda: LAYER.fit(Q, K, Q[:, 0], ridge=-1.0), "ridge: expected at least 0, got -1.0"),
        (lambda: LAYER.fit(Q, K, Q), r"y: expected \(4, 1\), got \(4, 16\)"),
        (lambda: LAYER.fit(Q[0], K[0], Q[:, 0]), r"query: expected \(n, d\)"),
        (lambda: LAYER.fit(Q, K, Q[:, 0], chunk=0), "chunk: expected a positive integer"),
        (lambda: LAYER.fit(Q, K, Q[:, 0], solver="lu"), "solver: expected"),
        (
            lambda: RandomFeatureAttention(16, 2, bias_mean=torch.eye(16)),
            r"bias_mean: expected \(17, 17\), got \(16, 16\)",
        ),
        (lambda: RandomFeatureMLP(16, 7, 2)(Q, K), r"keys: expected \(..., 7, 16\)"),
        (
            lambda: RandomFeatureMLP(16, 8, 2).features(Q, K, torch.ones(4, 8, dtype=torch.bool)),
            "mask: expected None",
        ),
        (lambda: rfa_features(Q, K, LAYER.weight, activation="elu"), "activation: expected"),
        (lambda: rfa_kernel(Q, K, Q[:, :4], K), r"query2: expected \(m, 16\)"),
        (lambda: rfa_kernel(Q[0], K, Q, K), r"query: expected \(n, d\)"),
        (lambda: rfa_kernel(Q, K, Q, K[..., :4]), r"keys2: expected \(..., N, 16\)"),
        (lambda: rfa_kernel(Q, K, Q, K, weight_std=0), "weight_std: expected"),
        (lambda: rfa_target(Q, K, Q[0, :3], power=1), r"beta: expected \(16,\), got \(3,\)"),
        (lambda: rfa_target(Q, K, Q[0], power=0), "power: expected a positive integer, got 0"),
        (lambda: rfa_target(Q, K, Q[0], power=1, kind="max"), "kind: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
