import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from torchzoo.experiments.circuits.compression import digit_levels
from torchzoo.experiments.quickstart import outliers
from torchzoo.experiments.quickstart.figures import outlier_rows
from torchzoo.experiments.quickstart.outliers import Outliers, Pictures
from torchzoo.hub import from_pretrained, manifest


@pytest.fixture(scope="module")
def found():
    """The stage with a classifier that is hardly trained."""
    return outliers.measure(from_pretrained(outliers.WEIGHTS), seed=0, epochs=1)


def pictures(name, bits, confidence):
    return Pictures(name, torch.zeros(len(bits), 64).long(), bits, confidence)


def scores(seed, shift, count):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return (draw + shift).mul(4).round().div(4)  # rounded, so that there are ties


def test_areas_are_those_of_scikit_learn_ties_included():
    inside, outside = scores(0, 0.7, 40)[0], scores(1, 0.0, 60)[0]
    labels = [1] * 40 + [0] * 60
    expected = roc_auc_score(labels, torch.cat([inside, outside]))
    placed = outliers.placements(inside, outside)
    assert outliers.area(*placed).number == pytest.approx(expected, abs=1e-12)
    assert float(placed[1].mean()) == pytest.approx(expected, abs=1e-12)


def test_errors_of_areas_and_of_their_difference_are_the_spread_of_repeated_draws():
    inside, outside = scores(2, 0.5, 200), scores(3, 0.0, 100)
    inside[1] += 2 * inside[0]  # two scores of the same pictures, correlated
    outside[1] += 2 * outside[0]
    digits = pictures("digits", -inside[0], inside[1])
    kind = pictures("others", -outside[0], outside[1])
    stated = Outliers(digits, [kind], 1.0).areas(kind)
    generator, draws = torch.Generator().manual_seed(4), []
    for _ in range(600):
        i = torch.randint(0, 200, (200,), generator=generator)
        j = torch.randint(0, 100, (100,), generator=generator)
        one, two = (outliers.placements(inside[k, i], outside[k, j])[0].mean() for k in (0, 1))
        draws.append(torch.stack([one, two, one - two]))
    for area, spread in zip(stated, torch.stack(draws).std(0), strict=True):
        assert area.std_error == pytest.approx(float(spread), rel=0.12)
    assert stated[2].std_error < 0.8 * math.hypot(stated[0].std_error, stated[1].std_error)
    assert stated[2].number == pytest.approx(stated[0].number - stated[1].number)


def test_flagging_keeps_the_stated_share_of_digits():
    digits = pictures("digits", torch.arange(100.0), -torch.arange(100.0))
    kind = pictures("others", torch.tensor([90.0, 94.0, 95.0, 200.0]), torch.full((4,), -94.0))
    both = Outliers(digits, [kind], 1.0)
    assert both.flagged(digits) == (0.05, 0.05)
    assert both.flagged(kind) == (0.5, 0.0)


def test_pictures_are_what_their_names_say():
    test = digit_levels(0)[1]
    kinds = outliers.other_pictures(test, seed=1)
    turned = kinds["digits, a quarter turned"].view(-1, 8, 8)
    assert torch.equal(turned.transpose(1, 2).flip(2), test.view(-1, 8, 8))
    shuffled = kinds["digits, rows shuffled"].view(-1, 8, 8)
    for before, after in zip(test[:50].view(-1, 8, 8), shuffled, strict=False):
        assert sorted(before.tolist()) == sorted(after.tolist())
    stripes = torch.arange(8).repeat_interleave(8).expand(100, 64)
    orders = outliers.other_pictures(stripes, seed=1)["digits, rows shuffled"][:, ::8]
    assert len({tuple(order.tolist()) for order in orders}) > 95  # each has its own
    photographs = kinds["patches of photographs"]
    assert (photographs.min(), photographs.max()) == (0, 16)
    assert photographs.shape == test.shape
    assert torch.equal(photographs, outliers.other_pictures(test, seed=1)["patches of photographs"])
    assert not torch.equal(
        photographs, outliers.other_pictures(test, seed=2)["patches of photographs"]
    )


def test_digits_are_those_that_the_circuit_was_tested_on_and_none_is_turned(found):
    entry = manifest()[outliers.WEIGHTS]
    test = digit_levels(entry["seed"])[1]
    assert torch.equal(found.digits.levels, test[::2])
    for kind in found.others[1:]:
        assert len(kind.levels) == len(test) // 2
    turned = found.others[2].levels.view(-1, 8, 8)
    assert torch.equal(turned.rot90(-1, (1, 2)).flatten(1), test[1::2])
    circuit = from_pretrained(outliers.WEIGHTS)
    with torch.no_grad():
        each = -circuit(test).double()[:, 0] / (64 * math.log(2))
    torch.testing.assert_close(found.digits.bits, each[::2])
    for kind in (found.digits, *found.others):  # the largest of ten is a tenth at least
        assert (kind.confidence >= -math.log(10) - 1e-9).all()
        assert (kind.confidence <= 0).all()
    # what the container adds to the ideal length: 64 bits for each of its blocks, and rounding
    assert float(each.mean()) == pytest.approx(entry["metric"]["test_bits_per_dim"], abs=0.003)


def test_the_circuit_tells_photographs_and_shuffled_rows_from_digits(found):
    photographs, shuffled, _ = (found.areas(kind)[0] for kind in found.others)
    assert 0.5 < found.accuracy < 1
    assert photographs.number > 0.99
    assert shuffled.number > 0.9


def test_rows_show_each_kind_and_count_small_differences_neither_way(found):
    rows = list(outlier_rows(found))
    assert [row.what for row in rows] == [f"circuit, {kind.name}" for kind in found.others]
    for row, kind in zip(rows, found.others, strict=True):
        labels = [1] * len(found.digits.bits) + [0] * len(kind.bits)
        for value, side in ((row.ours, "bits"), (row.theirs, "confidence")):
            score = torch.cat([getattr(found.digits, side), getattr(kind, side)])
            expected = roc_auc_score(labels, -score if side == "bits" else score)
            assert value.number == pytest.approx(expected, abs=1e-9)
        assert row.result.number == pytest.approx(row.ours.number - row.theirs.number)
    base = scores(5, 0.0, 50)
    digits = pictures("digits", -base[0], base[0])
    same, worse = pictures("same", -base[1], base[1]), pictures("worse", -base[1] - 9, base[1] - 9)
    better = pictures("better", -base[1] + 9, base[1])
    verdicts = [row.better for row in outlier_rows(Outliers(digits, [same, worse, better], 1.0))]
    assert verdicts == [None, False, True]


def test_the_stage_is_decided_by_its_seed_and_counts_its_epochs(found):
    calls = []
    circuit = from_pretrained(outliers.WEIGHTS)
    again = outliers.measure(circuit, seed=0, epochs=1, on_epoch=lambda: calls.append(1))
    assert calls == [1]
    assert again.to_json() == found.to_json()
    assert again.to_json()["kinds"]["digits"]["flagged"]["circuit"] == pytest.approx(0.05, abs=0.01)
