"""Lazy package attributes (PEP 562), so that importing torchzoo costs little more than torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(
    package: str, exports: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package.

    Args:
        package: The package's `__name__`.
        exports: For each submodule, the public names that it defines; `".ops"` is `torchzoo.ops`,
            relative to the package, for what is found through either.
        submodules: Submodules that are themselves public.

    Raises:
        AttributeError: From the returned `__getattr__`, for a name that is not exported.
    """
    home = {name: module for module, names in exports.items() for name in names}
    public = sorted({*home, *submodules})

    def __getattr__(name: str) -> Any:
        if name in home:
            value = getattr(import_module(f".{home[name]}", package), name)
        elif name in submodules:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: public, public
