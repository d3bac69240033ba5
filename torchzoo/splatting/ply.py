"""PLY files: the vertices of any, and scenes of Gaussians in the layout of Kerbl et al.

A scene's vertex has `x y z`, `f_dc_0..2` (the colour's coefficients of degree 0), `f_rest_*` (those
of the other degrees, all of red first, then green, then blue), `opacity` (a logit), `scale_0..2`
(logarithms) and `rot_0..3` (wxyz), as 32-bit floats. Properties are read by name, in any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange

from torchzoo.splatting.scene import GaussianScene

__all__ = ["read_ply", "read_vertices", "write_ply"]

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8",
}  # fmt: skip
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
_LIMIT = 1 << 20
"""Bytes within which a header must end."""

_GROUPS = {
    "means": ["x", "y", "z"],
    "sh0": [f"f_dc_{i}" for i in range(3)],
    "opacity_logits": ["opacity"],
    "log_scales": [f"scale_{i}" for i in range(3)],
    "quats": [f"rot_{i}" for i in range(4)],
}


class _Element(NamedTuple):
    name: str
    rows: int
    properties: list[tuple[str, str]]
    has_lists: bool


def read_vertices(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The properties of a PLY file's vertices, as float64 arrays by name.

    Raises:
        ValueError: It is no PLY file, is shorter than its header says, or is of a kind that splats
            and point clouds don't come in.
    """
    order, elements, start = _header(data)
    body = memoryview(data)[start:]
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise ValueError(f"PLY without vertices: it has {', '.join(names) or 'no elements'}")
    before, vertex = elements[: names.index("vertex")], elements[names.index("vertex")]
    if any(element.has_lists for element in [*before, vertex]):
        raise ValueError("PLY with lists in or before its vertices: expected plain numbers")
    if order == "ascii":
        return _ascii_columns(body, before, vertex)
    dtypes = [
        np.dtype([(name, _ORDERS[order] + kind) for name, kind in element.properties])
        for element in [*before, vertex]
    ]
    skip = sum(
        element.rows * dtype.itemsize for element, dtype in zip(before, dtypes[:-1], strict=True)
    )
    room = max(len(body) - skip, 0)
    if vertex.rows * dtypes[-1].itemsize > room:
        whole = room // dtypes[-1].itemsize
        raise ValueError(f"truncated PLY: {whole} of {vertex.rows} vertices are there")
    if not vertex.rows or not dtypes[-1].itemsize:
        return {name: np.empty(0) for name, _ in vertex.properties}
    rows = np.frombuffer(body, dtypes[-1], vertex.rows, skip)
    return {name: rows[name].astype(np.float64) for name, _ in vertex.properties}


def read_ply(data: bytes) -> GaussianScene:
    """A scene from a PLY file's bytes.

    Raises:
        ValueError: As for `read_vertices`, or the vertices are no Gaussians.
    """
    columns = read_vertices(data)
    if missing := [name for group in _GROUPS.values() for name in group if name not in columns]:
        raise ValueError(f"PLY without {', '.join(missing)}: its vertices are no Gaussians")
    rest = [f"f_rest_{i}" for i in range(sum(name.startswith("f_rest_") for name in columns))]
    if len(rest) not in (0, 9, 24, 45) or any(name not in columns for name in rest):
        got = sorted(name for name in columns if name.startswith("f_rest_"))
        expected = "f_rest_0 to f_rest_8, 23 or 44"
        raise ValueError(f"PLY with {len(got)} properties f_rest: expected {expected}, or none")
    values = {name: _columns(columns, group) for name, group in _GROUPS.items()}
    others = rearrange(_columns(columns, rest), "n (c k) -> n k c", c=3)
    return GaussianScene.from_tensors(
        values["means"],
        values["quats"],
        values["log_scales"],
        values["opacity_logits"].squeeze(-1),
        torch.cat([values["sh0"][:, None], others], 1),
    )


def write_ply(scene: GaussianScene) -> bytes:
    """A scene as a little-endian PLY file, with the normals (zeros) that some readers expect."""
    values = {
        "means": scene.means,
        "normals": torch.zeros_like(scene.means),
        "sh0": scene.sh0.squeeze(1),
        "shN": rearrange(scene.shN, "n k c -> n (c k)"),
        "opacity_logits": scene.opacity_logits[:, None],
        "log_scales": scene.log_scales,
        "quats": scene.quats,
    }
    more = {
        "normals": ["nx", "ny", "nz"],
        "shN": [f"f_rest_{i}" for i in range(values["shN"].shape[1])],
    }
    names = [name for group in values for name in (_GROUPS | more)[group]]
    rows = torch.cat([value.detach().cpu().float() for value in values.values()], 1)
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(rows)}",
        *(f"property float {name}" for name in names),
        "end_header\n",
    ]
    return "\n".join(lines).encode("ascii") + rows.numpy().astype("<f4").tobytes()


def _columns(columns: dict[str, np.ndarray[Any, Any]], names: list[str]) -> torch.Tensor:
    count = len(columns["x"])
    values = np.stack([columns[name] for name in names], 1) if names else np.empty((count, 0))
    with np.errstate(over="ignore"):  # a double may be an infinite float
        return torch.from_numpy(values.astype(np.float32))


def _header(data: bytes) -> tuple[str, list[_Element], int]:
    """The format, the elements, and where the body begins."""
    if data[:4] not in (b"ply\n", b"ply\r"):
        raise ValueError("no PLY file: it doesn't begin with the line 'ply'")
    order, elements, start = "", list[_Element](), 0
    while True:
        end = data.find(b"\n", start, _LIMIT)
        if end < 0:
            raise ValueError("truncated PLY: its header doesn't end")
        try:
            words = data[start:end].decode("ascii").split()
        except UnicodeDecodeError:
            raise ValueError("PLY header: expected ASCII text") from None
        start = end + 1
        match words:
            case ["end_header"]:
                if not order:
                    raise ValueError("PLY header: it names no format")
                return order, elements, start
            case ["format", str(name), "1.0"] if name in _ORDERS:
                order = name
            case ["element", name, count] if count.isdecimal() and len(count) < 19:
                elements.append(_Element(name, int(count), [], False))
            case ["property", "list", _, _, _] if elements:
                elements[-1] = elements[-1]._replace(has_lists=True)
            case ["property", kind, name] if elements and kind in _TYPES:
                if name in [known for known, _ in elements[-1].properties]:
                    raise ValueError(f"PLY header: two properties are called {name!r}")
                elements[-1].properties.append((name, _TYPES[kind]))
            case ["ply" | "comment" | "obj_info", *_] | []:
                pass
            case _:
                raise ValueError(f"PLY header: can't read the line {' '.join(words)[:80]!r}")


def _ascii_columns(
    body: memoryview, before: list[_Element], vertex: _Element
) -> dict[str, np.ndarray[Any, Any]]:
    width = len(vertex.properties)
    skip = sum(element.rows * len(element.properties) for element in before)
    if 2 * (skip + vertex.rows * width) - 1 > len(body):  # a number has a digit and a space
        raise ValueError(f"truncated PLY: fewer than {vertex.rows} vertices are there")
    words = bytes(body).split(None, skip + vertex.rows * width)
    words = words[skip : skip + vertex.rows * width]
    if len(words) < vertex.rows * width:
        raise ValueError(f"truncated PLY: {len(words) // width} of {vertex.rows} vertices")
    try:
        table = np.array([float(word) for word in words]).reshape(-1, max(width, 1))
    except ValueError:
        raise ValueError("PLY with a vertex that is no list of numbers") from None
    return {name: table[:, i] for i, (name, _) in enumerate(vertex.properties)}
