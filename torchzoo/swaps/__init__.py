"""Layers of the zoo in the place of layers that a model has: what carries over, and how it starts.

Every swap notes what it moved, so that `torchzoo.surgery.restore` undoes it.
"""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".surgery": ["Swapped", "restore"],
        "activations": ["swap_activations"],
        "balance": ["balanced"],
        "attention": ["GaussianPreGate", "add_gaussian_gate"],
        "delta": ["FrameDeltaConv2d", "swap_delta"],
        "evonorm": ["swap_evonorm"],
        "experts": ["CopiedExperts", "swap_experts", "upcycle"],
        "feedforward": ["swap_sparse_ffn"],
        "mixtral": ["from_mixtral_block", "to_mixtral_block", "to_mixtral_state"],
        "sparsifying": ["prosparse"],
        "names": ["TARGETS", "apply", "parse"],
        "selectors": ["WORDS", "selector"],
    },
)
