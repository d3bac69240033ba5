import pytest
import torch
import torch.nn.functional as F

from torchzoo.data.digits import digits
from torchzoo.experiments.quickstart import finetune, pretrain, tune
from torchzoo.experiments.quickstart.training import BALANCE, Recipe, objective, placed, score
from torchzoo.hub import from_pretrained, manifest
from torchzoo.moe import load_balance_loss


def states_equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("name", pretrain.SHIPPED)
def test_pretraining_is_decided_by_the_seed(name):
    data = digits(pretrain.CLASSES)
    few = data._replace(train_x=data.train_x[:40], train_y=data.train_y[:40])
    recipe = Recipe(epochs=2, batch_size=16, lr=1e-3)
    first, again, other = (pretrain.pretrain(name, few, recipe, seed=s) for s in (3, 3, 4))
    assert states_equal(first, again)
    assert not states_equal(first, other)


@pytest.mark.parametrize("name", pretrain.SHIPPED)
def test_shipped_weights_reach_the_figures_of_the_manifest(name):
    model, entry = from_pretrained(name), manifest()[name]
    data = digits(pretrain.CLASSES)
    # one image of slack for another processor's rounding
    for side, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        reached = score(model, x, y)
        assert reached == pytest.approx(entry["metric"][f"{side}_accuracy"], abs=1.01 / len(y))
    assert entry["metric"]["test_accuracy"] > 0.9
    assert entry["command"] == pretrain.COMMAND
    assert type(model) is pretrain.SHIPPED[name]


def test_the_objective_is_cross_entropy_and_weighted_balance(small):
    images, labels = torch.rand(6, 1, 12, 12), torch.tensor([0, 1, 2, 0, 1, 2])
    logits, routings = small(images, return_routing=True)
    balance = sum(load_balance_loss(routing) for routing in routings)
    expected = F.cross_entropy(logits, labels) + BALANCE * balance
    torch.testing.assert_close(objective(small, images, labels), expected)
    assert BALANCE * balance > 0.01  # a batch is never balanced better than 1 a block


def test_labels_are_few_balanced_and_from_the_training_side():
    data = digits(finetune.CLASSES)
    x, y = finetune.few_labels(data, 10, seed=1)
    assert y.bincount().tolist() == [10] * 5
    rows = {
        tuple(image.flatten().tolist()): int(label)
        for image, label in zip(data.train_x, data.train_y, strict=True)
    }
    assert all(
        rows[tuple(image.flatten().tolist())] == int(label)
        for image, label in zip(x, y, strict=True)
    )
    assert not torch.equal(x, finetune.few_labels(data, 10, seed=2)[0])


def test_images_are_judged_at_places_that_never_change():
    images = torch.rand(7, 1, 8, 8)
    assert torch.equal(placed(images), placed(images))
    torch.testing.assert_close(placed(images).sum((1, 2, 3)), images.sum((1, 2, 3)))


@pytest.mark.parametrize("arm", finetune.ARMS, ids=lambda arm: arm.key)
def test_an_arm_starts_from_its_weights_with_dense_gates_and_a_new_head(arm):
    torch.manual_seed(0)
    model = finetune.start(arm, Recipe(4, 25, 1e-3), 50)
    if arm.zoo:
        assert float(model.gates[0].temperature) == pytest.approx(2.0)
        assert model.gates[0].steps == 8
    if arm.weights:
        shipped = from_pretrained(arm.weights).state_dict()
        same = {n for n, p in model.named_parameters() if torch.equal(p, shipped[n])}
        assert {n for n, _ in model.named_parameters()} - same == {"head.weight", "head.bias"}


def test_a_run_learns_is_followed_and_is_decided_by_the_seed():
    data = digits(finetune.CLASSES)
    first, again = (finetune.finetune(finetune.ARMS[0], data, seed=0, epochs=6) for _ in range(2))
    assert first.epochs == [1, 5, 6]
    assert first.accuracy == again.accuracy
    assert states_equal(first.model, again.model)
    assert first.accuracy[-1] == score(first.model, data.test_x, data.test_y)
    assert first.accuracy[-1] > 0.35  # chance is 0.2
    assert first.temperature[-1] == pytest.approx(0.25)
    assert 1 <= first.active[-1] < first.active[0] <= 4
    for load in first.load:
        assert all(sum(block) == pytest.approx(1) for block in load)


def test_tuning_never_sees_the_test_side():
    data = digits(finetune.CLASSES)
    blind = tune.held_out(data._replace(test_x=torch.empty(0), test_y=torch.empty(0)))
    rows = torch.cat([blind.train_x, blind.test_x]).flatten(1)
    assert sorted(rows.tolist()) == sorted(data.train_x.flatten(1).tolist())
    assert {arm.lr for arm in finetune.ARMS} <= set(tune.GRID)
