"""One layer of a deep kernel machine, whitened: from a Gram matrix to the next.

With the kernel K of the Gram matrix before, K_ii = L L^T between inducing points,

    G_ii = L A A^T L^T,    G_ti = K_ti K_ii^-1 G_ii,
    G_tt = K_tt + K_ti K_ii^-1 (G_ii - K_ii) K_ii^-1 K_it,
    KL(N(0, G_ii) || N(0, K_ii)) = (sum A^2 - P) / 2 - log det A,

A lower triangular, P by P, and the identity at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchzoo.gp.gram_kernels import KINDS, GramBlocks, GramKernelKind, check_blocks, gram_kernel
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register

JITTER = 1e-6


def _example_blocks() -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    inducing, test = features[:, :4], features[:, 4:]
    return inducing @ inducing.mT, test @ inducing.mT, test.square().sum(-1)


@register(
    paper=7,
    example=lambda: Example(
        {"num_inducing": 4},
        _example_blocks(),
        bad_options={"num_inducing": 0, "kernel": "cubic", "nu": 0.0, "jitter": -1.0},
    ),
    compare="layers of Gram matrices, which have no counterpart that maps features",
)
class DKMLayer(ZooModel):
    """One layer of a deep kernel machine: from a Gram matrix to the next.

    Args:
        num_inducing: Inducing points P.
        kernel: The kernel of the Gram matrix before; see `torchzoo.gp.gram_kernel`.
        nu: Weight of the layer's KL term, its relative width; above 0.
        jitter: Added to the diagonal of the kernel, relative to its mean.
        device: Device of the parameter.
        dtype: Its dtype.

    Shape:
        - gram_ii: `(..., P, P)`
        - gram_ti: `(..., B, P)`
        - gram_tt_diag: `(..., B)`
        - output: a `GramBlocks` of the same shapes

    Returns:
        The layer's Gram matrix, in blocks.

    Raises:
        ValueError: An option out of its range, or shapes that don't fit.

    Source:
        A. X. Yang and others, "A theory of representation learning gives a deep generalisation of
        kernel methods", 2023.

    Example:
        >>> x = torch.randn(6, 3)
        >>> layer = DKMLayer(4)
        >>> gram = layer(x[:4] @ x[:4].mT, x @ x[:4].mT, x.square().sum(-1))
        >>> gram.ii.shape, gram.ti.shape, gram.tt.shape
        (torch.Size([4, 4]), torch.Size([6, 4]), torch.Size([6]))
        >>> layer.kl()  # it starts at its prior
        tensor(0., grad_fn=<SubBackward0>)
    """

    def __init__(
        self,
        num_inducing: int,
        *,
        kernel: GramKernelKind = "relu",
        nu: float = 5.0,
        jitter: float = JITTER,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_inducing < 1:
            raise ValueError(f"num_inducing: expected at least 1, got {num_inducing}")
        if kernel not in KINDS:
            raise ValueError(f"kernel: expected one of {KINDS}, got {kernel!r}")
        if not 0 < nu < math.inf:
            raise ValueError(f"nu: expected a number above 0, got {nu}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected within [0, 1), got {jitter}")
        super().__init__()
        self.kernel, self.nu, self.jitter = kernel, nu, jitter
        self.factor = nn.Parameter(
            torch.empty(num_inducing, num_inducing, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity: the layer is at its prior."""
        set_identity(self.factor)

    def forward(self, gram_ii: Tensor, gram_ti: Tensor, gram_tt_diag: Tensor) -> GramBlocks:
        size = self.factor.shape[-1]
        if gram_ii.shape[-2:] != (size, size):
            raise ValueError(f"gram_ii: expected (..., {size}, {size}), got {tuple(gram_ii.shape)}")
        check_blocks(gram_ii, gram_ti, gram_tt_diag)
        with no_autocast(gram_ii):
            return self._forward(gram_ii, gram_ti, gram_tt_diag)

    def _forward(self, gram_ii: Tensor, gram_ti: Tensor, gram_tt_diag: Tensor) -> GramBlocks:
        factor, white, tt = whiten(gram_ii, gram_ti, gram_tt_diag, self.kernel, self.jitter)
        a = self.factor.tril()
        root, seen = factor @ a, a.mT @ white  # G_ii = root root^T, G_it = root seen
        tt = tt - white.square().sum(-2) + seen.square().sum(-2)
        return GramBlocks(root @ root.mT, (root @ seen).mT, tt)

    def kl(self) -> Tensor:
        """`KL(N(0, G) || N(0, K))`, without its weight; it depends on the layer's factor only."""
        return whitened_kl(self.factor.tril())

    def extra_repr(self) -> str:
        size, nu = self.factor.shape[-1], self.nu
        return f"num_inducing={size}, kernel={self.kernel!r}, nu={nu:g}"


@torch.no_grad()
def set_identity(matrix: Tensor) -> None:
    """Make a square matrix the identity, whatever the default device is."""
    matrix.zero_().fill_diagonal_(1)


def whiten(
    gram_ii: Tensor, gram_ti: Tensor, gram_tt_diag: Tensor, kind: GramKernelKind, jitter: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`L`, `L^-1 K_it` and the diagonal of `K_tt` for the kernel of a Gram matrix, `K_ii = L L^T`.

    Shape:
        - output: `(..., P, P)`, `(..., P, B)` and `(..., B)`
    """
    k = gram_kernel(gram_ii, gram_ti, gram_tt_diag, kind)
    factor, _ = torch.linalg.cholesky_ex(shifted(k.ii, jitter))
    return factor, torch.linalg.solve_triangular(factor, k.ti.mT, upper=False), k.tt


def shifted(matrix: Tensor, jitter: float) -> Tensor:
    """A matrix made symmetric, with jitter times the mean of its diagonal added to that."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    shift = jitter * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    return (matrix + matrix.mT) / 2 + torch.diag_embed(shift)


def gram_kl(gram: Tensor, kernel: Tensor) -> Tensor:
    """`KL(N(0, G) || N(0, K))` of two covariance matrices.

    Shape:
        - gram, kernel: `(..., P, P)`
        - output: `(...)`

    Example:
        >>> round(gram_kl(2 * torch.eye(2), torch.eye(2)).item(), 4)  # 1 - log 2
        0.3069
    """
    factor = torch.linalg.cholesky(kernel)
    root = torch.linalg.solve_triangular(factor, torch.linalg.cholesky(gram), upper=False)
    return whitened_kl(root)


def whitened_kl(a: Tensor) -> Tensor:
    """`KL(N(0, A A^T) || N(0, I))` for a triangular A."""
    log_det = a.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return (a.square().sum((-1, -2)) - a.shape[-1]) / 2 - log_det


def layer_widths(nu: float | Sequence[float], depth: int) -> list[float]:
    """One nu for each layer."""
    widths = [float(nu)] * depth if isinstance(nu, (int, float)) else [float(v) for v in nu]
    if len(widths) != depth or not all(0 < v < math.inf for v in widths):
        raise ValueError(f"nu: expected a number above 0, or {depth} of them, got {nu}")
    return widths
