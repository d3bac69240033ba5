"""ProSparse in the training loop: the penalty of each step, and exact resumption."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from torchzoo.finetuning import Recipe, classification, finetune
from torchzoo.sparsity import SineSparsityScheduler
from torchzoo.swaps import prosparse


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def rows(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.mark.claim(122, "In fine-tuning the penalty's weight follows the stages", tolerance=1e-6)
def test_the_weight_is_that_of_the_stages():
    model, (x, y) = network(), rows(5).tensors
    stages = SineSparsityScheduler.published("llama2-7b")
    with prosparse(classification(), model, weight=3.0) as task:
        for step in (0, 40, 60, 70, 99):
            task.start(step, 100)
            weight = 3.0 * stages.value_at((step + 1) / 100 * 16_500) / 0.2
            expected = classification().loss(model, x, y) + weight * model[:2](x).abs().mean()
            torch.testing.assert_close(task.loss(model, x, y), expected, atol=1e-6, rtol=1e-6)
        model.eval()
        assert torch.equal(task.loss(model, x, y), classification().loss(model, x, y))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_that_is_resumed_is_the_same(tmp_path):
    recipe = Recipe(epochs=4, batch_size=8, lr=0.05, save_every=3)
    data, whole, broken = rows(40), network(), network()
    with prosparse(classification(), whole, weight=1.0) as task:
        finetune(whole, task, data, data, recipe, device="cpu")

    def stop(done, total, text):
        if done == 11:
            raise KeyboardInterrupt

    for resume in (False, True):
        options = {} if resume else {"progress": stop}
        model = network() if resume else broken
        with prosparse(classification(), model, weight=1.0) as task:
            try:
                finetune(
                    model,
                    task,
                    data,
                    data,
                    recipe,
                    out=tmp_path,
                    resume=resume,
                    device="cpu",
                    **options,
                )
            except KeyboardInterrupt:
                assert not resume
    pairs = zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_errors():
    with (
        pytest.raises(ValueError, match="weight: expected"),
        prosparse(classification(), network(), weight=-1),
    ):
        pass
    with (
        pytest.raises(ValueError, match="feed-forward"),
        prosparse(classification(), nn.Linear(2, 2)),
    ):
        pass
