"""`torchzoo doctor`: what is there, what is missing, and weights whose hash is wrong."""

import hashlib
import json

import torch

from torchzoo import _weights, ops
from torchzoo.cli import doctor


def test_json_says_what_runs(run):
    code, out, err = run("doctor", "--json")
    about = json.loads(out)
    assert (code, err) == (0, "")
    assert about["torch"] == torch.__version__
    assert about["cuda"]["built_for"] == torch.version.cuda
    assert list(about["ops"]) == [op for op in ops.__all__ if hasattr(torch.ops.torchzoo, op)]
    assert {"delta_linear_step", "grouped_mm"} <= about["ops"].keys()
    for state in about["ops"].values():
        assert state["backend"] in ("reference", "native")
        assert state["reason"]
    assert all({"name", "path", "origin"} <= set(library) for library in about["libraries"])


def test_extras_are_read_from_the_package_metadata(monkeypatch):
    have = {"matplotlib": "3.9"}
    monkeypatch.setattr(doctor, "_installed", have.get)
    assert doctor._extras(
        [
            "torch>=2.10",
            'matplotlib>=3.8; extra == "plot"',
            "scikit-learn>=1.4 ; extra == 'train'",
            'torchzoo[plot,train]; extra == "all"',
        ]
    ) == {
        "plot": {
            "present": True,
            "packages": {"matplotlib": "3.9"},
            "install": "pip install torchzoo[plot]",
        },
        "train": {
            "present": False,
            "packages": {"scikit-learn": None},
            "install": "pip install torchzoo[train]",
        },
    }


def test_a_missing_extra_names_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "accelerate" else "1")
    assert "missing accelerate: pip install torchzoo[train]" in run("doctor")[1]


def test_damaged_and_missing_weights_are_found(run, tmp_path, monkeypatch):
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "bad").write_bytes(b"changed")
    digest = hashlib.sha256(b"good").hexdigest()
    entries = {name: {"file": name, "sha256": digest} for name in ("good", "bad", "gone")}
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    monkeypatch.setattr(_weights, "WEIGHTS", tmp_path)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    status = {weight["name"]: weight["status"] for weight in json.loads(out)["weights"]}
    assert status == {"good": "ok", "bad": "damaged", "gone": "missing"}
    assert "damaged" in run("doctor")[1]


def test_a_compiler_that_is_not_there_is_none():
    assert doctor._program_version("no-such-compiler") is None
