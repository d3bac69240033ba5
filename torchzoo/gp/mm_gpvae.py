"""MM-GPVAE: a variational autoencoder of several series, with private and shared latents over time.

Latents z are independent Gaussian processes of the steps t, given by Fourier coefficients a (see
`torchzoo.gp.fourier`). Those in the private block of a modality explain that one alone, those of
the shared block all of them. For spikes y and behaviour x

    y_t ~ Poisson(exp(W [z_A, z_S]_t + d)),  x_t ~ N(g([z_S, z_B]_t), sigma^2 I).

An encoder of each modality gives m_t and s_t at every step, and linear maps over time turn them
into its q(a) = N(m, diag(exp s)^2). On the shared block the encoders' means and log standard
deviations are averaged. Maximised is the bound

    ELBO = E_q[log p(y | z)] + E_q[log p(x | z)] - KL(q(a) || p(a)).

R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian process
variational autoencoders for neural and behavioral data", 2024, section 3. Deviations: the
divergence and the term of a linear decoder are exact, not sampled; each latent has its own length;
decoders end without ELU; variances start at 1; modalities may be masked or missing, and
`fusion="poe"` multiplies the encoders' Gaussians.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from torchzoo.gp.fourier import FourierGPPrior, Paths
from torchzoo.gp.mm_gpvae_blocks import SHARED, Expert, LatentBlocks, fuse
from torchzoo.gp.mm_gpvae_checks import Series, check_parts, check_series, check_values
from torchzoo.gp.mm_gpvae_likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    PoissonLikelihood,
    PoissonLoadingDecoder,
    StepMLP,
)
from torchzoo.gp.posterior import GaussianPosterior
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import no_autocast
from torchzoo.registry import Example, register


def _example() -> Example:
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.ones(3, 6, 5), generator)
    frames = torch.rand(3, 6, 4, generator=generator)
    modalities = {
        "spikes": (StepMLP([5, 4, 4]), PoissonLoadingDecoder(2, 5), PoissonLikelihood()),
        "frames": (StepMLP([4, 4, 4]), StepMLP([2, 4, 4]), BernoulliLikelihood()),
    }
    prior = FourierGPPrior(3, 6, min_lengthscale=3.0, lengthscale_init=3.0)
    kwargs: dict[str, Any] = {"modalities": modalities, "num_private": {"spikes": 1, "frames": 1}}
    kwargs |= {"num_shared": 1, "num_steps": 6, "prior": prior}
    bad: dict[str, Any] = {"modalities": {}, "num_private": {"spikes": 1}, "num_shared": -1}
    bad |= {"num_steps": 0, "fusion": "sum", "prior": FourierGPPrior(2, 6)}
    return Example(kwargs, (frames, counts), bad_options=bad)


@register(
    paper=94,
    example=_example,
    compare="a latent variable model: what counts is its fit, which its experiment measures",
)
class MMGPVAE(ZooModel):
    """Gaussian process autoencoder of modalities recorded together, such as spikes and images.

    Modalities are in alphabetical order. Latents are in this one: the private ones of the first
    modality, the shared ones, the private ones of the other modalities; encoders and decoders see
    theirs in the same order. With a single modality and no shared latents it is a GP-VAE, or, with
    a `PoissonLoadingDecoder`, GP factor analysis.

    Args:
        modalities: By name, an encoder of steps `(..., D)` into means and log standard deviations
            of its K latents, `(..., 2 K)`; a decoder `(..., K)` to `(..., D)`; and a likelihood. A
            decoder with a method `moments`, as `PoissonLoadingDecoder` has, is not sampled.
        num_private: By name, latents of one modality alone.
        num_shared: Latents of all modalities.
        num_steps: Steps T.
        fusion: How encoders agree on shared latents: `"mean"` averages means and log standard
            deviations, `"poe"` multiplies densities.
        prior: Prior of all P latents; None: `FourierGPPrior` with its defaults.
        device: Device of the maps over time, and of a default prior.
        dtype: Their dtype.

    Shape:
        - data: by name `(..., T, D)`; or the first modality's tensor
        - others: tensors of the other modalities in their order, where data is a tensor
        - latents, variance: `(..., T, P)`, of which the shared and private parts are columns
        - kl: `(..., P)`
        - recon: by name `(..., T, D)`

    Returns:
        A dict of `latents`, `variance`, `kl`, `shared`, and, by modality, `private` and `recon`,
        which has all modalities, even those that are missing.

    Raises:
        ValueError: An option out of its range, parts that do not fit, an unknown modality, series
            of another length or width, or values that a likelihood does not allow.

    Source:
        R. Gondur, U. B. Sikandar, E. Schaffer, M. C. Aoi and S. L. Keeley, "Multi-modal Gaussian
        process variational autoencoders for neural and behavioral data", 2024, section 3.

    Example:
        >>> model = MMGPVAE.neural_behavior(num_neurons=20, obs_dim=64, num_steps=30)
        >>> spikes, frames = torch.ones(5, 30, 20), torch.rand(5, 30, 64)
        >>> model.elbo({"spikes": spikes, "behavior": frames}).shape
        torch.Size([5])
        >>> model.predict("behavior", {"spikes": spikes}).shape
        torch.Size([5, 30, 64])
    """

    prior: FourierGPPrior

    def __init__(
        self,
        modalities: Mapping[str, tuple[nn.Module, nn.Module, nn.Module]],
        *,
        num_private: Mapping[str, int],
        num_shared: int,
        num_steps: int,
        fusion: Literal["mean", "poe"] = "mean",
        prior: FourierGPPrior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        blocks = LatentBlocks(num_private, num_shared, sorted(modalities))
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        if fusion not in ("mean", "poe"):
            raise ValueError(f"fusion: expected 'mean' or 'poe', got {fusion!r}")
        total = num_shared + sum(num_private.values())
        if prior and (prior.num_latents, prior.num_steps) != (total, num_steps):
            raise ValueError(
                f"prior: expected {total} latents and {num_steps} steps, got {prior.num_latents} "
                f"and {prior.num_steps}"
            )
        super().__init__()
        self.num_steps, self.fusion = num_steps, fusion
        self.blocks = blocks
        for name, (encoder, decoder, _) in modalities.items():
            check_parts(blocks, name, encoder, decoder)
        names = sorted(modalities)  # as a saved config does not keep the order
        self.encoders = nn.ModuleDict({name: modalities[name][0] for name in names})
        self.decoders = nn.ModuleDict({name: modalities[name][1] for name in names})
        self.likelihoods = nn.ModuleDict({name: modalities[name][2] for name in names})
        self.prior = prior or FourierGPPrior(total, num_steps, device=device, dtype=dtype)
        count = len(self.prior.basis)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.means = nn.ModuleDict({name: nn.Linear(num_steps, count, **options) for name in names})
        options["bias"] = False
        maps = {name: nn.Linear(num_steps, count, **options) for name in names}
        self.logstds = nn.ModuleDict(maps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Maps over time as of `nn.Linear`, but variances of 1, whatever the scale of the data."""
        for name in self.means:
            self.means[name].reset_parameters()  # type: ignore[operator]
            nn.init.zeros_(self.logstds[name].weight)  # type: ignore[arg-type]

    @classmethod
    def neural_behavior(
        cls,
        num_neurons: int,
        obs_dim: int,
        *,
        num_steps: int = 60,
        num_private: tuple[int, int] = (1, 1),
        num_shared: int = 1,
        **options: Any,
    ) -> Self:
        """The paper's model of `"spikes"` and `"behavior"`, an image or any other vector.

        Args:
            num_neurons: Neurons.
            obs_dim: Pixels, or coordinates of behaviour.
            num_steps: Steps T.
            num_private: Latents of spikes alone and of behaviour alone.
            num_shared: Latents of both.
            **options: `fusion`, `prior`, `device` and `dtype` of `MMGPVAE`.
        """
        neural, image = (private + num_shared for private in num_private)
        factory: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        spikes = (
            StepMLP([num_neurons, 80, 40, 20, 2 * neural], **factory),
            PoissonLoadingDecoder(neural, num_neurons, **factory),
            PoissonLikelihood(),
        )
        behavior = (
            StepMLP([obs_dim, 784, 512, 256, 256, 2 * image], **factory),
            StepMLP([image, 256, 256, 512, 784, obs_dim], **factory),
            GaussianLikelihood(**factory),
        )
        return cls(
            {"spikes": spikes, "behavior": behavior},
            num_private={"spikes": num_private[0], "behavior": num_private[1]},
            num_shared=num_shared,
            num_steps=num_steps,
            **options,
        )

    def forward(self, data: Series | Tensor, *others: Tensor) -> dict[str, Any]:
        paths = self.prior(*self.encode(self._named(data, others)))
        columns = self.blocks.columns
        return {
            "latents": paths.mean,
            "variance": paths.variance,
            "kl": paths.kl,
            "shared": paths.mean[..., columns[SHARED]],
            "private": {name: paths.mean[..., columns[name]] for name in self.decoders},
            "recon": {name: self._expected(name, paths) for name in self.decoders},
        }

    def encode(self, data: Series, *, mask: Series | None = None) -> tuple[Tensor, Tensor]:
        """Means and log standard deviations of the coefficients.

        A modality that is missing, or masked at all steps, leaves its private latents to the prior.

        Args:
            data: Series by modality, of some or all.
            mask: By modality, `(..., T)`, True where a step was seen; those left out are seen.

        Shape:
            - output: two of `(..., N_f, P)`
        """
        check_series(self.encoders, self.num_steps, data, mask)
        experts = [self._expert(name, x, (mask or {}).get(name)) for name, x in data.items()]
        spread = self.prior.spectrum().log() / 2
        batch = next(iter(data.values())).shape[:-2]
        found = []
        for block, columns in self.blocks.columns.items():
            alone = spread[:, columns].expand(*batch, -1, -1)
            known = [expert[block] for expert in experts if block in expert]
            found.append(fuse(known, alone, self.fusion))
        return torch.cat([mean for mean, _ in found], -1), torch.cat([std for _, std in found], -1)

    def elbo(
        self,
        data: Series | Tensor,
        *others: Tensor,
        mask: Series | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The evidence lower bound of each trial, from one sample where an expectation needs it.

        Args:
            data: Series by modality; missing ones count for nothing. Or as in `forward`.
            *others: As in `forward`.
            mask: By modality, `(..., T)`, True where a step was seen. Masked values may be NaN.
            generator: Draws the sample.

        Shape:
            - output: `(...)`
        """
        series = self._named(data, others)
        mean, logstd = self.encode(series, mask=mask)
        check_values(self.likelihoods, series, mask)
        paths = self.prior(mean, logstd)
        total = -paths.kl.sum(-1)
        for name, x in series.items():
            seen = mask.get(name) if mask else None
            x = x if seen is None else torch.where(seen[..., None], x, 0.0)
            if self._is_exact(name):
                output = self._linear(name, paths)
                each = self.likelihoods[name](output.mean, x, output.variance)
            else:
                spread = self.blocks.of(name, logstd).exp()
                noise = torch.randn(
                    spread.shape, generator=generator, device=spread.device, dtype=spread.dtype
                )
                latents = self.prior.to_time(self.blocks.of(name, mean) + spread * noise)
                each = self.likelihoods[name](self.decoders[name](latents), x)
            total = total + (each if seen is None else torch.where(seen, each, 0.0)).sum(-1)
        return total

    def infer(
        self, data: Series, *, only: Sequence[str] | None = None, mask: Series | None = None
    ) -> GaussianPosterior:
        """Latents over time from what was seen.

        Args:
            data: Series by modality.
            only: Modalities to look at; None: all of data.
            mask: As in `elbo`.

        Shape:
            - output: mean and variance `(..., T, P)`

        Raises:
            ValueError: A modality to look at that is not in the data.
        """
        if absent := sorted(set(only or ()) - set(data)):
            raise ValueError(f"only: got {absent}, expected some of {sorted(data)}")
        self.prior.check_extension()
        seen = {name: x for name, x in data.items() if only is None or name in only}
        paths = self.prior(*self.encode(seen, mask=mask))
        return GaussianPosterior(paths.mean, paths.variance)

    def predict(self, target: str, given: Series, *, mask: Series | None = None) -> Tensor:
        """One modality as expected from others, its private latents being at their prior.

        Expectations are over the latents where the decoder is linear, else at their means.

        Args:
            target: The modality.
            given: Series of others.
            mask: As in `elbo`.

        Shape:
            - output: `(..., T, D)`
        """
        if target not in self.decoders:
            raise ValueError(f"target: expected one of {list(self.decoders)}, got {target!r}")
        self.prior.check_extension()
        return self._expected(target, self.prior(*self.encode(given, mask=mask)))

    def extra_repr(self) -> str:
        shared = self.blocks.sizes[SHARED]
        return f"num_shared={shared}, num_steps={self.num_steps}, fusion={self.fusion!r}"

    def _named(self, data: Series | Tensor, others: tuple[Tensor, ...]) -> Series:
        if not isinstance(data, Tensor):
            return data
        if len(others) != len(self.decoders) - 1:
            raise ValueError(
                f"others: expected a tensor for each of {list(self.decoders)[1:]}, "
                f"got {len(others)}"
            )
        return dict(zip(self.decoders, (data, *others), strict=True))

    def _expert(self, name: str, x: Tensor, seen: Tensor | None) -> dict[str, Expert]:
        """What a modality says of its blocks; steps that were not seen add nothing over time."""
        weight = x.new_ones(*x.shape[:-2], 1, 1)
        if seen is not None:
            x = torch.where(seen[..., None], x, 0.0)
            weight = weight * seen.any(-1)[..., None, None]
        steps = self.encoders[name](x).to(self.prior.basis.dtype).mT
        if seen is not None:
            steps = torch.where(seen[..., None, :], steps, 0.0)
        with no_autocast(steps):
            mean_steps, logstd_steps = steps.chunk(2, -2)
            mean, logstd = self.means[name](mean_steps).mT, self.logstds[name](logstd_steps).mT
        sizes = self.blocks.seen_by(name)
        widths = list(sizes.values())
        parts = zip(sizes, mean.split(widths, -1), logstd.split(widths, -1), strict=True)
        return {block: Expert(m, s, weight.to(m)) for block, m, s in parts}

    def _is_exact(self, name: str) -> bool:
        return bool(self.likelihoods[name].closed_form) and hasattr(self.decoders[name], "moments")

    def _linear(self, name: str, paths: Paths) -> GaussianPosterior:
        """The Gaussian output of a linear decoder."""
        mean, variance = self.blocks.of(name, paths.mean), self.blocks.of(name, paths.variance)
        return self.decoders[name].moments(mean, variance)  # type: ignore[operator]

    def _expected(self, name: str, paths: Paths) -> Tensor:
        likelihood: Any = self.likelihoods[name]
        if self._is_exact(name):
            output = self._linear(name, paths)
            return likelihood.mean(output.mean, output.variance)
        return likelihood.mean(self.decoders[name](self.blocks.of(name, paths.mean)))
