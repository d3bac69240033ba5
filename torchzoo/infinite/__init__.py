"""Networks of infinite width: their kernels in closed form."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dual_activations": ["DualActivation", "arc_cosine", "dual"],
    },
)
