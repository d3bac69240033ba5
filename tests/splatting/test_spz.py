"""SPZ: bytes written by hand, round trips, the turn of the axes, and damaged files."""

import contextlib
import gzip
import math
import struct
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.splatting import Cameras, GaussianScene, quat_to_matrix, spz
from torchzoo.splatting.spz import read_spz, write_spz

SIGNS = [-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1]


def scene_of(count, degree=3):
    torch.manual_seed(0)
    scene = GaussianScene(count, sh_degree=degree)
    for parameter in scene.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return scene


def angle(one, two):
    """Angles in degrees between rotations."""
    trace = torch.einsum("nij,nij->n", *(quat_to_matrix(q.double()) for q in (one, two)))
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())


def header(version, count=2, degree=3, bits=12):
    return struct.pack("<IIIBBBB", 0x5053474E, version, count, degree, bits, 1, 0)


def fixed(*values):
    """24-bit little-endian integers."""
    return b"".join((value & 0xFFFFFF).to_bytes(3, "little") for value in values)


def blocks(version):
    """Two Gaussians; positions are 1, -2, 0.5 and -1000, 0, 1/4096, right, up, back."""
    if version == 1:
        positions = struct.pack("<6e", 1, -2, 0.5, -1000, 0, 1 / 4096)
    else:
        positions = fixed(4096, -8192, 2048, -4096000, 0, 1)
    # by hand: a quarter turn about y, then one of 2 asin(0.6) about z (w 0.8, z 0.6)
    if version < 3:
        rotations = bytes([128, 218, 128, 128, 128, 204])
    else:
        # the largest is w of 0.7071 (index 3), y is 511 of 511; then w again, z is 434
        rotations = struct.pack("<II", 3 << 30 | 511 << 10, 3 << 30 | 434)
    return [
        positions,
        bytes([51, 255]),
        bytes([0, 128, 255, 140, 127, 90]),
        bytes([160, 176, 144, 0, 255, 168]),
        rotations,
        bytes(128 + k - 22 for k in range(45)) + bytes(128 - 2 * k + 40 for k in range(45)),
    ]


def check_two(scene, version):
    expected = torch.tensor([[1, 2, -0.5], [-1000, 0, -1 / 4096]])
    torch.testing.assert_close(scene.means, expected, rtol=0, atol=0)
    assert scene.opacities[0].item() == pytest.approx(0.2, abs=1e-6)
    assert 1 - 1 / 510 < scene.opacities[1] < 1
    colours = torch.tensor([[0, 128, 255], [140, 127, 90]]) / 255
    torch.testing.assert_close(scene.sh0[:, 0], (colours - 0.5) / 0.15)
    assert scene.log_scales.tolist() == [[0, 1, -1], [-10, 5.9375, 0.5]]
    half = math.sqrt(0.5)
    quats = torch.tensor([[half, 0, -half, 0], [0.8, 0, 0, -0.6]])  # about our y, our z
    assert (angle(scene.quats, quats) < (1.0 if version < 3 else 0.25)).all()
    coefficients = torch.tensor(
        [[k - 22 for k in range(45)], [40 - 2 * k for k in range(45)]], dtype=torch.float32
    )
    sh = coefficients.reshape(2, 15, 3) / 128 * torch.tensor(SIGNS)[:, None]
    assert torch.equal(scene.shN, sh)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_two_gaussians_by_hand(version):
    check_two(read_spz(gzip.compress(header(version) + b"".join(blocks(version)))), version)


def version_4(degree=3, table=32):
    """The same in version 4; a stream is stored as itself with a letter before it."""
    streams = [b"z" + block for block in blocks(3)[: 6 if degree else 5]]
    sizes = b"".join(struct.pack("<QQ", len(s), len(s) - 1) for s in streams)
    head = struct.pack("<IIIBBBBI12x", 0x5053474E, 4, 2, degree, 12, 0, len(streams), table)
    return head + bytes(max(table - 32, 0)) + sizes + b"".join(streams)


@pytest.fixture
def zstd(monkeypatch):
    """A module in place of zstd's whose streams are the content after one letter."""

    class ZstdError(Exception):
        pass

    class ZstdDecompressor:
        def decompress(self, data, max_length=-1):
            if data[:1] != b"z":
                raise ZstdError("unknown frame")
            return data[1:][: max_length if max_length >= 0 else None]

    module = types.SimpleNamespace(ZstdDecompressor=ZstdDecompressor, ZstdError=ZstdError)
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    return module


@pytest.mark.parametrize("table", [32, 50])
def test_version_4(zstd, table):
    check_two(read_spz(version_4(table=table)), 4)
    assert read_spz(version_4(degree=0)).sh_degree == 0


def test_version_4_without_zstd(monkeypatch):
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="needs zstd"):
        read_spz(version_4())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (version_4()[:20], "header is not whole"),
        (version_4()[:100], "table of contents"),
        (version_4()[:-1], "ends after the file"),
        (version_4().replace(b"z\0\x10\0", b"y\0\x10\0"), "unknown frame"),
        (version_4(table=16), "table of contents"),
        (version_4()[:15] + b"\x07" + version_4()[16:], "7 streams"),
        (b"NGSP\3" + version_4()[5:], "version 3 without gzip"),
        (version_4()[:32] + struct.pack("<QQ", 19, 99) + version_4()[48:], "99 bytes where 18"),
        (version_4()[:32] + struct.pack("<QQ", 9, 18) + version_4()[48:], "damaged SPZ"),
    ],
)
def test_bad_version_4_says_what_is_wrong(zstd, data, words):
    with pytest.raises(ValueError, match=words):
        read_spz(data)


def test_round_trip():
    """Everything is kept to half a step of its grid."""
    scene = scene_of(8000)
    scene.quats.data = torch.randn(8000, 4)
    scene.shN.data.uniform_(-0.9, 0.9)
    scene.log_scales.data.uniform_(-10, 5.9)
    scene.sh0.data.uniform_(-3.3, 3.3)
    again = read_spz(write_spz(scene))
    assert (again.means - scene.means).abs().max() <= 2**-13
    worst = angle(again.quats, scene.quats).max()
    assert 0.15 < worst <= 0.25
    assert (again.log_scales - scene.log_scales).abs().max() <= 1 / 32
    assert (again.opacities - scene.opacities).abs().max() <= 1 / 510 + 1e-6
    assert (again.sh0 - scene.sh0).abs().max() <= 0.5 / 255 / 0.15 + 1e-6
    errors = (again.shN - scene.shN).abs().amax((0, 2)) * 128
    assert ((errors[:3] > 4) & (errors[:3] <= 4.5)).all()
    assert ((errors[3:] > 8) & (errors[3:] <= 8.5)).all()
    assert again.sh_degree == 3
    third = read_spz(write_spz(again))
    for name in ("means", "log_scales", "opacity_logits", "sh0", "shN"):
        assert torch.equal(getattr(third, name), getattr(again, name))


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_lower_degrees_and_empty_scenes(degree):
    again = read_spz(write_spz(scene_of(3, degree)))
    assert again.shN.shape == (3, (degree + 1) ** 2 - 1, 3)
    assert read_spz(write_spz(scene_of(0, degree))).num_gaussians == 0


@pytest.mark.parametrize(("reach", "bits"), [(2047.9, 12), (2049, 11), (8e6, 0)])
def test_large_scenes_have_fewer_bits_after_the_point(reach, bits):
    scene = scene_of(2)
    scene.means.data[0] = torch.tensor([reach, -reach, 0.3])
    data = write_spz(scene)
    assert gzip.decompress(data)[13] == bits
    assert (read_spz(data).means - scene.means).abs().max() <= 2.0 ** -(bits + 1) + 1e-4
    scene.means.data[0] = 1e7
    with pytest.raises(ValueError, match=r"means: got coordinates up to 1e\+07"):
        write_spz(scene)


def test_values_outside_the_grid_are_cut():
    scene = scene_of(1, 1)
    scene.log_scales.data = torch.tensor([[-20.0, 20.0, 0.0]])
    scene.shN.data[0, 0] = torch.tensor([-3.0, 3.0, 0.0])
    again = read_spz(write_spz(scene))
    assert again.log_scales.tolist() == [[-10, 5.9375, 0]]
    torch.testing.assert_close(again.shN[0, 0], torch.tensor([-1, 127 / 128, 0]), atol=0.01, rtol=0)


def test_turned_axes_show_the_same_picture():
    """What a file says in its own axes, seen by the camera in those axes, is what we see."""
    scene = scene_of(30)
    scene.shN.data *= 2
    flip = torch.tensor([1.0, -1, -1])
    other = GaussianScene.from_tensors(
        scene.means * flip,
        scene.quats * torch.tensor([1.0, 1, -1, -1]),
        scene.log_scales,
        scene.opacity_logits,
        torch.cat([scene.sh0, scene.shN * spz._SIGNS[:, None]], 1),
    )
    cameras = Cameras.orbit(3, radius=3.0, width=24, height=20)
    turned = cameras.viewmats * torch.cat([flip, torch.ones(1)])
    there = Cameras(turned, cameras.Ks, 24, 20)
    ours, theirs = scene.render(cameras).image, other.render(there).image
    assert ours.std() > 0.05
    assert (ours - scene.render(cameras, sh_degree=2).image).abs().max() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert spz._SIGNS.tolist() == SIGNS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no SPZ file"),
        (b"PK\3\4", "no SPZ file"),
        (b"\x1f\x8b\1\1\1\1\1\1\1\1\1\1", "damaged SPZ"),
        (gzip.compress(b"NGSP"), "header is not whole"),
        (gzip.compress(b"NGSQ" + header(2)[4:]), "no SPZ file of version 1 to 3"),
        (gzip.compress(header(5)), "no SPZ file of version 1 to 3"),
        (gzip.compress(header(2, degree=4)), "degree 4"),
        (gzip.compress(header(2, count=2**32 - 1)), "can't hold 4294967295"),
        (gzip.compress(header(2) + b"".join(blocks(2))[:-1]), "truncated SPZ: 127 of 128"),
        (gzip.compress(header(3) + b"".join(blocks(3)))[:60], "truncated SPZ"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{len(value)} bytes"
    ),  # gzip notes the time
)
def test_bad_spz_says_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words):
        read_spz(data)


def test_a_bomb_is_read_only_as_far_as_its_header_says():
    bomb = gzip.compress(header(2, count=1, degree=0) + bytes(30_000_000))
    assert read_spz(bomb).num_gaussians == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_spz_crashes_the_reader(data):
    version = data.draw(st.integers(1, 4))
    whole = version_4() if version == 4 else header(version) + b"".join(blocks(version))
    place = st.integers(0, len(whole) - 1)
    changed = bytearray(whole)
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)):
        changed[at] = value
    changed = changed[: data.draw(st.just(len(whole)) | place)]
    if version < 4:
        changed = bytearray(gzip.compress(changed, 1))
        if data.draw(st.booleans()):
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert read_spz(bytes(changed)).means.shape[1] == 3
