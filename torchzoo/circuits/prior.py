"""A circuit as the prior behind an invertible map of integers: it makes a flow's code shorter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchzoo.circuits.circuit import Circuit
from torchzoo.circuits.compression import CircuitCodec


class CircuitPrior:
    """A circuit as the prior of integer latents, behind an invertible map of integer data.

    With z = g(x) a bijection of integer grids there is no Jacobian: log p(x) = log p_circuit(g(x)),
    so that a better circuit over z makes a flow's code shorter and the flow stays as it is.

    Args:
        circuit: A structured circuit over z, as for `CircuitCodec`.
        forward: The map g, of samples `(N, ...)` to integers `(N, D)`; by default none.
        inverse: Its inverse, of integers `(N, D)` to samples.
        low: The least latent; the others reach up to `low + C - 1`.
        **options: Options of `CircuitCodec`.

    Raises:
        ValueError: `forward` without `inverse` or the other way round, or a circuit that can't be
            coded.

    Source:
        A. Liu, S. Mandt and G. Van den Broeck, Lossless Compression with Probabilistic Circuits,
        2022, section 6: integer discrete flows with circuits as priors.

    Example:
        >>> import torch
        >>> from torchzoo.circuits import CategoricalLeaf, hclt
        >>> circuit = Circuit(hclt([-1, 0]), CategoricalLeaf(7), num_units=2)
        >>> flip = lambda x: x.flip(1)
        >>> prior = CircuitPrior(circuit, forward=flip, inverse=flip, low=-3)
        >>> prior.decode(prior.encode(torch.tensor([[-3, 2]]))).tolist()
        [[-3, 2]]
    """

    def __init__(
        self,
        circuit: Circuit,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
        inverse: Callable[[Tensor], Tensor] | None = None,
        low: int = 0,
        **options: Any,
    ):
        if (forward is None) != (inverse is None):
            raise ValueError("forward, inverse: expected both or neither, got one")
        self.codec = CircuitCodec(circuit, **options)
        self.forward, self.inverse, self.low = forward, inverse, low

    def _latents(self, x: Tensor) -> Tensor:
        z = (x if self.forward is None else self.forward(x)).long() - self.low
        if z.ndim != 2 or z.shape[1] != self.codec.num_variables:
            raise ValueError(
                f"x: expected latents (N, {self.codec.num_variables}), got {tuple(z.shape)}"
            )
        top = self.codec.num_categories - 1
        if ((z < 0) | (z > top)).any():
            raise ValueError(f"x: expected latents in {self.low} to {self.low + top}, got others")
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of p(x), of samples, `(N,)`; differentiable in the circuit."""
        return self.codec.circuit(self._latents(x))[..., 0]

    def encode(self, x: Tensor) -> bytes:
        """Code the latents of samples."""
        return self.codec.encode(self._latents(x))

    def decode(self, data: bytes, *, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """The samples of `encode`, int64 where there is no map; see `CircuitCodec.decode`."""
        z = self.codec.decode(data, indices=indices) + self.low
        return z if self.inverse is None else self.inverse(z)
