"""The sequence tasks: what they ask, that they can be learnt, and the shipped models."""

import pytest
import torch

from torchzoo import hub
from torchzoo.experiments.ssm import sequences
from torchzoo.trainer import accuracy


@pytest.mark.parametrize("name", list(sequences.SHIPPED))
def test_shipped_models_reach_their_metrics(name):
    task = sequences.SHIPPED[name]()
    model = hub.from_pretrained(name)
    metric = hub.manifest()[name]["metric"]
    found = accuracy(model, task.test_x, task.test_y)
    assert found == pytest.approx(metric["test_accuracy"], abs=0.01)
    assert found > 2 * task.test_y.bincount().max() / len(
        task.test_y
    )  # twice the commonest label's


def test_a_little_training_learns_digits():
    task = sequences.digit_pixels()
    model = {**task.model, "d_model": 16, "depth": 1, "d_state": 8, "dropout": 0.0}
    losses = []
    task = task._replace(model=model, epochs=12)
    trained = sequences.train(task, lr=2e-2, on_epoch=losses.append)
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy(trained, task.test_x, task.test_y) > 0.3


def test_tasks_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    x, y = sequences.cued(128, 5, generator)
    assert torch.equal(x.sum(-1), (torch.arange(128) < 2).float().expand(5, -1))
    assert torch.equal(x[:, 0].argmax(-1), y)
    u = sequences.band_limited(256, 16, 3, generator)
    power = torch.fft.rfft(u).abs()
    assert power[:, 17:].max() < 1e-4 < power[:, 1:17].min()
    torch.testing.assert_close(u.std(-1), torch.ones(3))
    data = sequences.digit_pixels()
    assert torch.equal(data.train_x.reshape(-1, 8, 8)[:, 2, 3], data.train_x[:, 19, 0])


def test_memory_tasks_can_be_learnt():
    assert sequences.recall(64, steps=60) > 0.9
    losses = []
    assert sequences.copy(128, steps=60, on_step=losses.append) < 0.5
    assert losses[0] > 0.8
