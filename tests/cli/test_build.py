"""`torchzoo build` and `torchzoo bench`: what they print, save and refuse."""

import json

import pytest

from torchzoo import benchmark
from torchzoo.ops import building


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A build that only notes what it was asked for."""
    asked = []

    def build(name, **options):
        options.pop("progress")(1, 2, "some.cpp")
        asked.append((name, options))
        return options["target"] or tmp_path / f"{name}.so"

    monkeypatch.setattr(building, "build", build)
    return asked


def test_build_makes_the_cpu_library(run, compiler, tmp_path):
    code, out, _ = run("build")
    assert (code, out) == (0, f"cpu kernels: {tmp_path / 'cpu.so'}\n")
    assert compiler == [("cpu", {"clean": False, "jobs": None, "target": None})]


def test_build_of_both_as_json(run, compiler, tmp_path):
    code, out, _ = run(
        "build", "--cuda", "--clean", "--jobs", "3", "--out", str(tmp_path / "lib"), "--json"
    )
    paths = {name: tmp_path / "lib" / f"libtorchzoo_{name}.so" for name in ("cpu", "cuda")}
    assert code == 0
    assert json.loads(out) == [{"name": name, "path": str(path)} for name, path in paths.items()]
    assert [options["target"] for _, options in compiler] == list(paths.values())
    assert all(options["clean"] and options["jobs"] == 3 for _, options in compiler)


def test_build_without_a_compiler(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run("build", "--clean")
    assert (code, out) == (1, "")
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in err


def test_bench_saves_what_it_prints(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        benchmark, "machine_limits", lambda d: {"bytes_per_s": 1.0, "flops_per_s": 1.0}
    )
    monkeypatch.setattr(benchmark, "WARM_UP", 0.0)
    file, plot = tmp_path / "a.json", tmp_path / "a.png"
    asked = ("bench", "--op", "delta_linear_step", "--case", "1% changed", "--rounds", "3")
    code, out, _ = run(*asked, "--json", str(file), "--plot", str(plot))
    assert code == 0
    assert "delta_linear_step on" in out
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["cases"]] == ["4096 x 4096, 1% changed"]
    assert set(result["cases"][0]["seconds"]) == {"torchzoo", "dense"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*asked, "--json", "-")
    assert json.loads(out).keys() == result.keys()


def test_bench_of_an_unknown_operator(run):
    code, out, err = run("bench", "--op", "grouped_m")
    assert (code, out) == (2, "")
    assert "no benchmark of 'grouped_m'" in err
    assert "did you mean grouped_mm?" in err
