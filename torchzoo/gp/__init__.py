"""Gaussian processes: what gpytorch and botorch lack, in their terms."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "bandit_loop": ["run_bandit"],
        "bbkb": ["BBKB"],
        "bkb": ["BKB", "BudgetedKernelBandit"],
        "dkm": ["DeepKernelMachine"],
        "dkm_layer": ["DKMLayer", "gram_kl"],
        "excursions": ["excursion_times", "simulate_stationary"],
        "fourier": ["FourierGPPrior"],
        "funbat": ["FunBaT", "FunctionalCP"],
        "gp_pde": ["GPHM", "Fields", "laplace"],
        "gram_kernels": ["GramBlocks", "gram_kernel"],
        "iia": [
            "IndependentIntervalApproximation",
            "check_iia_valid",
            "persistency_exponent",
            "slepian_iia",
        ],
        "kernels": ["GaussianMixtureKernel", "StudentTMixtureKernel"],
        "kronecker": ["KroneckerGP"],
        "manifold": [
            "connections",
            "field_index",
            "furthest_points",
            "manifold_graph",
            "mesh_graph",
            "tangent_frames",
        ],
        "manifold_laplacian": ["ConnectionLaplacian"],
        "mm_gpvae": ["MMGPVAE"],
        "mm_gpvae_likelihoods": [
            "BernoulliLikelihood",
            "GaussianLikelihood",
            "PoissonLikelihood",
            "PoissonLoadingDecoder",
            "StepMLP",
        ],
        "posterior": ["GaussianPosterior"],
        "rvgp": ["RVGP", "VectorPosterior"],
        "rvgp_kernel": ["GraphConnectionKernel"],
        "slepian": ["SlepianProcess"],
        "sparse": ["LeverageScoreSampler", "inverse_root", "nystrom_features"],
        "sparse_dkm": ["SparseDKM"],
        "state_space": ["StateSpaceGP"],
        "stationary": ["StationaryCovariance", "as_stationary"],
    },
)
