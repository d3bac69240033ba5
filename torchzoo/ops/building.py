"""`torchzoo build`: compiles the kernel libraries into the user's cache.

Only the compiler is called, with torch's headers: the libraries use the LibTorch stable ABI alone,
so they need none of `torch.utils.cpp_extension`, which would look for a CUDA runtime. Objects are
compiled side by side up to a job cap, the library is linked under a temporary name and renamed when
whole, and a lock file keeps two processes from building at once; a killed build leaves neither a
lock nor a library behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from torchzoo.ops import library
from torchzoo.ops.library import KernelError

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CPU_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", TARGET)
ARCHITECTURES = ("80", "90")
CUDA_FLAGS = (
    *("-O3", "-std=c++20", "-DUSE_CUDA", TARGET, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
    f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}",
)


def compiler(name: str) -> str:
    """The compiler of a library: `CXX` or g++; nvcc on PATH or under `CUDA_HOME`.

    Raises:
        KernelError: There is none.
    """
    if name == "cpu":
        wanted = os.environ.get("CXX", "g++")
        if found := shutil.which(wanted):
            return found
        raise KernelError(f"no C++ compiler: {wanted!r} is not on PATH; install g++ or set CXX")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if found := shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin"):
        return found
    raise KernelError("no CUDA compiler: nvcc is neither on PATH nor under CUDA_HOME")


def build(
    name: str = "cpu",
    *,
    clean: bool = False,
    jobs: int | None = None,
    target: Path | None = None,
    flags: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Path:
    """Compile a library unless it is there already, and return its path.

    Args:
        name: `"cpu"` or `"cuda"`.
        clean: Compile even where the library is there.
        jobs: How many files are compiled at once; by default the number of cores, at most 4.
        target: Where a copy of the library goes; by default it stays in the cache alone, where
            `library.find` looks for it.
        flags: More flags for every compile and the link, for example a sanitizer's.
        progress: Called with files done, files in all, and the file that comes next.

    Raises:
        KernelError: No compiler, a torch below the floor, a compile error (with the compiler's
            first error), or a folder that can't be written.
    """
    from filelock import FileLock

    if library.torch_version() < library.FLOOR:
        raise KernelError(f"kernels need torch >= 2.10, found {torch.__version__}")
    program = compiler(name)
    path = library.built_path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            if clean:
                path.unlink(missing_ok=True)
            scratch = f".building-{name}-"
            for left_by_a_kill in path.parent.glob(f"{scratch}*"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            if not path.is_file():
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=scratch) as folder:
                    made = _compile(name, program, Path(folder), jobs, flags, progress)
                    os.replace(made, path)
        return _copy(path, target) if target else path
    except OSError as error:
        mend = "set TORCHZOO_CACHE to a folder that can be written"
        where = error.filename or path
        raise KernelError(f"can't write {where}: {error.strerror or error}; {mend}") from error


def _copy(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        os.replace(shutil.copy(path, folder), target)
    return target


def _compile(
    name: str,
    program: str,
    folder: Path,
    jobs: int | None,
    flags: Sequence[str],
    progress: Callable[[int, int, str], None],
) -> Path:
    files = library.sources(name)
    total = len(files) + 1
    theirs = Path(torch.__file__).parent / "include"
    headers = [f"-I{library.SOURCES}", "-isystem", str(theirs)]  # whose warnings are torch's own
    base = [program, *(CPU_FLAGS if name == "cpu" else CUDA_FLAGS), *flags, *headers]
    objects = [folder / f"{file.stem}.o" for file in files]
    with ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, 4)) as pool:
        running = [
            pool.submit(_run, [*base, "-c", str(file), "-o", str(made)])
            for file, made in zip(files, objects, strict=True)
        ]
        for done, (file, task) in enumerate(zip(files, running, strict=True)):
            progress(done, total, file.name)
            task.result()
    progress(len(files), total, "linking")
    made = folder / f"libtorchzoo_{name}.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    linked = ["-ltorch_cpu", "-ltorch"] if name == "cpu" else ["-ltorch_cuda", "-ltorch_cpu"]
    _run(
        [program, "-shared", *flags, *map(str, objects), "-o", str(made), f"-L{torch_lib}", *linked]
    )
    library.seal(made)
    progress(total, total, "")
    return made


def _run(command: list[str]) -> None:
    plain = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error:" in line), done.stderr.strip()[-500:])
        raise KernelError(f"{Path(command[0]).name} failed: {first}")
