"""How well the parameters of a mixture of experts are known: Voronoi loss and gate diagnostic.

H. Nguyen, P. Akbarian and N. Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
Experts?", 2024. Fitted atoms `theta_i = (beta1_i, tau, a_i, b_i, var_i)` of weight
`w_i = exp(beta0_i / tau)` are shared out among the true atoms, each to the nearest:

    A_j = {i : ||theta_i - theta*_j|| <= ||theta_i - theta*_l|| for all l},
    D_r = sum_j |sum_{i in A_j} w_i - w*_j|
        + sum_j sum_{i in A_j} w_i (|dbeta1|^q + |dtau|^q + |da|^q + |db|^q + |dvar|^q),

with `q = 1` where a cell has one atom and `q = r` where it has several. Labels don't matter, and a
true atom that is fitted by several costs what its weight is off, not the extra atoms. For top-K
gates `r` may depend on how many atoms a cell has, and the cells of the worst region count; see
`torchzoo.moe.topk_softmax`.

Deviations from the paper: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from torchzoo.moe.dense_to_sparse import ActivationDenseToSparseGate
from torchzoo.moe.gaussian_params import MoEParams
from torchzoo.moe.routing import Gate, check_count

Order = float | Sequence[float] | Callable[[int], Sequence[float]]
BLOCKS = ("beta1", "tau", "a", "b", "var")


def voronoi_cells(params: MoEParams, true_params: MoEParams) -> Tensor:
    """The true atom nearest to each fitted one, in (beta1, tau, a, b, var).

    Args:
        params: Fitted parameters, `k` atoms.
        true_params: True parameters, `k*` atoms; batch dimensions broadcast.

    Shape:
        - output: `(..., k)`

    Returns:
        int64 indices of true atoms; ties go to the lowest one.

    Raises:
        ValueError: Shapes that don't fit.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
        Experts?", 2024, section 2.

    Example:
        >>> eye = torch.eye(2)
        >>> true = MoEParams(eye[0], eye, eye, eye[0], eye[0] + 1)
        >>> voronoi_cells(MoEParams(*(field.flip(0) for field in true[:5])), true)
        tensor([1, 0])
    """
    _check_pair(params, true_params)
    return _distances(params, true_params).square().sum(-1).argmin(-1)


def voronoi_loss(
    params: MoEParams,
    true_params: MoEParams,
    order: Order = 2,
    *,
    top_k: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Distance of fitted parameters from the true ones that sees no labels.

    The parameters are taken as they are: anchor both sides first, see `MoEParams.anchored`.

    Args:
        params: Fitted parameters, `k` atoms.
        true_params: True parameters, `k*` atoms; batch dimensions broadcast.
        order: Exponent `r` in cells of several atoms; one for all, or five for beta1, tau, a, b
            and var, or a function from the number of atoms in a cell to these five.
        top_k: Number of cells that "regions-max" adds up.
        reduce: "sum" over the cells, or "regions-max": the largest sum over `top_k` of them,
            which is the worst region of a gate that uses `top_k` experts.

    Shape:
        - output: `(...)`

    Returns:
        The loss; 0 if and only if the two mixing measures are equal (with "sum").

    Raises:
        ValueError: Shapes that don't fit, exponents that are not above 0, an unknown `reduce`, or
            a `top_k` that is missing or above `k*`.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
        Experts?", 2024, section 2; "regions-max": Nguyen, Akbarian, Yan and Ho, "Statistical
        Perspective of Top-K Sparse Softmax Gating Mixture of Experts", 2024.

    Example:
        >>> one, eye = torch.ones(2), torch.eye(2)
        >>> true = MoEParams(torch.zeros(2), eye, eye, one, one)
        >>> voronoi_loss(true._replace(b=torch.tensor([1.0, 1.25])), true)
        tensor(0.2500)
    """
    _check_pair(params, true_params)
    exponents = params.b.new_tensor(_exponents(order, params.b.shape[-1]))
    num_true = true_params.beta0.shape[-1]
    if reduce not in ("sum", "regions-max"):
        raise ValueError(f"reduce: expected 'sum' or 'regions-max', got {reduce!r}")
    if top_k is None and reduce == "regions-max":
        raise ValueError(f"top_k: expected 1..{num_true} with reduce='regions-max', got None")
    if top_k is not None:
        check_count("top_k", top_k, 1, num_true)

    distances = _distances(params, true_params)  # (..., k, k*, 5)
    cells = distances.square().sum(-1).argmin(-1)
    member = F.one_hot(cells, num_true)  # (..., k, k*)
    occupants = member.sum(-2, keepdim=True)
    powers = distances ** exponents[occupants]
    weights = _atom_weights(params).unsqueeze(-1) * member
    off = (weights.sum(-2) - _atom_weights(true_params)).abs()
    terms = off + (weights * powers.sum(-1)).sum(-2)  # (..., k*)
    return terms.sum(-1) if reduce == "sum" else terms.topk(top_k or 0).values.sum(-1)


def gate_dependence(gate: Gate, x: Tensor) -> Tensor:
    """How close the parameters of a gate are to being dependent at some inputs; 0: they are.

    The rows of the matrix are `sqrt(p_i(x_t)) d log p_i(x_t) / d theta` for all inputs and
    experts, its columns have unit norm, and its smallest singular value is returned: 0 where a
    change of the parameters leaves all weights of the gate unchanged. `theta` are the free
    parameters: the logarithm of the temperature where it is learned, and weights and biases
    without those that a softmax can't see, namely the last expert's bias and, where the scores
    are linear in x, its weights.

    Args:
        gate: The gate.
        x: Inputs, `(n, d)`.

    Shape:
        - x: `(n, d)`
        - output: scalar

    Returns:
        The smallest singular value, in [0, 1].

    Raises:
        ValueError: Inputs that are not `(n, d)` or none at all, or a gate without free parameters.

    Source:
        The independence conditions of Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient
        for Softmax Gaussian Mixture of Experts?", 2024, definitions 2 and 3, in numbers.

    Example:
        >>> from torchzoo.moe import ActivationDenseToSparseGate, DenseToSparseGate
        >>> x = torch.rand(200, 2, dtype=torch.float64) * 6 - 3
        >>> linear = DenseToSparseGate(2, 3, temperature="learned", noise=None, bias=True)
        >>> bool(gate_dependence(linear.double(), x) < 1e-10)
        True
        >>> tanh = ActivationDenseToSparseGate(2, 3, activation="tanh", learn_temperature=True)
        >>> bool(gate_dependence(tanh.double(), x) > 1e-10)
        True
    """
    if x.ndim != 2 or x.shape[-1] != gate.dim or len(x) == 0:
        raise ValueError(f"x: expected (n, {gate.dim}) with n > 0, got {tuple(x.shape)}")
    free = _free_entries(gate)
    if not any(bool(mask.any()) for mask in free.values()):
        raise ValueError(f"gate: expected one with free parameters, got {gate}")
    params = {name: p.detach() for name, p in gate.named_parameters() if name in free}

    def log_probs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(_LogProbs(gate), {f"gate.{n}": v for n, v in values.items()}, (x,))

    slopes = jacfwd(log_probs)(params)
    columns = torch.cat([slopes[name][..., mask] for name, mask in free.items()], -1)
    root_p = (0.5 * gate.log_probs(x).detach()).exp()
    matrix = rearrange(root_p.unsqueeze(-1) * columns, "n i p -> (n i) p")
    return torch.linalg.svdvals(F.normalize(matrix, dim=0))[-1]


class _LogProbs(nn.Module):
    """A gate's log-probabilities as a `forward`, which is what `functional_call` calls."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate.log_probs(x)


def _free_entries(gate: Gate) -> dict[str, Tensor]:
    """For each parameter that requires a gradient, the mask of its entries that a softmax sees."""
    activation = gate.activation if isinstance(gate, ActivationDenseToSparseGate) else "identity"
    linear = activation == "identity" or isinstance(activation, nn.Identity)
    free = {
        name: torch.ones_like(p, dtype=torch.bool)
        for name, p in gate.named_parameters()
        if p.requires_grad
    }
    for name in ("weight", "bias") if linear else ("bias",):
        if name in free:
            free[name][-1] = False
    return free


def _check_pair(params: MoEParams, true_params: MoEParams) -> None:
    params.check("params")
    true_params.check("true_params")
    d, true_d = params.beta1.shape[-1], true_params.beta1.shape[-1]
    if d != true_d:
        raise ValueError(f"params.beta1: expected {true_d} features as in true_params, got {d}")


def _exponents(order: Order, num_atoms: int) -> list[list[float]]:
    """Exponents of the five blocks by the number of atoms in a cell, 0 to at least `num_atoms`."""
    table = [[1.0] * len(BLOCKS)] * 2
    for occupants in range(2, max(num_atoms, 2) + 1):
        wanted = order(occupants) if callable(order) else order
        exponents = list(wanted) if isinstance(wanted, Sequence) else [wanted] * len(BLOCKS)
        if len(exponents) != len(BLOCKS) or not all(exponent > 0 for exponent in exponents):
            names = f"a number above 0 or {len(BLOCKS)} of them, for {', '.join(BLOCKS)}"
            raise ValueError(f"order: expected {names}, got {wanted!r}")
        table.append(exponents)
    return table


def _temperature(params: MoEParams) -> Tensor:
    """`(..., 1)`, the temperature."""
    if params.temperature is None:
        return params.beta0.new_ones(params.beta0.shape[:-1]).unsqueeze(-1)
    return params.temperature.unsqueeze(-1)


def _atom_weights(params: MoEParams) -> Tensor:
    """`(..., k)`, the weights `exp(beta0 / tau)`."""
    return (params.beta0 / _temperature(params)).exp()


def _distances(params: MoEParams, true_params: MoEParams) -> Tensor:
    """`(..., k, k*, 5)`, distances of the atoms block by block, in the order of `BLOCKS`."""

    def vectors(p: MoEParams) -> list[Tensor]:
        scalars = (_temperature(p).expand_as(p.b), p.b, p.var)
        tau, b, var = (scalar.unsqueeze(-1) for scalar in scalars)
        return [p.beta1, tau, p.a, b, var]

    pairs = zip(vectors(params), vectors(true_params), strict=True)
    gaps = [
        rearrange(u, "... i d -> ... i 1 d") - rearrange(v, "... j d -> ... 1 j d")
        for u, v in pairs
    ]
    return torch.stack([torch.linalg.vector_norm(gap, dim=-1) for gap in gaps], -1)
