"""Mixture of experts: gates, dispatch, experts and layers, and statistical Gaussian mixtures."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dense_to_sparse": ["ActivationDenseToSparseGate", "DenseToSparseGate"],
        "dispatch": ["Dispatch", "apply_capacity", "permute_tokens", "unpermute_tokens"],
        "em": ["fit_em"],
        "experts": ["GroupedExperts"],
        "fitting": ["fit_mle"],
        "gates": ["NoisyTopKGate", "SoftmaxGate", "TopKGate"],
        "gaussian": ["GaussianMoE", "MoEParams"],
        "layer": ["MoELayer", "moe_layer"],
        "losses": ["importance_loss", "load_balance_loss", "router_entropy", "z_loss"],
        "routing": ["Gate", "Routing"],
        "voronoi": ["gate_dependence", "voronoi_cells", "voronoi_loss"],
    },
)
