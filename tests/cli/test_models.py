"""The commands on whole models: swap, finetune, compare, and bench of a model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from torchzoo import timing

MODEL = ("--model", "timm:test_resnet")
SWAP = ("--swap", "relu=CRReLU")


def test_swap_shows_a_tree_with_what_changed(run):
    code, out, err = run("swap", *MODEL, *SWAP, "--size", 32)
    assert (code, err) == (0, "")
    assert "act1  ReLU → CRReLU  0 → 1 parameters" in out
    assert "CRReLU starts within 0.0061 of ReLU" in out
    code, out, _ = run("swap", *MODEL, *SWAP, "--size", 32, "--classes", 10, "--json")
    (report,) = json.loads(out)
    assert report["parameters"][1] - report["parameters"][0] == report["count"] == 12
    assert report["flops"][0] == report["flops"][1] > 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((*MODEL,), 2, "expected --swap"),
        ((*MODEL, "--swap", "relu=CRRelu"), 2, "no layer 'CRRelu'; did you mean CRReLU"),
        ((*MODEL, "--swap", "layers.*=CRReLU"), 2, "selects nothing of ResNet"),
        ((*MODEL, "--swap", "relu"), 1, "expected selector=Layer"),
        (("--model", "timm:test_resnt", *SWAP), 2, "timm has none; did you mean test_resnet"),
    ],
)
def test_swaps_that_cannot_be(run, options, code, message):
    found, out, err = run("swap", *options)
    assert (found, out) == (code, "")
    assert message in err.replace("\n", " ")


def test_finetune_writes_its_run_and_goes_on(run, tmp_path):
    out = tmp_path / "run"
    options = (*MODEL, *SWAP, "--data", "digits", "--size", 16, "--batch-size", 256, "--epochs", 2)
    code, printed, err = run("finetune", *options, "--out", out)
    assert (code, err) == (0, "")
    assert "best accuracy" in printed
    job = json.loads((out / "job.json").read_text())
    assert (job["model"], job["swaps"]) == ("timm:test_resnet", ["relu=CRReLU"])
    assert "act1.eps" in load_file(out / "best.safetensors")
    code, _, err = run("finetune", *options, "--out", out)
    assert code == 1
    assert "holds a run" in err
    before = load_file(out / "last.safetensors")
    code, printed, err = run("finetune", *options, "--out", out, "--resume", "--json")
    assert code == 0
    assert "went on after step 12" in err
    assert json.loads(printed)["steps"] == 12
    after = load_file(out / "last.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--data", "folder:/nowhere/at/all"), 1, "there is no such folder"),
        (("--data", "mnist"), 2, "expected digits, folder:PATH, torchvision:NAME"),
        (("--warmup", "2"), 1, "--warmup: expected a share"),
        (("--freeze", "fc.wait"), 2, "'fc.wait' fits no parameter; did you mean fc.weight"),
        (("--weights", "/nowhere.safetensors"), 1, "can't be read"),
    ],
)
def test_finetunes_that_cannot_be(run, tmp_path, options, code, message):
    found, out, err = run("finetune", *MODEL, "--size", 16, "--out", tmp_path, *options)
    assert (found, out) == (code, "")
    assert message in err.replace("\n", " ")


def test_compare_prints_a_table_and_saves_a_picture(run, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    options = (*MODEL, *SWAP, "--size", 16, "--seeds", 1, "--epochs", 1, "--batch-size", 128)
    code, out, err = run("compare", *options, "--out", tmp_path)
    assert code == 0
    assert "the swap changes the accuracy by" in out
    assert "step, ms" in out
    assert "CRReLU starts within" in err
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["seeds"] == [0]
    assert (tmp_path / "compare.png").exists()
    assert run("compare", *MODEL)[0] == 2


def test_bench_of_a_model_with_and_without_a_swap(run, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    file = tmp_path / "bench.json"
    options = (*MODEL, *SWAP, "--size", 32, "--batch-size", 2, "--rounds", 3, "--json", file)
    code, out, err = run("bench", *options)
    assert (code, err) == (0, "")
    assert "step, ms" in out
    plain, swapped = json.loads(file.read_text()).values()
    assert swapped["parameters"] - plain["parameters"] == 12
    assert plain["forward"]["seconds"]["low"] < plain["step"]["seconds"]["high"]
    for wrong in ((), (*MODEL, "--op", "grouped_mm")):
        code, _, err = run("bench", *wrong)
        assert code == 2
        assert "expected one of LAYER, --op and --model" in err


def test_bench_says_why_a_layer_has_no_peers(run):
    code, _, err = run("bench", "KnowledgeCircuit", "--rounds", "3", "--no-backward")
    assert code == 0
    assert "no peers: exact probabilities under rules" in " ".join(err.split())


def test_bench_of_a_layer_and_its_peers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    file, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--shapes", "4x8", "--shapes", "16x8", "--rounds", 3, "--json", file, "--plot", plot)
    code, out, err = run("bench", "CRReLU", "--against", "GELU", *options)
    assert (code, err) == (0, "")
    assert "step, ms" in out
    result = json.loads(file.read_text())
    assert {size: [*rows] for size, rows in result.items()} == {
        "4x8": ["CRReLU", "GELU"],
        "16x8": ["CRReLU", "GELU"],
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, err = run("bench", "CRReLU", "--against", "Gelu")
    assert (code, out) == (2, "")
    assert "no peer 'Gelu'" in err


def test_prosparse_on_a_language_model(run, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("the cat sat on the mat, the rat sat on the hat. " * 30)
    model = (
        "transformers:llama(hidden_size=16, intermediate_size=32, num_hidden_layers=1, "
        "num_attention_heads=2)"
    )
    options = ("--model", model, "--data", f"text:{book}", "--size", 16, "--recipe", "prosparse")
    budget = ("--epochs", 4, "--batch-size", 16, "--lr", 0.01, "--l1", 20, "--threshold", 0.05)
    code, out, err = run("finetune", *options, *budget, "--out", tmp_path / "run")
    assert code == 0, err
    assert "1 feed-forward layers have relu now" in err
    assert "fatrelu(0.05)" in out
    found = json.loads((tmp_path / "run" / "prosparse.json").read_text())
    relu, shifted = found["activations"]
    assert 0 < relu["inactive"] < shifted["inactive"] <= 1
    assert shifted["test_loss"] < 3.0
