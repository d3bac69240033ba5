import pytest
import torch
from sklearn.datasets import load_digits

from torchzoo.data.digits import digits


def rows(x):
    return sorted(x.flatten(1).tolist())


def test_the_two_sides_hold_every_image_once_with_its_own_label():
    bunch = load_digits()
    data = digits()
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    labelled = torch.cat([x.flatten(1) * 16, y[:, None]], 1)
    expected = torch.cat(
        [torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)[:, None]], 1
    )
    assert rows(labelled) == rows(expected)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert x.shape == (1797, 1, 8, 8)


def test_the_split_is_stratified_and_of_the_size_asked_for():
    data = digits(test_fraction=0.4)
    assert len(data.test_x) == round(0.4 * 1797)
    share = data.test_y.bincount() / torch.cat([data.train_y, data.test_y]).bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.4), atol=0.01, rtol=0)


def test_the_seed_alone_decides_the_split():
    first, again, other = digits(seed=3), digits(seed=3), digits(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.train_x, other.train_x)


def test_labels_are_places_in_classes():
    everything = digits()
    full = torch.cat([everything.train_x, everything.test_x])
    labels = torch.cat([everything.train_y, everything.test_y])
    data = digits(classes=(8, 3))
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    for label, digit in enumerate((8, 3)):
        assert rows(x[y == label]) == rows(full[labels == digit])
    assert set(y.tolist()) == {0, 1}


@pytest.mark.parametrize("classes", [(), (1, 1), (10,), (-1, 2), (0.5,), "ab"])
def test_classes_that_are_no_digits_are_refused(classes):
    with pytest.raises(ValueError, match="classes"):
        digits(classes)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_test_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        digits(test_fraction=fraction)
