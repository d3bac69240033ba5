"""Layers that compute less: sparse weights, and temporal (delta) sparsity of activations."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "activation_meter": ["ActivationMeter", "ActivityReport", "activation_ratio"],
        "delta": [
            "DeltaActivation",
            "DeltaConv2d",
            "DeltaLinear",
            "L1Activation",
            "delta_penalty",
        ],
        "dendrites": ["DendriteSegments"],
        "emergence": ["EmergenceCurve", "EmergenceParams"],
        "emergence_predictor": ["Architecture", "EmergencePredictor", "architecture_features"],
        "ffn": ["SparseFFN"],
        "hosts": ["find_blocks", "find_ffns"],
        "lazy": [
            "TopKActivation",
            "TopKFFN",
            "activation_gradient_at_init",
            "convert_topk",
            "topk_activation",
        ],
        "layouts": ["MLPParts", "mlp_parts"],
        "massive": ["MassiveActivationMeter", "MassiveReport", "intervene", "massive_mask"],
        "meters": ["DeltaMeter"],
        "law": ["SparsingLaw"],
        "prosparse": [
            "ActivationL1",
            "FATReLU",
            "SineSparsityScheduler",
            "fatrelu",
            "load_prosparse_config",
            "prosparse_convert",
        ],
        "sdr": [
            "Threshold",
            "capacity",
            "optimal_threshold",
            "repeated_error",
            "sdr_false_negative",
            "sdr_false_positive",
            "sdr_log_pmf",
            "sdr_union_false_positive",
        ],
        "sdr_patterns": ["SDR"],
        "smash": ["SparseSparseLinear"],
        "sparsity_meter": ["SparsityMeter", "SparsitySummary"],
        "streaming": ["StreamingModel", "fold_to_streaming"],
        "tail_error": ["cett", "cett_curve", "cett_thresholds", "importance"],
        "truncation": ["SparsityReport", "cett_ppl", "ppl_sparsity", "uniform_ppl"],
        ".ops": ["SpGEMMPlan", "spgemm", "spgemm_batched", "spgemm_plan", "spgemm_stats"],
    },
)
