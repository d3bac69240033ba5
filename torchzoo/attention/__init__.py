"""Attention layers: Gaussian adaptive attention (paper 48), random features (paper 168)."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "blocks": ["GaussianAdaptiveTransformerBlock", "GroupedQueryGaussianAttention"],
        "gaussian_adaptive": ["GaussianAdaptiveAttention", "MultiHeadGaussianAdaptiveAttention"],
        "importance": ["ImportanceTracker", "importance_factor"],
        "random_feature": [
            "BiasedRandomFeatureAttention",
            "RandomFeatureAttention",
            "rfa_features",
            "rfa_target",
        ],
        "random_feature_kernel": ["rfa_kernel"],
        "random_feature_model": ["RandomFeatureMLP"],
    },
)
