"""S-KAN: a Kolmogorov-Arnold layer that chooses a family of functions at each of its nodes.

Z. Yang, J. Zhang, X. Luo, Z. Lu and L. Shen, Activation Space Selectable Kolmogorov-Arnold
Networks, 2024. With a pool of M bases B^m and gates g (D, M),

    y_o = sum_i sum_m g_im sum_k c^m_oik B^m_k(x_i) + bias_o,

in three phases: all families at once with free gates, g = w (1); a choice among them (2); each node
keeps one family, and the others are deleted (3, `prune`). As the gates only scale weights, they are
folded into them, and every phase is one matrix product of the functions with the weights.

The paper's summaries leave formulas open. Ours are: in phase 2 g = softmax_m(w / tau) with tau
falling, or its one-hot choice with the gradient of the softmax (`hard`); the gates of a node keep
their logits w from phase 1, so that the loss jumps where phase 2 begins; coefficients start such
that each family's sum has variance 1 for inputs spread over its range, and w = 1 / M.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from torchzoo import peers
from torchzoo.activations.basis import check_choice, check_count
from torchzoo.activations.kan import compute_type, make_basis
from torchzoo.activations.pooled import (
    FULL,
    POOL,
    SELECTIVE,
    NodeReport,
    PooledKAN,
    PrunedKANLinear,
    check_pool,
)
from torchzoo.hub import ZooModel
from torchzoo.registry import Comparison, Example, register


@register(
    paper=10,
    example=lambda: Example(
        {"in_features": 3, "out_features": 2, "pool": ("bspline", "chebyshev", "wavelet")},
        (2 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 1,),
        bad_options={
            "in_features": 0,
            "out_features": 0,
            "pool": ("bspline", "sine"),
            "gate": "edge",
            "group_size": 2,
        },
    ),
    compare=lambda: Comparison(
        {"in_features": 64, "out_features": 64}, (2 * torch.rand(256, 64) - 1,), peers.LINEAR
    ),
)
class SKANLinear(PooledKAN):
    """A layer with several families of functions and gates that learn which each input needs.

    It starts in phase 1; `select` takes it to phase 2, and `prune` gives the layer of phase 3.

    Args:
        in_features: Number of inputs D, the nodes.
        out_features: Number of outputs O.
        pool: Names of families: bspline, rbf, rswaf, chebyshev, gram, jacobi, wavelet,
            relu_product, fourier, pair or silu; see `make_basis`.
        gate: Gates for each `"node"`, or one set for the `"layer"`.
        bias: Whether a bias is added.
        group_size: Neighbouring inputs that share gates, as the positions of a kernel do.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., D)`
        - output: `(..., O)`
        - gate_weight: `(D / group_size, M)`, or `(1, M)` for a layer's
        - coef: for each family `(O, D, K)`
        - gates: `(D, M)`

    Returns:
        The outputs.

    Raises:
        ValueError: A count out of range, an empty pool, an unknown or repeated family, or x of
            another width.

    Source:
        Yang, Zhang, Luo, Lu and Shen, Activation Space Selectable Kolmogorov-Arnold Networks, 2024,
        section 3; the formulas of the gates are ours.

    Example:
        >>> layer = SKANLinear(3, 2)
        >>> layer.select(tau=0.1)
        >>> bool((layer.gates.sum(-1) - 1).abs().max() < 1e-6)
        True
        >>> layer.prune()(torch.rand(5, 3)).shape
        torch.Size([5, 2])
    """

    _phase: Tensor
    _tau: Tensor
    _hard: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pool: Sequence[str] = POOL,
        gate: str = "node",
        bias: bool = True,
        group_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_count("group_size", group_size)
        check_choice("gate", gate, ("node", "layer"))
        if in_features % group_size:
            raise ValueError(f"group_size: expected a divisor of {in_features}, got {group_size}")
        self.in_features, self.out_features, self.gate = in_features, out_features, gate
        self.group_size = in_features if gate == "layer" else group_size
        self.pool = check_pool(pool)
        factory = {"device": device, "dtype": dtype}
        bases = {n: make_basis(n, in_features, device=device, dtype=dtype) for n in self.pool}
        self.bases = nn.ModuleDict(bases)
        self.coef = nn.ParameterDict(
            {
                name: torch.empty(out_features, in_features, basis.num_basis, **factory)  # type: ignore[arg-type]
                for name, basis in bases.items()
            }
        )
        groups = in_features // self.group_size
        self.gate_weight = nn.Parameter(torch.empty(groups, len(self.pool), **factory))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None  # type: ignore[arg-type]
        self.register_buffer("_phase", torch.tensor(FULL, device=device))
        self.register_buffer("_tau", torch.tensor(1.0, device=device))
        self.register_buffer("_hard", torch.tensor(False, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates 1 / M, and coefficients that give each family's sum variance 1."""
        nn.init.constant_(self.gate_weight, 1 / len(self.pool))
        self._reset_functions()

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates.unbind(-1)
        families = zip(gates, self.families(), strict=True)
        return self._product(x, [g.unsqueeze(-1) * coef for g, (_, _, coef) in families])

    @property
    def phase(self) -> int:
        """1, all families with free gates; 2, a choice among them."""
        return int(self._phase)

    @property
    def tau(self) -> float:
        """The temperature of the choice in phase 2."""
        return float(self._tau)

    @property
    def gates(self) -> Tensor:
        """The gates in use, (D, M): w in phase 1, softmax(w / tau) or one-hot in phase 2."""
        w = self.gate_weight
        soft = (w / self._tau.to(w.dtype)).softmax(-1)
        chosen = F.one_hot(w.argmax(-1), len(self.pool)).to(w.dtype)
        hard = chosen + (soft - soft.detach())
        selected = torch.where(self._hard, hard, soft)
        gates = torch.where(self._phase == FULL, w, selected)
        return repeat(gates, "g m -> (g s) m", s=self.group_size)

    def select(self, tau: float = 1.0, *, hard: bool = False) -> None:
        """Enter phase 2, or change its temperature.

        Args:
            tau: Temperature, above 0.
            hard: Use each node's best family only, with the gradient of the softmax.

        Raises:
            ValueError: `tau` is not above 0.
        """
        if not tau > 0:
            raise ValueError(f"tau: expected a number above 0, got {tau!r}")
        self._phase.fill_(SELECTIVE)
        self._tau.fill_(tau)
        self._hard.fill_(hard)

    def selection_entropy(self) -> Tensor:
        """Mean over the nodes of the entropy of softmax(w / tau), a scalar with gradient."""
        soft = (self.gate_weight / self._tau.to(self.gate_weight.dtype)).softmax(-1)
        return torch.special.entr(soft).sum(-1).mean()

    def scores(self, x: Tensor) -> Tensor:
        """Size of each family's part at each node, (D, M): g_im mean abs(sum_k c^m_oik B^m_k).

        Args:
            x: A batch, `(..., D)`; the mean is over it and the outputs.
        """
        self.check_inputs(x)
        x = compute_type(x).reshape(-1, self.in_features)
        parts = [
            torch.einsum("nik,oik->noi", basis(x).to(coef.dtype), coef).abs().mean((0, 1))
            for _, basis, coef in self.families()
        ]
        return self.gates * torch.stack(parts, -1)

    @torch.no_grad()
    def report(self, x: Tensor | None = None) -> list[NodeReport]:
        """What each node chooses as things are, with the families' scores if a batch is given."""
        gates = self.gates
        best = gates.argmax(-1).tolist()
        sizes = [[]] * self.in_features if x is None else self.scores(x).tolist()
        return [
            NodeReport(
                node,
                self.pool[m],
                float(gates[node, m]),
                dict(zip(self.pool, sizes[node], strict=False)),
            )
            for node, m in enumerate(best)
        ]

    @torch.no_grad()
    def prune(self, mode: str = "top1", *, threshold: float = 0.1) -> PrunedKANLinear:
        """The layer of phase 3, which has the chosen families only, gates folded into them.

        Args:
            mode: `"top1"` keeps the family of each node's largest gate, `"threshold"` also all
                whose gate is at least the threshold.
            threshold: The least gate that is kept.

        Raises:
            RuntimeError: The layer is in phase 1, whose gates are no choice.
            ValueError: An unknown mode.
        """
        check_choice("mode", mode, ("top1", "threshold"))
        if self.phase == FULL:
            raise RuntimeError("prune: expected a layer in phase 2, got phase 1; call select first")
        gates = self.gates
        kept = F.one_hot(gates.argmax(-1), len(self.pool)).bool()
        if mode == "threshold":
            kept |= gates >= threshold
        nodes = {n: k.nonzero()[:, 0] for n, k in zip(self.pool, kept.T, strict=True) if k.any()}
        pruned = PrunedKANLinear(
            self.in_features,
            self.out_features,
            {name: index.tolist() for name, index in nodes.items()},
            bias=self.bias is not None,
            device=self.gate_weight.device,
            dtype=self.gate_weight.dtype,
        )
        for name, index in nodes.items():
            gate = gates[index, self.pool.index(name), None]
            pruned.bases[name] = self.bases[name].select(index)  # type: ignore[operator]
            pruned.coef[name].copy_(gate * self.coef[name][:, index])
        if self.bias is not None and pruned.bias is not None:
            pruned.bias.copy_(self.bias)
        return pruned.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, gate={self.gate!r}"


@register(
    paper=10,
    example=lambda: Example(
        {"widths": (3, 2, 1), "pool": ("rbf", "chebyshev")},
        (2 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 1,),
        bad_options={"widths": (3,), "pool": ()},
    ),
    compare=lambda: Comparison({"widths": (64, 64, 10)}, (2 * torch.rand(256, 64) - 1,), peers.MLP),
)
class SKAN(ZooModel):
    """A network of `SKANLinear` layers.

    Args:
        widths: Numbers of inputs, hidden units and outputs.
        pool: Names of families.
        gate: Gates for each `"node"`, or one set for the `"layer"`.
        bias: Whether the layers have biases.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - x: `(..., widths[0])`
        - output: `(..., widths[-1])`

    Returns:
        The outputs.

    Raises:
        ValueError: Fewer than two widths, or what `SKANLinear` refuses.

    Source:
        Yang, Zhang, Luo, Lu and Shen, Activation Space Selectable Kolmogorov-Arnold Networks, 2024.

    Example:
        >>> model = SKAN((2, 5, 1))
        >>> model(torch.rand(8, 2)).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        pool: Sequence[str] = POOL,
        gate: str = "node",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected at least two numbers, got {tuple(widths)}")
        self.widths = tuple(widths)
        self.layers = nn.Sequential(
            *(
                SKANLinear(a, b, pool=pool, gate=gate, bias=bias, device=device, dtype=dtype)
                for a, b in pairwise(widths)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
