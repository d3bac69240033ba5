"""`torchzoo compress` and `decompress`: pixels and bytes come back, damage does not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from torchzoo.circuits import CategoricalLeaf, Circuit, CircuitCodec, archive, hclt
from torchzoo.circuits.residuals import from_patches, from_residuals, to_patches, to_residuals


def small_codec(model):
    """An untrained circuit of the shipped ones' sizes, which likes small residuals and text."""
    torch.manual_seed(0)
    size = 64 if model == archive.IMAGE_MODEL else 32
    circuit = Circuit(hclt(list(range(-1, size - 1))), CategoricalLeaf(256), num_units=2)
    likes = torch.arange(256.0)
    away = torch.minimum(likes, 256 - likes) if size == 64 else (likes - 100).abs() / 4
    with torch.no_grad():
        circuit.leaf.logits.copy_((-away / 3)[:, None].expand(size, -1, 2))
    return CircuitCodec(circuit, precision=20, block_size=8)


@pytest.fixture(scope="module")
def codecs():
    return {name: small_codec(name) for name in archive.BLOCK_SIZE}


@pytest.fixture(autouse=True)
def shipped(monkeypatch, codecs):
    monkeypatch.setattr(archive, "codec", codecs.__getitem__)


def picture(height, width, channels, seed=0):
    """A smooth picture with a little noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 120 + 40 * np.sin(y / 9)[..., None] + 30 * np.cos(x / 7)[..., None]
    noise = generator.integers(-1, 2, (height, width, channels))
    return (base + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff"])
@pytest.mark.parametrize(("height", "width", "channels"), [(21, 13, 3), (8, 16, 1), (1, 1, 3)])
def test_pixels_come_back(run, tmp_path, suffix, height, width, channels):
    pixels = picture(height, width, channels)
    pixels = pixels[..., 0] if channels == 1 else pixels
    source, packed, back = (tmp_path / f"{n}" for n in (f"a.{suffix}", "a.tzc", f"b.{suffix}"))
    Image.fromarray(pixels).save(source)
    code, out, _ = run("compress", source, "-o", packed, "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["kind"], row["raw_bytes"]) == ("image", pixels.size)
    assert row["compressed_bytes"] == packed.stat().st_size
    code, out, _ = run("decompress", packed, "-o", back)
    assert code == 0
    assert out.startswith(f"{back} (image, ")
    np.testing.assert_array_equal(np.asarray(Image.open(back)), pixels)


def test_a_smooth_picture_gets_small(run, tmp_path):
    pixels = picture(64, 64, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    _, out, _ = run("compress", tmp_path / "a.png", "-o", tmp_path / "a.tzc", "--json")
    assert json.loads(out)[0]["bits_per_byte"] < 5


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000])
@pytest.mark.parametrize("kind", ["text", "random"])
def test_bytes_come_back(run, tmp_path, size, kind):
    generator = np.random.default_rng(size)
    data = bytes(generator.integers(0, 256, size, dtype=np.uint8))
    data = b"abcdefgh" * (size // 8) + b"i" * (size % 8) if kind == "text" else data
    (tmp_path / "a.bin").write_bytes(data)
    code, out, err = run("compress", tmp_path / "a.bin", "-o", tmp_path / "a.tzc", "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert row["kind"] == "bytes"
    # what gets no smaller is stored: never more than the description on top
    assert row["compressed_bytes"] <= size + 200
    assert run("decompress", tmp_path / "a.tzc", "-o", tmp_path / "b.bin")[0] == 0
    assert (tmp_path / "b.bin").read_bytes() == data


def test_several_files_into_a_folder(run, tmp_path):
    Image.fromarray(picture(9, 9, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("some text, and more")
    folder, back = tmp_path / "packed", tmp_path / "back"
    code, out, _ = run("compress", tmp_path / "a.png", tmp_path / "b.txt", "-o", folder)
    assert code == 0
    assert "image" in out
    assert "bits a byte" in out
    assert sorted(p.name for p in folder.iterdir()) == ["a.png.tzc", "b.txt.tzc"]
    code, _, _ = run("decompress", folder / "a.png.tzc", folder / "b.txt.tzc", "-o", back)
    assert code == 0
    assert (back / "b.txt").read_text() == "some text, and more"
    np.testing.assert_array_equal(np.asarray(Image.open(back / "a.png")), picture(9, 9, 3))


def test_as_bytes_gives_the_same_file(run, tmp_path):
    Image.fromarray(picture(9, 9, 3)).save(tmp_path / "a.png")
    assert run("compress", tmp_path / "a.png", "-o", tmp_path / "a.tzc", "--as", "bytes")[0] == 0
    assert run("decompress", tmp_path / "a.tzc", "-o", tmp_path / "b.png")[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "LA", "1"])
def test_images_of_other_modes_are_bytes(run, tmp_path, mode):
    source = tmp_path / "a.png"
    Image.new(mode, (5, 4)).save(source)
    code, out, _ = run("compress", source, "-o", tmp_path / "a.tzc", "--json")
    assert (code, json.loads(out)[0]["kind"]) == (0, "bytes")
    run("decompress", tmp_path / "a.tzc", "-o", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == source.read_bytes()
    code, _, err = run("compress", source, "-o", tmp_path / "a.tzc", "--as", "image")
    assert (code, "expected an 8-bit grey or RGB image, got PNG of mode" in err) == (1, True)


def test_a_jpeg_keeps_its_bytes(run, tmp_path):
    source = tmp_path / "a.jpg"
    Image.fromarray(picture(16, 16, 3)).save(source)
    _, out, _ = run("compress", source, "-o", tmp_path / "a.tzc", "--json")
    assert json.loads(out)[0]["kind"] == "bytes"


def test_damage_writes_nothing(run, tmp_path):
    Image.fromarray(picture(12, 12, 3)).save(tmp_path / "a.png")
    run("compress", tmp_path / "a.png", "-o", tmp_path / "a.tzc")
    data = (tmp_path / "a.tzc").read_bytes()
    places = [*range(0, len(data), 23), len(data) - 1]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 4
        (tmp_path / "bad.tzc").write_bytes(damaged)
        code, out, err = run("decompress", tmp_path / "bad.tzc", "-o", tmp_path / "out.png")
        assert (code, out) == (1, ""), at
        assert "data: " in err
        assert "Traceback" not in err
    for length in (0, 3, 12, 40, len(data) - 1):
        (tmp_path / "bad.tzc").write_bytes(data[:length])
        assert run("decompress", tmp_path / "bad.tzc", "-o", tmp_path / "out.png")[0] == 1
    assert not (tmp_path / "out.png").exists()


def test_requests_that_can_t_be_served(run, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    missing = run("compress", tmp_path / "none", "-o", tmp_path / "a.tzc")
    assert (missing[0], "no file" in missing[2]) == (1, True)
    same = run("compress", tmp_path / "a.txt", "-o", tmp_path / "a.txt")
    assert (same[0], "would be overwritten" in same[2]) == (1, True)
    kind = run("compress", tmp_path / "a.txt", "-o", tmp_path / "b", "--as", "video")
    assert (kind[0], "expected one of auto, image, bytes" in kind[2]) == (2, True)
    plain = run("decompress", tmp_path / "a.txt", "-o", tmp_path / "b")
    assert (plain[0], "expected a file that starts with" in plain[2]) == (1, True)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("y")
    both = run("compress", tmp_path / "a.txt", tmp_path / "sub" / "a.txt", "-o", tmp_path / "f")
    assert (both[0], "the same name" in both[2]) == (1, True)
    Image.fromarray(picture(4, 4, 1)[..., 0]).save(tmp_path / "p.png")
    run("compress", tmp_path / "p.png", "-o", tmp_path / "p.tzc")
    lossy = run("decompress", tmp_path / "p.tzc", "-o", tmp_path / "p.jpg")
    assert (lossy[0], "expected a name that ends in .png" in lossy[2]) == (1, True)


def test_an_archive_that_lies_about_its_content():
    data = archive.pack_bytes(b"abcdefgh" * 100)
    other = archive.pack_bytes(b"abcdefgi" * 100)
    head = len(data) - len(data[data.index(b"TZPC") :])
    with pytest.raises(ValueError, match="not what was compressed"):
        archive.unpack(data[:head] + other[other.index(b"TZPC") :])


def test_residuals_are_of_the_median_predictor():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 5, 3), generator=generator, dtype=torch.uint8)
    red, green, blue = (pixels[..., i].int() for i in range(3))
    for plane, found in zip((green, red - green, blue - green), to_residuals(pixels), strict=True):
        plane = plane % 256
        for y in range(1, 6):
            for x in range(1, 5):
                left, above = int(plane[y, x - 1]), int(plane[y - 1, x])
                guess = sorted((left, above, left + above - int(plane[y - 1, x - 1])))[1]
                assert int(found[y, x]) == (int(plane[y, x]) - guess) % 256
        assert found[0, 0] == plane[0, 0]
        assert torch.equal(found[1:, 0].int(), (plane[1:, 0] - plane[:-1, 0]) % 256)
        assert torch.equal(found[0, 1:].int(), (plane[0, 1:] - plane[0, :-1]) % 256)
    assert torch.equal(from_residuals(to_residuals(pixels)), pixels)
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \(H, W, 1 or 3\)"):
        to_residuals(pixels[..., :2])


def test_patches_are_rows_of_squares():
    planes = torch.arange(2 * 11 * 9).view(2, 11, 9)
    patches = to_patches(planes)
    assert patches.shape == (8, 64)
    assert patches[0].tolist() == planes[0, :8, :8].flatten().tolist()
    assert patches[3, 0] == planes[0, 8, 8]
    assert patches[3].count_nonzero() == 3
    assert torch.equal(from_patches(patches, 2, 11, 9), planes)
