"""Finding and loading the kernel libraries; never a compile that nobody asked for.

A library is looked for where the wheel ships it, then where `torchzoo build` puts it, and else the
operators run on their PyTorch reference, with one warning that names the command. The environment
variable `TORCHZOO_OPS=reference|native` forces one; `native` raises where a library is missing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from torchzoo.errors import TorchzooError

NAMES = ("cpu", "cuda")
FLOOR = (2, 10)
SOURCES = Path(__file__).parent.parent / "csrc"
SHIPPED = Path(__file__).parent.parent / "lib"


class KernelError(TorchzooError, RuntimeError):
    """A kernel library can't be built or loaded; the message holds the cause and the mend."""


@dataclass(frozen=True)
class Library:
    """A kernel library, found or not.

    Attributes:
        name: `"cpu"` or `"cuda"`.
        path: The file, or None where there is none.
        origin: `"wheel"`, `"build"` or `"none"`.
        error: Why it could not be loaded, empty where it was.
        ops: The operators that it brings.
    """

    name: str
    path: Path | None
    origin: str
    error: str = ""
    ops: tuple[str, ...] = field(default=())

    @property
    def loaded(self) -> bool:
        return self.path is not None and not self.error


def sources(name: str) -> list[Path]:
    """The C++ or CUDA files of a library, headers not counted."""
    return sorted(SOURCES.glob("*_cpu.cpp" if name == "cpu" else "*_cuda.cu"))


def ops_of(name: str) -> tuple[str, ...]:
    """The operators that a library's sources register for the dispatcher."""
    found: set[str] = set()
    for path in sources(name):
        found |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text(encoding="utf-8")))
    return tuple(sorted(found))


def cache_folder() -> Path:
    """Where `torchzoo build` keeps libraries: `TORCHZOO_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("TORCHZOO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchzoo"


def built_path(name: str) -> Path:
    """The file that `torchzoo build` makes from the present sources for the present torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (Path(__file__).with_name("building.py"), *sorted(SOURCES.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache_folder() / f"{digest.hexdigest()[:16]}" / f"libtorchzoo_{name}.so"


def find(name: str) -> Library:
    """The library file that would be loaded, without loading it."""
    shipped, built = SHIPPED / f"libtorchzoo_{name}.so", built_path(name)
    if shipped.is_file():
        return Library(name, shipped, "wheel", ops=ops_of(name))
    if built.is_file():
        return Library(name, built, "build", ops=ops_of(name))
    return Library(name, None, "none", "not built")


def mode() -> str:
    """The value of `TORCHZOO_OPS`: `"auto"`, `"reference"` or `"native"`.

    Raises:
        KernelError: It has another value.
    """
    value = os.environ.get("TORCHZOO_OPS", "auto")
    if value not in ("auto", "reference", "native"):
        raise KernelError(f"TORCHZOO_OPS: expected reference, native or auto, got {value!r}")
    return value


@cache
def load() -> dict[str, Library]:
    """Load the libraries once a process and say what came of it; called on importing the ops.

    Raises:
        KernelError: `TORCHZOO_OPS=native` and the CPU library can't be loaded.
    """
    if mode() == "reference":
        return {name: Library(name, None, "none", "TORCHZOO_OPS=reference") for name in NAMES}
    found = {"cpu": _load(find("cpu"))}
    cuda = find("cuda")
    if torch.cuda.is_available() or mode() == "native":
        found["cuda"] = _load(cuda)
    else:
        found["cuda"] = Library("cuda", cuda.path, cuda.origin, "this torch sees no CUDA device")
    wanted = [name for name in NAMES if name == "cpu" or torch.cuda.is_available()]
    for library in (found[name] for name in wanted):
        if not library.loaded:
            text = f"{library.name} kernels: {library.error}. {mend(library)}"
            if mode() == "native":
                raise KernelError(text)
            warnings.warn(f"{text} Operators run on the PyTorch reference.", stacklevel=3)
    return found


def mend(library: Library) -> str:
    """The one command that mends a library that is not loaded."""
    if torch_version() < FLOOR:
        return "Run `pip install --upgrade torch`."
    if library.origin == "wheel":
        return "Run `pip install --force-reinstall --no-deps torchzoo`."
    flag = " --cuda" if library.name == "cuda" else ""
    clean = " --clean" if library.path else ""
    return f"Run `torchzoo build{flag}{clean}`."


def torch_version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def seal(path: Path) -> None:
    """Append the file's SHA-256: the loader of shared libraries crashes on a truncated one."""
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        file.write(digest.encode())


def is_whole(path: Path) -> bool:
    """Whether a sealed file is as it was sealed."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-64]).hexdigest().encode() == content[-64:]


def _load(library: Library) -> Library:
    if library.path is None:
        return library
    if torch_version() < FLOOR:
        floor = ".".join(map(str, FLOOR))
        error = f"they need torch >= {floor}, found {torch.__version__}"
    elif not is_whole(library.path):
        error = f"{library.path} is damaged"
    else:
        error = _try_load(library.path)
    return Library(library.name, library.path, library.origin, error, library.ops)


def _try_load(path: Path) -> str:
    """Load a library; an empty string, or the linker's first real error."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        return f"{path} does not load: {cause}"
    return ""


def instruction_set(path: Path) -> str:
    """What a CPU library runs on here: `"baseline"`, `"avx2"` or `"avx512"`."""
    name = ctypes.CDLL(str(path)).torchzoo_cpu_isa
    name.restype = ctypes.c_char_p
    found: bytes = name()
    return found.decode()


def release_memory() -> int:
    """Give back the memory that the CPU kernels keep of large results for the next ones.

    Results of 4 MiB or more are freed into a store of at most 512 MiB, as memory from the system
    costs about as much to write to for the first time as a pass over it takes. Their storage can't
    be resized.

    Returns:
        How many bytes were given back.

    Example:
        >>> _ = release_memory()
        >>> release_memory()
        0
    """
    library = load()["cpu"]
    if not library.loaded:
        return 0
    release = ctypes.CDLL(str(library.path)).torchzoo_release_memory
    release.restype = ctypes.c_uint64
    return int(release())


def backend(op: str, device: str = "cpu") -> tuple[str, str]:
    """Whether an operator runs `"native"` or on its `"reference"`, and why."""
    library = load()[device]
    if library.loaded and op in library.ops:
        return "native", f"{library.origin}: {library.path}"
    return "reference", library.error or f"the {device} library has no kernel for it"
