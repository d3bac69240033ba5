"""Images of a few bits where all is exact: how far steered marginals are from the posterior.

The circuit is the law, the denoiser has exact p(x_0^i | x_t), and all states are enumerated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchzoo.circuits import (
    CategoricalLeaf,
    Circuit,
    factorised,
    soft_evidence_from_gaussian,
    steered_posterior,
)

LEVELS = torch.tensor([-1.0, 1.0], dtype=torch.float64)
SHARES = (0.05, 0.2, 0.5)
MIXES = (0.0, 0.5)


def two_bits() -> Tensor:
    """Two neighbours, equal with probability 0.8."""
    return torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)


def four_bits() -> Tensor:
    """A 2x2 Ising model whose four neighbouring pairs are coupled with strength 0.8."""
    spins = LEVELS[torch.cartesian_prod(*[torch.arange(2)] * 4)]
    energy = 0.8 * (spins * spins[:, [1, 3, 0, 2]]).sum(-1)
    return energy.softmax(0).view(2, 2, 2, 2)


LAWS = {"2 bits": (two_bits, 1), "4 bits": (four_bits, 2)}
"""For each law its table, and how many bits are known, the first ones."""


def exact_circuit(table: Tensor) -> Circuit:
    """A circuit with a unit for each state, of exactly the law in a table."""
    size, categories = table.dim(), table.shape[0]
    leaf = CategoricalLeaf(categories)
    circuit = Circuit(factorised(size), leaf, num_units=table.numel(), dtype=table.dtype)
    states = torch.cartesian_prod(*[torch.arange(categories)] * size)
    own = states.T[circuit.scope]  # (D, K), the value of each variable in each state
    with torch.no_grad():
        circuit.layers[-1].log_weight.copy_(table.log().view(1, 1, -1))
        circuit.leaf.set_probs((own[:, None] == torch.arange(categories)[:, None]).to(table))
    return circuit


def divergences(
    table: Tensor, num_known: int, share: float, n: int, generator: torch.Generator
) -> dict[str, float]:
    """Mean KL of the true constrained posterior from products of marginals, over draws of x_t.

    Returns:
        `"DM"`, the denoiser's marginals with the known bits pasted; `"mix 0"` and so on; and
        `"gap"`, the largest distance of the KL at mix 0 from the posterior's total correlation.
    """
    size, circuit = table.dim(), exact_circuit(table)
    states = torch.cartesian_prod(*[torch.arange(2)] * size)
    drawn = states[torch.multinomial(table.flatten(), n, replacement=True, generator=generator)]
    noise = torch.randn(n, size, dtype=table.dtype, generator=generator)
    x_t = share**0.5 * LEVELS[drawn] + (1 - share) ** 0.5 * noise
    log_w = soft_evidence_from_gaussian(x_t, share, LEVELS)
    known = (torch.arange(size) < num_known).expand(n, size)
    log_joint = table.log().flatten() + log_w[:, torch.arange(size), states].sum(-1)  # (N, states)
    fits = (states == drawn[:, None])[..., :num_known].all(-1)
    posterior = log_joint.masked_fill(~fits, -torch.inf).softmax(-1)
    points = torch.nn.functional.one_hot(states, 2).to(table)
    denoised = torch.einsum("ns,sdc->ndc", log_joint.softmax(-1), points)
    candidates = {"DM": denoised.log().masked_fill(known[..., None], 0)}
    for mix in MIXES:
        log_p = steered_posterior(circuit, denoised.log(), log_w, known, drawn, mix=mix)
        candidates[f"mix {mix:g}"] = log_p.masked_fill(known[..., None], 0)
    found = {name: _kl(posterior, log_p, states) for name, log_p in candidates.items()}
    own = torch.einsum("ns,sdc->ndc", posterior, points)
    correlation = torch.special.entr(own).sum((1, 2)) - torch.special.entr(posterior).sum(1)
    gap = (found["mix 0"] - correlation).abs().max()
    return {**{name: kl.mean().item() for name, kl in found.items()}, "gap": gap.item()}


def _kl(posterior: Tensor, log_p: Tensor, states: Tensor) -> Tensor:
    """`(N,)`, KL of posteriors over states from products of `(N, D, 2)`; known bits count 0."""
    product = log_p[:, torch.arange(states.shape[1]), states].sum(-1)
    return (torch.xlogy(posterior, posterior) - posterior * product).sum(-1)
