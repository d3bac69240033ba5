"""What an optimiser has observed, and tensors as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observations:
    """Evaluations of a function; fields that were never given are None.

    Attributes:
        x: Points, `(n, d)`.
        y: Values, `(n,)`.
        constraints: What should be at most 0, `(n, c)`.
        fidelity: Fidelities, `(n,)`.
        grad: Gradients, `(n, d)`, NaN where there is none.

    Example:
        >>> data = Observations.empty(2).added(torch.zeros(1, 2), 3.0)
        >>> len(data), data.y
        (1, tensor([3.], dtype=torch.float64))
    """

    x: Tensor
    y: Tensor
    constraints: Tensor | None = None
    fidelity: Tensor | None = None
    grad: Tensor | None = None

    @classmethod
    def empty(cls, dim: int) -> Observations:
        """None yet, of so many inputs."""
        return cls(torch.empty(0, dim, dtype=torch.float64), torch.empty(0, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def inputs(self) -> Tensor:
        """Points with their fidelities."""
        return self.x if self.fidelity is None else torch.cat([self.x, self.fidelity[:, None]], 1)

    @property
    def gradients(self) -> Tensor:
        """Gradients, NaN where there is none."""
        return torch.full_like(self.x, math.nan) if self.grad is None else self.grad

    @property
    def feasible(self) -> Tensor:
        """Where constraints hold, `(n,)`."""
        if self.constraints is None:
            return torch.ones(len(self), dtype=torch.bool)
        return (self.constraints <= 0).all(1)

    def added(
        self,
        x: Tensor,
        y: Any,
        constraints: Tensor | None = None,
        fidelity: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> Observations:
        """These and more.

        Raises:
            ValueError: Not a finite number for each point, or constraints that come and go.
        """
        q, dim = x.shape
        y = torch.atleast_1d(torch.as_tensor(y, dtype=torch.float64)).detach()
        if y.shape != (q,) or not y.isfinite().all():
            raise ValueError(f"y: expected ({q},) of finite numbers, got {tuple(y.shape)}: {y}")
        new: dict[str, Tensor | None] = {}
        known = None if self.constraints is None else self.constraints.shape[1]
        if constraints is not None:
            constraints = constraints.detach().to(x)
            count = constraints.shape[-1] if known is None else known
            if constraints.shape != (q, count) or not constraints.isfinite().all():
                expected = f"({q}, {'c' if known is None else known}) of finite numbers"
                got = tuple(constraints.shape)
                raise ValueError(f"constraints: expected {expected}, got {got}")
        if len(self) and (constraints is None) != (known is None):
            raise ValueError("constraints: expected at all points or at none")
        new["constraints"] = _joined(self.constraints, constraints)
        if fidelity is not None and fidelity.shape != (q,):
            raise ValueError(f"fidelity: expected ({q},), got {tuple(fidelity.shape)}")
        new["fidelity"] = _joined(self.fidelity, fidelity)
        if grad is not None and grad.shape != (q, dim):
            raise ValueError(f"grad: expected ({q}, {dim}), got {tuple(grad.shape)}")
        if grad is not None or self.grad is not None:
            grad = torch.full_like(x, math.nan) if grad is None else grad.detach().to(x)
            new["grad"] = torch.cat([self.gradients, grad])
        return replace(self, x=torch.cat([self.x, x]), y=torch.cat([self.y, y]), **new)

    def encoded(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: encode(value) for name, value in vars(self).items()}

    @classmethod
    def decoded(cls, state: Mapping[str, Any]) -> Observations:
        """The reverse."""
        fields: dict[str, Any] = {name: decode(value) for name, value in state.items()}
        return cls(**fields)


def checked_levels(fidelity: Any, known: list[float]) -> Tensor | None:
    """Fidelities as a tensor; None where there are none.

    Raises:
        ValueError: Unknown ones, or some where none are known, or none where some are.
    """
    levels = None if fidelity is None else torch.as_tensor(fidelity, dtype=torch.float64)
    given = [] if levels is None else levels.reshape(-1).tolist()
    if (levels is None) == bool(known) or any(s not in known for s in given):
        raise ValueError(
            f"fidelity: expected {f'some of {known}' if known else None}, got {fidelity}"
        )
    return levels


def encode(value: Tensor | None) -> Any:
    """A tensor as JSON values, exactly; NaN and infinities are words.

    Example:
        >>> encode(torch.tensor([0.5, float("nan")]))
        {'dtype': 'float32', 'shape': [2], 'values': [0.5, 'nan']}
    """
    if value is None:
        return None
    kind = str(value.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"dtype": kind, "shape": list(value.shape)}
    if value.dtype == torch.uint8:
        return found | {"hex": bytes(value.flatten().tolist()).hex()}
    numbers = value.detach().cpu().flatten().tolist()
    return found | {"values": [v if math.isfinite(v) else str(v) for v in numbers]}


def decode(value: Any) -> Any:
    """The reverse of `encode`.

    Example:
        >>> decode(encode(torch.eye(2)))
        tensor([[1., 0.],
                [0., 1.]])
    """
    if value is None:
        return None
    if "hex" in value:
        numbers: list[float] = list(bytes.fromhex(value["hex"]))
    else:
        numbers = [float(v) if isinstance(v, str) else v for v in value["values"]]
    return torch.tensor(numbers, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])


def _joined(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if new is None or old is None:
        return new if old is None else old
    return torch.cat([old, new])
