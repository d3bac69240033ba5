"""Top-K sparse softmax gating: its regions, and how many experts an over-specified fit must use.

H. Nguyen, P. Akbarian, F. Yan and N. Ho, "Statistical Perspective of Top-K Sparse Softmax Gating
Mixture of Experts", 2024. With `k` experts, inputs `x` in R^d and a scalar response `y`

    p(y | x) = sum_i softmax_i(TopK(beta1_i^T x, K; beta0_i)) N(y | a_i^T x + b_i, var_i),
    TopK(v_i, K; c_i) = v_i + c_i if v_i is among the K largest, else -inf,

which is `GaussianMoE(gate="topk")`. The biases enter after the choice, so that the input space
falls into at most `C(k, K)` regions, bounded by hyperplanes through 0, with a dense softmax mixture
of K experts in each; across a boundary the density jumps.

If as many experts are fitted as there are, all parameters are estimated at the parametric rate in
the loss D1, the Voronoi loss of the worst region: `voronoi_loss` with `order=1` and
`reduce="regions-max"`. If more are fitted, then several of them share the cell `A_j` of a true
one, and the fit must use

    K_fit >= max over K-subsets {l_1, .., l_K} of the true experts of sum_j size(A_(l_j))

of them for its density to come close to the truth everywhere (`minimum_top_k`). The parameters of a
shared cell are then estimated more slowly, as the loss D2 says: the same with
`order=overfit_exponents`. The cause is that `u = exp(beta1^T x) N(y | a^T x + b, var)` satisfies
`d2u/dbeta1 db = du/da` and `du/dvar = (1/2) d2u/db2`.

Deviations from the paper: none in the density; ties, which the paper leaves open, go to the expert
of the lowest index. The rates are about local maxima of the likelihood near the truth.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.moe.gaussian_params import MoEParams
from torchzoo.moe.routing import check_count, top_k_experts
from torchzoo.moe.voronoi import voronoi_cells


def topk_regions(x: Tensor, beta1: Tensor, k: int, *, beta0: Tensor | None = None) -> Tensor:
    """The region of each input: which of the `C(E, k)` sets of experts a top-K gate chooses.

    A region is the place of its set in colexicographic order: {0..k-1} is 0, and the set
    `c_0 < c_1 < ..` is `sum_j C(c_j, j + 1)`. `region_experts` gives the set back.

    Args:
        x: Inputs, `(..., d)`.
        beta1: Weights of the gate, `(E, d)`.
        k: Experts an input.
        beta0: Biases of the gate, `(E,)`, where they take part in the choice.

    Shape:
        - x: `(..., d)`
        - output: `(...)`

    Returns:
        int64 indices in `[0, C(E, k))`; ties of the scores go to the lowest expert.

    Raises:
        ValueError: Shapes that don't fit, `k` not in 1..E, or too many sets for int64.

    Source:
        Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of Top-K Sparse Softmax Gating
        Mixture of Experts", 2024, the partition of the input space in section 2.

    Example:
        >>> beta1 = torch.tensor([[4.0], [2.0], [0.0]])
        >>> regions = topk_regions(torch.tensor([[0.5], [-0.5]]), beta1, 2)
        >>> regions, region_experts(regions, 3, 2).tolist()
        (tensor([0, 2]), [[0, 1], [1, 2]])
    """
    if beta1.ndim != 2:
        raise ValueError(f"beta1: expected (E, d), got {tuple(beta1.shape)}")
    num_experts, d = beta1.shape
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(f"x: expected (..., {d}), got {tuple(x.shape)}")
    if beta0 is not None and beta0.shape != (num_experts,):
        raise ValueError(f"beta0: expected ({num_experts},), got {tuple(beta0.shape)}")
    ranks = _subset_ranks(num_experts, k).to(x.device)
    chosen = top_k_experts(F.linear(x, beta1, beta0), k).sort(-1).values
    return ranks[chosen, torch.arange(k, device=x.device)].sum(-1)


def region_experts(regions: Tensor, num_experts: int, k: int) -> Tensor:
    """The set of experts of each region, the inverse of `topk_regions`.

    Args:
        regions: int64 indices in `[0, C(E, k))`, `(...)`.
        num_experts: Number of experts `E`.
        k: Experts an input.

    Shape:
        - regions: `(...)`
        - output: `(..., k)`

    Returns:
        int64 experts in ascending order.

    Raises:
        ValueError: `k` not in 1..E, indices out of range, or too many sets for int64.

    Example:
        >>> region_experts(torch.arange(3), 3, 2).tolist()
        [[0, 1], [0, 2], [1, 2]]
    """
    ranks = _subset_ranks(num_experts, k).to(regions.device)
    count = math.comb(num_experts, k)
    outside = regions[(regions < 0) | (regions >= count)]
    if outside.numel():
        raise ValueError(f"regions: expected 0..{count - 1}, got {outside[0].item()}")
    chosen, rest = [], regions.contiguous()
    for column in reversed(ranks.unbind(-1)):
        expert = torch.searchsorted(column.contiguous(), rest, right=True) - 1
        chosen.append(expert)
        rest = rest - column[expert]
    return torch.stack(chosen[::-1], -1)


def _subset_ranks(num_experts: int, k: int) -> Tensor:
    """`(E, k)`, what expert c at place j of an ascending set adds to its rank: `C(c, j + 1)`."""
    check_count("num_experts", num_experts)
    check_count("k", k, 1, num_experts)
    count = math.comb(num_experts, k)
    if count > torch.iinfo(torch.int64).max:
        raise ValueError(f"k: expected fewer than 2^63 sets of experts, got C({num_experts}, {k})")
    # Binomials above `count` belong to places that no set reaches; capped, they fit int64.
    rows = [[min(math.comb(c, j + 1), count) for j in range(k)] for c in range(num_experts)]
    return torch.tensor(rows, dtype=torch.int64)


def minimum_top_k(fitted: MoEParams, true: MoEParams, top_k: int) -> int:
    """How many experts an over-specified fit must use for its density to be consistent.

    With fewer, an input whose K true experts are shared out among more fitted ones than are used
    loses some of them, and the density stays a fixed distance off the truth.

    Args:
        fitted: Fitted parameters, `k` atoms.
        true: True parameters, `k*` atoms.
        top_k: Experts that the true gate uses, K.

    Returns:
        The largest number of fitted atoms in K cells, so the sum of the K largest cells.

    Raises:
        ValueError: Shapes that don't fit, batch dimensions, or `top_k` not in 1..k*.

    Source:
        Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of Top-K Sparse Softmax Gating
        Mixture of Experts", 2024, section 3.

    Example:
        >>> from torchzoo.moe import MoEParams
        >>> eye, one = torch.eye(2), torch.ones(2)
        >>> true = MoEParams(one, 4 * eye, eye, one, one)
        >>> fitted = MoEParams(*(torch.cat([field, field[:1]]) for field in true[:5]))
        >>> minimum_top_k(fitted, true, 1)
        2
    """
    cells = voronoi_cells(fitted, true)
    if cells.ndim != 1:
        got = tuple(fitted.beta1.shape)
        raise ValueError(f"fitted.beta1: expected (k, d) without batch dimensions, got {got}")
    num_true = true.beta0.shape[-1]
    check_count("top_k", top_k, 1, num_true)
    return int(cells.bincount(minlength=num_true).topk(top_k).values.sum())


def minimum_top_k_bound(num_fitted: int, num_true: int, top_k: int) -> int:
    """`minimum_top_k` in the worst case, for planning a fit before the truth is known.

    All experts beyond one for each true one may share the cells of the K that count.

    Args:
        num_fitted: Number of experts to be fitted, at least `num_true`.
        num_true: Number of true experts, or the least that is thought possible.
        top_k: Experts that the true gate uses, K.

    Returns:
        `num_fitted - num_true + top_k`; enough if no true expert is left without a fitted one.

    Raises:
        ValueError: Counts that aren't `1 <= top_k <= num_true <= num_fitted`.

    Source:
        The threshold of Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of Top-K Sparse
        Softmax Gating Mixture of Experts", 2024, section 3, where no cell is empty.

    Example:
        >>> minimum_top_k_bound(8, 5, 2)
        5
    """
    check_count("num_true", num_true)
    check_count("num_fitted", num_fitted, num_true)
    check_count("top_k", top_k, 1, num_true)
    return num_fitted - num_true + top_k


def overfit_exponents(num_atoms: int) -> tuple[float, ...]:
    """Exponents of the loss D2 in a cell of several atoms, for the `order` of `voronoi_loss`.

    `rbar(m)` on beta1 and b, half of it on a and var. `rbar(m)` is the order up to which `m`
    Gaussians can't imitate one: Gauss-Hermite nodes of smaller variance around a Gaussian's mean
    agree with it in `2 m - 1` moments, so that `rbar(m) >= 2 m`, with equality for m = 2 and 3.
    Beyond that no value is known, and `2 m` is taken.

    Args:
        num_atoms: Number of fitted atoms `m` in the cell, at least 2.

    Returns:
        The exponents of beta1, tau, a, b and var; this gate has no temperature, and 1 stands there.

    Raises:
        ValueError: Fewer than 2 atoms.

    Source:
        Nguyen, Akbarian, Yan and Ho, "Statistical Perspective of Top-K Sparse Softmax Gating
        Mixture of Experts", 2024, the loss D2 of section 3; rbar from Ho and Nguyen, "Convergence
        Rates of Parameter Estimation for Some Weakly Identifiable Finite Mixtures", 2016.

    Example:
        >>> overfit_exponents(2), overfit_exponents(3)
        ((4.0, 1.0, 2.0, 4.0, 2.0), (6.0, 1.0, 3.0, 6.0, 3.0))
    """
    check_count("num_atoms", num_atoms, 2)
    rbar = 2.0 * num_atoms
    return rbar, 1.0, rbar / 2, rbar, rbar / 2
