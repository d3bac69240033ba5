"""Edits that change how many Gaussians a scene has, or which, and what optimisers know of them.

Each edit says from which old row a new one carries on. That row's entries in the state of the
optimisers, such as Adam's moments, are gathered with it; rows without one start from zero. What
has no rows, such as Adam's step, stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchzoo.splatting.rotations import quat_to_matrix

if TYPE_CHECKING:
    from torchzoo.splatting.scene import GaussianScene

__all__ = [
    "adopt_size",
    "append",
    "clone",
    "keep",
    "relocate",
    "relocated",
    "reset_opacities",
    "split",
]

Optimizers = Optimizer | Iterable[Optimizer]

MAX_COPIES = 51
"""A relocation counts no more copies of one Gaussian than this."""


class Rows(Protocol):
    """A module whose own parameters have one row for each item."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def _note_size(self) -> None: ...


@torch.no_grad()
def keep(scene: Rows, rows: Tensor, optimizers: Optimizers = ()) -> Tensor:
    """Keep some Gaussians, in the order given; a permutation sorts the scene.

    Args:
        rows: A mask `(N,)` or indices `(M,)`.
        optimizers: Those that hold the scene's parameters.

    Returns:
        `(M,)`, the old row of each new one.
    """
    index = _indices(scene, "rows", rows)
    return _rewrite(scene, _rows(scene, index), index, optimizers)


@torch.no_grad()
def clone(scene: Rows, rows: Tensor, optimizers: Optimizers = ()) -> Tensor:
    """Append copies of some Gaussians.

    Args:
        rows: A mask `(N,)` or indices `(M,)`.
        optimizers: Those that hold the scene's parameters.

    Returns:
        `(N + M,)`, the old row of each new one, -1 for the copies.
    """
    return append(scene, _rows(scene, _indices(scene, "rows", rows)), optimizers)


@torch.no_grad()
def append(scene: Rows, values: Mapping[str, Tensor], optimizers: Optimizers = ()) -> Tensor:
    """Append Gaussians.

    Args:
        values: Rows for each parameter of the scene, by its name.
        optimizers: Those that hold the scene's parameters.

    Returns:
        `(N + M,)`, the old row of each new one, -1 for the new.

    Raises:
        ValueError: `values` has other names than the parameters, or rows of another shape.
    """
    old = _parameters(scene)
    if values.keys() != old.keys():
        raise ValueError(f"values: got {sorted(values)}, expected {sorted(old)}")
    count = len(values[next(iter(old))])
    for name, value in values.items():
        if (shape := (count, *old[name].shape[1:])) != tuple(value.shape):
            raise ValueError(f"values[{name!r}]: got {tuple(value.shape)}, expected {shape}")
    rows = {name: torch.cat([old[name].detach(), value]) for name, value in values.items()}
    index = torch.arange(len(first := next(iter(old.values()))), device=first.device)
    return _rewrite(scene, rows, torch.cat([index, index.new_full((count,), -1)]), optimizers)


def adopt_size(scene: Rows, state: Mapping[str, Any], prefix: str) -> None:
    """Take over the number of rows of a state to be loaded, where all parameters come with it."""
    own = _parameters(scene)
    rows = {name: state[prefix + name] for name in own if prefix + name in state}
    before = {parameter.shape[:1] for parameter in own.values()}
    if rows.keys() != own.keys() or {value.shape[:1] for value in rows.values()} == before:
        return
    count = len(next(iter(rows.values())))
    if all(value.shape == (count, *own[name].shape[1:]) for name, value in rows.items()):
        for parameter in own.values():
            parameter.grad = None
            parameter.data = parameter.data.new_empty(count, *parameter.shape[1:])
        scene._note_size()


@torch.no_grad()
def split(
    scene: GaussianScene,
    rows: Tensor,
    optimizers: Optimizers = (),
    *,
    parts: int = 2,
    shrink: float = 1.6,
    revised_opacity: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace some Gaussians by smaller ones, drawn from them; these come last.

    Args:
        rows: A mask `(N,)` or indices `(M,)` without repetitions.
        optimizers: Those that hold the scene's parameters.
        parts: Into how many each is split.
        shrink: What the scales are divided by.
        revised_opacity: Whether parts get opacity `1 - (1 - o)^(1 / parts)`, so that all together
            let as much light through as the one did, where they coincide; else they keep o.
        generator: Where the draws come from.

    Returns:
        `(N + (parts - 1) M,)`, the old row of each new one, -1 for the parts.
    """
    index = _indices(scene, "rows", rows)
    rest = torch.ones(len(scene.means), dtype=torch.bool, device=index.device)
    rest[index] = False
    new = _rows(scene, index.repeat(parts))
    noise = torch.randn(
        new["means"].shape, generator=generator, device=new["means"].device, dtype=scene.means.dtype
    )
    offset = quat_to_matrix(new["quats"]) @ (noise * new["log_scales"].exp())[..., None]
    new["means"] = new["means"] + offset.squeeze(-1)
    new["log_scales"] = new["log_scales"] - math.log(shrink)
    if revised_opacity:
        new["opacity_logits"] = _revised(_below_one(new["opacity_logits"].sigmoid()), parts).logit()
    kept = rest.nonzero().squeeze(-1)
    values = {name: torch.cat([row, new[name]]) for name, row in _rows(scene, kept).items()}
    fresh = kept.new_full((parts * len(index),), -1)
    return _rewrite(scene, values, torch.cat([kept, fresh]), optimizers)


@torch.no_grad()
def relocate(
    scene: GaussianScene,
    sources: Tensor,
    optimizers: Optimizers = (),
    *,
    dead: Tensor | None = None,
    min_opacity: float = 0.005,
) -> Tensor:
    """Copy Gaussians so that source and copies together look like the source did.

    Each source and its copies get the opacity and scales of `relocated`, and zero moments.

    Args:
        sources: `(M,)`, the rows to copy; one that is there m times gets m copies.
        optimizers: Those that hold the scene's parameters.
        dead: `(M,)`, the rows that the copies replace; without them copies are appended.
        min_opacity: What no opacity falls below.

    Returns:
        The old row of each new one, -1 for sources and copies.

    Raises:
        ValueError: `dead` has another length than `sources`, or shares rows with them.
    """
    sources = _indices(scene, "sources", sources)
    count = len(scene.means)
    if dead is None:
        place = count + torch.arange(len(sources), device=sources.device)
    else:
        place = _indices(scene, "dead", dead)
        if len(place) != len(sources):
            raise ValueError(f"dead: got {len(place)} rows, expected {len(sources)} as sources")
        if torch.isin(place, sources).any():
            raise ValueError("dead: got rows that are sources too, expected others")
    index = torch.arange(count, device=sources.device)
    if dead is None:
        index = torch.cat([index, sources])
    else:
        index[place] = sources
    values, origin = _rows(scene, index), index.clone()
    touched = torch.cat([sources, place])
    copies = torch.bincount(sources, minlength=count)[index[touched]] + 1
    opacities, shrink = relocated(
        values["opacity_logits"][touched].sigmoid(), copies, min_opacity=min_opacity
    )
    values["opacity_logits"][touched] = opacities.logit()
    values["log_scales"][touched] += shrink.log()[:, None]
    origin[touched] = -1
    return _rewrite(scene, values, origin, optimizers)


def relocated(
    opacities: Tensor, counts: Tensor, *, min_opacity: float = 0.005
) -> tuple[Tensor, Tensor]:
    """Opacity and scale of n equal Gaussians in one place that look like one of opacity o.

    Along a line through the centre the n of opacity o' and scale c s let through
    `(1 - o' exp(-x^2 / (2 c^2 s^2)))^n`. With `o' = 1 - (1 - o)^(1/n)` they are as opaque in the
    centre, and

        c = o / sum over j = 1..n of C(n, j) (-1)^(j-1) o'^j / sqrt(j)

    keeps the integral over x of what they hold back.

    Args:
        opacities: o, between 0 and 1; 1 counts as the number below it, which has a finite logit.
        counts: n, at least 1; above 51 as 51.
        min_opacity: o' is at least this.

    Shape:
        - opacities: `(M,)`
        - counts: `(M,)`
        - outputs: `(M,)`

    Returns:
        o' and c.

    Source:
        Kheradmand et al., "3D Gaussian Splatting as Markov Chain Monte Carlo", 2024, equation 9;
        its double sum is taken over one index first.

    Example:
        >>> opacity, shrink = relocated(torch.tensor([0.75]), torch.tensor([2]))
        >>> opacity
        tensor([0.5000])
    """
    o, n = _below_one(opacities).double(), counts.clamp(max=MAX_COPIES).double()
    new = _revised(o, n).clamp_min(min_opacity)
    j = torch.arange(1, MAX_COPIES + 1, device=o.device, dtype=o.dtype)
    left = n[:, None] - j
    choose = (
        torch.lgamma(n + 1)[:, None] - torch.lgamma(j + 1) - torch.lgamma(left.clamp_min(0) + 1)
    )
    terms = (choose + j * new.log()[:, None]).exp() / j.sqrt() * (1 - 2 * ((j + 1) % 2))
    total = torch.where(left >= 0, terms, 0).sum(-1)
    return new.to(opacities), (o / total).to(opacities)


@torch.no_grad()
def reset_opacities(scene: GaussianScene, ceiling: float, optimizers: Optimizers = ()) -> None:
    """Lower opacities to at most `ceiling`, and forget the optimisers' moments of all of them."""
    old = scene.opacity_logits
    limit = math.log(ceiling / (1 - ceiling))
    new = nn.Parameter(old.detach().clamp(max=limit), requires_grad=old.requires_grad)
    _swap(optimizers, old, new, torch.zeros_like)
    scene.opacity_logits = new


def _revised(opacities: Tensor, parts: int | Tensor) -> Tensor:
    """`1 - (1 - o)^(1 / parts)`, without loss of digits at either end."""
    return -torch.expm1(torch.log1p(-opacities) / parts)


def _below_one(opacities: Tensor) -> Tensor:
    """Opacities whose logits are finite; the sigmoid of 17 is 1 in single precision."""
    return opacities.clamp(max=1 - torch.finfo(opacities.dtype).eps)


def _parameters(scene: Rows) -> dict[str, nn.Parameter]:
    return dict(scene.named_parameters(recurse=False))


def _rows(scene: Rows, index: Tensor) -> dict[str, Tensor]:
    return {name: value.detach()[index] for name, value in _parameters(scene).items()}


def _indices(scene: Rows, name: str, rows: Tensor) -> Tensor:
    """Rows as indices, from indices or a mask."""
    count = len(next(iter(_parameters(scene).values())))
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        what = f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(f"{name}: got {what}, expected a mask ({count},) or indices (M,)")
    if rows.dtype == torch.bool:
        if len(rows) != count:
            raise ValueError(f"{name}: got a mask of {len(rows)}, expected {count}")
        return rows.nonzero().squeeze(-1)
    return rows.long()


def _rewrite(
    scene: Rows, values: Mapping[str, Tensor], origin: Tensor, optimizers: Optimizers
) -> Tensor:
    """Put new rows into the scene; row i carries on the optimisers' state of `origin[i]`."""
    fresh = origin < 0

    def carry(state: Tensor) -> Tensor:
        if not len(state):
            return state.new_zeros(len(origin), *state.shape[1:])
        carried = state[origin.clamp_min(0)]
        carried[fresh] = 0
        return carried

    for name, old in _parameters(scene).items():
        new = nn.Parameter(values[name].contiguous(), requires_grad=old.requires_grad)
        _swap(optimizers, old, new, carry)
        setattr(scene, name, new)
    scene._note_size()
    return origin


def _swap(
    optimizers: Optimizers,
    old: nn.Parameter,
    new: nn.Parameter,
    carry: Callable[[Tensor], Tensor],
) -> None:
    """Replace a parameter in the optimisers that hold it, its state's rows changed by `carry`."""
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if one is old else one for one in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {
                key: carry(value)
                if isinstance(value, Tensor) and value.shape[:1] == old.shape[:1]
                else value
                for key, value in optimizer.state.pop(old).items()
            }
