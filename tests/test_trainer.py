"""The small training loop against a closed form and against itself."""

import pytest
import torch
from torch import nn

from torchzoo import trainer


def regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3


def squared(model, x, y):
    return (model(x) - y).square().mean()


def test_fit_reaches_the_least_squares_solution():
    torch.manual_seed(0)
    x, y = regression()
    model = nn.Linear(3, 1)
    history = trainer.fit(model, squared, (x, y), epochs=300, batch_size=16, lr=0.02)
    torch.testing.assert_close(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=1e-3, rtol=0)
    assert model.bias.item() == pytest.approx(0.3, abs=1e-3)
    assert history[-1] < 1e-5 < history[0]


def test_fit_is_repeatable_and_reports_steps_and_epochs():
    x, y = regression()
    weights, steps, epochs = [], [], []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        trainer.fit(
            model,
            squared,
            (x, y),
            epochs=2,
            batch_size=48,
            generator=torch.Generator().manual_seed(5),
            on_step=lambda m=model: steps.append(m.training),
            on_epoch=lambda epoch, loss, m=model: epochs.append((epoch, m.training)),
        )
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    assert steps == [True] * 8  # two batches (48 and 16 rows), two epochs, two runs
    assert epochs == [(0, False), (1, False)] * 2


def test_epoch_loss_is_the_mean_over_rows():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(0.0)
        model.bias.fill_(0.0)
    x, y = torch.zeros(3, 1), torch.tensor([[0.0], [0.0], [3.0]])
    history = trainer.fit(model, squared, (x, y), epochs=1, batch_size=2, lr=0.0)
    assert history == [pytest.approx(3.0)]


def test_accuracy_counts_rows():
    x = torch.eye(4)
    y = torch.tensor([0, 1, 2, 0])
    assert trainer.accuracy(nn.Identity(), x, y, batch_size=3) == 0.75


def test_rows_must_match():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"same non-zero number of rows, got \[2, 3\]"):
        trainer.fit(model, squared, (torch.ones(3, 1), torch.ones(2, 1)), epochs=1, batch_size=1)
    with pytest.raises(ValueError, match=r"got \[0\]"):
        trainer.fit(model, squared, (torch.ones(0, 1),), epochs=1, batch_size=1)
