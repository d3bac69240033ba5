"""State space models: long-convolution layers that also run as recurrences."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "block": ["S4Block", "S4DBlock"],
        "dplr": ["DPLR", "DPLRKernel", "hippo_dplr"],
        "functional": ["discretise", "exprel", "fft_conv", "log_transition"],
        "hippo": [
            "hippo_basis",
            "hippo_matrix",
            "hippo_measure",
            "hippo_reconstruct",
            "timescale_init",
        ],
        "hippo_memory": ["HiPPOMemory", "MemoryState", "hippo_project"],
        "init": ["legs_normal_part", "s4d_init"],
        "layer": ["SSMKernel", "SSMLayer"],
        "orthogonal": [
            "OrthogonalSSM",
            "hippo_from_basis",
            "hippo_from_official",
            "hippo_to_official",
        ],
        "params": ["ssm_param_groups"],
        "ptd": ["PTDResult", "S4PTD", "perturb_then_diagonalize", "ptd_init"],
        "s4": ["S4"],
        "s4d": ["S4D", "S4DKernel"],
        "sequence": ["SequenceModel", "SequenceState"],
        "s5": ["S5", "S5PTD"],
        "transfer": ["TransferGap", "transfer_function", "transfer_gap"],
    },
)
