"""Mixture of experts: gates, dispatch, experts and layers, and statistical Gaussian mixtures."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "collectives": ["Traffic", "exchange_rows", "sparse_all_gather", "sparse_reduce_scatter"],
        "dense_to_sparse": ["ActivationDenseToSparseGate", "DenseToSparseGate"],
        "dispatch": [
            "Dispatch",
            "Slots",
            "apply_capacity",
            "permute_tokens",
            "sort_slots",
            "unpermute_tokens",
        ],
        "em": ["fit_em"],
        "expert_choice": ["ExpertChoiceGate"],
        "expert_parallel": ["EPExperts"],
        "experts": ["GroupedExperts"],
        "fitting": ["fit_mle"],
        "gates": ["NoisyTopKGate", "SoftmaxGate", "TopKGate"],
        "gaussian": ["GaussianMoE", "MoEParams"],
        "growth": ["GrowthMoE", "GrowthParams"],
        "growth_experts": ["BilinearSplineExpert"],
        "growth_fitting": ["GrowthMoEFit", "compare_models", "fit_growth_moe"],
        "growth_regressor": ["GrowthMoERegressor"],
        "layer": ["MoELayer", "moe_layer"],
        "losses": ["importance_loss", "load_balance_loss", "router_entropy", "z_loss"],
        "parallel": ["FSSDPExperts", "parallelize_moe", "reshard"],
        "placement": [
            "ExpertPlacement",
            "heterogeneous_shard",
            "plan_dispatch",
            "sparse_materialize",
        ],
        "policy": ["PMoEActor", "PMoEPolicy"],
        "policy_losses": ["pmoe_frequency_loss", "pmoe_ppo_loss", "pmoe_sac_loss"],
        "routing": ["Gate", "Routing"],
        "simulate": ["calibrate", "overlap_degree", "simulate_step"],
        "sac": ["SAC", "ReplayBuffer"],
        "squashed_mixture": ["SquashedGaussianMixture"],
        "topk_softmax": [
            "minimum_top_k",
            "minimum_top_k_bound",
            "overfit_exponents",
            "region_experts",
            "topk_regions",
        ],
        "sem_forest": ["sem_forest_importance"],
        "voronoi": ["gate_dependence", "voronoi_cells", "voronoi_loss"],
    },
)
