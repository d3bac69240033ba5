"""Random mixtures of Gaussians with a top-K gate, data for them, and choices of their atoms."""

import pytest
import torch

from torchzoo.moe import GaussianMoE, MoEParams

both_rules = pytest.mark.parametrize("with_bias", [False, True])


def random_params(k, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    return MoEParams(
        beta0=2 * torch.randn(k, **draw),
        beta1=2 * torch.randn(k, d, **draw),
        a=2 * torch.randn(k, d, **draw),
        b=2 * torch.randn(k, **draw),
        var=torch.rand(k, **draw) + 0.2,
    )


def random_data(n, d=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, 3 * torch.randn(n, generator=g, dtype=torch.float64)


def topk_model(params, top_k, *, with_bias=False):
    return GaussianMoE.from_params(params, gate="topk", top_k=top_k, select_with_bias=with_bias)


def atoms(params, which):
    """Some of the atoms, in any order, some of them perhaps several times."""
    return MoEParams(*(field[which] for field in params[:5]))
