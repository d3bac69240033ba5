"""Probabilistic circuits: exact marginals, conditionals, samples and expectations."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "block_sparse": ["compact"],
        "builders": [
            "balanced",
            "factorised",
            "hclt",
            "linear",
            "poon_domingos",
            "quad_tree",
            "rat_spn",
        ],
        "certificate": ["ball_bounds", "mean_bounds", "smoothed_mean"],
        "chow_liu": ["chow_liu_tree"],
        "circuit": ["Circuit"],
        "compression": ["CircuitCodec", "CodeLength"],
        "conformal": ["COLEP", "certified_coverage", "conformal_quantile", "smoothed_bounds"],
        "discretized_logistic": ["DiscretizedLogisticLeaf"],
        "finite_leaf": ["FiniteLeaf"],
        "gaussian_leaf": ["GaussianLeaf"],
        "growing": ["grow", "prune"],
        "inputs": ["BernoulliLeaf", "BinomialLeaf", "CategoricalLeaf"],
        "knowledge": ["KnowledgeCircuit", "KnowledgeMixture"],
        "leaf": ["Leaf"],
        "learning": ["edge_flows", "em_fit", "em_step", "init_from_data"],
        "order": ["prefix_conditionals", "variable_order"],
        "pairs": [
            "cauchy_schwarz_divergence",
            "inner_product",
            "log_inner_product",
            "renyi2_entropy",
        ],
        "prior": ["CircuitPrior"],
        "products": ["cross_entropy", "entropy", "entropy_mc", "kl", "power", "product"],
        "properties": ["is_compatible", "is_deterministic"],
        "region_graph": ["RegionGraph"],
        "sampling": ["max_product_decode", "sample"],
        "soft_evidence": ["soft_evidence_from_codebook", "soft_evidence_from_gaussian"],
        "steering": ["TractableSteering", "steered_posterior"],
        "teacher": ["init_from_teacher"],
        ".ops.rans": ["RansDecoder", "RansEncoder"],
    },
)
