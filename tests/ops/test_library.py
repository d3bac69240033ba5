"""Building and loading the kernel libraries, in whole and in broken environments."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from torchzoo.ops import building, library
from torchzoo.ops.library import KernelError

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")

SOURCE = """
#include "cpu.h"
namespace torchzoo {
Tensor probe(const Tensor& x) { return torch::stable::clone(x); }
STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) { m.impl("probe", TORCH_BOX(&probe)); }
}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A library of one trivial kernel in a folder of its own, so that a build takes seconds."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    for header in ("cpu.h", "pool.h"):
        shutil.copy(library.SOURCES / header, sources)
    (sources / "probe_cpu.cpp").write_text(SOURCE)
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "lib")
    monkeypatch.setenv("TORCHZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "CPU_FLAGS", ("-O0", *building.CPU_FLAGS[1:]))
    return tmp_path


def in_new_process(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_compiler
def test_a_build_is_found_whole_and_kept(small):
    assert library.find("cpu").origin == "none"
    seen = []
    path = building.build("cpu", progress=lambda *step: seen.append(step))
    assert seen == [(0, 2, "probe_cpu.cpp"), (1, 2, "linking"), (2, 2, "")]
    found = library.find("cpu")
    assert (found.path, found.origin, found.ops) == (path, "build", ("probe",))
    assert library.is_whole(path)
    before = path.stat().st_mtime_ns
    assert building.build("cpu").stat().st_mtime_ns == before
    assert building.build("cpu", clean=True).stat().st_mtime_ns > before
    assert sorted(p.suffix for p in path.parent.iterdir()) in ([".so"], [".lock", ".so"])
    (small / "csrc" / "probe_cpu.cpp").write_text(SOURCE + "// changed\n")
    assert library.find("cpu").origin == "none"


@needs_compiler
def test_the_shipped_library_comes_first(small):
    built = building.build("cpu")
    shipped = building.build("cpu", target=small / "lib" / "libtorchzoo_cpu.so")
    assert library.find("cpu").path == shipped != built
    assert library.find("cpu").origin == "wheel"


@needs_compiler
def test_a_truncated_library_is_named_not_loaded(small):
    path = building.build("cpu")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-1], b"\0" + content[1:]):
        path.write_bytes(damaged)
        found = library._load(library.find("cpu"))
        assert not found.loaded
        assert found.error == f"{path} is damaged"
        assert library.mend(found) == "Run `torchzoo build --clean`."


@needs_compiler
def test_a_library_of_another_abi_shows_the_linkers_error(small):
    path = small / "cache" / "bad.so"
    path.parent.mkdir()
    source = small / "bad.cpp"
    source.write_text('extern "C" void not_there(); extern "C" void f() { not_there(); }')
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(path)], check=True
    )
    library.seal(path)
    found = library._load(library.Library("cpu", path, "build"))
    assert not found.loaded
    assert "undefined symbol: not_there" in found.error


@needs_compiler
def test_a_killed_build_leaves_nothing_in_the_way(small):
    slow = small / "slow-compiler"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    code = (
        "from pathlib import Path; from torchzoo.ops import library, building;"
        f"library.SOURCES = Path({str(small / 'csrc')!r}); building.build('cpu')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "CXX": str(slow)}, start_new_session=True
    )
    folder = library.built_path("cpu").parent
    deadline = time.monotonic() + 120
    while not list(folder.glob(".building-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(folder.glob(".building-*"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert library.find("cpu").origin == "none"
    assert library.is_whole(building.build("cpu"))
    assert not list(folder.glob(".building-*"))


@needs_compiler
def test_processes_that_build_at_once_make_one_library(small):
    code = (
        "from pathlib import Path; from torchzoo.ops import library, building;"
        f"library.SOURCES = Path({str(small / 'csrc')!r});"
        "building.CPU_FLAGS = ('-O0', *building.CPU_FLAGS[1:]);"
        "runs = []; real = building._compile;"
        "building._compile = lambda *a: runs.append(1) or real(*a);"
        "print(building.build('cpu'), len(runs))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines = [process.communicate()[0].split() for process in running]
    assert lines[0][0] == lines[1][0] == str(library.built_path("cpu"))
    assert sorted(line[1] for line in lines) == ["0", "1"]


def test_no_compiler(small, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelError, match=r"'no-such-compiler' is not on PATH; install g\+\+"):
        building.build("cpu")


def test_no_cuda_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(KernelError, match="nvcc is neither on PATH nor under CUDA_HOME"):
        building.build("cuda")


@needs_compiler
def test_a_compile_error_is_the_compilers_first(small):
    (small / "csrc" / "probe_cpu.cpp").write_text("int f() { return undeclared_name; }")
    with pytest.raises(KernelError, match=r"g\+\+ failed: .*undeclared_name"):
        building.build("cpu")
    assert library.find("cpu").origin == "none"


def test_a_torch_below_the_floor(small, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    with pytest.raises(KernelError, match=r"need torch >= 2.10, found 2.9.1"):
        building.build("cpu")
    path = small / "some.so"
    path.write_bytes(b"x")
    found = library._load(library.Library("cpu", path, "wheel"))
    assert "they need torch >= 2.10, found 2.9.1" in found.error
    assert library.mend(found) == "Run `pip install --upgrade torch`."


def test_a_cache_that_cannot_be_written(small, monkeypatch):
    (small / "file").write_text("")
    monkeypatch.setenv("TORCHZOO_CACHE", str(small / "file" / "cache"))
    with pytest.raises(KernelError, match=r"can't write .*set TORCHZOO_CACHE to a folder"):
        building.build("cpu")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("reference", ""), ("auto", "cpu kernels: not built. Run `torchzoo build`.")],
)
def test_without_a_library_the_reference_runs_with_one_warning(tmp_path, mode, expected):
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, torchzoo.ops as ops\n"
        "    ops.grouped_mm(torch.ones(1, 2), torch.ones(1, 2, 3), torch.tensor([1]))\n"
        "print([str(w.message) for w in seen if 'kernels' in str(w.message)])\n"
        "print(ops.library.backend('grouped_mm'))"
    )
    done = in_new_process(code, TORCHZOO_OPS=mode, TORCHZOO_CACHE=str(tmp_path))
    warned, backend = done.stdout.splitlines()
    assert warned.count("kernels") == bool(expected)
    assert expected in warned
    assert "'reference'" in backend


def test_native_is_an_error_where_it_is_missing(tmp_path):
    done = in_new_process(
        "import torchzoo.ops", TORCHZOO_OPS="native", TORCHZOO_CACHE=str(tmp_path)
    )
    assert done.returncode == 1
    assert "KernelError: cpu kernels: not built. Run `torchzoo build`." in done.stderr
    done = in_new_process("import torchzoo.ops", TORCHZOO_OPS="fast")
    assert "TORCHZOO_OPS: expected reference, native or auto, got 'fast'" in done.stderr


def test_the_library_uses_the_stable_abi_alone():
    found = library.load()["cpu"]
    if not found.loaded or not shutil.which("nm"):
        pytest.skip(f"no CPU library to look at: {found.error}")
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(found.path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    foreign = re.findall(r".*\b(?:c10|at|torch)::.*", symbols)
    assert "torch_call_dispatcher" in symbols
    assert foreign == []
    assert "Py" not in re.findall(r"U (Py\w*)", symbols)


def test_every_kernel_belongs_to_an_operator():
    for name in library.NAMES:
        for op in library.ops_of(name):
            assert hasattr(torch.ops.torchzoo, op), f"{name} has a kernel of unknown {op}"
