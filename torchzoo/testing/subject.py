"""What a check looks at: how to build the module, and how to call it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchzoo.registry import Card


@dataclass(frozen=True)
class Subject:
    """A module under test.

    Attributes:
        factory: The class, or a callable that takes keyword arguments and gives a module.
        inputs: Positional inputs of `forward`.
        kwargs: Arguments for `factory`; modules among them are copied for every build.
        batch_dims: How many leading dimensions of each input are batch dimensions.
        bad_options: Values that must be refused by name; None if the caller states none.
        exempt: Capabilities, or names of checks, that lift checks.
        device: Where to run.
    """

    factory: Callable[..., nn.Module]
    inputs: tuple[Tensor, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_dims: int = 1
    bad_options: Mapping[str, Any] | None = None
    exempt: frozenset[str] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, card: Card, device: torch.device | str = "cpu") -> Subject:
        """The subject of a registered module, from a fresh example."""
        example = card.example()
        return cls(
            card.cls,
            example.inputs,
            example.kwargs,
            example.batch_dims,
            example.bad_options,
            frozenset(card.exempt),
            torch.device(device),
        )

    @property
    def name(self) -> str:
        return type(self.build()).__name__

    def build(self, seed: int = 0, **options: Any) -> nn.Module:
        """A fresh module from a seed, in training mode.

        `device` and `dtype` reach modules among the arguments too; where the factory does not
        take them, its module can only consist of those.
        """
        device = options.get("device", torch.get_default_device())
        given = {
            key: _moved(value, device, options.get("dtype")) for key, value in self.kwargs.items()
        }
        taken = inspect.signature(self.factory).parameters
        if not any(item.kind is item.VAR_KEYWORD for item in taken.values()):
            options = {
                key: value
                for key, value in options.items()
                if key in taken or key not in ("device", "dtype")
            }
        torch.manual_seed(seed)
        module = self.factory(**{**given, **options})
        return module if "device" in options or device.type == "meta" else module.to(self.device)

    def make_inputs(
        self, dtype: torch.dtype | None = None, grad: bool = False
    ) -> tuple[Tensor, ...]:
        """The inputs on the device; floating-point ones in `dtype` and, if `grad`, as leaves."""
        return tuple(
            value.to(self.device, dtype if value.is_floating_point() else None)
            .detach()
            .clone()
            .requires_grad_(grad and value.is_floating_point())
            for value in self.inputs
        )

    def flat_inputs(self) -> tuple[Tensor, ...]:
        """The inputs with their batch dimensions flattened into one."""
        return tuple(value.flatten(0, self.batch_dims - 1) for value in self.make_inputs())


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A copy of `value` with the modules in it on the device and in the dtype."""
    return pytree.tree_map(
        lambda item: copy.deepcopy(item).to(device, dtype) if isinstance(item, nn.Module) else item,
        value,
    )


def call(module: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The tensors that a seeded call returns, whatever structure they come in."""
    torch.manual_seed(seed)
    return tensors(module(*inputs))


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a pytree; a distribution counts as its mean and variance."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, torch.distributions.Distribution):
            found += [leaf.mean, leaf.variance]
    assert found, f"forward returned no tensor but {type(output).__name__}"
    return found


class AsTensors(nn.Module):
    """A module whose outputs come as a list of tensors, for what can't return other objects."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return tensors(self.module(*inputs))


def backward(outputs: Iterable[Tensor]) -> None:
    """Backward of a fixed random projection of all floating-point outputs."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for output in outputs:
        if output.requires_grad:
            weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            total = total.to(output.device) + (output * weight).sum()
    assert total.requires_grad, "no output depends on parameters or inputs differentiably"
    total.backward()


def assert_same(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    what: str,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Assert that outputs are equal in number, shape, dtype and, to rounding, in value."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} outputs, not {len(expected)}"
    for index, (one, two) in enumerate(zip(actual, expected, strict=True)):
        try:
            torch.testing.assert_close(one, two, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{what}: output {index}: {error}") from None
