"""Paper 7: do wide deep Gaussian processes reach the deep kernel machine, and is it any use?

Theory: Hamiltonian Monte Carlo over the features of deep Gaussian processes of growing width,
their data copied as often as they are wide, against the optimised Gram matrices. Use: sparse
machines on four tables, against the same model held at its prior, the infinitely wide network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.gp import DeepKernelMachine, GaussianPosterior, SparseDKM, gram_kernel

DATA = ("diabetes", "wine", "breast_cancer", "digits")
METHODS = ("DKM", "NNGP", "RBF GP", "SVM")
NUS = (0.3, 1.0, 5.0, 30.0)
NOISE, POINTS, WIDTHS = 0.1, 8, 4


def xor_points() -> tuple[Tensor, Tensor]:
    """Eight points around the corners of a square, labelled by the sign of their product."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).repeat(2, 1)
    x = corners + 0.3 * torch.randn(POINTS, 2, generator=generator)
    return x.double(), corners.prod(1, keepdim=True).double()


def relu_kernel(gram: Tensor) -> Tensor:
    """The kernel of a Gram matrix, with the jitter of `DeepKernelMachine`."""
    k = gram_kernel(gram, gram[:0], gram.diagonal()[:0], "relu").ii
    return k + 1e-8 * k.diagonal().mean() * torch.eye(len(k), dtype=k.dtype)


def deep_gp(x: Tensor, noise: Tensor) -> list[Tensor]:
    """Gram matrices of a deep Gaussian process from whitened features `(L, N, width)`."""
    grams = [x @ x.mT / x.shape[1]]
    for white in noise:
        features = torch.linalg.cholesky(relu_kernel(grams[-1])) @ white
        grams.append(features @ features.mT / features.shape[1])
    return grams[1:]


def log_density(x: Tensor, y: Tensor, white: Tensor, copies: int) -> Tensor:
    """Log posterior of whitened features, the data copied."""
    k = relu_kernel(deep_gp(x, white)[-1]) + NOISE * torch.eye(len(x), dtype=x.dtype)
    factor = torch.linalg.cholesky(k)
    misfit = torch.linalg.solve_triangular(factor, y, upper=False).square().sum()
    fit = -misfit / 2 - y.shape[1] * factor.diagonal().log().sum()
    return copies * fit - white.square().sum() / 2


def hmc(
    density: Callable[[Tensor], Tensor], start: Tensor, samples: int, generator: torch.Generator
) -> list[Tensor]:
    """Hamiltonian Monte Carlo of ten steps; the first fifth of the samples adapts their size."""

    def gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.detach().requires_grad_()
        value = density(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    at, step, kept = start, 0.05, []
    value, slope = gradient(at)
    for index in range(samples + samples // 4):
        momentum = torch.randn(at.shape, dtype=at.dtype, generator=generator)
        new, new_slope, p = at, slope, momentum
        for _ in range(10):
            p = p + step / 2 * new_slope
            new = new + step * p
            new_value, new_slope = gradient(new)
            p = p + step / 2 * new_slope
        gain = new_value - value + (momentum.square() - p.square()).sum() / 2
        accepted = math.log(torch.rand((), generator=generator).item()) < float(gain)
        if accepted:
            at, value, slope = new, new_value, new_slope
        if index < samples // 4:
            step *= 1.1 if accepted else 0.8
        else:
            kept.append(at)
    return kept


@cache
def theory(widths: tuple[int, ...], samples: int) -> dict[str, float]:
    """Relative distances of the mean Gram matrices of deep Gaussian processes, by width."""
    x, y = xor_points()
    machine = DeepKernelMachine(2, nu=1.0, noise=NOISE)
    machine.fit(x, y, steps=200, method="lbfgs")
    best = [gram.detach() for gram in machine.grams]
    prior = [x @ x.mT / 2]
    for _ in range(2):
        prior.append(relu_kernel(prior[-1]))

    def distances(width: int, copies: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(width)
        start = torch.randn(2, POINTS, width, dtype=x.dtype, generator=generator)
        kept = hmc(lambda e: log_density(x, y, e, copies), start, samples, generator)
        runs = [deep_gp(x, e) for e in kept]
        means = [torch.stack([run[layer] for run in runs]).mean(0) for layer in range(2)]
        return _distance(means, best), _distance(means, prior[1:])

    figures: dict[str, float] = {}
    for index, width in enumerate(widths):
        figures[f"width, {index}"] = width
        near, far = distances(width, width)
        figures |= {f"from DKM, width {index}": near, f"from NNGP, width {index}": far}
    near, far = distances(widths[-1], 1)
    return figures | {"from DKM, not copied": near, "from NNGP, not copied": far}


def _distance(grams: list[Tensor], others: list[Tensor]) -> float:
    """Mean over layers of the relative Frobenius distance."""
    pairs = zip(grams, others, strict=True)
    return sum(float((a - b).norm() / b.norm()) for a, b in pairs) / len(grams)


def split(name: str, rows: int, seed: int) -> list[Tensor]:
    """Standardised inputs and targets: for training, validation, and testing."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    x, y = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows]
    x, y = x[order], y[order]
    test, known = len(x) // 5, 4 * len(x) // 5
    train = known - known // 5
    x = (x - x[:train].mean(0)) / x[:train].std(0).clamp_min(1e-6)
    if name == "diabetes":
        y = ((y - y[:train].mean()) / y[:train].std()).float()[:, None]
    parts = [slice(0, train), slice(train, known), slice(len(x) - test, len(x))]
    return [t[part] for part in parts for t in (x, y)]


def fit(x: Tensor, y: Tensor, nu: float | None, options: dict[str, Any], seed: int) -> SparseDKM:
    """Train a sparse machine; without nu its layers stay at their priors."""
    torch.manual_seed(seed)
    classes = 0 if y.is_floating_point() else int(y.max()) + 1
    model = SparseDKM(
        x.shape[1],
        classes or y.shape[1],
        num_layers=2,
        num_inducing=min(options["inducing"], len(x)),
        nu=nu or 1.0,
        likelihood="softmax" if classes else "gaussian",
    )
    model.init_inducing(x)
    for layer in model.layers:
        cast(Any, layer).factor.requires_grad_(nu is not None)
    steps = options["steps"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(100, len(x)),))
        optimizer.zero_grad()
        (-model.elbo(x[rows], y[rows], len(x)) / len(x)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def score(model: SparseDKM, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Error (rate, or root mean square) and mean negative log predictive density."""
    torch.manual_seed(0)
    found = model(x)
    if isinstance(found, GaussianPosterior):
        seen = found.observed()
        density = torch.distributions.Normal(seen.mean, seen.stddev).log_prob(y)
        return float((y - seen.mean).square().mean().sqrt()), -float(density.mean())
    log_p = F.log_softmax(found, -1).logsumexp(0) - math.log(len(found))
    return float((log_p.argmax(-1) != y).float().mean()), float(F.nll_loss(log_p, y))


def rbf_gp(x: Tensor, y: Tensor, new: Tensor, steps: int) -> Tensor:
    """Mean of an exact Gaussian process fitted by gpytorch to targets or one-hot classes."""
    import gpytorch

    targets = y if y.is_floating_point() else F.one_hot(y).float()
    centre = targets.mean(0)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()

    class Model(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, (targets - centre).mT, likelihood)
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.kernel.base_kernel.lengthscale = x.shape[1] ** 0.5

        def forward(self, x: Tensor) -> Any:
            shape = x.shape[:-1]
            return gpytorch.distributions.MultivariateNormal(x.new_zeros(shape), self.kernel(x))

    model = Model()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    each = x.expand(targets.shape[1], *x.shape)
    model.set_train_data(each, (targets - centre).mT, strict=False)
    with gpytorch.settings.fast_computations(False, False, False):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -mll(model(each), (targets - centre).mT).sum()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            return model(new.expand(targets.shape[1], *new.shape)).mean.mT + centre


def svm(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Predictions of a support vector machine with an RBF kernel, C = 10."""
    from sklearn.svm import SVC, SVR

    kind = SVR if y.is_floating_point() else SVC
    found = kind(C=1.0 if kind is SVR else 10.0).fit(x.numpy(), y.flatten().numpy())
    return torch.from_numpy(found.predict(new.numpy()))


def _error(predicted: Tensor, y: Tensor) -> float:
    if y.is_floating_point():
        return float((predicted.reshape(y.shape) - y).square().mean().sqrt())
    classes = predicted.argmax(-1) if predicted.ndim == 2 else predicted
    return float((classes != y).float().mean())


def trial(context: Context) -> dict[str, float]:
    """The theory, which is computed once, and all models on one split of each table."""
    options, seed = dict(context.options), context.seed
    context.progress("deep Gaussian processes")
    figures = dict(theory(tuple(options["widths"]), options["samples"]))
    for name in DATA:
        context.progress(name)
        x, y, x_val, y_val, x_new, y_new = split(name, options["rows"], seed)
        fits = {nu: fit(x, y, nu, options, seed) for nu in NUS}
        losses = {nu: score(model, x_val, y_val)[1] for nu, model in fits.items()}
        nu = min(losses, key=losses.__getitem__)
        figures[f"nu, {name}"] = nu
        models = {"DKM": fits[nu], "NNGP": fit(x, y, None, options, seed)}
        for method, model in models.items():
            error, density = score(model, x_new, y_new)
            figures[f"error, {method}, {name}"] = error
            figures[f"NLPD, {method}, {name}"] = density
        for each, model in fits.items():
            figures[f"NLPD, nu {each:g}, {name}"] = score(model, x_new, y_new)[1]
        predicted = rbf_gp(x, y, x_new, options["gp steps"])
        figures[f"error, RBF GP, {name}"] = _error(predicted, y_new)
        figures[f"error, SVM, {name}"] = _error(svm(x, y, x_new), y_new)
    return figures


def _convergence(measured: Measurements) -> tuple[bool, str]:
    near = [measured[f"from DKM, width {i}"].mean for i in range(WIDTHS)]
    far = measured[f"from NNGP, width {WIDTHS - 1}"].mean
    loose = [measured[f"from {what}, not copied"].mean for what in ("DKM", "NNGP")]
    falls = all(a > b for a, b in pairwise(near))
    holds = falls and near[2] < 0.05 and far > 2 * near[-1] and loose[1] < loose[0]
    widths = [f"{measured[f'width, {i}'].mean:.0f}: {near[i]:.2g}" for i in range(WIDTHS)]
    return holds, (
        f"{', '.join(widths)}; from the NNGP {far:.2g}; not copied {loose[0]:.2g}, from the NNGP "
        f"{loose[1]:.2g}"
    )


def _metric(measured: Measurements, method: str, name: str) -> Measurement:
    """What a table is judged by: density for the regression, the error rate for classes."""
    kind = "NLPD" if name == "diabetes" else "error"
    return measured[f"{kind}, {method}, {name}"]


def _useful(measured: Measurements) -> tuple[bool, str]:
    pairs = {n: (_metric(measured, "DKM", n), _metric(measured, "NNGP", n)) for n in DATA}
    held = sum(ours.mean <= other.mean for ours, other in pairs.values())
    return held >= 3, "; ".join(
        f"{name}: {ours} against {other}, paired {ours - other}"
        for name, (ours, other) in pairs.items()
    )


def plot(measured: Measurements, figure: Any) -> None:
    """Distances by width, errors of all methods, and densities by nu."""
    left, middle, right = figure.subplots(1, 3)
    widths = [measured[f"width, {i}"].mean for i in range(WIDTHS)]
    for what, colour in (("DKM", "C0"), ("NNGP", "tab:gray")):
        values = [measured[f"from {what}, width {i}"].mean for i in range(WIDTHS)]
        left.loglog(widths, values, "o-", color=colour, label=f"from {what}")
        loose = measured[f"from {what}, not copied"].mean
        left.loglog(widths[-1:], [loose], "x", color=colour, label=f"from {what}, data not copied")
    left.set(xlabel="width", title="Distance of mean Gram matrices")
    left.legend(fontsize=7)
    colours = ("C0", "black", "tab:gray", "C1")
    for offset, (method, colour) in enumerate(zip(METHODS, colours, strict=True)):
        runs = [measured[f"error, {method}, {name}"] for name in DATA]
        places = [i + 0.18 * (offset - 1.5) for i in range(len(DATA))]
        middle.errorbar(
            [m.mean for m in runs], places, xerr=[2 * m.std_error for m in runs],
            fmt="o", ms=4, color=colour, label=method,
        )  # fmt: skip
    middle.set_yticks(range(len(DATA)), [name.replace("_", " ") for name in DATA])
    middle.set_xscale("symlog", linthresh=0.02)
    middle.set(title="Error (two standard errors)", xlim=(0, None))
    middle.legend(fontsize=7)
    for name in DATA:
        values = [measured[f"NLPD, nu {nu:g}, {name}"].mean for nu in NUS]
        best = min(values)
        right.semilogx(NUS, [v - best for v in values], "o-", ms=4, label=name.replace("_", " "))
    right.set(xlabel="nu", title="Log density lost by nu")
    right.legend(fontsize=7)
    for axes in (left, middle, right):
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    paper=7,
    claim=Claim(
        statement=(
            "In a limit of infinite width in which representations are still learned, a deep "
            "Gaussian process becomes a deep kernel machine, whose Gram matrices are optimised; "
            "its sparse form is a useful method of linear cost."
        ),
        figure="posteriors over features are Gaussian with the optimised Gram matrices",
        source="abstract",
    ),
    setup=(
        "Theory: 8 points with XOR labels, 2 layers, nu 1, noise 0.1, 400 samples of Hamiltonian "
        "Monte Carlo with 10 steps each. Tables: 2 layers, 48 inducing points, 200 steps of Adam "
        "on batches of 100, at most 600 rows, a fifth for testing, nu by density on a fifth of "
        "the rest."
    ),
    baseline=(
        "the same model and training with layers at their priors (NNGP), an exact Gaussian process "
        "with an RBF kernel, on one-hot classes, and support vector machines"
    ),
    criteria=(
        Criterion(
            "the mean Gram matrices of deep Gaussian processes come nearer to the optimised ones "
            "at each width, within 0.05 at width 128; the widest is more than twice as far from "
            "the NNGP, and nearer to that if data are not copied",
            _convergence,
        ),
        Criterion(
            "on at least 3 of 4 tables it is not worse than the NNGP (density on diabetes, errors "
            "on the rest)",
            _useful,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "widths": (8, 32, 128, 512),
            "samples": 400,
            "rows": 600,
            "inducing": 48,
            "steps": 200,
            "gp steps": 40,
        },
        "smoke": {
            "seeds": 1,
            "widths": (2, 4, 8, 16),
            "samples": 5,
            "rows": 100,
            "inducing": 8,
            "steps": 3,
            "gp steps": 2,
        },
    },
    trial=trial,
    plot=plot,
)
