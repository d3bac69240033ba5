"""Gaussian processes: what gpytorch and botorch lack, in their terms."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "excursions": ["excursion_times", "simulate_stationary"],
        "iia": [
            "IndependentIntervalApproximation",
            "check_iia_valid",
            "persistency_exponent",
            "slepian_iia",
        ],
        "slepian": ["SlepianProcess"],
        "stationary": ["StationaryCovariance", "as_stationary"],
    },
)
