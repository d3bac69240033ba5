"""Options of a layer as text: `num_experts=4, k=1`."""

from __future__ import annotations

import ast
from typing import Any

from torchzoo.errors import TorchzooError


def parse_options(text: str, what: str) -> dict[str, Any]:
    """Read `name=value, ...`, the values being Python literals.

    Args:
        text: The options, without parentheses.
        what: What they belong to, for the message of an error.

    Raises:
        TorchzooError: Text of another form.

    Example:
        >>> parse_options("num_experts=4, gate='topk'", "MoELayer")
        {'num_experts': 4, 'gate': 'topk'}
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not options alone")
        if any(word.arg is None for word in call.keywords):
            raise ValueError("an option without a name")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise TorchzooError(
            f"{what}: expected options name=value with numbers, strings or lists, got {text!r}"
        ) from error
