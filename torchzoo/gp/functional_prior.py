"""Weight priors tuned so that the functions a network draws look like a Gaussian process.

Both priors are seen through function values f at M random inputs, drawn afresh in each step, and
their distance is that of Wasserstein in the dual form of Kantorovich and Rubinstein,

    W1 = sup over 1-Lipschitz phi of E[phi(f_gp)] - E[phi(f_net)].

The critic phi is a network that starts anew in each step and maximises the difference minus
`penalty` times the mean of `(norm of its gradient - 1)^2` between samples; then, phi held, one step
of RMSprop lowers the difference on fresh samples by the parameters of the prior.

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, section 3. Deviations: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.common.autodiff import gradient_penalty
from torchzoo.gp.bnn_priors import PriorNet
from torchzoo.gp.functional_prior_targets import FunctionSampler, gp_prior
from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

LipschitzKind = Literal["gp", "lp"]
_STEEP = 0.01  # norm of the critic's gradient below which it counts as fitted


@register(
    paper=13,
    example=lambda: Example(
        {"num_measure": 5, "hidden": 8},
        (torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),),
        bad_options={"num_measure": 0, "hidden": 0},
    ),
    compare="a part of FunctionalPriorTuner, trained to tell two priors apart",
)
class LipschitzCritic(ZooModel):
    """Network that tells two kinds of functions apart by their values alone.

    Args:
        num_measure: Values M of each function.
        hidden: Width of the two hidden layers.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - f: `(..., M)`
        - output: `(...)`

    Returns:
        A value for each function.

    Raises:
        ValueError: An option out of its range, or functions with another number of values.

    Source:
        B.-H. Tran and others, "All you need is a good functional prior for Bayesian deep learning",
        2022, section 3.2.

    Example:
        >>> LipschitzCritic(100)(torch.randn(7, 100)).shape
        torch.Size([7])
    """

    def __init__(
        self,
        num_measure: int,
        *,
        hidden: int = 200,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_measure < 1:
            raise ValueError(f"num_measure: expected at least 1, got {num_measure}")
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        super().__init__()
        self.num_measure, self.hidden = num_measure, hidden
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Linear(num_measure, hidden, **options)
        self.second = nn.Linear(hidden, hidden, **options)
        self.last = nn.Linear(hidden, 1, **options)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights of Glorot's normal distribution, standard normal biases."""
        for layer in (self.first, self.second, self.last):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, generator=generator)

    def forward(self, f: Tensor) -> Tensor:
        if f.ndim == 0 or f.shape[-1] != self.num_measure:
            raise ValueError(f"f: expected (..., {self.num_measure}), got {tuple(f.shape)}")
        return cast(Tensor, self.last(F.softplus(self.second(F.softplus(self.first(f))))))[..., 0]

    def difference(self, real: Tensor, fake: Tensor) -> Tensor:
        """Mean value of real functions minus that of fake ones."""
        return self(real).mean() - self(fake).mean()

    def extra_repr(self) -> str:
        return f"num_measure={self.num_measure}"


def fit_critic(
    real: Tensor,
    fake: Tensor,
    *,
    steps: int = 200,
    lr: float = 0.02,
    lipschitz: LipschitzKind = "gp",
    penalty: float = 10.0,
    hidden: int = 200,
    generator: torch.Generator | None = None,
) -> LipschitzCritic:
    """Train a critic from scratch by Adagrad; the samples count as constants.

    Args:
        real: Function values.
        fake: As many others.
        steps: Most steps; it ends earlier where the gradient vanishes.
        lr: Learning rate.
        lipschitz: `"gp"` pulls gradient norms to 1, `"lp"` only those above 1 down to it. With few
            values or few steps take the latter, as the former keeps slopes from passing through 0.
        penalty: Weight of that.
        hidden: Width of the hidden layers.
        generator: Draws, on the device of the samples.

    Shape:
        - real, fake: `(n, M)`

    Raises:
        ValueError: Samples that are not finite or of different shapes, or an unknown penalty.
    """
    _check_samples(real, fake)
    if lipschitz not in ("gp", "lp"):
        raise ValueError(f"lipschitz: expected 'gp' or 'lp', got {lipschitz!r}")
    real, fake = real.detach(), fake.detach()
    with torch.device("meta"):
        critic = LipschitzCritic(real.shape[-1], hidden=hidden, dtype=real.dtype)
    critic = critic.to_empty(device=real.device)
    critic.reset_parameters(generator)
    parameters = list(critic.parameters())
    optimizer = torch.optim.Adagrad(parameters, lr=lr)
    for _ in range(steps):
        with torch.enable_grad():
            steepness = gradient_penalty(
                critic, real, fake, one_sided=lipschitz == "lp", generator=generator
            )
            loss = penalty * steepness - critic.difference(real, fake)
        # The last bias shifts all values alike, so it has no gradient to speak of.
        slopes = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        if torch.stack([slope.square().sum() for slope in slopes]).sum() < _STEEP**2:
            break
        optimizer.step()
    return critic.requires_grad_(False)


def wasserstein_1(real: Tensor, fake: Tensor, **options: Any) -> Tensor:
    """Estimate the 1-Wasserstein distance of two distributions from samples.

    A critic is trained on one half of the samples and judges the other, which keeps what it learns
    by heart out of the estimate.

    Args:
        real: Samples.
        fake: As many samples of the other distribution; the estimate can be differentiated by both.
        **options: Those of `fit_critic`.

    Shape:
        - real, fake: `(n, M)`, n at least 2
        - output: a scalar

    Raises:
        ValueError: Samples that are not finite or of different shapes.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 1000, 1, generator=generator)
        >>> distance = wasserstein_1(a, b + 1, lr=0.1, lipschitz="lp", generator=generator)
        >>> 0.8 < distance.item() < 1.2
        True
    """
    _check_samples(real, fake)
    half = len(real) // 2
    critic = fit_critic(real[:half], fake[:half], **options)
    return critic.difference(real[half:], fake[half:])


class FunctionalPriorTuner:
    """Moves the parameters of a prior over weights towards a Gaussian process prior.

    Args:
        net: The prior over weights.
        gp_sampler: Maps inputs `(M, D)` and a number n to n target functions at the inputs,
            `(n, M)`; or a gpytorch kernel. Each output of the network has the same target.
        measurement_sampler: Maps a number M to inputs `(M, ...)`, others each time; see
            `torchzoo.gp.measurement_sets`.
        num_samples: Functions of each kind.
        num_measure: Inputs M.
        inner_steps: Most steps of the critic.
        inner_lr: Learning rate of the critic.
        outer_lr: Learning rate of the prior.
        lipschitz: See `fit_critic`.
        penalty: See `fit_critic`.
        generator: Draws weights and critics.

    Raises:
        ValueError: An option out of its range.

    Source:
        B.-H. Tran and others, "All you need is a good functional prior for Bayesian deep learning",
        2022, section 3 and algorithm 1.

    Example:
        >>> from torchzoo.gp import GaussianPriorNet, measurement_sets, rbf_prior
        >>> net = GaussianPriorNet([1, 20, 1])
        >>> x = torch.linspace(-3, 3, 50)[:, None]
        >>> tuner = FunctionalPriorTuner(
        ...     net, rbf_prior(0.6), measurement_sets(x), num_measure=10, inner_steps=20
        ... )
        >>> tuner.fit(3).shape
        torch.Size([3])
    """

    def __init__(
        self,
        net: PriorNet,
        gp_sampler: FunctionSampler | Any,
        measurement_sampler: Callable[[int], Tensor],
        *,
        num_samples: int = 128,
        num_measure: int = 100,
        inner_steps: int = 200,
        inner_lr: float = 0.02,
        outer_lr: float = 0.01,
        lipschitz: LipschitzKind = "gp",
        penalty: float = 10.0,
        generator: torch.Generator | None = None,
    ):
        if lipschitz not in ("gp", "lp"):
            raise ValueError(f"lipschitz: expected 'gp' or 'lp', got {lipschitz!r}")
        counts = {"num_samples": num_samples, "num_measure": num_measure}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        for name, rate in {"inner_lr": inner_lr, "outer_lr": outer_lr}.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"{name}: expected above 0, got {rate}")
        self.net, self.measurement_sampler, self.generator = net, measurement_sampler, generator
        self.gp_sampler = _as_sampler(gp_sampler, generator)
        self.num_samples, self.num_measure = num_samples, num_measure
        self.critic_options: dict[str, Any] = {
            "steps": inner_steps,
            "lr": inner_lr,
            "lipschitz": lipschitz,
            "penalty": penalty,
        }
        self.optimizer = torch.optim.RMSprop(net.parameters(), lr=outer_lr)

    def step(self) -> Tensor:
        """Train a critic, and move the prior once.

        Returns:
            The distance before the move, on samples that the critic has not seen, summed over the
            outputs of the network.

        Raises:
            ValueError: The samplers gave other shapes than asked for, or values that are not
                finite.
        """
        x = self.measurement_sampler(self.num_measure)
        if len(x) != self.num_measure:
            raise ValueError(
                f"measurement_sampler: expected {self.num_measure} inputs, got {tuple(x.shape)}"
            )
        with torch.no_grad():
            fake = self._draw(x)
        critic = fit_critic(
            self._target(x, fake), fake, generator=self.generator, **self.critic_options
        )
        fake = self._draw(x)
        outputs = len(fake) // self.num_samples
        distance = outputs * critic.difference(self._target(x, fake), fake)
        psi = [p for p in self.net.parameters() if p.requires_grad]
        for parameter, slope in zip(psi, torch.autograd.grad(distance, psi), strict=True):
            parameter.grad = slope
        self.optimizer.step()
        self.optimizer.zero_grad()
        return distance.detach()

    def fit(self, n: int) -> Tensor:
        """Take n steps; their distances `(n,)`."""
        return torch.stack([self.step() for _ in range(n)])

    def _draw(self, x: Tensor) -> Tensor:
        """Functions of the network, one for each draw and output."""
        f = self.net.sample_functions(x, self.num_samples, generator=self.generator)
        return rearrange(f, "n m o -> (n o) m")

    def _target(self, x: Tensor, like: Tensor) -> Tensor:
        """As many functions of the target."""
        f = self.gp_sampler(x, len(like)).to(like)
        if f.shape != like.shape:
            raise ValueError(
                f"gp_sampler: expected functions {tuple(like.shape)}, got {tuple(f.shape)}"
            )
        if not f.isfinite().all():
            raise ValueError("gp_sampler: expected finite functions, got NaN or infinity")
        return f


def _as_sampler(sampler: Any, generator: torch.Generator | None) -> FunctionSampler:
    """A gpytorch kernel as the process that it stands for; other samplers as they are."""
    from gpytorch.kernels import Kernel

    if isinstance(sampler, Kernel):
        return gp_prior(sampler, generator=generator)
    return cast(FunctionSampler, sampler)


def _check_samples(real: Tensor, fake: Tensor) -> None:
    if real.ndim != 2 or real.shape != fake.shape:
        raise ValueError(
            f"fake: expected (n, M) like real, {tuple(real.shape)}, got {tuple(fake.shape)}"
        )
    for name, samples in {"real": real, "fake": fake}.items():
        if not samples.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
