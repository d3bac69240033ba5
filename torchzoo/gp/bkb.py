"""BKB: Gaussian-process bandits whose inducing points are drawn anew in every round.

For arms x_1, ..., x_t pulled so far, with rewards y, inducing points S among them and Nyström
features z(x) = K_SS^(+1/2) k_S(x) (see `torchzoo.gp.sparse`), Z stacking z(x_s),

    V = Z^T Z + lambda I,    mu(x) = z(x)^T V^-1 Z^T y,
    sigma^2(x) = (k(x, x) - z(x)^T z(x)) / lambda + z(x)^T V^-1 z(x),
    ucb(x) = mu(x) + beta sigma(x),
    beta = sqrt(lambda) F + sqrt(xi^2 (log(t) sum_s sigma^2(x_s) + log(1 / delta))).

sigma^2 is the posterior variance over lambda, so that the sum over pulls is the effective
dimension. Its first term is what inducing points can't explain; without it the variance starves far
from them. A round takes time O(A m^2 + m^3) for A arms and m inducing points, whatever t is.

D. Calandriello, L. Carratino, A. Lazaric, M. Valko and L. Rosasco, "Gaussian process optimization
with adaptive sketching: scalable and no regret", 2019. Deviations: beta is the one that the authors
compute with, the paper's is the option `constants="theory"`, and five times oversampling is the
default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchzoo.gp.bkb_sketch import STATE, SketchedPosterior
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.gp.sparse import LeverageScoreSampler


class BKB(SketchedPosterior):
    """Budgeted kernel bandit: GP-UCB at a cost that follows the effective dimension, not time.

    `ask` says which arm to pull, `tell` takes the reward; see `run_bandit` for a loop that goes on
    where it was killed. `BudgetedKernelBandit` is another name of it.

    Args:
        kernel: A gpytorch kernel; or a function of two sets of points, with or without a `diag`.
        lam: Regulariser lambda; None: the noise variance.
        fnorm: Bound F on the norm of the reward function.
        noise_variance: Bound xi² on the variance of the rewards' noise.
        delta: Probability that the confidence intervals may fail with.
        oversampling: How many more inducing points to draw than the effective dimension; 2 to 10.
        beta_scale: Multiplies the width of the confidence intervals; about 0.3 in practice, as at
            1 hundreds of rounds are spent on exploring.
        constants: `"practical"`: the width above; `"theory"`: the one that regret is proved for,
            `2 xi sqrt(alpha log(kappa² t) sum sigma² + log(1/delta)) + (1 + 1/sqrt(1 - eps))
            sqrt(lambda) F`, with `alpha = (1 + eps) / (1 - eps)`, `kappa² = max k(x, x) / lambda`
            and at least 1, and eps = 1/2 (not checked against the paper).
        max_inducing: Most inducing points; more than that are never used.
        generator: Draws the inducing points; None: a new one, seeded by torch's.
        device: Where arms are held; None: that of the arms.
        dtype: Their type; None: that of the arms. Factorisations are in float64.

    Raises:
        ValueError: An option out of its range.

    Source:
        D. Calandriello and others, "Gaussian process optimization with adaptive sketching: scalable
        and no regret", 2019, algorithm 1.

    Example:
        >>> kernel = lambda a, b: (-10 * torch.cdist(a, b) ** 2).exp()
        >>> arms = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
        >>> bandit = BKB(kernel, noise_variance=0.01, beta_scale=0.5)
        >>> bandit.initialize(arms, [0], [0.0])
        >>> for _ in range(20):
        ...     arm = bandit.ask()
        ...     bandit.tell(arm, (3 * arms[arm]).sin().item())
        >>> 0.4 < arms[bandit.means.argmax()].item() < 0.6  # the best is pi / 6
        True
    """

    def __init__(
        self,
        kernel: Any,
        *,
        lam: float | None = None,
        fnorm: float = 1.0,
        noise_variance: float = 1.0,
        delta: float = 0.5,
        oversampling: float = 5.0,
        beta_scale: float = 1.0,
        constants: Literal["practical", "theory"] = "practical",
        max_inducing: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        lam = noise_variance if lam is None else lam
        for name, value in {"noise_variance": noise_variance, "lam": lam}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        for name, value in {"fnorm": fnorm, "beta_scale": beta_scale}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if not 0 < delta < 1:
            raise ValueError(f"delta: expected within (0, 1), got {delta}")
        if constants not in ("practical", "theory"):
            raise ValueError(f"constants: expected 'practical' or 'theory', got {constants!r}")
        sampler = LeverageScoreSampler(oversampling, max_inducing=max_inducing, generator=generator)
        super().__init__(kernel, lam, sampler)
        self.fnorm, self.noise_variance, self.delta = fnorm, noise_variance, delta
        self.beta_scale, self.constants = beta_scale, constants
        self.device, self.dtype = device, dtype
        self._pulls: list[tuple[int, float]] = []
        self._candidates: Tensor | None = None

    @property
    def t(self) -> int:
        """Pulls so far."""
        return len(self._pulls)

    @property
    def pulled_index(self) -> Tensor:
        """The arm of each pull, `(t,)`."""
        return torch.tensor([index for index, _ in self._pulls], dtype=torch.int64)

    @property
    def pulled_y(self) -> Tensor:
        """The reward of each pull, `(t,)`, float64."""
        return torch.tensor([y for _, y in self._pulls], dtype=torch.float64)

    @property
    def beta(self) -> Tensor:
        """Width of the confidence intervals in units of sigma, `beta_scale` included."""
        dimension, noise = self.effective_dimension, self.noise_variance
        norm = math.sqrt(self.lam) * self.fnorm
        slack = math.log(1 / self.delta)
        if self.constants == "practical":
            width = norm + (noise * (math.log(self.t) * dimension + slack)).sqrt()
        else:
            eps = 0.5
            alpha = (1 + eps) / (1 - eps)
            kappa2 = (self._prior.max() / self.lam).clamp_min(1)
            spread = alpha * (kappa2 * self.t).log() * dimension + slack
            width = 2 * (noise * spread).sqrt() + (1 + 1 / math.sqrt(1 - eps)) * norm
        return self.beta_scale * width

    @torch.no_grad()
    def initialize(
        self, arms: Tensor, index: Sequence[int] | Tensor, y: Sequence[float] | Tensor
    ) -> None:
        """Set the arms and the first pulls, which are the first inducing points.

        Args:
            arms: All candidates; or, where every `ask` brings its own, those of the first pulls.
            index: Arms pulled, repeated as often as they were.
            y: Their rewards.

        Shape:
            - arms: `(A, d)`
            - index: `(s,)`
            - y: `(s,)`

        Raises:
            ValueError: Arms, indices or rewards that are empty, out of range or not finite.
        """
        if arms.ndim != 2 or not arms.numel():
            raise ValueError(f"arms: expected (A, d), got {tuple(arms.shape)}")
        index, y = _checked(index, y, len(arms))
        self._set_arms(arms.detach().to(self.device, self.dtype).clone())
        self._pulls, self._candidates = [], None
        self._record(index, y)
        self._sketch(index.to(self.arms.device).unique())

    @torch.no_grad()
    def ask(self, candidates: Tensor | None = None) -> Any:
        """The arm of the highest upper confidence bound, the first where several have it.

        Args:
            candidates: Points to choose from instead of the arms, for this round.

        Shape:
            - candidates: `(A', d)`

        Returns:
            Its index among the arms or the candidates, which `tell` understands.

        Raises:
            RuntimeError: Before `initialize`.
            ValueError: Candidates of another shape.
        """
        mean, variance, _ = self._field(candidates)
        return int((mean + self.beta * variance.sqrt()).argmax())

    @torch.no_grad()
    def tell(
        self, index: int | Sequence[int] | Tensor, y: float | Sequence[float] | Tensor
    ) -> None:
        """Take rewards, draw new inducing points, and update means and variances of all arms.

        Args:
            index: Arms pulled; of the candidates, if the last `ask` had any, which become arms.
            y: Their rewards.

        Shape:
            - index, y: a number, or `(b,)`

        Raises:
            RuntimeError: Before `initialize`.
            ValueError: Indices out of range, or rewards that are not finite or as many.
        """
        self._check_initialized()
        pool = self.arms if self._candidates is None else self._candidates
        index, y = _checked(index, y, len(pool))
        if self._candidates is not None:
            index = self._append(self._candidates[index.to(self.arms.device)])
        self._record(index, y)
        self._sketch(self.draw_inducing())

    def to_botorch(self) -> Any:
        """This bandit as a botorch model, for its acquisition functions and optimisers.

        The model looks at the bandit: what the bandit is told later, the model knows.

        Raises:
            ImportError: botorch is not installed.
            RuntimeError: Before `initialize`.
        """
        self._check_initialized()
        try:
            from torchzoo.gp._botorch import SketchedModel
        except ModuleNotFoundError as error:
            raise ImportError("to_botorch needs botorch: pip install torchzoo[gp]") from error
        return SketchedModel(self)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bandit with the same options needs to go on, bit by bit the same."""
        self._check_initialized()
        state = {name: getattr(self, attribute) for name, attribute in STATE.items()}
        state |= {"pulled_index": self.pulled_index, "pulled_y": self.pulled_y}
        state["generator"] = self.sampler.generator.get_state()
        if self._candidates is not None:
            state["candidates"] = self._candidates
        return {name: value.clone() for name, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the state of another bandit with the same options.

        Raises:
            ValueError: Entries are missing.
        """
        needed = {*STATE, "pulled_index", "pulled_y", "generator"}
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"state: expected {sorted(needed)}, got none of {missing}")
        device = self.device if self.device is not None else state["arms"].device
        for name, attribute in STATE.items():
            setattr(self, attribute, state[name].to(device, copy=True))
        pairs = zip(state["pulled_index"].tolist(), state["pulled_y"].tolist(), strict=True)
        self._pulls = list(pairs)
        self.sampler.generator.set_state(state["generator"].cpu())
        self._candidates = state["candidates"].to(device) if "candidates" in state else None
        self._fit()

    def _field(self, candidates: Tensor | None) -> GaussianPosterior:
        """Mean and variance at what there is to choose from, which is noted for `tell`."""
        self._check_initialized()
        self._candidates = None
        if candidates is None:
            return GaussianPosterior(self.means, self.variances)
        if candidates.ndim != 2 or candidates.shape[-1] != self.arms.shape[-1]:
            expected = f"(A', {self.arms.shape[-1]})"
            raise ValueError(f"candidates: expected {expected}, got {tuple(candidates.shape)}")
        self._candidates = candidates.detach().to(self.arms)
        return self.posterior(self._candidates)

    def _record(self, index: Tensor, y: Tensor) -> None:
        self._pulls += zip(index.tolist(), y.tolist(), strict=True)
        self._add(index, y)


BudgetedKernelBandit = BKB


def _checked(index: Any, y: Any, size: int) -> tuple[Tensor, Tensor]:
    """Indices and rewards as vectors on the CPU."""
    index = torch.as_tensor(index).cpu().reshape(-1)
    y = torch.as_tensor(y, dtype=torch.float64).detach().cpu().reshape(-1)
    if not len(index) or index.is_floating_point() or index.min() < 0 or index.max() >= size:
        raise ValueError(f"index: expected integers within [0, {size}), got {index.tolist()}")
    if y.shape != index.shape or not y.isfinite().all():
        raise ValueError(f"y: expected {len(index)} finite numbers, got {y.tolist()}")
    return index.long(), y
