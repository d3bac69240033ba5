from pydoc_data.topics import topics as by_name

import pytest
import torch

from torchzoo.data.topics import topics


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
