"""Gaussian splatting: scenes of 3-D Gaussians, their pictures, training and files."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "analytic": [
            "AnalyticScene",
            "area_downsample",
            "gaussian_cdf_logistic",
            "mip_filter_3d",
            "multiscale_cameras",
            "pixel_integral",
        ],
        "cameras": ["Cameras"],
        "compact": ["Compact3DGS"],
        "compact_mask": ["LearnableGaussianMask", "hard_mask"],
        "compact_color": ["HashGridColor"],
        "compact_training": ["CompactStrategy", "compact_rates"],
        "edits": ["relocated"],
        "fields": ["DenseGridField"],
        "fitting": ["SplatTrainer"],
        "frequency_loss": ["FrequencyModulatedLoss"],
        "generalized_exponential": [
            "GEFMixture1d",
            "gef",
            "gef_variance_scale",
            "ray_integral",
        ],
        "ges": ["GESStrategy", "GeneralizedExponentialScene", "ges_shape_modulation"],
        "formats": ["Capture", "load", "load_capture", "save"],
        "hyper": ["ConditionalGaussian", "HyperGaussian"],
        "hyper_embedding": ["SplatEmbedding"],
        "hyper_scene": ["AnimatableScene", "HyperGaussianHead"],
        "losses": ["l1", "photometric_loss"],
        "photographs": ["load_photographs"],
        "protocol": ["DensifyStrategy", "TrainStep"],
        "rotations": ["matrix_to_quat", "quat_to_matrix"],
        "s3im_loss": ["S3IMLoss", "s3im"],
        "scene": ["GaussianScene"],
        "vdgs": ["VDGSScene", "vdgs_rates"],
        "vdgs_field": ["ViewDirectionField"],
        "viewer": ["export_html"],
        "strategy": ["DefaultStrategy", "MCMCStrategy"],
    },
)
