"""The loop against a plain one, parts and processes against one, and what stops it."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from tests.finetuning.runs import RECIPE, data, network, train, train_on_rank
from torchzoo.errors import TorchzooError, UnknownNameError
from torchzoo.finetuning import Recipe, Task, checkpoints, classification, finetune
from torchzoo.finetuning.loop import Loop
from torchzoo.testing.ranks import run_ranks

PLAIN = Recipe(epochs=3, batch_size=12, lr=0.02, clip=0.5, warmup=0.3, seed=3)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


def test_it_is_adamw_with_warm_up_cosine_and_clipping():
    model, run = train(None, PLAIN, model=network(dropout=0.0))
    x, y = data().tensors
    plain = network(dropout=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.01)
    step, losses = 0, []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        for rows in torch.randperm(50, generator=generator).tensor_split(5):
            warm = 5  # 0.3 of 15 steps, rounded up
            cosine = 0.01 * (1 + math.cos(math.pi * (step - warm) / 10))
            optimizer.param_groups[0]["lr"] = 0.02 * (step + 1) / warm if step < warm else cosine
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(x[rows]), y[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item() * len(rows))
            step += 1
    close(weights(model), weights(plain), atol=1e-6, rtol=1e-5)
    assert run.history[1]["loss"] == pytest.approx(sum(losses[5:10]) / 50, rel=1e-5)
    hits = (plain.eval()(x).argmax(-1) == y).float().mean().item()
    assert run.history[2]["accuracy"] == pytest.approx(hits)
    assert run.step == 15


@pytest.mark.parametrize("parts", [2, 5, 12])
def test_parts_of_a_batch_learn_what_the_whole_batch_learns(parts):
    rows, found = data(dtype=torch.float64), []
    for recipe in (PLAIN, dataclasses.replace(PLAIN, accumulate=parts)):
        model = network(norm=False, dropout=0.0).double()
        finetune(model, classification(), rows, rows, recipe, device="cpu")
        found.append(weights(model))
    close(*found, atol=1e-9, rtol=1e-8)


def test_two_processes_learn_what_one_learns():
    recipe = dataclasses.replace(PLAIN, accumulate=2)
    ranks = run_ranks(train_on_rank, 2, 0, recipe, timeout=100)
    one, run = train(None, recipe, model=network(norm=False, dropout=0.0))
    for found, history in ranks:
        close({k: torch.as_tensor(v) for k, v in found.items()}, weights(one), atol=1e-5, rtol=0)
        for row, expected in zip(history, run.history, strict=True):
            for name in ("loss", "test_loss", "accuracy", "rate"):
                assert row[name] == pytest.approx(expected[name], abs=1e-5)


def test_sharded_processes_learn_what_one_learns(tmp_path):
    ranks = run_ranks(train_on_rank, 2, 0, PLAIN, tmp_path, timeout=100)
    one, run = train(None, PLAIN, model=network(norm=False, dropout=0.0))
    close(load_file(tmp_path / "last.safetensors"), weights(one), atol=1e-5, rtol=0)
    for resumed, history in ranks:
        assert resumed == 15
        assert history[-1]["test_loss"] == pytest.approx(run.history[-1]["test_loss"], abs=1e-5)
    with pytest.raises(TorchzooError, match="sharded weights is not kept"):
        train(None, RECIPE, fsdp=True)


def test_the_average_is_evaluated_and_kept(tmp_path):
    recipe = dataclasses.replace(PLAIN, ema=0.9, epochs=1)
    seen = []
    model = network(dropout=0.0)
    train(tmp_path, recipe, model=model, progress=lambda *_: seen.append(weights(model)))
    average = seen[0]["0.weight"]  # the first update takes the weights as they are
    for one in seen[1:]:
        average = 0.9 * average + 0.1 * one["0.weight"]
    kept = load_file(tmp_path / "last.safetensors")
    torch.testing.assert_close(kept["0.weight"], average)
    torch.testing.assert_close(kept["1.running_mean"], seen[-1]["1.running_mean"])


def test_frozen_parameters_stay_and_the_others_learn():
    model = network()
    before = weights(model)
    train(None, dataclasses.replace(PLAIN, freeze=("0.*", "*.bias")), model=model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"1.weight", "4.weight"}


def test_bf16_computes_in_bf16_and_leaves_the_model_as_it_was():
    model, seen = network(), set()
    handle = model[4].register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    train(None, dataclasses.replace(PLAIN, precision="bf16", epochs=1), model=model)
    handle.remove()
    assert seen == {torch.bfloat16}
    assert model(torch.randn(2, 6)).dtype is torch.float32
    assert model[0].weight.dtype is torch.float32
    assert not model.training


def test_files_of_a_run(tmp_path):
    _, run = train(tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert float(rows[2]["test_loss"]) == run.history[2]["test_loss"]
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".csv", ".png"} | {".0"}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-18.json", "step-18.safetensors", "step-20.json", "step-20.safetensors"]
    assert run.best == max(row["accuracy"] for row in run.history)
    model = network()
    model.load_state_dict(load_file(tmp_path / "best.safetensors"))
    x, y = data().tensors
    assert (model.eval()(x).argmax(-1) == y).float().mean().item() == pytest.approx(run.best)


def test_lower_may_be_better(tmp_path):
    def loss(model, x, y):
        return (model(x) - x.sum(-1, keepdim=True)).square().mean()

    task = Task(
        loss,
        lambda model, x, y: (model(x) - x.sum(-1, keepdim=True))[:, 0].abs(),
        metric="error",
        higher=False,
    )
    run = finetune(nn.Linear(6, 1), task, data(), data(), PLAIN, device="cpu", out=tmp_path)
    assert run.best == min(row["error"] for row in run.history) == run.history[-1]["error"]


def test_the_first_of_equals_stays_the_best(tmp_path):
    task = dataclasses.replace(
        classification(), score=lambda model, x, y: torch.zeros(len(x)), higher=False
    )
    seen = []
    model = network(norm=False)
    finetune(
        *(model, task, data(), data(), dataclasses.replace(PLAIN, epochs=2)),
        out=tmp_path,
        device="cpu",
        progress=lambda *_: seen.append(weights(model)),
    )
    close(load_file(tmp_path / "best.safetensors"), seen[4], atol=0, rtol=0)
    close(load_file(tmp_path / "last.safetensors"), seen[9], atol=0, rtol=0)


def test_without_a_number_of_steps_each_epoch_is_saved(tmp_path):
    train(tmp_path, dataclasses.replace(PLAIN, epochs=2))
    assert checkpoints.steps(tmp_path / "checkpoints") == [5, 10]


def test_a_process_without_rows_adds_nothing(monkeypatch):
    rows = data(rows=49)  # in batches of 12 the last one has a row for the first process only
    loop = Loop(network(), classification(), rows, rows, PLAIN, None, "cpu", False)
    whole, parts, drawn = loop.evaluate(), [], []
    monkeypatch.setattr(loop, "_mean", lambda sums: parts.append(sums) or sums)
    for rank in range(2):
        loop.accelerator = SimpleNamespace(
            num_processes=2, process_index=rank, device=torch.device("cpu")
        )
        loop.evaluate()
        loop._seed(3)
        drawn.append(torch.rand(4))
    loss, score, count = sum(parts).tolist()
    assert [int(part[2]) for part in parts] == [25, 24]
    assert (loss / count, score / count) == pytest.approx(whole)
    assert not torch.equal(*drawn)


def test_randomness_is_seeded_by_the_step_and_by_nothing_else():
    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model = network()
        torch.manual_seed(noise)
        results.append(weights(train(None, model=model)[0]))
    close(*results, atol=0, rtol=0)
    other, _ = train(None, dataclasses.replace(RECIPE, seed=6))
    assert not torch.equal(other[0].weight, results[0]["0.weight"])


def test_workers_read_the_same_rows():
    one, _ = train(None, dataclasses.replace(PLAIN, epochs=1))
    two, _ = train(None, dataclasses.replace(PLAIN, epochs=1, workers=1))
    close(weights(one), weights(two), atol=0, rtol=0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_says_what_to_try(error):
    def loss(model, x, y):
        raise error

    task = Task(loss, loss)
    with pytest.raises(TorchzooError, match=r"batch size of 12 in 2 part.*try 4 parts.*size of 6"):
        finetune(network(), task, data(), data(), RECIPE, device="cpu")


def test_out_of_memory_in_the_optimizer_or_the_evaluation(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def score(model, x, y):
        return full()

    task = Task(classification().loss, score)
    with pytest.raises(TorchzooError, match="batch size of 12 in 2 part"):
        finetune(network(), task, data(), data(), RECIPE, device="cpu")
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(TorchzooError, match="batch size of 12 in 2 part"):
        finetune(network(), classification(), data(), data(), RECIPE, device="cpu")


def test_there_is_nothing_to_resume_without_a_folder():
    with pytest.raises(ValueError, match="out: expected the folder of the run to resume"):
        finetune(network(), classification(), data(), data(), RECIPE, resume=True, device="cpu")


def test_other_errors_are_not_taken_for_it():
    task = dataclasses.replace(classification(), loss=lambda model, x, y: model(x[:, :3]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        finetune(network(), task, data(), data(), RECIPE, device="cpu")


def test_a_loss_that_is_not_finite_ends_the_run():
    task = dataclasses.replace(classification(), loss=lambda m, x, y: m(x).sum() * torch.inf)
    with pytest.raises(TorchzooError, match="at step 0; try a lower lr"):
        finetune(network(), task, data(), data(), RECIPE, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulate": 0}, "accumulate"),
        ({"save_every": 0}, "save_every"),
        ({"precision": "fp8"}, "precision: expected no, bf16 or fp16, got 'fp8'"),
        ({"warmup": 1.0}, "warmup"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_freezing_names_what_is_wrong():
    with pytest.raises(
        UnknownNameError, match=r"'0.wait' fits no parameter; did you mean 0.weight"
    ):
        train(None, dataclasses.replace(PLAIN, freeze=("0.wait",)))
    with pytest.raises(TorchzooError, match="a parameter that learns, got none"):
        train(None, dataclasses.replace(PLAIN, freeze=("*",)))


def test_no_rows_are_an_error():
    empty = TensorDataset(torch.ones(0, 6), torch.ones(0))
    for sets in ((empty, data()), (data(), empty)):
        with pytest.raises(TorchzooError, match="rows to train on and to test on"):
            finetune(network(), classification(), *sets, PLAIN, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs there")
def test_fp16_needs_a_gpu():
    with pytest.raises(TorchzooError, match="fp16 needs a GPU"):
        train(None, dataclasses.replace(PLAIN, precision="fp16"))
