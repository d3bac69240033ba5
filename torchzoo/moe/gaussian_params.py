"""Parameters of Gaussian mixtures of experts, apart from any model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MoEParams(NamedTuple):
    """Parameters of a Gaussian mixture of experts, with any leading batch dimensions.

    `k` experts, `d` features.

    Attributes:
        beta0: `(..., k)`, biases of the gate.
        beta1: `(..., k, d)`, weights of the gate.
        a: `(..., k, d)`, slopes of the experts.
        b: `(..., k)`, intercepts of the experts.
        var: `(..., k)`, variances of the experts.
        temperature: `(...)`, temperature of the gate; None counts as 1.
    """

    beta0: Tensor
    beta1: Tensor
    a: Tensor
    b: Tensor
    var: Tensor
    temperature: Tensor | None = None

    def anchored(self, *, linear: bool = True) -> MoEParams:
        """The same density, written with 0 as the bias and weights of the last expert's gate.

        A softmax ignores what its logits have in common, so that only anchored parameters can be
        compared.

        Args:
            linear: Whether the gate is linear in x; if not, only the biases can be shifted.
        """
        beta1 = self.beta1 - self.beta1[..., -1:, :] if linear else self.beta1
        return self._replace(beta0=self.beta0 - self.beta0[..., -1:], beta1=beta1)

    def check(self, name: str = "params") -> None:
        """Raise a ValueError, naming the field, where shapes don't fit each other."""
        if self.beta1.ndim < 2:
            got = tuple(self.beta1.shape)
            raise ValueError(f"{name}.beta1: expected (..., k, d), got {got}")
        batch, (k, d) = self.beta1.shape[:-2], self.beta1.shape[-2:]
        wanted = {"beta0": (k,), "a": (k, d), "b": (k,), "var": (k,), "temperature": ()}
        for field, tail in wanted.items():
            value = getattr(self, field)
            if value is not None and value.shape != (*batch, *tail):
                raise ValueError(
                    f"{name}.{field}: expected {(*batch, *tail)} as beta1 is "
                    f"{tuple(self.beta1.shape)}, got {tuple(value.shape)}"
                )
