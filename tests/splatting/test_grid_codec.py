"""Bundles of images: the error of what they hold, their size, and damage."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from torchzoo.splatting import GridCodec, SelfOrganizingScene
from torchzoo.splatting.sog import ATTRIBUTES

BITS = {"xyz": 14, "sh_rest": 5, "scaling": 6, "rotation": 6, "opacity": 6, "sh_dc": 8}


def drawn(count=90, sh_degree=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = (sh_degree + 1) ** 2
    return SelfOrganizingScene.from_tensors(
        torch.randn(count, 3, generator=g) * 3,
        torch.randn(count, 4, generator=g),
        torch.randn(count, 3, generator=g) - 3,
        4 * torch.randn(count, generator=g),
        torch.randn(count, k, 3, generator=g),
    )


def rows(scene, name):
    return scene.get_parameter(ATTRIBUTES[name]).detach().double().reshape(len(scene.means), -1)


def contract(x):
    return x.sign() * x.abs().log1p()


@pytest.mark.claim(
    27, "what a bundle holds is off by half a quantisation step at most", tolerance=0.5
)
@pytest.mark.parametrize("bits", [None, dict.fromkeys(BITS, 16), dict.fromkeys(BITS, 1)])
@pytest.mark.parametrize("contracted", [True, False])
@pytest.mark.parametrize("count", [81, 85])
def test_half_a_step(bits, contracted, count, tmp_path):
    scene = drawn(count)
    GridCodec(bits, contract_xyz=contracted).encode(scene, tmp_path / "grid")
    found = GridCodec.decode(tmp_path / "grid")
    assert found.num_gaussians == count
    for name in ATTRIBUTES:
        old, new = rows(scene, name), rows(found, name)
        if name == "xyz" and contracted:
            old, new = contract(old), contract(new)
        step = (old.max() - old.min()) / (2 ** (bits or BITS)[name] - 1)
        assert (old - new).abs().max() <= 0.5 * step * (1 + 1e-6) + 4e-7
        assert (old - new).abs().max() > 0.3 * step  # no finer than that
        assert new.max() == old.max()
        assert new.min() == old.min()


@pytest.mark.claim(
    27, "a bundle of a decoded scene decodes to the same bits, and has the same bytes"
)
@pytest.mark.parametrize("path", ["grid", "grid.zip"])
@pytest.mark.parametrize("double", [False, True])
def test_idempotent(path, double, tmp_path):
    scene = drawn()
    if double:
        scene = scene.double()
        for parameter in scene.parameters():
            parameter.data *= 1 + 1e-9
    GridCodec().encode(scene, tmp_path / path)
    once = GridCodec.decode(tmp_path / path)
    (tmp_path / "again").mkdir()
    GridCodec().encode(once, tmp_path / "again" / path)
    twice = GridCodec.decode(tmp_path / "again" / path)
    for name, value in once.named_parameters():
        assert torch.equal(value, twice.get_parameter(name))
    if path.endswith("zip"):
        assert (tmp_path / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
        with zipfile.ZipFile(tmp_path / path) as archive:
            assert {info.date_time[0] for info in archive.infolist()} == {1980}


@pytest.mark.claim(
    27, "a sorted scene takes at most 0.75 times the bytes of the shuffled one", tolerance=0.75
)
def test_sorted_scenes_are_smaller(tmp_path):
    """Attributes that hang together, as those of surfaces do."""
    g = torch.Generator().manual_seed(0)
    place = torch.rand(1024, 2, generator=g)
    waves = torch.randn(2, 40, generator=g) * 3
    smooth = (place @ waves + torch.rand(40, generator=g)).sin()
    scene = SelfOrganizingScene.from_tensors(
        torch.cat([place * 2 - 1, smooth[:, :1]], 1),
        smooth[:, 1:5] + torch.tensor([2.0, 0, 0, 0]),
        smooth[:, 5:8] - 3,
        smooth[:, 8],
        smooth[:, 9:36].view(1024, 9, 3) / 3,
    )
    shuffled = GridCodec().encode(scene, tmp_path / "shuffled")
    scene.sort_(generator=g, improvement_break=1e-3)
    found = GridCodec().encode(scene, tmp_path / "sorted")
    assert found["total"] <= 0.75 * shuffled["total"]
    assert found["xyz"] < shuffled["xyz"]


def test_report_is_what_is_on_disk(tmp_path):
    scene = drawn()
    report = GridCodec().encode(scene, tmp_path / "grid")
    files = {f.name: f.stat().st_size for f in (tmp_path / "grid").iterdir()}
    assert sum(files.values()) == report["total"]
    assert files["manifest.json"] == report["manifest"]
    manifest = json.loads((tmp_path / "grid" / "manifest.json").read_text())
    for name, entry in manifest["attributes"].items():
        assert files[entry["file"]] == entry["bytes"] == report[name]
        assert entry["bits"] == BITS[name]
    zipped = GridCodec().encode(scene, tmp_path / "grid.zip")
    assert zipped["total"] == (tmp_path / "grid.zip").stat().st_size
    assert manifest["grid"] == [10, 9]


def test_layout_of_images(tmp_path):
    """Channels below each other, high bytes before low ones, Gaussians row by row."""
    scene = drawn(81)
    GridCodec().encode(scene, tmp_path / "grid")
    manifest = json.loads((tmp_path / "grid" / "manifest.json").read_text())
    entry = manifest["attributes"]["scaling"]
    image = np.asarray(Image.open(tmp_path / "grid" / entry["file"]).convert("L"))
    values = rows(scene, "scaling")
    low, high = values.min(), values.max()
    expected = ((values - low) / (high - low) * 63).round().T.reshape(27, 9)
    assert np.array_equal(image, expected.numpy())
    entry = manifest["attributes"]["xyz"]
    image = np.asarray(Image.open(tmp_path / "grid" / entry["file"]).convert("L")).astype(int)
    values = contract(rows(scene, "xyz"))
    low, high = values.min(), values.max()
    expected = ((values - low) / (high - low) * 16383).round().T.reshape(27, 9).numpy()
    assert np.array_equal(256 * image[:27] + image[27:], expected)
    low, high = entry["range"]
    assert (low, high) == (rows(scene, "xyz").min(), rows(scene, "xyz").max())


def test_lossy_base_colours(tmp_path):
    scene = drawn(400, sh_degree=0)
    scene.sh0.data[:] = scene.means.data[:, None].sort(0).values
    reports = [GridCodec(lossless=x).encode(scene, tmp_path / str(x)) for x in (True, False)]
    assert "sh_rest" not in reports[0]
    found = GridCodec.decode(tmp_path / "False")
    span = scene.sh0.max() - scene.sh0.min()
    error = (found.sh0 - scene.sh0).abs()
    assert 0.5 / 255 * span < error.max() < 0.2 * span
    assert error.mean() < 0.03 * span
    exact = GridCodec.decode(tmp_path / "True")
    assert torch.equal(exact.means, found.means)
    assert found.shN.shape == (400, 0, 3)


def test_degenerate_scenes(tmp_path):
    for count in (1, 2, 3):
        scene = drawn(count, sh_degree=0)
        scene.opacity_logits.data.fill_(0.3)
        GridCodec().encode(scene, tmp_path / "grid")
        found = GridCodec.decode(tmp_path / "grid")
        assert found.num_gaussians == count
        assert torch.equal(found.opacity_logits, scene.opacity_logits)
    with pytest.raises(ValueError, match="scene: got no Gaussians"):
        GridCodec().encode(SelfOrganizingScene(0), tmp_path / "none")
    scene.means.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="values of means that are not finite"):
        GridCodec().encode(scene, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_bundle_is_replaced(tmp_path):
    GridCodec().encode(drawn(seed=0), tmp_path / "grid")
    GridCodec().encode(drawn(seed=1), tmp_path / "grid")
    assert len(list((tmp_path / "grid").iterdir())) == 7
    scene = GridCodec.decode(tmp_path / "grid")
    assert (scene.means - drawn(seed=1).means).abs().max() < 0.01


def test_a_failure_leaves_the_old_bundle(tmp_path, monkeypatch):
    from torchzoo.splatting import grid_codec

    for name in ("grid", "grid.zip"):
        GridCodec().encode(drawn(seed=0), tmp_path / name)

        def broken(*args, **kwargs):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(grid_codec, "write_text", broken)
            patch.setattr(zipfile.ZipFile, "writestr", broken)
            with pytest.raises(Exception, match="No space left"):
                GridCodec().encode(drawn(seed=1), tmp_path / name)
        scene = GridCodec.decode(tmp_path / name)
        assert (scene.means - drawn(seed=0).means).abs().max() < 0.01


def test_damage(tmp_path):
    folder = tmp_path / "grid"
    GridCodec().encode(drawn(), folder)
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    image = folder / manifest["attributes"]["scaling"]["file"]
    data = image.read_bytes()

    def fails(message):
        with pytest.raises(ValueError, match=message) as caught:
            GridCodec.decode(folder)
        assert str(folder) in str(caught.value)

    for bad in (data[:-1], data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        image.write_bytes(bad)
        fails(f"{image.name}: not the {len(data)} bytes")
    image.write_bytes(data)

    def changed(message, change):
        broken = json.loads(text)
        change(broken)
        (folder / "manifest.json").write_text(json.dumps(broken))
        fails(message)

    one = manifest["attributes"]["scaling"]
    changed("expected format", lambda m: m.update(format="x"))
    changed("expected version 1, got 2", lambda m: m.update(version=2))
    changed("sh_degree: got 7", lambda m: m.update(sh_degree=7))
    changed("got attributes", lambda m: m.update(sh_degree=0))
    changed("a grid of 10 x 9 for 91", lambda m: m.update(count=91))
    changed("a grid of", lambda m: m.update(grid=[10**6, 10**6]))
    changed("pixels, expected", lambda m: m.update(grid=[9, 10]))
    changed("scaling: 17 bits", lambda m: m["attributes"]["scaling"].update(bits=17))
    changed("scaling: 6 bits", lambda m: m["attributes"]["scaling"].update(range=[1.0, 0.0]))
    changed("no bundle, or a damaged one", lambda m: m.update(attributes=[]))
    changed("no bundle, or a damaged one", lambda m: m.update(grid=None))
    for name in ("../x.png", "/etc/passwd"):
        changed("without a folder", lambda m, n=name: m["attributes"]["xyz"].update(file=n))
    changed("without a folder", lambda m: m["attributes"]["xyz"].update(file=one["file"]))
    (folder / "manifest.json").write_text("[" * 50_000)
    fails("recursion")
    (folder / "manifest.json").unlink()
    fails("no bundle")


def test_damaged_zip(tmp_path):
    path = tmp_path / "grid.zip"
    GridCodec().encode(drawn(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"grid\.zip"):
        GridCodec.decode(path)
    for extra in ({"run.pkl": b"x"}, {"manifest.json": b" " * 100_000}):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (members | extra).items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match=r"got files|no bundle"):
            GridCodec.decode(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="got compressed files"):
        GridCodec.decode(path)


def test_limits_of_the_image_library(tmp_path, monkeypatch):
    """Neither its limit of pixels nor a build without WebP stands in the way."""
    GridCodec().encode(drawn(), tmp_path / "grid")
    expected = GridCodec.decode(tmp_path / "grid")
    assert ".webp" in {f.suffix for f in (tmp_path / "grid").iterdir()}
    monkeypatch.setattr(features, "check", lambda name: False)
    GridCodec().encode(drawn(), tmp_path / "png")
    assert {f.suffix for f in (tmp_path / "png").iterdir()} == {".png", ".json"}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert torch.equal(GridCodec.decode(tmp_path / "png").shN, expected.shN)
    with pytest.raises(ValueError, match="damaged image"):
        GridCodec.decode(tmp_path / "grid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": {"xyz": 17}}, "bits: got 17 for 'xyz', expected 1 to 16"),
        ({"bits": {"xyz": 0}}, "bits: got 0 for 'xyz'"),
        ({"bits": {"colour": 8}}, "bits: got 'colour', expected one of"),
        ({"bits": {"sh_dc": 10}, "lossless": False}, "bits: got 10 for 'sh_dc', expected 8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GridCodec(**options)
