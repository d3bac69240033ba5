"""A small network that corrects splats' opacities or colours by where they are seen from.

D. Malarz, W. Smolak-Dyżewska, J. Tabor, S. Tadeja and P. Spurek, "Gaussian Splatting with
NeRF-based Color and Opacity", 2024. For a splat at mu that is seen along the unit vector d,

    F(mu, d) = a(MLP(concat(d, grid((mu - low) / (high - low)))))

with a hash grid over the scene's box, leaky rectifiers without biases, and a sigmoid for a.

Deviations: the authors' code gives the grid positions in the world, of which it sees those in the
unit cube. `"exp"` and `"identity"` for a, which start at 1 and at 0, are not in the paper, nor are
further inputs in its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchzoo.common.encodings import HashGridEncoding
from torchzoo.hub import ZooModel
from torchzoo.ops.calling import values_readable
from torchzoo.registry import Example, register
from torchzoo.splatting.compact_color import box_of

__all__ = ["ViewDirectionField"]

TARGETS = ("opacity", "color", "both")
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "identity": lambda x: x,
}
EXTRA_WIDTHS = {"log_scales": 3, "quats": 4}


def _field_example() -> Example:
    dirs = torch.tensor([[0.6, 0.0, 0.8], [-0.48, 0.6, 0.64], [0.0, -1.0, 0.0], [0.8, 0.6, 0.0]])
    return Example(
        kwargs={
            "aabb": [[-3.0, -2.5, -4.0], [3.5, 3.0, 4.5]],
            "target": "both",
            "sh_degree": 1,
            "hidden": 8,
            "levels": 3,
            "features": 2,
            "log2_table": 6,
            "base": 4,
        },
        inputs=(torch.randn(4, 3), dirs),
        bad_options={
            "aabb": [[0.0] * 3] * 2,
            "target": "colour",
            "sh_degree": 4,
            "hidden": 0,
            "layers": 0,
            "levels": 0,
            "features": 0,
            "log2_table": -1,
            "base": 0,
            "growth": 0.5,
            "output": "tanh",
            "extra_inputs": ("means",),
        },
    )


@register(paper=50, example=_field_example, compare="a part of VDGSScene, which has a peer")
class ViewDirectionField(ZooModel):
    """Factors of splats' opacities, of their coefficients of colour, or of both, by direction.

    Args:
        aabb: Lower and upper corner of the scene's box, `(2, 3)`.
        target: `"opacity"`, `"color"` or `"both"`.
        sh_degree: Degree of the colours; `K = (degree + 1)^2`.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
        levels: Grids.
        features: Features an entry.
        log2_table: Entries of a grid's table at most, as a power of 2.
        base: Cells a side of the coarsest grid.
        growth: What each grid is finer by.
        output: What is made of the last layer: `"sigmoid"` keeps factors between 0 and 1, so that
            they can but attenuate; `"exp"` starts at 1 and `"identity"` at 0 everywhere, with a
            last layer of zeros.
        extra_inputs: What else the network sees of a splat: `"log_scales"`, `"quats"`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        - means: `(..., 3)`; outside the box they count as its nearest point
        - dirs: `(..., 3)`, from the camera to the splat; leading dimensions broadcast
        - extra: `(..., E)`, the columns of `extra_inputs` in their order
        - output: a dict with `"opacity"`, `(...)`, and `"sh"`, `(..., K, 3)`, as the target says

    Returns:
        The factors.

    Raises:
        ValueError: An option out of its range, a box without volume, inputs of shapes that don't
            fit, or directions of another length than 1 (of 0, they have none).

    Source:
        Malarz et al., "Gaussian Splatting with NeRF-based Color and Opacity", 2024; sizes are the
        authors' code's.

    Example:
        >>> field = ViewDirectionField([[-1.0] * 3, [1.0] * 3], target="both", log2_table=8)
        >>> dirs = torch.nn.functional.normalize(torch.randn(2, 5, 3), dim=-1)
        >>> {name: tuple(value.shape) for name, value in field(torch.rand(5, 3), dirs).items()}
        {'opacity': (2, 5), 'sh': (2, 5, 16, 3)}
    """

    aabb: Tensor

    def __init__(
        self,
        aabb: Tensor | Sequence[Sequence[float]],
        *,
        target: str = "opacity",
        sh_degree: int = 3,
        hidden: int = 32,
        layers: int = 2,
        levels: int = 4,
        features: int = 4,
        log2_table: int = 15,
        base: int = 16,
        growth: float = 1.5,
        output: str = "sigmoid",
        extra_inputs: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.box = box_of(aabb)
        if target not in TARGETS:
            raise ValueError(f"target: got {target!r}, expected one of {TARGETS}")
        if output not in OUTPUTS:
            raise ValueError(f"output: got {output!r}, expected one of {tuple(OUTPUTS)}")
        if not 0 <= sh_degree <= 3:
            raise ValueError(f"sh_degree: got {sh_degree}, expected 0 to 3")
        for name, value in (("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if unknown := [name for name in extra_inputs if name not in EXTRA_WIDTHS]:
            known = tuple(EXTRA_WIDTHS)
            raise ValueError(f"extra_inputs: got {unknown[0]!r}, expected some of {known}")
        if "aabb" in self._zoo_config:  # a tensor has no place there
            self._zoo_config["aabb"] = self.box
        self.target, self.sh_degree, self.output = target, sh_degree, output
        self.extra_inputs = tuple(extra_inputs)
        self.extra_width = sum(EXTRA_WIDTHS[name] for name in self.extra_inputs)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("aabb", torch.tensor(self.box, **factory))
        self.grid = HashGridEncoding(
            3,
            levels=levels,
            features=features,
            log2_table=log2_table,
            base=base,
            growth=growth,
            **factory,
        )
        count = {"opacity": 1, "color": 0, "both": 1}[target]
        if target != "opacity":
            count += 3 * (sh_degree + 1) ** 2
        sizes = [3 + levels * features + self.extra_width, *[hidden] * layers]
        modules: list[nn.Module] = []
        for before, after in pairwise(sizes):
            modules += [nn.Linear(before, after, bias=False, **factory), nn.LeakyReLU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(hidden, count, bias=False, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Table from U(-1e-4, 1e-4), layers as Glorot and Bengio; zeros where the output says."""
        self.grid.reset_parameters()
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        if self.output != "sigmoid":
            nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]

    def forward(
        self, means: Tensor, dirs: Tensor, extra: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Factors of splats seen in directions; see the class."""
        given = {"means": means, "dirs": dirs} | ({} if extra is None else {"extra": extra})
        if self.extra_width and extra is None:
            raise ValueError(f"extra: got None, expected the columns of {self.extra_inputs}")
        widths = {"means": 3, "dirs": 3, "extra": self.extra_width}
        for name, value in given.items():
            if value.dim() < 1 or value.shape[-1] != widths[name]:
                raise ValueError(
                    f"{name}: got {tuple(value.shape)}, expected (..., {widths[name]})"
                )
        try:
            lead = torch.broadcast_shapes(*(value.shape[:-1] for value in given.values()))
        except RuntimeError:
            got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            raise ValueError(f"means, dirs: got {got}, expected shapes that broadcast") from None
        if values_readable(dirs):
            length = dirs.detach().norm(dim=-1)
            wrong = ((length - 1).abs() > 1e-3) & (length > 0)
            if wrong.any():
                raise ValueError(f"dirs: got lengths like {length[wrong][0]:.4g}, expected 1")
        dtype = self.aabb.dtype
        low, high = self.aabb
        place = self.grid((means.to(dtype) - low) / (high - low))
        seen = [dirs.to(dtype), place, *([] if extra is None else [extra.to(dtype)])]
        inputs = torch.cat([part.expand(*lead, part.shape[-1]) for part in seen], -1)
        factors = OUTPUTS[self.output](self.mlp(inputs))
        found = {} if self.target == "color" else {"opacity": factors[..., 0]}
        if self.target != "opacity":
            found["sh"] = factors[..., len(found) :].unflatten(-1, (-1, 3))
        return found

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"aabb={self.box}, target={self.target!r}, output={self.output!r}"
