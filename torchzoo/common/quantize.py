"""Vectors as indices into learned tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResidualVQ"]

ITERATIONS = 10
"""Rounds of k-means that a codebook starts from."""


class ResidualVQ(nn.Module):
    """A vector as a sum of codes: each stage takes the code nearest to what is still missing.

    From `r_0 = x`, stage q takes `i_q = argmin_k norm(r_q - C_q[k])` and leaves
    `r_(q+1) = r_q - C_q[i_q]`; the sum of the codes stands for x. Its gradient passes straight to
    x, and none to the codebooks, which learn from the loss alone.

    Args:
        dim: Size D of the vectors.
        codebook_size: Codes K of each stage.
        stages: Number Q of stages.
        device: Device of the codebooks.
        dtype: Type of the codebooks.

    Shape:
        - x: `(..., D)`
        - quantised: `(..., D)`
        - indices: `(..., Q)`, int64
        - loss: scalar

    Attributes:
        codebooks: `(Q, K, D)`.

    Returns:
        The sums of codes, which `decode(indices)` gives to the last bit; the indices; and the loss
        of the codebooks, `sum over q of norm(sg[r_q] - C_q[i_q])^2`, in the mean over vectors.

    Raises:
        ValueError: A size below 1, vectors or indices that don't fit.

    Source:
        Lee et al., "Compact 3D Gaussian Representation for Radiance Field", 2024, equation 7;
        van den Oord et al., "Neural Discrete Representation Learning", 2017 (gradients).

    Example:
        >>> quantizer = ResidualVQ(3, codebook_size=8, stages=2)
        >>> x = torch.randn(100, 3)
        >>> quantizer.init_kmeans(x)
        >>> quantised, indices, loss = quantizer(x)
        >>> torch.equal(quantizer.decode(indices), quantised)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        codebook_size: int = 64,
        stages: int = 6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("codebook_size", codebook_size), ("stages", stages)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.dim, self.codebook_size, self.stages = dim, codebook_size, stages
        shape = (stages, codebook_size, dim)
        self.codebooks = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal codes, half as large at each stage; `init_kmeans` has better ones."""
        nn.init.normal_(self.codebooks)
        with torch.no_grad():
            self.codebooks.mul_(
                0.5 ** torch.arange(self.stages, device=self.codebooks.device)[:, None, None]
            )

    @torch.no_grad()
    def init_kmeans(self, x: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Set each stage's codes to the means of clusters of what the stages before it leave.

        Args:
            x: Vectors `(M, D)`, at least one.
            generator: Which codes k-means begins from is drawn from it.
        """
        self._check("x", x)
        if x.dim() != 2 or not len(x):
            raise ValueError(f"x: got {tuple(x.shape)}, expected (M, {self.dim}) with M from 1")
        residual = x.to(self.codebooks.dtype)
        for codes in self.codebooks:
            codes.copy_(_kmeans(residual, self.codebook_size, generator))
            residual = residual - codes[_nearest(residual, codes)]

    def encode(self, x: Tensor) -> Tensor:
        """Indices `(..., Q)` of vectors `(..., D)`."""
        return self(x)[1]

    def decode(self, indices: Tensor) -> Tensor:
        """Sums of codes `(..., D)`, differentiable in the codebooks.

        Args:
            indices: Which code of each stage, `(..., Q)`, integers from 0 to K - 1.

        Raises:
            ValueError: Indices of another shape or type, or, where it can be seen, out of range.
        """
        if indices.dim() < 1 or indices.shape[-1] != self.stages or indices.is_floating_point():
            got = f"{indices.dtype} {tuple(indices.shape)}"
            raise ValueError(f"indices: got {got}, expected integers (..., {self.stages})")
        if not torch.compiler.is_compiling() and not indices.is_meta and indices.numel():
            low, high = (int(value) for value in indices.aminmax())
            if low < 0 or high >= self.codebook_size:
                expected = f"0 to {self.codebook_size - 1}"
                raise ValueError(f"indices: got {low} to {high}, expected {expected}")
        return self._sum(indices)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of codes, indices and the codebooks' loss; see the class."""
        self._check("x", x)
        residual = x.detach().to(self.codebooks.dtype)
        loss, chosen = residual.new_zeros(()), []
        for codes in self.codebooks:
            index = _nearest(residual, codes.detach())
            code = F.embedding(index, codes)
            loss = loss + (residual - code).square().sum()
            residual = residual - code.detach()
            chosen.append(index)
        indices = torch.stack(chosen, -1)
        quantised = self._sum(indices).detach() + (x - x.detach())  # the last term is an exact 0
        return quantised, indices, loss / max(x.numel() // self.dim, 1)

    def _sum(self, indices: Tensor) -> Tensor:
        """Codes added up stage by stage, always in the same order."""
        total = F.embedding(indices[..., 0].long(), self.codebooks[0])
        for index, codes in zip(indices.unbind(-1)[1:], self.codebooks[1:], strict=True):
            total = total + F.embedding(index.long(), codes)
        return total

    def _check(self, name: str, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"{name}: got {got}, expected floating point (..., {self.dim})")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.dim}, codebook_size={self.codebook_size}, stages={self.stages}"


def _nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest of codes `(K, D)` to each of `(..., D)`; the first of equals."""
    rows = x.reshape(-1, x.shape[-1])
    distances = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(-1).reshape(x.shape[:-1])


def _kmeans(x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Means of `count` clusters of `(M, D)`; what no vector is nearest to stays where it was."""
    order = torch.randperm(len(x), generator=generator, device=x.device)
    codes = x[order[torch.arange(count, device=x.device) % len(x)]].clone()
    for _ in range(ITERATIONS):
        index = _nearest(x, codes)
        sizes = torch.bincount(index, minlength=count)[:, None]
        sums = torch.zeros_like(codes).index_add_(0, index, x)
        codes = torch.where(sizes > 0, sums / sizes.clamp_min(1), codes)
    return codes
