"""The CUDA library: it compiles without warnings, and loads where there is no GPU."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from torchzoo.ops import building, library


def slow(test):
    """The first test waits for the compilers, which on a busy machine takes minutes."""
    return pytest.mark.slow(pytest.mark.timeout(1200)(test))


def has_nvcc() -> bool:
    try:
        return bool(building.compiler("cuda"))
    except library.KernelError:
        return False


# On a GPU these run step by step, on torch's kernels and those of other operators.
COMPOSED = {
    "categorical_log_prob",
    "categorical_log_prob_backward",
    "cauchy",
    "grouped_ffn",
    "grouped_ffn_backward",
}
# An entropy coder's integers, and the sums that its tables are made from.
CPU_ONLY = {"ordered_matmul", "rans_decode", "rans_encode", "rans_tables"}


def test_every_cpu_kernel_has_a_cuda_kernel():
    assert set(library.ops_of("cpu")) == set(library.ops_of("cuda")) | COMPOSED | CPU_ONLY


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, compiled for every architecture, and what the compilers said about it."""
    if not has_nvcc():
        pytest.skip("no CUDA compiler")
    if not torch.version.cuda:
        pytest.skip("this torch is built without CUDA, so there is nothing to link with")
    said, run = [], subprocess.run

    def listening(*args, **kwargs):
        done = run(*args, **kwargs)
        said.append(done.stdout + done.stderr)
        return done

    path = tmp_path_factory.mktemp("cuda") / "libtorchzoo_cuda.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building.subprocess, "run", listening)
        flags = ("-Werror=all-warnings", "-Xptxas=-v")
        building.build("cuda", target=path, flags=flags)
    return path, "\n".join(said)


@slow
def test_kernels_keep_their_sums_in_registers(built):
    _, said = built
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores",
        said,
        flags=re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == {f"sm_{a}" for a in building.ARCHITECTURES}
    inner = [k for k in kernels if re.search("forward_kernel|dweight_kernel|step_kernel", k[0])]
    assert len(inner) >= 3 * 20
    assert [kernel for kernel in inner if int(kernel[3])] == []
    # elsewhere the compiler may give up a few addresses for occupancy, but no tile of sums
    assert [kernel for kernel in kernels if int(kernel[3]) > 96] == []


@slow
def test_the_library_uses_the_stable_abi_alone(built):
    path, _ = built
    if not shutil.which("nm"):
        pytest.skip("no nm")
    command = ["nm", "-DC", "--undefined-only", str(path)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch_call_dispatcher" in symbols
    assert re.findall(r".*\b(?:c10|at|torch)::.*", symbols) == []
    assert re.findall(r"U ((?:cuda|Py)\w*)", symbols) == []  # the CUDA runtime is linked in


@slow
def test_the_library_loads_without_a_gpu(built):
    path, _ = built
    ops = library.ops_of("cuda")
    code = (
        "import torch, torchzoo.ops\n"
        f"torch.ops.load_library({str(path)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"assert all(has(f'torchzoo::{{op}}', 'CUDA') for op in {ops!r})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
