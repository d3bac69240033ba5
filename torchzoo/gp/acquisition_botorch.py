"""What this family takes from botorch, and models in botorch's terms; imports it only when asked.

What botorch has is botorch's here, under the names of `NAMES`: `torchzoo.gp.<name>` looks them up.
Its noisy expected improvement integrates over what the noise hid, which is not what
`torchzoo.gp.NoisyExpectedImprovement` does, so it is called `IntegratedNoisyEI`. Of the methods of
P. I. Frazier, "A tutorial on Bayesian optimization", 2018:

- expected improvement, one point or several: botorch's `ExpectedImprovement`,
  `LogExpectedImprovement`, `qExpectedImprovement`, `qLogExpectedImprovement`; our own
  `expected_improvement` is the bare formula, and `sample_qei` is for functions that were sampled;
- with noise: our own `NoisyExpectedImprovement`; botorch's `IntegratedNoisyEI` and
  `qNoisyExpectedImprovement` are other ones;
- knowledge gradient: botorch's `qKnowledgeGradient` on a continuous domain; our own
  `KnowledgeGradient`, exact, on a finite set;
- with derivatives: our own `DerivativeGP` and `DerivativeKnowledgeGradient`; botorch has neither,
  gpytorch has kernels, which the latter understands;
- entropy search: our own `EntropySearch` and `PredictiveEntropySearch` on a finite set; botorch's
  `qPredictiveEntropySearch`, by expectation propagation, is differentiable in nothing and may be
  below 0; for the value of the maximum, botorch's `MaxValueEntropySearch`, our own
  `max_value_entropy` is the bare formula;
- parallel evaluations: botorch's acquisition functions of q points, `DerivativeKnowledgeGradient`,
  and `BayesOpt.suggest`, which finds points one after the other;
- constraints: botorch's `ConstrainedEI`; `BayesOpt` does without botorch;
- several fidelities: botorch's `qMultiFidelityKnowledgeGradient`; our own `CostAwareKG`, exact, on
  a finite set;
- several tasks: botorch's `MultiTaskGP`; our own `MultiTaskSurrogate` for `BayesOpt`, on gpytorch's
  kernel of tasks;
- random environments: our own `IntegratedEnvironment`;
- averages over hyperparameters: our own `FullyBayesianSurrogate` and `AveragedAcquisition`;
  botorch's `SaasFullyBayesianSingleTaskGP` has priors for many inputs, and needs numpyro to fit;
- maximising acquisition functions: botorch's, in `optimize_acqf`; the loop is our own `BayesOpt`.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

NAMES = {
    "ConstrainedEI": "acquisition.ConstrainedExpectedImprovement",
    "ExpectedImprovement": "acquisition.ExpectedImprovement",
    "IntegratedNoisyEI": "acquisition.NoisyExpectedImprovement",
    "LogExpectedImprovement": "acquisition.LogExpectedImprovement",
    "MaxValueEntropySearch": "acquisition.qMaxValueEntropy",
    "MultiTaskGP": "models.MultiTaskGP",
    "SaasFullyBayesianSingleTaskGP": "models.fully_bayesian.SaasFullyBayesianSingleTaskGP",
    "qExpectedImprovement": "acquisition.qExpectedImprovement",
    "qKnowledgeGradient": "acquisition.qKnowledgeGradient",
    "qLogExpectedImprovement": "acquisition.qLogExpectedImprovement",
    "qMultiFidelityKnowledgeGradient": "acquisition.qMultiFidelityKnowledgeGradient",
    "qNoisyExpectedImprovement": "acquisition.qNoisyExpectedImprovement",
    "qPredictiveEntropySearch": "acquisition.predictive_entropy_search.qPredictiveEntropySearch",
}
"""For each name here, botorch's."""


def from_botorch(name: str) -> Any:
    """A class of botorch by its name here, one of `NAMES`.

    Raises:
        ImportError: botorch is not installed.
    """
    module, _, theirs = NAMES[name].rpartition(".")
    return getattr(_botorch(f"botorch.{module}", name), theirs)


def as_botorch_model(model: Any) -> Any:
    """A plain gpytorch `ExactGP` as a botorch model of one output, for all of botorch.

    The result shares parameters and data with the model and is of its class, too.

    Args:
        model: The model, with its likelihood.

    Returns:
        A botorch `GPyTorchModel`; the model itself if it is one already.

    Raises:
        ImportError: botorch is not installed.
        ValueError: It is no `ExactGP`.

    Example:
        >>> import gpytorch
        >>> class Plain(gpytorch.models.ExactGP):
        ...     def __init__(self, x, y):
        ...         super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        ...         self.mean = gpytorch.means.ZeroMean()
        ...         self.kernel = gpytorch.kernels.RBFKernel()
        ...     def forward(self, x):
        ...         return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))
        >>> x = torch.rand(5, 2)
        >>> as_botorch_model(Plain(x, x.sum(1))).posterior(torch.rand(4, 3, 2)).mean.shape
        torch.Size([4, 3, 1])
    """
    import gpytorch

    base = _botorch("botorch.models.gpytorch", "as_botorch_model").GPyTorchModel
    if isinstance(model, base):
        return model
    if not isinstance(model, gpytorch.models.ExactGP):
        raise ValueError(f"model: expected a gpytorch ExactGP, got {type(model).__name__}")
    kind = type(model)
    found = copy.copy(model)
    found.__class__ = type(f"Botorch{kind.__name__}", (base, kind), {"num_outputs": 1})
    return found


def _botorch(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs botorch: pip install torchzoo[gp]") from error
