"""Reading Google-style docstrings: what the model card quotes and the contract asks for."""

from __future__ import annotations

import inspect
import re

_HEADER = re.compile(r"^([A-Z][a-z]+):[ \t]*(.*)$")


def sections(thing: object) -> dict[str, str]:
    """Split a docstring, not an inherited one, into sections: `{"": summary, "Args": ..., ...}`.

    A section starts at an unindented line such as `Args:`; what follows the colon on that line
    belongs to it. The summary before the first section is under the empty name.
    """
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        if header := _HEADER.match(line):
            name, line = header[1], header[2]
        found.setdefault(name, []).append(line)
    return {key: inspect.cleandoc("\n".join(lines)) for key, lines in found.items()}
