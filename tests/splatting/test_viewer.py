"""The page of a scene: what is in it, and that a browser draws the picture that we render."""

import base64
import math
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from torchzoo.splatting import Cameras, GaussianScene, export_html, viewer
from torchzoo.splatting.splat_file import read_splat, write_splat

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZE = 160


@pytest.fixture(scope="module")
def scene():
    """A ball of long coloured splats on a floor of dark ones."""
    torch.manual_seed(0)
    ball = torch.nn.functional.normalize(torch.randn(120, 3), dim=-1)
    floor = torch.cat([torch.rand(60, 2) * 4 - 2, torch.full((60, 1), -1.0)], 1)
    colours = torch.cat([ball / 2 + 0.5, torch.full((60, 3), 0.2)])
    made = GaussianScene.from_points(torch.cat([ball, floor]), colours, init_opacity=0.8)
    made.log_scales.data[:120, 0] += 0.7
    made.quats.data = torch.randn(180, 4)
    return made


def difference(page, folder, ours):
    """How far the page is from our picture, its text left out.

    A page on a busy machine needs more of its own time until all is sorted and drawn.
    """
    page.write_text(page.read_text().replace("<p>", "<p hidden>"))
    out = folder / "shot.png"
    for milliseconds in (5_000, 20_000, 80_000):
        subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--hide-scrollbars"),
                *("--force-device-scale-factor=1", "--use-angle=swiftshader"),
                *("--enable-unsafe-swiftshader", f"--window-size={SIZE},{SIZE}"),
                f"--virtual-time-budget={milliseconds}",
                f"--user-data-dir={folder / 'profile'}",
                f"--screenshot={out}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        found = np.abs(np.asarray(Image.open(out).convert("RGB")).astype(float) - ours)
        if found.mean() < 1.5:
            break
    return found


def expected(scene, eye, target, up, fov):
    """Our picture of what the page holds."""
    eye, target = torch.as_tensor(eye).float(), torch.as_tensor(target).float()
    camera = Cameras.look_at(
        eye[None], target, width=SIZE, height=SIZE, up=torch.as_tensor(up).tolist(), fov=fov
    )
    with torch.no_grad():
        image = read_splat(write_splat(scene)).render(camera).image[0]
    return (image.clamp(0, 1) * 255).numpy()


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@needs_chromium
@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0)])
def test_a_browser_draws_our_picture(scene, tmp_path, up):
    path = export_html(scene, tmp_path / "scene.html", up=up)
    view = viewer.first_view(scene, up)
    ours = expected(scene, view.eye, view.target, view.up, view.fov)
    error = difference(path, tmp_path, ours)
    assert ours.std() > 30
    assert error.mean() < 1.5
    assert error.max() < 20


@needs_chromium
def test_keys_turn_and_zoom_the_camera(scene, tmp_path):
    """Ten steps to the right, two up, one nearer: 0.6 and 0.12 rad, nine tenths."""
    keys = ["ArrowRight"] * 10 + ["ArrowUp"] * 2 + ["+"]
    press = "".join(f'dispatchEvent(new KeyboardEvent("keydown", {{ key: "{k}" }}));' for k in keys)
    text = viewer.page(scene)
    pressed = text.replace("try { start(); }", f"try {{ start(); {press} }}")  # before a frame
    assert pressed != text
    (tmp_path / "scene.html").write_text(pressed)
    view = viewer.first_view(scene)
    distance = 0.9 * (view.eye - view.target).norm()
    yaw, pitch = 0.6, viewer.PITCH + 0.12
    # the first view is from x; a growing angle goes towards the cross product of up and x
    away = [math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)]
    eye = view.target + distance * torch.tensor(away)
    ours = expected(scene, eye, view.target, view.up, view.fov)
    assert difference(tmp_path / "scene.html", tmp_path, ours).mean() < 1.5


def test_the_page_needs_nothing_else(scene):
    page = viewer.page(scene, title="a <b> & c")
    assert "<title>a &lt;b&gt; &amp; c</title>" in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=|href=|import\(|fetch\(|XMLHttpRequest", page)
    data = re.search(r'base64">([^<]+)<', page)[1]
    assert base64.b64decode(data) == write_splat(scene)
    assert not re.search(r"\$(title|view|splats)\b", page)


def test_first_view_sees_the_scene(scene):
    for up in ((0.0, 0, 2), (0, -1, 0), (1, 1, 0)):
        view = viewer.first_view(scene, up)
        camera = Cameras.look_at(
            view.eye[None], view.target, width=100, height=100, up=view.up.tolist(), fov=view.fov
        )
        seen = scene.means.detach().double() @ camera.viewmats[0, :3, :3].T
        seen = (seen + camera.viewmats[0, :3, 3]) @ camera.Ks[0].T
        pixels = seen[:, :2] / seen[:, 2:]
        inside = ((pixels > 0) & (pixels < 100)).all(-1)
        assert inside.double().mean() > 0.9
        assert pixels.std() > 10
        assert (view.eye - view.target) @ view.up > 0


def test_scenes_without_places_have_a_view():
    assert viewer.first_view(GaussianScene(0)).eye.isfinite().all()
    lone = GaussianScene(1)
    assert (viewer.first_view(lone).eye - lone.means[0]).norm() > 1
    lone.means.data[0, 0] = torch.nan
    assert viewer.first_view(lone).eye.isfinite().all()
    with pytest.raises(ValueError, match="up: got"):
        viewer.first_view(lone, (0, 0, 0))


def test_the_server_serves_one_page():
    server = viewer.server("<p>splats</p>")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{url}/?x") as answer:
            assert answer.read() == b"<p>splats</p>"
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/etc/passwd")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
