"""Layers that make networks compute less: temporal (delta) sparsity of activations."""

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
        "streaming": ["StreamingModel", "fold_to_streaming"],
    },
)
