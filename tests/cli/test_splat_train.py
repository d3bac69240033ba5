"""`torchzoo splat train` and `render`: from pictures to a scene to pictures."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from torchzoo.splatting import Cameras, GaussianScene, load, save

SMALL = ("--scene", "checker", "--size", 16, "--views", 8, "--points", 60, "--sh-degree", 1)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "events")


@pytest.fixture
def capture(tmp_path):
    """A transforms.json with four pictures of 12 × 8 pixels."""
    folder = tmp_path / "capture"
    (folder / "images").mkdir(parents=True)
    cameras = Cameras.orbit(4, radius=3.0, width=12, height=8)
    frames = []
    for index, pose in enumerate(cameras.camera_to_world("opengl").tolist()):
        pixels = np.full((8, 12, 3), 40 * index + 60, np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{index}.png")
        frames.append({"file_path": f"images/{index}", "transform_matrix": pose})
    whole = {"w": 12, "h": 8, "camera_angle_x": 0.8, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(whole))
    return folder


def test_a_built_in_scene_is_trained_and_resumed(run, tmp_path):
    out = tmp_path / "out"
    command = ("splat", "train", *SMALL, "-o", out, "--steps", 8, "--json")
    code, text, err = run(*command)
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert [row["step"] for row in report["log"]] == list(range(1, 9))
    assert report["log"][-1]["train_psnr"] > 5
    assert report["log"][-1].keys() >= {"test_psnr", "test_ssim", "splats", "loss", "seconds"}
    assert files(out) == ["checkpoints", "log.csv", "preview.png", "scene.ply"]
    assert load(out / "scene.ply").num_gaussians == report["splats"] == 60
    with (out / "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert np.asarray(Image.open(out / "preview.png")).shape == (32, 16, 3)
    first = (out / "scene.ply").read_bytes()
    code, _, err = run(*command)
    assert (code, "holds a run; resume it, or take another folder" in err) == (1, True)
    (out / "checkpoints/step-8.json").unlink()
    code, text, _ = run(*command, "--resume")
    assert code == 0
    assert (out / "scene.ply").read_bytes() == first
    assert [row["step"] for row in json.loads(text)["log"]] == list(range(1, 9))
    code, _, err = run(*command, "--resume", "--seed", 1)
    assert (code, "made with seed = 0, got 1" in err) == (1, True)


def test_lpips_is_in_the_log_where_it_can_be_had(run, tmp_path, monkeypatch):
    """Also in that of a run which began on a machine that has none."""
    from torchzoo.splatting import perceptual

    asked = []

    def found(height, width, *, device):
        asked.append((height, width))
        return {"lpips_vgg": lambda image, truth: (image - truth).square().mean()}

    command = ("splat", "train", *SMALL, "--steps", 8, "--save-every", 4)
    assert run(*command, "-o", tmp_path / "out")[0] == 0
    (tmp_path / "out/checkpoints/step-8.json").unlink()
    monkeypatch.setattr(perceptual, "find_lpips", found)
    code, text, _ = run(*command, "-o", tmp_path / "out", "--resume")
    assert (code, asked) == (0, [(16, 16)])
    assert "LPIPS VGG" in text
    monkeypatch.undo()
    # nothing is left to do, and the rows are those of the file
    code, text, _ = run(*command, "-o", tmp_path / "out", "--resume", "--json")
    rows = json.loads(text)["log"]
    assert code == 0
    assert [row["step"] for row in rows if "test_psnr" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "test_lpips_vgg" in row] == [5, 6, 7, 8]
    for row in rows[4:]:  # of the one view that is held out
        assert row["test_lpips_vgg"] == pytest.approx(10 ** (-row["test_psnr"] / 10), rel=1e-3)


@pytest.mark.parametrize("strategy", ["mcmc", "turbo", "none"])
def test_a_table_for_people(run, tmp_path, strategy):
    options = ("--steps", 3, "--strategy", strategy, "--batch", 2, "--dilation", 2)
    code, out, err = run("splat", "train", *SMALL, "-o", tmp_path, *options)
    assert code == 0
    assert "held-out PSNR" in out
    assert f"60 Gaussians in {tmp_path / 'scene.ply'}" in out.replace("\n", "")
    assert "torchzoo splat view" in err


def test_a_capture_is_trained(run, tmp_path, capture):
    options = ("--steps", 2, "--points", 50, "--size", 9, "--json")
    code, out, err = run("splat", "train", capture, "-o", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert json.loads(out)["splats"] == 50
    assert np.asarray(Image.open(tmp_path / "out/preview.png")).shape == (12, 36, 3)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "images/2.png").unlink(), "image 'images/2' is neither in"),
        (lambda f: truncate(f / "images/2.png"), "can't read the image"),
        (lambda f: Image.new("RGB", (9, 9)).save(f / "images/2.png"), "got 9 × 9, its camera has"),
        (lambda f: truncate(f / "transforms.json"), "no JSON"),
        (lambda f: (f / "transforms.json").unlink(), "expected a transforms.json or a COLMAP"),
        (
            lambda f: (f / "transforms.json").write_text(
                (f / "transforms.json").read_text().replace('"transform_matrix"', '"pose"')
            ),
            "transform_matrix of frame 0",
        ),
    ],
)
def test_captures_that_are_damaged(run, tmp_path, capture, break_it, message):
    break_it(capture)
    code, out, err = run("splat", "train", capture, "-o", tmp_path / "out", "--steps", 2)
    assert (code, out) == (1, "")
    assert message in err
    assert str(capture) in err.replace("\n", "")
    assert err.count("\n") == 1
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "expected a PATH or --scene NAME"),
        (("somewhere", "--scene", "checker"), 2, "expected a PATH or --scene NAME"),
        (("--scene", "cheker"), 2, "no scene 'cheker'; did you mean checker"),
        (("nowhere",), 1, "nowhere: expected a transforms.json or a COLMAP model"),
        (("--scene", "checker", "--strategy", "more"), 2, "--strategy"),
        ((*SMALL, "--absgrad", "--strategy", "mcmc"), 2, "--absgrad belongs to"),
        ((*SMALL, "--absgrad", "--strategy", "turbo"), 2, "--absgrad belongs to"),
        ((*SMALL, "--strategy", "turbo", "--cap", 59), 2, "begins with 60 points, got 59"),
    ],
)
def test_requests_that_can_t_be_served(run, tmp_path, options, code, message):
    found, out, err = run("splat", "train", *options, "-o", tmp_path / "out")
    assert (found, out) == (code, "")
    assert message in err.replace("\n", " ")


@pytest.fixture
def scene(tmp_path):
    torch.manual_seed(0)
    splats = GaussianScene.from_points(
        torch.randn(30, 3), torch.rand(30, 3), sh_degree=0, init_opacity=0.9
    )
    return save(splats, tmp_path / "scene.ply")


def test_frames_of_an_orbit(run, tmp_path, scene):
    out = tmp_path / "frames"
    options = ("--frames", 3, "--size", "20x14", "--background", "1,0,0", "--json")
    code, text, err = run("splat", "render", scene, "-o", out, *options)
    assert (code, err) == (0, "")
    assert json.loads(text) == {"out": str(out), "frames": 3, "splats": 30}
    assert files(out) == ["00000.png", "00001.png", "00002.png"]
    pictures = [np.asarray(Image.open(out / name)).astype(int) for name in files(out)]
    assert pictures[0].shape == (14, 20, 3)
    assert abs(pictures[0] - pictures[1]).max() > 20
    run("splat", "render", scene, "-o", tmp_path / "far", *options, "--radius", 200)
    far = np.asarray(Image.open(tmp_path / "far/00000.png"))
    assert far[0, 0].tolist() == [255, 0, 0]
    assert far[7, 10].tolist() != [255, 0, 0]
    # the folder that the scene is in will do, and another axis is another picture
    code, _, _ = run("splat", "render", scene.parent, "-o", out, *options, "--up", "-y")
    assert code == 0
    assert abs(np.asarray(Image.open(out / "00000.png")).astype(int) - pictures[0]).max() > 20


def test_a_capture_is_a_path_too(run, tmp_path, scene, capture):
    out = tmp_path / "frames"
    options = ("--path", capture, "--size", "12x8", "--json")
    code, text, _ = run("splat", "render", scene, "-o", out, *options)
    assert (code, json.loads(text)["frames"]) == (0, 4)
    cameras = Cameras.orbit(4, radius=3.0, width=12, height=8, fov=np.degrees(0.8))
    expected = load(scene).render(cameras).image[2].detach().clamp(0, 1).mul(255).round()
    found = np.asarray(Image.open(out / "00002.png")).astype(float)
    assert abs(found - expected.numpy()).max() <= 1


def test_a_video_or_without_pyav_its_frames(run, tmp_path, scene, monkeypatch):
    out = tmp_path / "orbit.mp4"
    options = ("--frames", 4, "--size", "33x32")
    if pytest.importorskip("av"):
        import av

        code, text, _ = run("splat", "render", scene, "-o", out, *options)
        assert (code, "4 frames in" in text) == (0, True)
        with av.open(str(out)) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert [frame.shape for frame in frames] == [(32, 32, 3)] * 4
        assert abs(frames[0].astype(int) - frames[2].astype(int)).mean() > 1
    monkeypatch.setattr(sys.modules["torchzoo.cli.splat_render"], "find_spec", lambda name: None)
    code, _, err = run("splat", "render", scene, "-o", tmp_path / "other.mp4", *options)
    assert code == 0
    assert "PyAV is not installed: PNG files go to" in err
    assert len(files(tmp_path / "other")) == 4


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--size", "20"), 2, "expected width x height such as 640x360, got '20'"),
        (("--size", "0x5"), 2, "expected width x height"),
        (("--background", "red"), 2, "--background: expected three of 0 to 1"),
        (("--up", "w"), 2, "--up: expected x, y, z"),
        (("--path", "nowhere"), 1, "--path: expected orbit or a capture"),
        (("-o", "film.doc"), 2, "--out: expected a folder or a name in"),
    ],
)
def test_pictures_that_can_t_be(run, tmp_path, scene, options, code, message):
    found, out, err = run("splat", "render", scene, "-o", tmp_path / "frames", *options)
    assert (found, out) == (code, "")
    assert message in err.replace("\n", " ")


def test_scenes_that_are_damaged(run, tmp_path, scene):
    truncate(scene)
    code, out, err = run("splat", "render", scene, "-o", tmp_path / "frames")
    assert (code, out) == (1, "")
    assert str(scene) in err.replace("\n", "")
    assert "Traceback" not in err
    code, _, err = run("splat", "render", tmp_path / "none.ply", "-o", tmp_path / "frames")
    assert (code, "can't read" in err) == (1, True)
