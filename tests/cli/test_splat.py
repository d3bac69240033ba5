"""`torchzoo splat`: files of scenes are converted and described."""

import json
import socket
from http.server import ThreadingHTTPServer

import pytest
import torch

from torchzoo.splatting import Cameras, GaussianScene, load, save


@pytest.fixture
def scene(tmp_path):
    torch.manual_seed(0)
    made = GaussianScene(200, sh_degree=1)
    made.shN.data.uniform_(-0.5, 0.5)
    return save(made, tmp_path / "scene.ply")


@pytest.mark.parametrize("command", ["convert", "info", "view"])
def test_help_of_a_command_has_an_example_of_it(run, command):
    code, out, err = run("splat", command, "--help")
    assert (code, err) == (0, "")
    assert f"torchzoo splat {command}" in out.partition("Example")[2]


def test_convert(run, scene, tmp_path):
    code, out, err = run("splat", "convert", scene, tmp_path / "scene.spz", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["gaussians"] == 200
    assert report["in_bytes"] == scene.stat().st_size
    assert report["out_bytes"] == (tmp_path / "scene.spz").stat().st_size
    assert report["out_bytes"] < report["in_bytes"] / 4
    assert report["sh_degree"] == 1
    original, packed = load(scene), load(tmp_path / "scene.spz")
    torch.testing.assert_close(packed.means, original.means, rtol=0, atol=2**-13)


def test_convert_to_every_format_and_back(run, scene, tmp_path):
    for name in ("a.splat", "b.spz", "folder", "c.ply"):
        code, out, _ = run("splat", "convert", scene, tmp_path / name)
        assert code == 0
        assert "200" in out
        assert load(tmp_path / name).num_gaussians == 200
    assert run("splat", "convert", tmp_path / "folder", tmp_path / "d.ply")[0] == 0
    assert (tmp_path / "d.ply").read_bytes() == scene.read_bytes()


def test_info_of_a_scene(run, scene):
    code, out, err = run("splat", "info", scene, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    means = load(scene).means.detach()
    low = means.sort(0).values[2]  # 1 % of 200
    torch.testing.assert_close(torch.tensor(report["box_low"]), low, rtol=0, atol=0.05)
    assert report["gaussians"] == 200
    assert report["not_finite"] == 0
    assert report["mean_opacity"] == pytest.approx(0.1)
    assert report["median_scale"] == pytest.approx(200 ** (-1 / 3), rel=1e-3)
    assert "200" in run("splat", "info", scene)[1]


def test_info_counts_what_is_not_finite(run, tmp_path):
    broken = GaussianScene(3, sh_degree=0)
    broken.means.data[1, 2] = torch.nan
    report = json.loads(run("splat", "info", save(broken, tmp_path / "x.ply"), "--json")[1])
    assert report["not_finite"] == 1
    empty = json.loads(
        run("splat", "info", save(GaussianScene(0), tmp_path / "empty.ply"), "--json")[1]
    )
    assert empty["gaussians"] == 0
    assert empty["median_scale"] is None


def test_info_of_photographs(run, tmp_path):
    poses = Cameras.orbit(3, radius=2.0, width=8, height=6).camera_to_world("opengl")
    frames = [
        {"file_path": f"{i}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)
    ]
    text = json.dumps({"w": 8, "h": 6, "fl_x": 9.5, "frames": frames})
    (tmp_path / "transforms.json").write_text(text)
    for path in (tmp_path, tmp_path / "transforms.json"):
        report = json.loads(run("splat", "info", path, "--json")[1])
        assert (report["images"], report["width"], report["height"]) == (3, 8, 6)
        assert report["focal_lengths"] == [9.5]
        assert report["points"] == 0


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["info", "none.ply"], 1, "can't read none.ply: No such file"),
        (["info", "none"], 1, "none: expected a name in .ply, .splat, .spz"),
        (["info", "none.obj"], 1, "none.obj: expected a name in .ply, .splat, .spz"),
        (["convert", "none.ply", "x.spz"], 1, "can't read none.ply"),
        (["convert", "none.ply"], 2, "OUT"),
        (["info", "--jsn", "x.ply"], 2, "--jsn"),
        (["paint", "x.ply"], 2, "paint"),
        (["view", "none.ply"], 1, "can't read none.ply"),
        (["view", "none.ply", "--up", "w"], 2, "got 'w'"),
        (["view", "none.ply", "--serve", "-o", "x.html"], 2, "leave out --out"),
        (["view", "none.ply", "--port", "-1"], 2, "--port"),
    ],
)
def test_errors_are_one_line(run, args, code, part):
    given, out, err = run("splat", *args)
    assert (given, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_a_damaged_file_and_a_bad_target_are_one_line(run, scene, tmp_path):
    (tmp_path / "torn.ply").write_bytes(scene.read_bytes()[:-9])
    code, out, err = run("splat", "convert", tmp_path / "torn.ply", tmp_path / "a.spz")
    assert (code, out) == (1, "")
    assert "torn.ply: truncated PLY: 199 of 200" in err
    assert run("splat", "convert", scene, tmp_path / "a.obj")[0] == 1
    assert not (tmp_path / "a.spz").exists()
    code, _, err = run("splat", "info", tmp_path)
    assert code == 1
    assert "expected a transforms.json or a COLMAP model" in err


def test_view_writes_a_page(run, scene, tmp_path):
    code, out, err = run("splat", "view", scene, "--json", "--up", "-y")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["out"] == str(tmp_path / "scene.html")
    assert '"up": [0.0, -1.0, 0.0]' in (tmp_path / "scene.html").read_text()
    assert run("splat", "view", scene, "-o", tmp_path / "b.html")[0] == 0
    assert "<title>scene</title>" in (tmp_path / "b.html").read_text()


def test_view_serves_until_it_is_ended(run, scene, monkeypatch, tmp_path):
    class Ends(ThreadingHTTPServer):
        def serve_forever(self, poll_interval=0.5):
            raise KeyboardInterrupt

    monkeypatch.setattr("torchzoo.splatting.viewer.ThreadingHTTPServer", Ends)
    code, out, err = run("splat", "view", scene, "--serve", "--json")
    assert (code, err) == (130, "interrupted\n")
    assert json.loads(out)["url"].startswith("http://127.0.0.1:")
    assert not (tmp_path / "scene.html").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("splat", "view", scene, "--serve", "--port", port)
    assert code == 1
    assert f"can't serve at port {port}" in err
