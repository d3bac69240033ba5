"""Attention layers: Gaussian adaptive attention (paper 48)."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "blocks": ["GaussianAdaptiveTransformerBlock", "GroupedQueryGaussianAttention"],
        "gaussian_adaptive": ["GaussianAdaptiveAttention", "MultiHeadGaussianAdaptiveAttention"],
        "importance": ["ImportanceTracker", "importance_factor"],
    },
)
