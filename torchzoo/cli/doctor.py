"""`torchzoo doctor`: what this installation has, what it lacks and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchzoo.cli._output import BAD_REQUEST, Json, new_grid, new_table, print_json, stdout, working
from torchzoo.version import __version__


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what is missing and how to get it.

    Exits with 1 where something that should work is broken.

    Example: [bold]torchzoo doctor[/bold]
    """
    with working("importing torch"):
        about = examine()
    if as_json:
        print_json(about)
    else:
        _show(about, stdout())
    if any(weight["status"] != "ok" for weight in about["weights"]):
        raise typer.Exit(BAD_REQUEST)


def examine() -> dict[str, Any]:
    """All that the doctor says, as its JSON object."""
    import torch

    from torchzoo.ops import library

    return {
        "torchzoo": __version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "torch": torch.__version__,
        "cuda": _cuda(),
        "compilers": {
            "g++": _program_version(os.environ.get("CXX") or "g++"),
            "nvcc": _program_version("nvcc"),
        },
        "cache": str(library.cache_folder()),
        **_kernels(),
        "extras": _extras(requires("torchzoo") or []),
        "weights": _shipped(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"built_for": torch.version.cuda, "devices": names}


def _program_version(program: str) -> str | None:
    """The version that a program states of itself; None where it is not on PATH."""
    if not shutil.which(program):
        return None
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "found, but does not run"
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", done.stdout)
    return numbers[-1] if numbers else "unknown"


def _kernels() -> dict[str, Any]:
    """The kernel libraries, and what each operator runs on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the warning says is what the doctor shows
        import torch

        from torchzoo import ops
        from torchzoo.ops import library

        found = library.load().values()
    return {
        "libraries": [
            {"name": lib.name, "path": str(lib.path), "origin": lib.origin}
            | (
                {"instruction_set": library.instruction_set(lib.path)}
                if lib.name == "cpu" and lib.loaded
                else {}
            )
            for lib in found
            if lib.path
        ],
        "ops": {
            op: dict(zip(("backend", "reason"), library.backend(op), strict=True))
            for op in ops.__all__
            if hasattr(torch.ops.torchzoo, op)  # the others are made of these
        },
    }


def _extras(requirements: list[str]) -> dict[str, Any]:
    """For each extra of the package what of it is installed, and the command that installs it."""
    extras: dict[str, dict[str, str | None]] = {}
    for line in requirements:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra\s*==\s*["'](\w+)["']""", line)
        if name and extra and name[0] != "torchzoo":
            extras.setdefault(extra[1], {})[name[0]] = _installed(name[0])
    return {
        extra: {
            "present": None not in packages.values(),
            "packages": packages,
            "install": f"pip install torchzoo[{extra}]",
        }
        for extra, packages in extras.items()
    }


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _shipped() -> list[dict[str, str]]:
    """Each shipped weight, and whether its file is the one of the manifest."""
    from torchzoo import _weights

    found = []
    for name, entry in sorted(_weights.manifest().items()):
        path = _weights.WEIGHTS / entry["file"]
        status = "missing"
        if path.is_file():
            status = "ok" if _weights.sha256(path) == entry["sha256"] else "damaged"
        found.append({"name": name, "path": str(path), "status": status})
    return found


def _show(about: dict[str, Any], console: Console) -> None:
    rows = new_grid("bold")
    for key in ("torchzoo", "python", "torch"):
        rows.add_row(key, about[key])
    rows.add_row("CUDA", _cuda_line(**about["cuda"]))
    for compiler, found in about["compilers"].items():
        rows.add_row(compiler, found or Text("not found", "dim"))
    rows.add_row("cache", about["cache"])
    for library in about["libraries"]:
        kind = f" ({library['instruction_set']})" if "instruction_set" in library else ""
        rows.add_row(f"{library['name']} kernels", f"{library['origin']}: {library['path']}{kind}")
    console.print(rows)

    table = _table("operator", "runs on", "why")
    for op, state in about["ops"].items():
        style = "green" if state["backend"] == "native" else "default"
        table.add_row(op, Text(state["backend"], style), state["reason"])
    console.print("", table, sep="\n")

    table = _table("extra", "", "packages")
    for extra, state in about["extras"].items():
        missing = [name for name, found in state["packages"].items() if found is None]
        mark = Text("✗", "yellow") if missing else Text("✓", "green")
        text = f"missing {', '.join(missing)}: {state['install']}"
        table.add_row(extra, mark, Text(text if missing else ", ".join(state["packages"])))
    console.print("", table, sep="\n")

    table = _table("weights", "sha256", "file")
    for weight in about["weights"]:
        style = "green" if weight["status"] == "ok" else "bold red"
        table.add_row(weight["name"], Text(weight["status"], style), weight["path"])
    console.print("", table if about["weights"] else "No weights are shipped.", sep="\n")


def _cuda_line(built_for: str | None, devices: list[str]) -> str:
    built = f"CUDA {built_for}" if built_for else "the CPU only"
    return f"{', '.join(devices) or 'no device'} (torch is built for {built})"


def _table(*columns: str) -> Table:
    table = new_table()
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table
