"""Scenes in files: PLY and .splat, what a round trip keeps, and what damaged files say."""

import contextlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchzoo.errors import TorchzooError
from torchzoo.splatting import GaussianScene, load, quat_to_matrix, save
from torchzoo.splatting.ply import read_ply, read_vertices, write_ply
from torchzoo.splatting.splat_file import read_splat, write_splat

NAMES = ("means", "quats", "log_scales", "opacity_logits", "sh0", "shN")


def scene_of(count=5, degree=3):
    torch.manual_seed(0)
    scene = GaussianScene(count, sh_degree=degree)
    for parameter in scene.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return scene


def angle(one, two):
    """Angles in degrees between rotations."""
    trace = torch.einsum("nij,nij->n", *(quat_to_matrix(q.double()) for q in (one, two)))
    return torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())


def mutations(data):
    """Strategy: the data with some bytes changed, cut out, or put in."""
    place = st.integers(0, max(len(data) - 1, 0))

    def change(edits, keep, insert):
        changed = bytearray(data)
        for at, value in edits:
            changed[at] = value
        if keep is not None:
            changed = changed[:keep]
        if insert is not None:
            changed[insert[0] : insert[0]] = insert[1]
        return bytes(changed)

    return st.builds(
        change,
        st.lists(st.tuples(place, st.integers(0, 255)), max_size=4),
        st.none() | place,
        st.none() | st.tuples(place, st.binary(max_size=8)),
    )


def only_value_errors(read, data):
    with contextlib.suppress(ValueError):
        assert read(data).means.shape[1] == 3


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 5])
def test_ply_round_trip_is_exact(tmp_path, count, degree):
    scene = scene_of(count, degree)
    again = load(save(scene, tmp_path / "scene.ply"))
    for name in NAMES:
        assert torch.equal(getattr(again, name), getattr(scene, name))


PLY = """ply
format {format} 1.0
comment two Gaussians, properties in an odd order, no normals
element camera 1
property double focal
element vertex 2
property float opacity
{rest}property uchar tag
property double x
property float z
property float32 y
property float rot_3
property float rot_0
property float rot_1
property float rot_2
property float f_dc_1
property float f_dc_0
property float f_dc_2
property float scale_2
property float scale_1
property float scale_0
element face 1
property list uchar int vertex_indices
end_header
"""


def odd_ply(kind):
    """A PLY file whose value number k of the second Gaussian is 100 + k, and what to expect."""
    rest = "".join(f"property float f_rest_{i}\n" for i in (*range(8, -1, -1),))
    header = PLY.format(format=kind, rest=rest).encode()
    rows = [[0.25 * k for k in range(24)], [100.0 + k for k in range(24)]]
    for row in rows:
        row[10] = 7
    if kind == "ascii":
        lines = ["50.5", *(" ".join(f"{v:g}" for v in row) for row in rows), "3 0 1 2"]
        return header + "\n".join(lines).encode() + b"\n", rows
    order = "<" if kind == "binary_little_endian" else ">"
    body = struct.pack(f"{order}d", 50.5)
    for row in rows:
        body += struct.pack(f"{order}10fBd12f", *row[:10], int(row[10]), *row[11:])
    return header + body + struct.pack(f"{order}B3i", 3, 0, 1, 2), rows


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_is_read_by_property_name(kind):
    data, rows = odd_ply(kind)
    scene = read_ply(data)
    for index, row in enumerate(rows):
        opacity, rest, place = row[0], row[1:10][::-1], row[11:]
        assert scene.opacity_logits[index] == opacity
        assert scene.means[index].tolist() == [place[0], place[2], place[1]]
        assert scene.quats[index].tolist() == [place[4], place[5], place[6], place[3]]
        assert scene.sh0[index, 0].tolist() == [place[8], place[7], place[9]]
        assert scene.log_scales[index].tolist() == place[10:13][::-1]
        for channel in range(3):
            assert scene.shN[index, :, channel].tolist() == rest[3 * channel : 3 * channel + 3]


def test_written_ply_has_the_layout_that_viewers_know():
    data = write_ply(scene_of(2, 1))
    header, _, body = data.partition(b"end_header\n")
    names = [line.split()[2].decode() for line in header.splitlines() if b"property" in line]
    assert names == [
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *(f"f_rest_{i}" for i in range(9)),
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    ]
    assert b"format binary_little_endian 1.0" in header
    assert b"element vertex 2" in header
    row = np.frombuffer(body, "<f4").reshape(2, 26)[1]
    scene = scene_of(2, 1)
    assert row[9:18].tolist() == scene.shN[1].T.flatten().tolist()
    assert not row[3:6].any()


def test_windows_line_ends():
    data, rows = odd_ply("ascii")
    assert read_ply(data.replace(b"\n", b"\r\n")).opacity_logits[1] == rows[1][0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no PLY file"),
        (b"plywood\n", "no PLY file"),
        (b"ply\nformat ascii 1.0\n", "truncated PLY: its header doesn't end"),
        (b"ply\nend_header\n", "names no format"),
        (b"ply\nformat ascii 1.0\nend_header\n", "PLY without vertices"),
        (b"ply\nformat ebcdic 1.0\nend_header\n", "can't read the line 'format ebcdic 1.0'"),
        (b"ply\nformat ascii 1.0\nelement vertex -1\nend_header\n", "can't read the line"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "can't read the line"),
        (b"ply\nformat ascii 1.0\ncomment \xff\nend_header\n", "expected ASCII"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float x\n",
            "two properties are called 'x'",
        ),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n",
            "lists",
        ),
        (write_ply(scene_of())[:-1], "truncated PLY: 4 of 5 vertices"),
        (odd_ply("ascii")[0].replace(b"108", b"1O8"), "no list of numbers"),
        (odd_ply("ascii")[0][:-60], "truncated PLY"),
        (odd_ply("ascii")[0].replace(b"f_rest_8", b"f_rest_9"), "9 properties f_rest"),
        (odd_ply("ascii")[0].replace(b"rot_3", b"rat_3"), "PLY without rot_3"),
        (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 999999999999999999\n"
            b"property float x\nend_header\n1234",
            "truncated PLY: 1 of 999999999999999999",
        ),
    ],
)
def test_bad_ply_says_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words):
        read_ply(data)


def test_vertices_without_properties():
    data = b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nend_header\n"
    assert read_vertices(data) == {}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_ply_crashes_the_reader(data):
    kind = data.draw(st.sampled_from(["ascii", "binary_little_endian", "binary_big_endian"]))
    only_value_errors(read_ply, data.draw(mutations(odd_ply(kind)[0]) | st.binary()))


def test_splat_by_hand():
    record = struct.pack("<6f4B4B", 1, -2, 3, 0.5, 0.25, 2, 255, 0, 51, 204, 128, 255, 128, 0)
    scene = read_splat(record * 2)
    assert scene.means[1].tolist() == [1, -2, 3]
    torch.testing.assert_close(scene.scales[0], torch.tensor([0.5, 0.25, 2]))
    torch.testing.assert_close(scene.opacities[0].item(), 0.8)
    rgb = 0.5 + scene.sh0[0, 0] / (2 * math.sqrt(math.pi))
    torch.testing.assert_close(rgb, torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(scene.quats[0] * 128, torch.tensor([0.0, 127, 0, -128]))


def test_splat_round_trip():
    """Degree 0 is kept to half a step; the worst of many quaternions is off by 0.9 degrees."""
    torch.manual_seed(0)
    scene = scene_of(20000, 1)
    scene.quats.data = torch.randn(20000, 4)
    again = read_splat(write_splat(scene))
    volume = scene.log_scales.sum(-1).exp() * scene.opacities
    order = volume.argsort(descending=True, stable=True)
    assert torch.equal(again.means, scene.means[order])
    torch.testing.assert_close(again.scales, scene.scales[order])
    assert (again.opacities - scene.opacities[order]).abs().max() <= 1 / 510 + 1e-6
    rgb, original = (0.5 + s.sh0 / (2 * math.sqrt(math.pi)) for s in (again, scene))
    assert (rgb - original[order].clamp(0, 1)).abs().max() <= 1 / 510 + 1e-6
    worst = angle(again.quats, scene.quats[order]).max()
    assert 0.6 < worst <= 0.9
    assert write_splat(again) == write_splat(read_splat(write_splat(again)))


def test_splat_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"truncated \.splat: 33 bytes"):
        read_splat(bytes(33))
    assert read_splat(b"").num_gaussians == 0
    assert read_splat(bytes(32)).log_scales.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=128))
def test_no_splat_file_crashes_the_reader(data):
    only_value_errors(read_splat, data)


def test_formats_agree(tmp_path):
    """The same scene comes back through any file: axes and conventions are the same."""
    scene = scene_of(4, 1)
    for suffix in (".ply", ".SPZ", ""):
        again = load(save(scene, tmp_path / f"scene{suffix}"))
        torch.testing.assert_close(again.means, scene.means, rtol=0, atol=2**-13)
        assert (angle(again.quats, scene.quats) < 0.25).all()
        torch.testing.assert_close(again.shN, scene.shN, rtol=0, atol=0.05)


def test_the_suffix_says_the_format(tmp_path):
    scene = scene_of(4, 0)
    again = load(save(scene, tmp_path / "scene.splat"))
    expected = read_splat(write_splat(scene))
    for name in NAMES:
        assert torch.equal(getattr(again, name), getattr(expected, name))
    assert len((tmp_path / "scene.splat").read_bytes()) == 4 * 32


@pytest.mark.filterwarnings("error")
def test_what_a_file_can_t_hold_is_said(tmp_path):
    scene = scene_of(2)
    for name in ("a.ply", "a.spz", "a.splat"):
        save(scene, tmp_path / name)
    scene.register_parameter("features", torch.nn.Parameter(torch.ones(2, 3)))
    scene.register_parameter("age", torch.nn.Parameter(torch.ones(2)))
    for suffix in (".ply", ".spz"):
        with pytest.warns(UserWarning, match=rf"^\{suffix} can't hold age, features: left out$"):
            save(scene, tmp_path / f"b{suffix}")
    assert (tmp_path / "b.ply").read_bytes() == (tmp_path / "a.ply").read_bytes()


def test_writes_are_whole_or_not_at_all(tmp_path):
    path = save(scene_of(2), tmp_path / "scene.spz")
    before = path.read_bytes()
    broken = scene_of(2)
    broken.means.data[0] = math.nan
    with pytest.raises(ValueError, match="means: got values that are not finite"):
        save(broken, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["scene.spz"]
    (tmp_path / "file").write_text("")
    with pytest.raises(TorchzooError, match="can't write"):
        save(scene_of(2), tmp_path / "file" / "scene.ply")


def test_names_and_paths_in_errors(tmp_path):
    with pytest.raises(ValueError, match=r"scene\.obj: expected a name in \.ply, \.splat, \.spz"):
        load(tmp_path / "scene.obj")
    with pytest.raises(ValueError, match=r"expected a name in .*got '.obj'"):
        save(scene_of(), tmp_path / "scene.obj")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.ply")
    (tmp_path / "a.ply").write_bytes(b"ply\n")
    with pytest.raises(ValueError, match=r"a\.ply: truncated PLY"):
        load(tmp_path / "a.ply")
