"""Layers that compute less: sparse weights, and temporal (delta) sparsity of activations."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "delta": [
            "DeltaActivation",
            "DeltaConv2d",
            "DeltaLinear",
            "L1Activation",
            "delta_penalty",
        ],
        "meters": ["DeltaMeter"],
        "smash": ["SparseSparseLinear"],
        "streaming": ["StreamingModel", "fold_to_streaming"],
        ".ops": ["SpGEMMPlan", "spgemm", "spgemm_batched", "spgemm_plan", "spgemm_stats"],
    },
)
