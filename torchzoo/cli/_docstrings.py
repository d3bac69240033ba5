"""What `info` takes from a unit: its summary, its signature, its example as code that runs."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchzoo._docstring import sections


def summary(thing: object) -> str:
    """The docstring's first paragraph, on one line."""
    return " ".join(sections(thing)[""].partition("\n\n")[0].split())


class _Bare(str):
    """An annotation kept as text, which `inspect` would show in quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def signature(thing: Callable[..., Any], width: int = 80) -> str:
    """`Name(arguments)`, one argument a line where it is wider than `width`."""
    name = getattr(thing, "__name__", str(thing))
    given = inspect.signature(thing)
    parameters = [
        p.replace(annotation=_Bare(p.annotation)) if isinstance(p.annotation, str) else p
        for p in given.parameters.values()
    ]
    line = name + str(given.replace(parameters=parameters, return_annotation=given.empty))
    if len(line) <= width:
        return line
    rows = [str(p) for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        rows.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return "\n".join([f"{name}(", *(f"    {row}," for row in rows), ")"])


def example_code(thing: object) -> str:
    """The docstring's example as a program: its imports, its lines, its outputs as comments.

    Empty where the docstring has no example.
    """
    steps = doctest.DocTestParser().get_examples(sections(thing).get("Example", ""))
    if not steps:
        return ""
    lines: list[str] = []
    for step in steps:
        source, want = step.source.rstrip(), step.want.rstrip().splitlines()
        line = f"{source}  # {want[0]}" if len(want) == 1 else ""
        if line and "\n" not in source and "#" not in source and len(line) <= 80:
            lines.append(line)
        else:
            # The blank line ends a block for those who paste into a prompt.
            end = [""] if source.splitlines()[-1].startswith(" ") else []
            lines += [source, *(f"# {line}" for line in want), *end]
    body = "\n".join(lines).rstrip()
    imports = _imports(body, sys.modules[thing.__module__])
    return "\n".join([*imports, "", body] if imports else [body]) + "\n"


def _imports(body: str, module: ModuleType) -> list[str]:
    """The import lines for what the code takes from the module that its docstring stands in."""
    names = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    stored = {
        node.id
        for node in ast.walk(ast.parse(body))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    stored |= {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(body))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    lines = []
    for name in sorted(names - stored - set(dir(builtins))):
        value = vars(module).get(name)
        if isinstance(value, ModuleType):
            last = value.__name__.rpartition(".")[2]
            rename = "" if value.__name__ == name else f" as {name}"
            lines.append(f"import {value.__name__}{rename}" if last else "")
        elif value is not None:
            lines.append(f"from {_home(name, value, module)} import {name}")
    return sorted(lines, key=lambda line: (not line.startswith("import torch"), line))


def _home(name: str, value: object, module: ModuleType) -> str:
    """The shortest public place to import a name from."""
    defined = getattr(value, "__module__", module.__name__)
    package = ".".join(defined.split(".")[:2])
    public = getattr(sys.modules.get(package), "__all__", ())
    return package if defined.startswith("torchzoo.") and name in public else defined
