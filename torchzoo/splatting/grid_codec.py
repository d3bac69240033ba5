"""Scenes as pictures: each attribute of a grid of Gaussians is an image file.

W. Morgenstern, F. Barthel, A. Hilsmann and P. Eisert, "Compact 3D Scene Representation via
Self-Organizing Gaussian Grids", 2024, section 3.3. Positions are contracted to
c = sign(x) log(1 + abs(x)). Values of b bits, with m the least of an attribute and M the largest,
are stored as

    q = round((x - m) / (M - m) (2^b - 1)),   x ~ (m (2^b - 1 - q) + M q) / (2^b - 1).

A bundle, a folder or a zip file, holds one image for each attribute and `manifest.json`, which says
how each is to be read, how long it is and its SHA-256. An image shows the channels below each
other, of more than 8 bits first all the high bytes and then all the low ones.

Deviations from the authors' code: lossless PNG or WebP, whichever is smaller, in place of JPEG XL;
base colours are quantised too, or, with `lossless=False`, JPEG; 2^b - 1 steps, not 2^b, so that b
bits hold them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzoo.files import atomic_path, write_text
from torchzoo.splatting.scene import MAX_SH_DEGREE, GaussianScene
from torchzoo.splatting.sog import ATTRIBUTES

__all__ = ["GridCodec"]

BITS = {"xyz": 14, "sh_rest": 5, "scaling": 6, "rotation": 6, "opacity": 6, "sh_dc": 8}
"""Bits of each value in the authors' configuration; base colours there are lossy."""

MANIFEST, FORMAT, VERSION = "manifest.json", "torchzoo gaussian grid", 1
_CHANNELS = {"xyz": 3, "sh_dc": 3, "scaling": 3, "rotation": 4, "opacity": 1}
_MANIFEST_BYTES = 1 << 16
_JPEG_QUALITY = 95
_PIXELS = 1 << 31
"""More pixels than this no image of a bundle may have: more than twenty million Gaussians."""

_DAMAGE = (LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile)
"""What else than a `ValueError` files lead to that are no bundles."""

Planes = np.ndarray[Any, Any]


class GridCodec:
    """Writes scenes as bundles of images, and reads them.

    Any scene can be written; neighbours on the grid should be alike for small files, see
    `SelfOrganizingScene.sort_`. A number of Gaussians that is no square fills a grid of as many
    columns, whose last row repeats the last of them. Scenes are read without `features`, which are
    not stored.

    Args:
        bits: Bits of each value by attribute, 1 to 16; what is left out has the default.
        lossless: Whether the quantised base colours are stored as they are; else as JPEG of
            quality 95.
        contract_xyz: Whether positions are contracted, so that those near the origin are finer.

    Raises:
        ValueError: An unknown attribute, or bits out of their range.

    Source:
        Morgenstern et al., "Compact 3D Scene Representation via Self-Organizing Gaussian Grids",
        2024, section 3.3.

    Example:
        >>> import tempfile
        >>> scene = GaussianScene.from_points(torch.randn(25, 3), torch.rand(25, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = GridCodec().encode(scene, f"{folder}/scene.zip")
        ...     GridCodec.decode(f"{folder}/scene.zip").means.shape
        torch.Size([25, 3])
    """

    def __init__(
        self,
        bits: Mapping[str, int] | None = None,
        *,
        lossless: bool = True,
        contract_xyz: bool = True,
    ) -> None:
        for name, count in (bits or {}).items():
            if name not in BITS:
                raise ValueError(f"bits: got {name!r}, expected one of {', '.join(BITS)}")
            if not 1 <= count <= 16:
                raise ValueError(f"bits: got {count} for {name!r}, expected 1 to 16")
        self.bits = {**BITS, **(bits or {})}
        if not lossless and self.bits["sh_dc"] > 8:
            raise ValueError(f"bits: got {self.bits['sh_dc']} for 'sh_dc', expected 8 for JPEG")
        self.lossless, self.contract_xyz = lossless, contract_xyz

    @torch.no_grad()
    def encode(self, scene: GaussianScene, path: str | Path) -> dict[str, int]:
        """Write a bundle, whole or not at all.

        Args:
            scene: The scene.
            path: A zip file, if it ends in `.zip`; else a folder. A bundle that is there is
                replaced.

        Returns:
            Bytes of the file of each attribute, of the `manifest`, and in `total`.

        Raises:
            ValueError: The scene has no Gaussians, or values that are not finite.
            TorchzooError: The files can't be written.
        """
        count = scene.num_gaussians
        if not count:
            raise ValueError("scene: got no Gaussians, expected at least one")
        width = math.isqrt(count)
        height = -(-count // width)
        entries: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for name, parameter in ATTRIBUTES.items():
            values = getattr(scene, parameter).detach().cpu().double().reshape(count, -1)
            if not values.shape[1]:
                continue
            if not values.isfinite().all():
                raise ValueError(f"scene: got values of {parameter} that are not finite")
            entries[name], data, suffix = self._coded(name, values, height, width)
            digest = hashlib.sha256(data).hexdigest()
            file = f"{name}-{digest[:12]}.{suffix}"
            entries[name] |= {"file": file, "bytes": len(data), "sha256": digest}
            files[file] = data
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "count": count,
            "grid": [height, width],
            "sh_degree": scene.sh_degree,
            "attributes": entries,
        }
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
        _write(Path(path), files, text)
        report = {name: entry["bytes"] for name, entry in entries.items()}
        report["manifest"] = len(text.encode())
        zipped = Path(path).suffix.lower() == ".zip"
        report["total"] = Path(path).stat().st_size if zipped else sum(report.values())
        return report

    def _coded(
        self, name: str, values: Tensor, height: int, width: int
    ) -> tuple[dict[str, Any], bytes, str]:
        """What the manifest says of an attribute, its image, and the image's suffix."""
        bits, contracted = self.bits[name], name == "xyz" and self.contract_xyz
        values = values.float().double()  # ranges are stored as float32
        low, high = values.min().item(), values.max().item()
        levels = _quantised(values, low, high, bits, contracted)
        rest = height * width - len(levels)
        levels = torch.cat([levels, levels[-1:].expand(rest, -1)])
        grid = levels.T.reshape(-1, height, width).numpy()
        entry: dict[str, Any] = {"bits": bits, "range": [low, high], "contracted": contracted}
        if name == "sh_dc" and not self.lossless:
            return entry, _saved(_planes(grid, bits), "JPEG"), "jpg"
        planes = _planes(grid, bits)
        coded = {"png": _saved(planes, "PNG")}
        if max(planes.shape) < 1 << 14 and _has_webp():
            coded["webp"] = _saved(planes, "WEBP")
        suffix = min(coded, key=lambda key: len(coded[key]))
        return entry, coded[suffix], suffix

    @staticmethod
    def decode(path: str | Path) -> GaussianScene:
        """Read a bundle.

        Args:
            path: What `encode` wrote.

        Returns:
            The scene, in float32 on the CPU, on the grid row by row.

        Raises:
            ValueError: It is no bundle, or damaged; the message says where.
            OSError: A file can't be read.
        """
        path = Path(path)
        try:
            return _decoded(_read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except _DAMAGE as error:
            raise ValueError(f"{path}: no bundle, or a damaged one: {error}") from None


def _contract(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def _expand(c: Tensor) -> Tensor:
    return c.sign() * c.abs().expm1()


def _quantised(values: Tensor, low: float, high: float, bits: int, contracted: bool) -> Tensor:
    """Levels from 0 to 2^bits - 1 of float64 values in [low, high]; 0 where these are equal."""
    ends = torch.tensor([low, high], dtype=values.dtype)
    if contracted:
        values, ends = _contract(values), _contract(ends)
    span = ends[1] - ends[0]
    share = (values - ends[0]) / torch.where(span > 0, span, 1.0)
    return (share * ((1 << bits) - 1)).round().long()


def _restored(levels: Tensor, low: float, high: float, bits: int, contracted: bool) -> Tensor:
    """What levels stand for, in float32; the least and the largest are exact."""
    top = (1 << bits) - 1
    ends = torch.tensor([low, high], dtype=torch.float64)
    if contracted:
        ends = _contract(ends)
    values = (ends[0] * (top - levels) + ends[1] * levels) / top
    return (_expand(values) if contracted else values).float()


def _planes(grid: Planes, bits: int) -> Planes:
    """Levels `(C, H, W)` as one 8-bit image of their bytes, high ones first."""
    parts = [grid] if bits <= 8 else [grid >> 8, grid & 255]
    stacked = np.concatenate(parts).astype(np.uint8)
    return stacked.reshape(-1, grid.shape[2])


def _saved(planes: Planes, kind: str) -> bytes:
    from PIL import Image

    options: dict[str, dict[str, Any]] = {
        "PNG": {"optimize": True},
        "WEBP": {"lossless": True, "quality": 100, "method": 6, "exact": True},
        "JPEG": {"quality": _JPEG_QUALITY},
    }
    buffer = io.BytesIO()
    image = Image.fromarray(planes)
    (image.convert("RGB") if kind == "WEBP" else image).save(buffer, kind, **options[kind])
    return buffer.getvalue()


def _has_webp() -> bool:
    """Whether this Pillow was built with WebP."""
    from PIL import features

    return bool(features.check("webp"))


def _opened(data: bytes, file: str, width: int, height: int) -> Planes:
    """The pixels of an image whose size is known; as PNG more than Pillow opens unasked."""
    from PIL.Image import DecompressionBombError
    from PIL.ImageFile import ImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    kinds: dict[str, Callable[[io.BytesIO], ImageFile]]
    kinds = {".png": PngImageFile, ".webp": WebPImageFile, ".jpg": JpegImageFile}
    kind = kinds.get(Path(file).suffix)
    if kind is None:
        raise ValueError(f"{file}: expected a name in {', '.join(kinds)}")
    try:
        with kind(io.BytesIO(data)) as image:
            if image.size != (width, height):
                raise ValueError(f"{file}: {image.size} pixels, expected {(width, height)}")
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, DecompressionBombError) as error:
        raise ValueError(f"{file}: damaged image: {error}") from None


def _write(path: Path, files: Mapping[str, bytes], manifest: str) -> None:
    """Write the images and then the manifest; what an older bundle left goes last."""
    if path.suffix.lower() == ".zip":
        with atomic_path(path) as part, zipfile.ZipFile(part, "w") as archive:
            for name, data in {MANIFEST: manifest.encode(), **files}.items():
                archive.writestr(zipfile.ZipInfo(name), data)  # no date: equal scenes, equal bytes
        return
    try:
        old = {entry["file"] for entry in _manifest(path)["attributes"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        old = set()
    for name, data in files.items():  # named after what is in them: none is another's
        with atomic_path(path / name) as part:
            part.write_bytes(data)
    write_text(path / MANIFEST, manifest)
    for name in old - files.keys():
        (path / Path(name).name).unlink(missing_ok=True)


def _manifest(folder: Path) -> Any:
    with (folder / MANIFEST).open("rb") as file:
        return json.loads(file.read(_MANIFEST_BYTES))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the images that it names, of the lengths and digests that it says."""
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise ValueError(f"no bundle: it has no {MANIFEST}")
        manifest, found = _manifest(path), {}
        for file, entry in _files(manifest).items():
            whole = (path / file).stat().st_size == entry["bytes"]
            found[file] = _checked(file, (path / file).read_bytes() if whole else b"", entry)
        return manifest, found
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info for info in archive.infolist()}
        if MANIFEST not in sizes or sizes[MANIFEST].file_size > _MANIFEST_BYTES:
            raise ValueError(f"no bundle: it has no {MANIFEST}")
        if any(info.compress_type != zipfile.ZIP_STORED for info in sizes.values()):
            raise ValueError("got compressed files, expected stored ones")
        manifest = json.loads(archive.read(MANIFEST))
        wanted = _files(manifest)
        if sizes.keys() != {MANIFEST, *wanted}:
            raise ValueError(f"got files {sorted(sizes)}, expected {sorted([MANIFEST, *wanted])}")
        return manifest, {
            file: _checked(
                file, archive.read(file) if sizes[file].file_size == entry["bytes"] else b"", entry
            )
            for file, entry in wanted.items()
        }


def _files(manifest: Any) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file name, once it is clear that it is one and what it may name."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST}: expected format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{MANIFEST}: expected version {VERSION}, got {manifest.get('version')}")
    degree = manifest["sh_degree"]
    if degree not in range(MAX_SH_DEGREE + 1):
        raise ValueError(f"{MANIFEST}: sh_degree: got {degree}, expected 0 to {MAX_SH_DEGREE}")
    expected = {name for name in ATTRIBUTES if degree or name != "sh_rest"}
    if manifest["attributes"].keys() != expected:
        got = sorted(manifest["attributes"])
        raise ValueError(f"{MANIFEST}: got attributes {got}, expected {sorted(expected)}")
    entries = {entry["file"]: entry for entry in manifest["attributes"].values()}
    for file in entries:
        if Path(file).name != file or len(entries) != len(expected):
            raise ValueError(f"{MANIFEST}: {file!r}: expected a name of its own without a folder")
    return entries


def _checked(file: str, data: bytes, entry: Mapping[str, Any]) -> bytes:
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{file}: not the {entry['bytes']} bytes that {MANIFEST} says")
    return data


def _decoded(bundle: tuple[dict[str, Any], dict[str, bytes]]) -> GaussianScene:
    manifest, files = bundle
    count, degree = manifest["count"], manifest["sh_degree"]
    height, width = manifest["grid"]
    channels = {**_CHANNELS, "sh_rest": 3 * ((degree + 1) ** 2 - 1)}
    if not (0 < width <= count <= height * width) or height * width * 90 > _PIXELS:
        raise ValueError(f"{MANIFEST}: a grid of {height} x {width} for {count} Gaussians")
    values = {}
    for name, entry in manifest["attributes"].items():
        bits, (low, high) = entry["bits"], entry["range"]
        if bits not in range(1, 17) or not -math.inf < low <= high < math.inf:
            raise ValueError(f"{MANIFEST}: {name}: {bits} bits in {low} to {high}")
        rows = channels[name] * height * (1 + (bits > 8))
        planes = _opened(files[entry["file"]], entry["file"], width, rows).astype(np.int64)
        parts = planes.reshape(-1, channels[name], height * width)
        levels = torch.from_numpy(parts[0] if len(parts) == 1 else parts[0] << 8 | parts[1])
        levels = levels.T[:count].clamp(max=(1 << bits) - 1)
        values[name] = _restored(levels, low, high, bits, entry["contracted"])
    sh = torch.cat([values[name] for name in ("sh_dc", "sh_rest") if name in values], 1)
    return GaussianScene.from_tensors(
        values["xyz"],
        values["rotation"],
        values["scaling"],
        values["opacity"].squeeze(-1),
        sh.reshape(count, -1, 3),
    )
