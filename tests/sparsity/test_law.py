"""The law of activation ratios against the published figures and against planted ones."""

import numpy as np
import pytest

from torchzoo.sparsity import SparsingLaw
from torchzoo.sparsity.law import _PUBLISHED

RELU = {0.80: 0.1047, 1.60: 0.0954, 4.80: 0.0855, 9.61: 0.0786, 20.8: 0.0746, 41.6: 0.0709}
SILU = {0.77: 0.3145, 1.60: 0.3403, 4.47: 0.3619, 9.59: 0.3707, 20.5: 0.3846, 41.6: 0.3920}
"""Ratios that the authors measured on models of 0.1 billion parameters, by billions of tokens."""
AT_2_AND_50 = {
    "0.1b_relu": (0.0932, 0.0699),
    "0.2b_relu": (0.0995, 0.0764),
    "0.4b_relu": (0.0967, 0.0790),
    "0.8b_relu": (0.1021, 0.0923),
    "1.2b_relu": (0.0986, 0.0955),
    "2.4b_relu": (0.0931, 0.0924),
    "0.1b_silu": (0.3358, 0.3933),
    "0.2b_silu": (0.2741, 0.3823),
    "0.4b_silu": (0.1793, 0.3775),
    "0.8b_silu": (0.1010, 0.3715),
    "1.2b_silu": (0.1068, 0.3698),
}
"""What the published coefficients give after 2 and 50 billion tokens, worked out by themselves."""


@pytest.mark.claim(
    145, "The published relu law gives the figures computed from its coefficients", tolerance=1e-4
)
def test_the_published_law():
    law = SparsingLaw.published("0.1b_relu")
    got = law.predict([3.0, 10.0, 100.0, 300.0]).numpy()
    np.testing.assert_allclose(got, [0.0890, 0.0788, 0.0674, 0.0647], atol=1e-4)
    silu = SparsingLaw.published("0.2b_silu")
    assert silu.predict([16.0]).item() == pytest.approx(0.390 - 0.208 / 16**0.844)


@pytest.mark.claim(145, "The published laws pass through what was measured", tolerance=4e-3)
def test_the_published_laws_pass_through_measurements():
    relu, silu = SparsingLaw.published("0.1b_relu"), SparsingLaw.published("0.1b_silu")
    np.testing.assert_allclose(relu.predict(list(RELU)).numpy(), list(RELU.values()), atol=1e-3)
    late = {d: a for d, a in SILU.items() if d > 4}
    np.testing.assert_allclose(silu.predict(list(late)).numpy(), list(late.values()), atol=4e-3)
    # the rivals' published curve is 0.02 too low early on
    assert silu.predict([0.77]).item() == pytest.approx(SILU[0.77], abs=0.025)


@pytest.mark.claim(
    145, "A fit to the noise-free published curves recovers their limits", tolerance=1e-3
)
@pytest.mark.parametrize("name", sorted(_PUBLISHED))
@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_fit_recovers_the_limit(name, unit):
    law = SparsingLaw.published(name)
    d = np.geomspace(0.5, 300, 40)
    fit = SparsingLaw(law.kind).fit(d * unit, law.predict(d))
    assert fit.limit == pytest.approx(law.limit, abs=1e-3)
    np.testing.assert_allclose(fit.predict(d * unit).numpy(), law.predict(d).numpy(), atol=1e-5)
    assert fit.alpha == pytest.approx(law.alpha, rel=0.05)


@pytest.mark.parametrize("name", sorted(_PUBLISHED))
def test_each_published_law(name):
    got = SparsingLaw.published(name).predict([2.0, 50.0]).tolist()
    assert got == pytest.approx(AT_2_AND_50[name], abs=6e-5)


@pytest.mark.parametrize(("kind", "direction"), [("relu", 1), ("silu", -1)])
def test_a_law_against_its_direction_is_flat(kind, direction):
    ratio = np.linspace(0.1, 0.5, 5)[::direction]
    law = SparsingLaw(kind).fit([1, 2, 4, 8, 16], ratio)
    assert law.limit == pytest.approx(0.3)
    np.testing.assert_allclose(law.predict([3.0, 1000.0]).numpy(), 0.3)
    assert (law.b if kind == "relu" else -law.c) == (-np.inf if kind == "relu" else 0.0)


def test_directions():
    d = [1.0, 2.0, 5.0, 20.0]
    assert (SparsingLaw.published("0.4b_relu").predict(d).diff() < 0).all()
    assert (SparsingLaw.published("0.4b_silu").predict(d).diff() > 0).all()


def test_fit_of_measurements_is_as_good_as_the_published_one():
    for kind, points in (("relu", RELU), ("silu", SILU)):
        d, a = np.array(list(points)), np.array(list(points.values()))
        errors = [
            np.square(law.predict(d).numpy() - a).sum()
            for law in (SparsingLaw(kind).fit(d, a), SparsingLaw.published(f"0.1b_{kind}"))
        ]
        assert errors[0] <= errors[1]


def test_bad_points_are_refused():
    law = SparsingLaw()
    for tokens, ratio in (
        ([1, 2, 3], [1, 1, 1]),
        ([1, 2, 3, 4], [1, 1, 1]),
        ([0, 2, 3, 4], [1, 1, 1, 1]),
        ([1, 2, 3, 4], [1, 1, float("nan"), 1]),
    ):
        with pytest.raises(ValueError, match="tokens, ratio"):
            law.fit(tokens, ratio)
    with pytest.raises(ValueError, match="kind"):
        SparsingLaw("gelu")
    with pytest.raises(ValueError, match="name"):
        SparsingLaw.published("7b_relu")
