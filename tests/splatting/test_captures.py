"""Cameras and points of data sets: COLMAP models and transforms.json, written here by hand."""

import contextlib
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from torchzoo.splatting import Cameras, load_capture
from torchzoo.splatting.colmap import read_colmap

QUATS = [[0.5, 0.5, -0.5, 0.5], [0.8, 0, 0.6, 0]]
SHIFTS = [[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]]
PINHOLE = (1, 40, 30, [50.0, 51.0, 20.5, 14.5])


def binary(model=PINHOLE, names=("b.png", "a dir/a.png"), camera=7):
    """The three files of a binary model with two images and two points."""
    number, width, height, parameters = model
    cameras = struct.pack("<QiiQQ", 1, camera, number, width, height)
    cameras += struct.pack(f"<{len(parameters)}d", *parameters)
    images = struct.pack("<Q", 2)
    for index, name in enumerate(names):
        images += struct.pack("<i7di", index + 1, *QUATS[index], *SHIFTS[index], camera)
        images += name.encode() + b"\0" + struct.pack("<Q", index)
        images += struct.pack("<ddq", 1.5, 2.5, -1) * index
    points = struct.pack("<Q", 2)
    for index in range(2):
        points += struct.pack("<Q3d3Bd", 9, 1.0, -2.0, index, 255, 51, index, 0.3)
        points += struct.pack("<Q", index) + struct.pack("<ii", 1, 0) * index
    return {"cameras.bin": cameras, "images.bin": images, "points3D.bin": points}


def text():
    images = "# two lines an image\n"
    for index, name in enumerate(("b.png", "a dir/a.png")):
        values = " ".join(str(v) for v in QUATS[index] + SHIFTS[index])
        images += f"{index + 1} {values} 7 {name}\n" + "1.5 2.5 -1" * index + "\n"
    return {
        "cameras.txt": b"# cameras\n7 PINHOLE 40 30 50.0 51 20.5 14.5\n",
        "images.txt": images.encode(),
        "points3D.txt": b"\n9 1.0 -2.0 0 255 51 0 0.3\n9 1 -2 1 255 51 1 0.3 1 0\n",
    }


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("place", ["", "sparse", "sparse/0"])
@pytest.mark.parametrize("files", [binary(), text()], ids=["bin", "txt"])
def test_colmap(tmp_path, files, place):
    write(tmp_path / place, files)
    capture = load_capture(tmp_path)
    assert capture.names == ["a dir/a.png", "b.png"]
    for view, row in enumerate((1, 0)):
        R = Rotation.from_quat([*QUATS[row][1:], QUATS[row][0]]).as_matrix()
        expected = torch.eye(4)
        expected[:3, :3], expected[:3, 3] = torch.from_numpy(R), torch.tensor(SHIFTS[row])
        torch.testing.assert_close(capture.cameras.viewmats[view], expected)
    K = torch.tensor([[50, 0, 20.5], [0, 51, 14.5], [0, 0, 1]])
    assert torch.equal(capture.cameras.Ks, K.expand(2, 3, 3))
    assert (capture.cameras.width, capture.cameras.height) == (40, 30)
    assert capture.points.tolist() == [[1, -2, 0], [1, -2, 1]]
    colors = torch.tensor([[255, 51, 0], [255, 51, 1]]) / 255
    torch.testing.assert_close(capture.colors, colors)


def test_where_a_capture_is_looked_for_first(tmp_path):
    """The folder itself, `sparse/0`, `sparse`; and transforms.json before all of them."""
    for place, name in (("sparse", "c"), ("sparse/0", "b"), ("", "a")):
        write(tmp_path / place, binary(names=(name, f"{name}{name}")))
        assert load_capture(tmp_path).names == [name, f"{name}{name}"]
    write_json(tmp_path, frames()[1])
    assert load_capture(tmp_path).names == ["v0", "v1"]
    place = write(tmp_path / "sparse/0", {"cameras.bin": b""})
    with pytest.raises(ValueError, match=f"^{place}: truncated"):
        load_capture(place)
    (tmp_path / "transforms.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'transforms.json'}: no JSON"):
        load_capture(tmp_path)


def test_colmap_without_points(tmp_path):
    files = binary()
    del files["points3D.bin"]
    capture = read_colmap(write(tmp_path, files))
    assert capture.points.shape == capture.colors.shape == (0, 3)


@pytest.mark.parametrize(
    ("model", "kind", "focals"),
    [
        ((0, 9, 8, [5.0, 4, 3]), "pinhole", (5, 5, 4, 3)),
        ((2, 9, 8, [5.0, 4, 3, 0]), "pinhole", (5, 5, 4, 3)),
        ((3, 9, 8, [5.0, 4, 3, 0, 0]), "pinhole", (5, 5, 4, 3)),
        ((4, 9, 8, [5.0, 6, 4, 3, 0, 0, 0, 0]), "pinhole", (5, 6, 4, 3)),
        ((5, 9, 8, [5.0, 6, 4, 3, 0, 0, 0, 0]), "fisheye", (5, 6, 4, 3)),
    ],
)
def test_models_without_distortion(tmp_path, model, kind, focals):
    cameras = read_colmap(write(tmp_path, binary(model))).cameras
    assert cameras.camera_model == kind
    K = cameras.Ks[0]
    assert (K[0, 0], K[1, 1], K[0, 2], K[1, 2]) == focals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": (2, 9, 8, [5.0, 4, 3, 0.1])}, "SIMPLE_RADIAL has distortion: undistort first"),
        ({"model": (5, 9, 8, [5.0, 6, 4, 3, 0, 0, 0, 1])}, "undistort first"),
        ({"model": (6, 9, 8, [5.0] * 12)}, "model 6: undistort first"),
        ({"model": (1, 0, 8, [5.0] * 4)}, "0 x 8 pixels"),
        ({"model": (1, 2**40, 8, [5.0] * 4)}, "x 8 pixels"),
    ],
)
def test_models_that_are_refused(tmp_path, change, words):
    write(tmp_path, binary(**change))
    with pytest.raises(ValueError, match=words):
        load_capture(tmp_path)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_truncated_colmap(tmp_path, name):
    files = binary()
    for data in (files[name][:-1], files[name][:5], b"\xff" * 8 + files[name][8:]):
        write(tmp_path, files | {name: data})
        with pytest.raises(ValueError, match=f"truncated COLMAP file {name}"):
            load_capture(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cameras.txt": b"7 PINHOLE 40 30 50 51 20.5\n"}, "can't read the line '7 PINHOLE"),
        ({"cameras.txt": b"7 PINHOLE 40 x 50 51 20.5 3\n"}, "can't read the line"),
        ({"cameras.txt": b"7 FOV 40 30 1 1 1 1 1\n"}, "model FOV: undistort first"),
        ({"cameras.txt": b""}, "there is no camera 7"),
        ({"images.txt": b""}, "without images"),
        ({"images.txt": b"1 0 0\n"}, "can't read the line '1 0 0'"),
        ({"points3D.txt": b"1 0 0 zero 0 0 0\n"}, "can't read the line"),
    ],
)
def test_bad_text_models(tmp_path, change, words):
    write(tmp_path, text() | change)
    with pytest.raises(ValueError, match=words):
        load_capture(tmp_path)


def test_images_of_two_sizes_are_refused(tmp_path):
    files = text()
    files["cameras.txt"] += b"8 PINHOLE 41 30 1 1 1 1\n"
    files["images.txt"] = files["images.txt"].replace(b" 7 b", b" 8 b")
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"of 2 sizes or models: expected one, got .*40.*41"):
        load_capture(tmp_path)


def frames(**more):
    cameras = Cameras.orbit(2, radius=3.0, width=16, height=12, fov=60)
    poses = cameras.camera_to_world("opengl").tolist()
    listed = [{"file_path": f"v{i}", "transform_matrix": pose} for i, pose in enumerate(poses)]
    return cameras, {"w": 16, "h": 12, "camera_angle_x": math.pi / 3, "frames": listed} | more


def write_json(folder, value):
    (folder / "transforms.json").write_text(json.dumps(value))
    return folder


def test_transforms(tmp_path):
    cameras, value = frames()
    capture = load_capture(write_json(tmp_path, value))
    torch.testing.assert_close(capture.cameras.viewmats, cameras.viewmats)
    torch.testing.assert_close(capture.cameras.Ks, cameras.Ks)
    assert capture.names == ["v0", "v1"]
    assert capture.points.shape == (0, 3)


def test_transforms_with_settings_of_frames_and_points(tmp_path):
    _, value = frames(fl_x=9.0, fl_y=8.0, cx=7.0, ply_file_path="points.ply", k1=0.0)
    value["frames"][1] |= {"fl_x": 10.0, "cy": 5.0}
    (tmp_path / "points.ply").write_bytes(
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
        b"property float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
        b"end_header\n1 2 3 255 0 51\n"
    )
    capture = load_capture(write_json(tmp_path, value))
    K = capture.cameras.Ks
    assert K[:, 0, 0].tolist() == [9, 10]
    assert K[:, 1, 1].tolist() == [8, 8]
    assert K[:, 0, 2].tolist() == [7, 7]
    assert K[:, 1, 2].tolist() == [6, 5]
    assert capture.points.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(capture.colors, torch.tensor([[1, 0, 0.2]]))


def test_size_of_the_first_image(tmp_path):
    _, value = frames()
    del value["w"], value["h"]
    for name in ("v0.png", "v1.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    cameras = load_capture(write_json(tmp_path, value)).cameras
    assert (cameras.width, cameras.height) == (20, 10)
    (tmp_path / "v1.png").unlink()
    with pytest.raises(ValueError, match="w and h are missing, and so is the image 'v1'"):
        load_capture(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k1": 0.1}, "undistort first"),
        ({"camera_model": "EQUIRECTANGULAR"}, "undistort first"),
        ({"frames": []}, "list of frames"),
        ({"frames": [3]}, "frame 0: expected an object"),
        ({"frames": [{"file_path": "x"}]}, "transform_matrix of frame 0"),
        ({"frames": [{"file_path": "x", "transform_matrix": [[1, 2], [3]]}]}, "transform_matrix"),
        ({"camera_angle_x": 4}, "camera_angle_x: got 4.0, expected 0 to pi"),
        ({"camera_angle_x": None}, "camera_angle_x: got 'None', expected a number"),
        ({"fl_x": "wide"}, "fl_x: got 'wide', expected a number"),
        ({"w": 1e12}, "w and h: got 1e"),
        ({"w": True}, "w: got 'True'"),
    ],
)
def test_bad_transforms_say_what_is_wrong(tmp_path, change, words):
    write_json(tmp_path, frames(**change)[1])
    with pytest.raises(ValueError, match=words):
        load_capture(tmp_path / "transforms.json")


def test_no_json_and_no_model(tmp_path):
    (tmp_path / "transforms.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"transforms\.json: no JSON"):
        load_capture(tmp_path)
    with pytest.raises(ValueError, match=r"expected a transforms\.json or a COLMAP model"):
        load_capture(tmp_path / "nothing")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_damage_crashes_the_readers(place, data):
    kind = data.draw(st.sampled_from(["bin", "txt", "json"]))
    files = {
        "bin": binary(),
        "txt": text(),
        "json": {"transforms.json": json.dumps(frames()[1]).encode()},
    }[kind]
    name = data.draw(st.sampled_from(sorted(files)))
    whole = files[name]
    at = st.integers(0, len(whole) - 1)
    changed = bytearray(whole)
    for index, value in data.draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=4)):
        changed[index] = value
    changed = bytes(changed[: data.draw(st.just(len(whole)) | at)])
    changed = data.draw(st.just(changed) | st.binary(max_size=40))
    folder = write(place / kind, files | {name: changed})
    with contextlib.suppress(ValueError, OSError):
        assert len(load_capture(folder).cameras) > 0
