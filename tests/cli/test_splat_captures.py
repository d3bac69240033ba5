"""`torchzoo splat train` from folders as other programs leave them: cameras, points and pictures.

The pictures are ray-traced, so that the scene that comes out can be held against the true cameras.
"""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from torchzoo.common.images import psnr
from torchzoo.data.splat_scenes import RADIUS, surface_points
from torchzoo.data.splat_worlds import world
from torchzoo.splatting import Cameras, GaussianScene, load

WIDTH, HEIGHT, VIEWS = 40, 32, 16
HELD = [0, 8]
"""Every eighth of the names in their order."""

NAMES = [f"photo {index:02}.png" for index in range(VIEWS)]
OPTIONS = ("--steps", 48, "--sh-degree", 1, "--json")


@pytest.fixture(scope="module")
def truth():
    """Views of the checkered world, as bytes, and points on its surfaces."""
    angle = torch.arange(VIEWS) * 2.4
    height = torch.linspace(0.25, 0.8, VIEWS)
    flat = (1 - height.square()).sqrt()
    eyes = RADIUS * torch.stack([flat * angle.cos(), flat * angle.sin(), height], -1)
    cameras = Cameras.look_at(eyes, width=WIDTH, height=HEIGHT, fov=45)
    checker = world("checker", 0)
    images = (checker.render(cameras, supersample=2).images * 255).round().byte()
    train = [index for index in range(VIEWS) if index not in HELD]
    points, colors = surface_points(checker, cameras[train], 300)
    return SimpleNamespace(
        cameras=cameras, images=images, points=points, colors=(colors * 255).round().byte()
    )


def records(truth):
    """What COLMAP says of each image, with quaternions and shifts in double, last image first."""
    for index in reversed(range(VIEWS)):
        pose = truth.cameras.viewmats[index].double().numpy()
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()
        yield index, [w, x, y, z, *pose[:3, 3].tolist()], NAMES[index]


def focal(truth):
    K = truth.cameras.Ks[0].double()
    return [K[0, 0].item(), K[1, 1].item(), K[0, 2].item(), K[1, 2].item()]


def binary(truth):
    """A model in COLMAP's binary files."""
    cameras = struct.pack("<QiiQQ4d", 1, 3, 1, WIDTH, HEIGHT, *focal(truth))
    images = struct.pack("<Q", VIEWS)
    for index, pose, name in records(truth):
        images += struct.pack("<i7di", index + 1, *pose, 3) + name.encode() + b"\0"
        images += struct.pack("<Qddq", 1, 1.5, 2.5, -1)
    points = struct.pack("<Q", len(truth.points))
    for xyz, rgb in zip(truth.points.tolist(), truth.colors.tolist(), strict=True):
        points += struct.pack("<Q3d3BdQii", 1, *xyz, *rgb, 0.5, 1, 1, 0)
    return {"cameras.bin": cameras, "images.bin": images, "points3D.bin": points}


def text(truth):
    """The same model in COLMAP's text files."""
    words = " ".join(map(str, focal(truth)))
    images = "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
    for index, pose, name in records(truth):
        images += f"{index + 1} {' '.join(map(str, pose))} 3 {name}\n1.5 2.5 -1\n"
    points = "".join(
        f"1 {' '.join(map(str, xyz + rgb))} 0.5 1 0\n"
        for xyz, rgb in zip(truth.points.tolist(), truth.colors.tolist(), strict=True)
    )
    return {
        "cameras.txt": f"3 PINHOLE {WIDTH} {HEIGHT} {words}\n".encode(),
        "images.txt": images.encode(),
        "points3D.txt": points.encode(),
    }


def transforms(truth):
    """The same capture as a transforms.json with a PLY file of points."""
    poses = truth.cameras.camera_to_world("opengl").tolist()
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": pose}
        for name, pose in zip(NAMES, poses, strict=True)
    ]
    sizes = {"w": WIDTH, "h": HEIGHT}
    fl_x, fl_y, cx, cy = focal(truth)
    whole = sizes | {"fl_x": fl_x, "fl_y": fl_y, "cx": cx, "cy": cy, "frames": frames}
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(truth.points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz")
    header += "".join(f"property uchar {channel}\n" for channel in ("red", "green", "blue"))
    rows = zip(truth.points.tolist(), truth.colors.tolist(), strict=True)
    body = b"".join(struct.pack("<3f3B", *xyz, *rgb) for xyz, rgb in rows)
    return {
        "transforms.json": json.dumps(whole | {"ply_file_path": "points.ply"}).encode(),
        "points.ply": header.encode() + b"end_header\n" + body,
    }


def capture(folder, truth, files):
    """A folder with the pictures, and with the files below `sparse/0` where they are COLMAP's."""
    (folder / "images").mkdir(parents=True)
    for name, image in zip(NAMES, truth.images, strict=True):
        Image.fromarray(image.numpy()).save(folder / "images" / name)
    place = folder if "transforms.json" in files else folder / "sparse" / "0"
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return folder


@torch.no_grad()
def held_out_psnr(scene, truth):
    """Of pictures through the true cameras."""
    found = scene.render(truth.cameras[HELD]).image.clamp(0, 1)
    return psnr(found, truth.images[HELD] / 255).mean().item()


@pytest.fixture(scope="module")
def start(truth):
    """Where every run here begins."""
    scene = GaussianScene.from_points(
        truth.points, truth.colors / 255, sh_degree=1, image_size=(HEIGHT, WIDTH)
    )
    return held_out_psnr(scene, truth)


@pytest.fixture(scope="module")
def known():
    """Losses of the run before, to which those of another file format are the same."""
    return {}


@pytest.mark.parametrize("write", [binary, text, transforms])
def test_a_capture_becomes_a_scene(run, tmp_path, truth, start, known, write):
    folder, out = capture(tmp_path / "capture", truth, write(truth)), tmp_path / "out"
    path = folder / "transforms.json" if write is transforms else folder
    code, printed, err = run("splat", "train", path, "-o", out, *OPTIONS)
    assert (code, err) == (0, "")
    report = json.loads(printed)
    first, last = report["log"][0], report["log"][-1]
    assert (first["step"], last["step"], len(report["log"])) == (6, 48, 8)
    assert last["test_psnr"] > start + 2
    assert last["test_psnr"] > first["test_psnr"] + 1
    assert last["test_ssim"] > first["test_ssim"]
    scene = load(out / "scene.ply")
    assert last["splats"] == report["splats"] == scene.num_gaussians == len(truth.points)
    assert held_out_psnr(scene, truth) == pytest.approx(last["test_psnr"], abs=0.02)
    left = sorted(path.name for path in out.iterdir() if path.name != "events")
    assert left == ["checkpoints", "log.csv", "preview.png", "scene.ply"]
    preview = np.asarray(Image.open(out / "preview.png"))
    assert preview.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert np.array_equal(preview[:HEIGHT], np.concatenate(truth.images[HELD].numpy(), 1))
    losses = [row["loss"] for row in report["log"]]
    assert losses == pytest.approx(known.setdefault("losses", losses), rel=1e-2)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def swap(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("write", "break_it", "message"),
    [
        (binary, lambda f: (f / "images/photo 03.png").unlink(), "image 'photo 03.png' is neither"),
        (binary, lambda f: cut(f / "sparse/0/cameras.bin", 8), "truncated COLMAP file cameras.bin"),
        (binary, lambda f: cut(f / "sparse/0/images.bin", 1), "truncated COLMAP file images.bin"),
        (binary, lambda f: (f / "sparse/0/images.bin").unlink(), "can't read"),
        (text, lambda f: swap(f / "sparse/0/cameras.txt", b"3 P", b"4 P"), "there is no camera 3"),
        (text, lambda f: swap(f / "sparse/0/cameras.txt", b"PINHOLE", b"FOV"), "undistort first"),
        (text, lambda f: swap(f / "sparse/0/cameras.txt", b" 32 ", b" 99 "), "its camera has 40"),
        (transforms, lambda f: cut(f / "points.ply", 1), "truncated PLY: 299 of 300 vertices"),
        (transforms, lambda f: (f / "points.ply").unlink(), "can't read"),
        (transforms, lambda f: swap(f / "transforms.json", b'"fl_x"', b'"k1"'), "undistort first"),
    ],
)
def test_captures_that_are_damaged(run, tmp_path, truth, write, break_it, message):
    folder, out = capture(tmp_path / "capture", truth, write(truth)), tmp_path / "out"
    break_it(folder)
    code, printed, err = run("splat", "train", folder, "-o", out, *OPTIONS)
    assert (code, printed) == (1, "")
    assert message in err
    assert str(folder) in err
    assert err.count("\n") == 1
    assert list(out.glob("*")) == []


def test_turbo_keeps_to_its_cap(run, tmp_path, truth):
    """It refines once, after step 50; a run that is resumed ends in the same bytes."""
    folder = capture(tmp_path / "capture", truth, binary(truth))
    command = ("splat", "train", folder, "--steps", 104, "--sh-degree", 0, "--size", 20)
    command += ("--strategy", "turbo", "--save-every", 40, "--seed", 1, "--json")
    out = tmp_path / "out"
    code, printed, err = run(*command, "-o", out, "--cap", 310)
    assert (code, err) == (0, "")
    report = json.loads(printed)
    assert 300 < report["splats"] <= 310
    scene = (out / "scene.ply").read_bytes()
    (out / "checkpoints/step-104.json").unlink()
    code, printed, _ = run(*command, "-o", out, "--cap", 310, "--resume")
    assert (code, json.loads(printed)["splats"]) == (0, report["splats"])
    assert (out / "scene.ply").read_bytes() == scene
    code, _, err = run(*command, "-o", tmp_path / "other", "--cap", 299)
    assert (code, "--strategy turbo begins with 300 points, got 299" in err) == (2, True)
    # a picture has fewer pixels than there are points: then there may be as many as these
    code, printed, _ = run(*command, "-o", tmp_path / "other", "--size", 16, "--steps", 3)
    assert (code, json.loads(printed)["splats"]) == (0, 300)
