"""Compact scenes at rest: the frozen scene of what is stored, and the parts of its file.

A splat is a position, an opacity and its codes; codebooks, the colours' table and network come
once. Splats are in Morton order, so that their positions compress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from torchzoo.files import atomic_path
from torchzoo.splatting import compact_file

if TYPE_CHECKING:
    from torchzoo.splatting.compact import Compact3DGS

__all__ = ["frozen", "options_of", "read", "write"]

HASH_PRUNE = 0.1
"""Values of the table up to this size become 0 in an entropy-coded file."""
_UNSAVED = ("device", "dtype", "mask_init", "mask_threshold", "frozen", "use_vq")


def options_of(scene: Compact3DGS, *, frozen: bool) -> dict[str, Any]:
    """Constructor arguments of a scene like this one."""
    grid = scene.color.grid
    return {
        "num_gaussians": scene.num_gaussians,
        "aabb": scene.color.box,
        "image_size": scene.image_size,
        "field": {
            "levels": grid.levels,
            "features": grid.features,
            "log2_table": grid.log2_table,
            "base": grid.base,
            "growth": grid.growth,
            "hidden": scene.color.hidden,
            "layers": scene.color.layers,
        },
        "codebook_size": scene.scale_vq.codebook_size,
        "stages": scene.scale_vq.stages,
        "mask_threshold": scene.mask_threshold,
        "mask_init": scene.mask_init,
        "use_vq": scene.use_vq,
        "frozen": frozen,
        "device": scene.means.device,
        "dtype": scene.means.dtype,
    }


def frozen(scene: Compact3DGS, rows: Tensor, codes: Sequence[Tensor] | None = None) -> Compact3DGS:
    """A frozen scene of some rows; None stands for the codes these have."""
    if codes is None:
        codes = [scene.scale_codes[rows], scene.rotation_codes[rows]]
    values = {"scale_codes": codes[0], "rotation_codes": codes[1]}
    values |= {"means": scene.means[rows], "opacity_logits": scene.opacity_logits[rows]}
    options = options_of(scene, frozen=True) | {"num_gaussians": len(codes[0])}
    made = type(scene)(**options)
    for name, value in values.items():
        made.get_parameter(name).data.copy_(value)
    for name in ("color", "scale_vq", "rotation_vq"):
        made.get_submodule(name).load_state_dict(scene.get_submodule(name).state_dict())
    return made.train(scene.training)


def write(path: str | Path, scene: Compact3DGS, huffman: bool) -> dict[str, int]:
    """Write a frozen scene, whole or not at all; returns the bytes of each part.

    Raises:
        TorchzooError: The file can't be written.
    """
    scene = frozen(scene, compact_file.morton_order(scene.means))
    values = {
        "means": scene.means,
        "opacities": scene.opacities,
        "scale_codes": scene.scale_codes,
        "rotation_codes": scene.rotation_codes,
        "codebooks": _vector([scene.scale_vq, scene.rotation_vq]),
        "grid": scene.color.grid.table,
        "mlp": _vector([scene.color.mlp]),
    }
    coders = compact_file.coders(huffman, scene.scale_vq.codebook_size, HASH_PRUNE)
    parts = {name: coders[name][0](value) for name, value in values.items()}
    options = options_of(scene, frozen=True)
    header = {"huffman": huffman, **{k: v for k, v in options.items() if k not in _UNSAVED}}
    data = compact_file.write_parts(header, parts)
    with atomic_path(path) as part:
        part.write_bytes(data)
    sizes = {name: len(coded) for name, coded in parts.items()}
    return {"header": len(data) - sum(sizes.values()), **sizes}


def read(path: str | Path, kind: type[Compact3DGS]) -> Compact3DGS:
    """The scene in a file, of a class, in float32 on the CPU.

    Raises:
        ValueError: It is no such file, or damaged; the message has the path.
        OSError: The file can't be read.
    """
    data = Path(path).read_bytes()
    try:
        return _from_parts(kind, *compact_file.read_parts(data))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None


def _vector(modules: Sequence[nn.Module]) -> Tensor:
    return parameters_to_vector([p for module in modules for p in module.parameters()])


def _from_parts(
    kind: type[Compact3DGS], header: Mapping[str, Any], parts: Mapping[str, bytes]
) -> Compact3DGS:
    """The scene of a file; its sizes are checked before there is memory for them."""
    options = dict(header)
    huffman = options.pop("huffman")
    with torch.device("meta"):
        plan = kind(**options, frozen=True)
    modules: dict[str, list[nn.Module]] = {
        "codebooks": [plan.scale_vq, plan.rotation_vq],
        "mlp": [plan.color.mlp],
    }
    counts = {
        "means": plan.means.numel(),
        "opacities": plan.num_gaussians,
        "scale_codes": plan.scale_codes.numel(),
        "rotation_codes": plan.rotation_codes.numel(),
        "codebooks": sum(p.numel() for m in modules["codebooks"] for p in m.parameters()),
        "grid": plan.color.grid.table.numel(),
        "mlp": sum(p.numel() for p in plan.color.mlp.parameters()),
    }
    if parts.keys() != counts.keys():
        raise ValueError(f"parts: got {sorted(parts)}, expected {sorted(counts)}")
    coders = compact_file.coders(huffman, plan.scale_vq.codebook_size, HASH_PRUNE)
    found = {name: coders[name][1](parts[name], count) for name, count in counts.items()}
    scene = kind(**options, frozen=True)
    opacities = found["opacities"].clamp(0, 1)
    for parameter, value in (
        (scene.means, found["means"]),
        (scene.opacity_logits, opacities.logit(eps=1e-6)),
        (scene.scale_codes, found["scale_codes"]),
        (scene.rotation_codes, found["rotation_codes"]),
        (scene.color.grid.table, found["grid"]),
    ):
        parameter.data.copy_(value.reshape(parameter.shape))
    books = [*scene.scale_vq.parameters(), *scene.rotation_vq.parameters()]
    vector_to_parameters(found["codebooks"], books)
    vector_to_parameters(found["mlp"], scene.color.mlp.parameters())
    return scene
