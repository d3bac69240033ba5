"""Data sets by name: what they hold, and what is said of those that are not there."""

import pytest
import torch
from torchvision.io import write_png

from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.experiments.finetune.datasets import load_data


def paint(folder, classes, count=4):
    """Images whose brightness is the class's number."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for one in range(count):
            write_png(
                torch.full((3, 9, 12), 60 * index, dtype=torch.uint8),
                str(folder / name / f"{one}.png"),
            )


def test_digits_are_normalised_and_split_by_the_seed():
    data = load_data("digits", size=16)
    x, y = data.train.tensors
    assert x.shape[1:] == (3, 16, 16)
    assert (data.size, data.classes[3], len(data.train) + len(data.test)) == (16, "3", 1797)
    assert abs(float(x.mean())) < 0.05
    assert not torch.equal(load_data("digits", size=16, seed=1).train.tensors[1], y)


def test_a_folder_of_classes_is_split(tmp_path):
    paint(tmp_path, ["cat", "dog"])
    data = load_data(f"folder:{tmp_path}", size=8)
    assert (len(data.train), len(data.test), data.classes) == (6, 2, ("cat", "dog"))
    for image, label in data.train:
        expected = (60 * label / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        torch.testing.assert_close(image, expected[:, None, None].expand(3, 8, 8))


def test_a_folder_with_a_test_part_keeps_it(tmp_path):
    paint(tmp_path / "train", ["a", "b", "c"])
    paint(tmp_path / "val", ["a", "b", "c"], count=2)
    data = load_data(f"folder:{tmp_path}", size=8)
    assert (len(data.train), len(data.test)) == (12, 6)
    paint(tmp_path / "val", ["d"])
    with pytest.raises(TorchzooError, match=r"train has 3 classes and val 4; only one .* has d"):
        load_data(f"folder:{tmp_path}", size=8)


def test_data_that_are_not_there(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(TorchzooError, match="no such folder; did you mean photos"):
        load_data(f"folder:{tmp_path / 'photo'}")
    with pytest.raises(TorchzooError, match="a folder of images for each class"):
        load_data(f"folder:{tmp_path / 'photos'}")
    with pytest.raises(UnknownNameError, match="did you mean CIFAR10"):
        load_data("torchvision:CIFAR01")
    for text in ("digit", "folder:", "torchvision"):
        with pytest.raises(UnknownNameError, match="expected digits, folder:PATH, torchvision"):
            load_data(text)


def test_a_data_set_of_torchvision_that_needs_no_network():
    data = load_data("torchvision:FakeData", size=8)
    assert (len(data.classes), len(data.train), len(data.test)) == (10, 750, 250)
    assert data.train[0][0].shape == (3, 8, 8)


def test_text_is_cut_into_pieces_and_the_same_a_character_further(tmp_path):
    file = tmp_path / "rhyme.txt"
    file.write_text("abcd" * 50)
    data = load_data(f"text:{file}", size=6)
    assert (data.text, data.size, data.classes) == (True, 6, ("a", "b", "c", "d"))
    x, y = data.train.tensors
    assert x.tolist()[1] == [2, 3, 0, 1, 2, 3]
    assert torch.equal(y, (x + 1) % 4)
    assert (len(x), len(data.test)) == ((180 - 1) // 6, (20 - 1) // 6)
    book = load_data("text", size=100)
    assert len(book.train) > 1000
    assert "".join(book.classes[i] for i in book.train[0][0][:13].tolist()) == 'The "assert" '


def test_text_that_cannot_be_read(tmp_path):
    with pytest.raises(TorchzooError, match=r"none\.txt: can't be read"):
        load_data(f"text:{tmp_path / 'none.txt'}")
    (tmp_path / "short.txt").write_text("abc" * 20)
    with pytest.raises(TorchzooError, match="expected more than 64 characters on each side"):
        load_data(f"text:{tmp_path / 'short.txt'}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TorchzooError, match="can't be read"):
        load_data(f"text:{tmp_path / 'bytes.txt'}")
