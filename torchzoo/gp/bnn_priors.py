"""Priors over the weights of a network, and the functions that they stand for.

For each tensor t of a network's parameters, f its fan-in (1 for a vector, such as a bias), the
Gaussian prior of its entries is

    w ~ N(0, s_t^2 / f),

and s is what it learns; draws can be differentiated by it. Other priors are in
`torchzoo.gp.bnn_priors_hierarchical` and `torchzoo.gp.bnn_priors_flow`.

B.-H. Tran, S. Rossi, D. Milios and M. Filippone, "All you need is a good functional prior for
Bayesian deep learning", 2022, section 4.1. Deviation: s itself starts at 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from torchzoo.hub import ZooModel
from torchzoo.registry import Example, register

Network = nn.Module | Sequence[int]


class PriorNet(ZooModel):
    """Base of the priors: a network without weights, and a distribution to draw them from.

    Subclasses give `sample_weights` and `_log_density`.

    Args:
        module: A network, whose own weights are not used; or the widths of one with tanh.
    """

    def __init__(
        self,
        module: Network,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        network = module if isinstance(module, nn.Module) else _tanh_network(module)
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        if not shapes:
            raise ValueError("module: expected a network with parameters, got none")
        super().__init__()
        self.in_features = None if isinstance(module, nn.Module) else module[0]
        self.shapes: dict[str, tuple[int, ...]] = shapes
        self.network = _emptied(network, device, dtype)

    @property
    def fan_ins(self) -> list[int]:
        """Inputs to each output of each tensor; 1 for vectors."""
        return [math.prod(shape[1:]) for shape in self.shapes.values()]

    def sample_weights(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw weights.

        Args:
            n: Draws.
            generator: Draws on the device of the parameters.

        Returns:
            By name, tensors `(n, ...)`, differentiable by the parameters of the prior.
        """
        raise NotImplementedError

    def log_prior(self, params: Mapping[str, Tensor]) -> Tensor:
        """The log density of weights.

        Args:
            params: By name, tensors of the network's shapes behind any leading dimensions.

        Shape:
            - output: `(...)`, the leading dimensions

        Raises:
            ValueError: Names or shapes that are not those of the network.
        """
        lead = self.lead(params)
        flat = [
            params[name].reshape(*lead, math.prod(shape)) for name, shape in self.shapes.items()
        ]
        return torch.stack([self._log_density(i, w) for i, w in enumerate(flat)]).sum(0)

    def _log_density(self, index: int, w: Tensor) -> Tensor:
        """The log density `(...)` of the entries `(..., n)` of a tensor, by its place."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """One function drawn from the prior, at x."""
        return self.sample_functions(x, 1)[0]

    def sample_functions(
        self, x: Tensor, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw functions.

        Args:
            x: Inputs.
            n: Draws.
            generator: Draws on the device of the parameters.

        Shape:
            - x: `(..., D)`, or what the network takes
            - output: `(n, ..., O)`

        Raises:
            ValueError: Inputs of another dimension.
        """
        return self.functions(self.sample_weights(n, generator=generator), x)

    def functions(
        self, weights: Mapping[str, Tensor], x: Tensor, *, paired: bool = False
    ) -> Tensor:
        """The network with given weights.

        Args:
            weights: By name, tensors with leading dimensions `(*lead, ...)`.
            x: Inputs.
            paired: Whether each of the weights has inputs of its own.

        Shape:
            - x: `(..., D)`, or paired `(*lead, ..., D)`
            - output: `(*lead, ..., O)`

        Raises:
            ValueError: Inputs of another dimension, or weights that don't fit.
        """
        if self.in_features is not None and (x.ndim == 0 or x.shape[-1] != self.in_features):
            raise ValueError(f"x: expected (..., {self.in_features}), got {tuple(x.shape)}")
        lead = self.lead(weights)
        flat = {name: weights[name].reshape(-1, *shape) for name, shape in self.shapes.items()}

        def call(w: dict[str, Tensor], x: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self.network, w, (x,)))

        inputs = x.reshape(-1, *x.shape[len(lead) :]) if paired else x
        run = vmap(call, in_dims=(0, 0 if paired else None), randomness="different")
        found = run(flat, inputs)
        return found.reshape(*lead, *found.shape[1:])

    def lead(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The leading dimensions of weights, which all must share.

        Raises:
            ValueError: Names or shapes that are not those of the network.
        """
        if set(weights) != set(self.shapes):
            raise ValueError(
                f"weights: expected tensors {sorted(self.shapes)}, got {sorted(weights)}"
            )
        leads = set()
        for name, shape in self.shapes.items():
            found = tuple(weights[name].shape)
            split = len(found) - len(shape)
            if split < 0 or found[split:] != shape:
                raise ValueError(f"weights: expected (..., {shape}) of {name}, got {found}")
            leads.add(found[:split])
        if len(leads) > 1:
            raise ValueError(f"weights: expected one leading shape, got {sorted(leads)}")
        return leads.pop()

    def _normal(self, n: int, like: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Standard normal tensors `(n, ...)` of all names."""
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        return {
            name: torch.randn((n, *shape), generator=generator, **options)
            for name, shape in self.shapes.items()
        }

    def extra_repr(self) -> str:
        return f"{sum(math.prod(shape) for shape in self.shapes.values())} weights"


_EXAMPLE: dict[str, Any] = {"module": [3, 6, 2]}
STOCHASTIC = {"stochastic": "Draws a function for each call, others in another precision."}


def prior_example(**bad_options: Any) -> Example:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return Example(_EXAMPLE, (x,), bad_options={"module": [3], **bad_options})


@register(
    paper=13,
    example=lambda: prior_example(init_std=0.0),
    exempt=STOCHASTIC,
    compare="a prior over networks: what counts is the posterior, which the experiment measures",
)
class GaussianPriorNet(PriorNet):
    """Independent normal weights, with a standard deviation for each tensor.

    Args:
        module: A network, whose own weights are not used, or the widths of one with tanh. Only the
            latter is saved by `save_pretrained`.
        init_std: Standard deviation s at the start, the same for all tensors.
        scaled: Whether the variance of weights is divided by their fan-in.
        device: Device of the parameters.
        dtype: Their dtype.

    Shape:
        - x: `(..., D)`, or what the network takes
        - output: `(..., O)`

    Returns:
        One function drawn from the prior, at x.

    Raises:
        ValueError: A network without parameters, an option out of its range, or inputs of another
            dimension.

    Source:
        B.-H. Tran and others, "All you need is a good functional prior for Bayesian deep learning",
        2022, section 4.1.

    Example:
        >>> prior = GaussianPriorNet([1, 50, 1], init_std=2.0)
        >>> prior.sample_functions(torch.linspace(-1, 1, 30)[:, None], 7).shape
        torch.Size([7, 30, 1])
        >>> prior.std
        tensor([2., 2., 2., 2.], grad_fn=<SoftplusBackward0>)
    """

    def __init__(
        self,
        module: Network,
        *,
        init_std: float = 1.0,
        scaled: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 0 < init_std < math.inf:
            raise ValueError(f"init_std: expected above 0, got {init_std}")
        super().__init__(module, device=device, dtype=dtype)
        self.init_std, self.scaled = init_std, scaled
        self.raw_std = nn.Parameter(torch.empty(len(self.shapes), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All standard deviations as at the start."""
        self.std = torch.full_like(self.raw_std, self.init_std)

    @property
    def std(self) -> Tensor:
        """Standard deviations s `(T,)`, in the order of `shapes`."""
        return F.softplus(self.raw_std)

    @std.setter
    def std(self, value: Tensor) -> None:
        with torch.no_grad():
            self.raw_std.copy_(inverse_softplus(value))

    def scales(self) -> dict[str, Tensor]:
        """Standard deviations of the entries, by name."""
        fans = self.fan_ins if self.scaled else [1] * len(self.shapes)
        return {
            name: std / math.sqrt(fan)
            for name, std, fan in zip(self.shapes, self.std.unbind(), fans, strict=True)
        }

    def sample_weights(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        noise, scales = self._normal(n, self.raw_std, generator), self.scales()
        return {name: scales[name] * e for name, e in noise.items()}

    def _log_density(self, index: int, w: Tensor) -> Tensor:
        std = self.std[index] / math.sqrt(self.fan_ins[index] if self.scaled else 1)
        constant = w.shape[-1] * (std.log() + math.log(2 * math.pi) / 2)
        return -(w / std).square().sum(-1) / 2 - constant


def inverse_softplus(value: Tensor) -> Tensor:
    """What `softplus` maps to a value above 0."""
    return value + (-torch.expm1(-value)).log()


def _tanh_network(widths: Sequence[int]) -> nn.Module:
    """Linear layers with tanh between them."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"module: expected a network or at least two widths, got {widths}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, device="meta"), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _emptied(
    network: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """A copy with empty buffers in place of parameters, tied ones still tied."""
    network = copy.deepcopy(network)
    places: dict[Tensor, Tensor] = {}
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = places.setdefault(parameter, torch.empty(0, device=device, dtype=dtype))
            delattr(module, name)
            module.register_buffer(name, place, persistent=False)
    return network
