from pydoc_data.topics import topics as by_name

import pytest
import torch

from torchzoo.data.topics import topic_windows, topics


def test_every_topic_is_on_exactly_one_side():
    text = topics()
    train, validation = text.decode(text.train), text.decode(text.validation)
    for body in by_name.values():
        assert (body in train) != (body in validation)
    assert len(train) + len(validation) == sum(len(body) for body in set(by_name.values()))
    assert 0.02 < len(validation) / len(train) < 0.3


def test_numbers_and_characters_go_together():
    text = topics(every=5)
    assert list(text.characters) == sorted(set(text.characters))
    both = torch.cat([text.train, text.validation])
    assert both.unique().tolist() == list(range(len(text.characters)))
    assert text.train.dtype == torch.int64
    assert len(text.validation) > len(topics(every=20).validation)
    assert all(torch.equal(a, b) for a, b in zip(text[:2], topics(every=5)[:2], strict=True))


def test_every_is_checked():
    with pytest.raises(ValueError, match="every"):
        topics(every=1)


def test_windows_are_pieces_of_their_topics_and_of_one_side_only():
    data = topic_windows(100, names=("debugger", "types"))
    for label, name in enumerate(data.names):
        text = by_name[name].encode()
        blocks = [text[at : at + 400] for at in range(0, len(text) - 399, 400)]
        for x, y, mine, step in (
            (data.train_x, data.train_y, [b for i, b in enumerate(blocks) if i % 4 != 3], 25),
            (data.test_x, data.test_y, blocks[3::4], 100),
        ):
            found = [bytes(row.tolist()) for row in x[y == label]]
            assert found == [b[at : at + 100] for b in mine for at in range(0, 301, step)]


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="names"):
        topic_windows(10, names=("nothing",))
    for length in (0, 10**6):
        with pytest.raises(ValueError, match="length"):
            topic_windows(length)
