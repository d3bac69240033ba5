"""Gaussian processes: what gpytorch and botorch lack, in their terms."""

from typing import Any

from torchzoo._lazy import attach
from torchzoo.gp.acquisition_botorch import NAMES, from_botorch

_ours, __dir__, __all__ = attach(
    __name__,
    {
        "acquisition": [
            "expected_improvement",
            "expected_max_piecewise_linear",
            "expected_rise",
            "max_value_entropy",
        ],
        "acquisition_lines": ["IntegratedEnvironment", "Lines", "gaussian", "posterior_lines"],
        "acquisition_modules": ["CostAwareKG", "KnowledgeGradient", "NoisyExpectedImprovement"],
        "acquisition_average": ["AveragedAcquisition"],
        "acquisition_botorch": ["as_botorch_model"],
        "acquisition_derivative": ["DerivativeKnowledgeGradient", "gaussian_with_gradient"],
        "acquisition_entropy": ["EntropySearch", "PredictiveEntropySearch"],
        "acquisition_optimize": ["optimize_acqf"],
        "bandit_loop": ["run_bandit"],
        "bayes_opt": ["BayesOpt"],
        "bbkb": ["BBKB"],
        "bkb": ["BKB", "BudgetedKernelBandit"],
        "bnn_surrogates": ["StandardizedSurrogate", "Surrogate"],
        "bnn_surrogates_gp": ["DKLSurrogate", "GPSurrogate", "InfiniteWidthSurrogate"],
        "bnn_surrogates_map": ["EnsembleSurrogate", "LaplaceSurrogate"],
        "bnn_surrogates_mcmc": ["HMCSampler", "HMCSamples", "HMCSurrogate", "SGHMCSurrogate"],
        "bnn_surrogates_nets": ["FlatMLP", "NetworkSurrogate"],
        "bnn_surrogates_posterior": ["FunctionSamples", "JointGaussian", "SamplePosterior"],
        "bo": ["History", "greedy_batch", "run_rounds", "sample_qei"],
        "bnn_priors": ["GaussianPriorNet", "PriorNet"],
        "bnn_priors_flow": ["FlowPriorNet", "PlanarFlow"],
        "bnn_priors_hierarchical": ["HierarchicalPriorNet"],
        "bnn_priors_posterior": ["predict", "sample_posterior"],
        "derivative_gp": ["DerivativeGP", "derivative_covariance"],
        "dkm": ["DeepKernelMachine"],
        "dkm_layer": ["DKMLayer", "gram_kl"],
        "excursions": ["excursion_times", "simulate_stationary"],
        "fourier": ["FourierGPPrior"],
        "fully_bayesian": ["FullyBayesianSurrogate"],
        "funbat": ["FunBaT", "FunctionalCP"],
        "functional_prior": [
            "FunctionalPriorTuner",
            "LipschitzCritic",
            "fit_critic",
            "wasserstein_1",
        ],
        "functional_prior_targets": ["gp_prior", "measurement_sets", "rbf_prior"],
        "gp_pde": ["GPHM", "Fields", "laplace"],
        "gpcis": ["GPCISHead"],
        "gpcis_clicks": [
            "Segmentation",
            "click_disks",
            "click_violations",
            "disk_points",
            "gpcis_loss",
            "normalized_focal_loss",
        ],
        "gram_kernels": ["GramBlocks", "gram_kernel"],
        "iia": [
            "IndependentIntervalApproximation",
            "check_iia_valid",
            "persistency_exponent",
            "slepian_iia",
        ],
        "infinite_kernels": ["InfiniteWidthErfKernel", "InfiniteWidthReLUKernel"],
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
        "multi_task": ["MultiTaskSurrogate"],
        "pathwise": ["PathwiseSparseGP", "random_features"],
        "posterior": ["GaussianPosterior"],
        "rvgp": ["RVGP", "VectorPosterior"],
        "rvgp_kernel": ["GraphConnectionKernel"],
        "sgmcmc": ["AdaptiveSGHMC", "sghmc"],
        "slepian": ["SlepianProcess"],
        "sparse": ["LeverageScoreSampler", "inverse_root", "nystrom_features"],
        "sparse_dkm": ["SparseDKM"],
        "state_space": ["StateSpaceGP"],
        "stationary": ["StationaryCovariance", "as_stationary"],
    },
)


def __getattr__(name: str) -> Any:
    """What is ours, or an acquisition function of botorch."""
    return from_botorch(name) if name in NAMES else _ours(name)
