"""What this family takes from botorch, and models in botorch's terms; imports it only when asked.

Acquisition functions that botorch has are botorch's here, under these names: `torchzoo.gp.<name>`
looks them up. Its noisy expected improvement integrates over what the noise hid, which is not what
`torchzoo.gp.NoisyExpectedImprovement` does, so it is called `IntegratedNoisyEI`.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

NAMES = {
    "ConstrainedEI": "ConstrainedExpectedImprovement",
    "ExpectedImprovement": "ExpectedImprovement",
    "IntegratedNoisyEI": "NoisyExpectedImprovement",
    "LogExpectedImprovement": "LogExpectedImprovement",
    "MaxValueEntropySearch": "qMaxValueEntropy",
    "qExpectedImprovement": "qExpectedImprovement",
    "qKnowledgeGradient": "qKnowledgeGradient",
    "qLogExpectedImprovement": "qLogExpectedImprovement",
    "qNoisyExpectedImprovement": "qNoisyExpectedImprovement",
}
"""For each name here, botorch's."""


def from_botorch(name: str) -> Any:
    """A class of `botorch.acquisition` by its name here, one of `NAMES`.

    Raises:
        ImportError: botorch is not installed.
    """
    return getattr(_botorch("botorch.acquisition", name), NAMES[name])


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
