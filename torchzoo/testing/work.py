"""Work counted rather than timed: the same on every machine, however busy."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CountElements"]


class CountElements(TorchDispatchMode):
    """Counts the elements that operators read and write while it is entered.

    Attributes:
        elements: Sum over all calls of the elements of their inputs and outputs.

    Example:
        >>> with CountElements() as work:
        ...     _ = torch.ones(3) + torch.ones(3)
        >>> work.elements  # two tensors filled, two read, one written
        15
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        self.elements += sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        return out
