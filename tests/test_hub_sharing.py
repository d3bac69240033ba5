"""Sharing: the model card, another number of classes, and a hub that is a local server."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import torchzoo
from torchzoo.errors import WeightsError
from torchzoo.hub import from_pretrained
from torchzoo.moe import TopKGate
from torchzoo.sparsity import VideoNet


def test_the_card_says_what_the_catalogue_knows(tmp_path):
    gate = torchzoo.create("TopKGate", dim=4, num_experts=3, k=1)
    training = {"data": "noise", "metric": {"accuracy": 0.5}, "seed": 3, "command": "python -m x"}
    folder = gate.save_pretrained(tmp_path / "gate", model_card_kwargs=training)
    card = (folder / "README.md").read_text()
    (paper,) = (p for p in torchzoo.papers() if p.number == 146)
    for text in (
        "license: apache-2.0",
        "# TopKGate",
        paper.title,
        f"claimed: {paper.claim}",
        "measured by torchzoo: ",
        "torchzoo reproduce 146",
        "- metric: accuracy 0.5",
        "- command: `python -m x`",
        "## Citation",
        "Shazeer et al.",
        "## License",
    ):
        assert text in card, text
    verdict = torchzoo.catalogue.recorded_result(paper)["verdict"]
    assert f"measured by torchzoo: {verdict}" in card


@pytest.fixture
def video(tmp_path):
    torch.manual_seed(0)
    model = VideoNet(1, 5, frame_size=(8, 8), channels=(5,), hidden=(6,))
    return model, model.save_pretrained(tmp_path / "video")


def test_another_number_of_classes_draws_only_the_head_anew(video):
    model, folder = video
    with pytest.warns(UserWarning, match="were drawn anew for other classes") as caught:
        new = from_pretrained(folder, num_classes=3)
    old, now = model.state_dict(), new.state_dict()
    changed = {k for k in old if old[k].shape != now[k].shape or not torch.equal(old[k], now[k])}
    assert len(changed) == 2  # weight and bias of the last layer, though 5 channels are there too
    assert all(key in str(caught[0].message) for key in changed)
    assert new(torch.randn(1, 2, 8, 8, 1)).shape == (1, 2, 3)
    assert torch.isfinite(new(torch.randn(1, 2, 8, 8, 1))).all()


def test_a_change_of_something_else_is_still_an_error(video):
    _, folder = video
    with pytest.raises(WeightsError, match="wrong shape"):
        from_pretrained(folder, channels=(4,))
    with pytest.raises(WeightsError, match="wrong shape"):
        from_pretrained(folder, num_classes=3, hidden=(7,))
    same = from_pretrained(folder, num_classes=5).state_dict()
    assert all(torch.equal(same[key], value) for key, value in video[0].state_dict().items())


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: the list of files, their sizes, their bytes."""

    folder = None
    mended = None
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        parts = self.path.partition("?")[0].strip("/").split("/")
        commit = "a" * 40
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        if "tree" in parts:
            rows = [
                {"type": "file", "path": n, "size": s, "oid": f"{s:040}"} for n, s in sizes.items()
            ]
            self.reply(json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
        elif parts[:2] == ["api", "models"]:
            files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            info = {"id": "me/gate", "sha": commit, "siblings": files}
            self.reply(json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif parts[-1] in sizes:
            data = (self.folder / parts[-1]).read_bytes()
            self.reply(data, {"X-Repo-Commit": commit, "ETag": f'"{len(data):040}"'}, body)
        else:
            self.send_error(404)

    def reply(self, data, headers, body):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        whole = len(data) < 5000 or self.mended.exists()
        if body:
            self.wfile.write(data if whole else data[:4000])
        self.close_connection = not whole

    def log_message(self, *args):
        pass


PROGRAM = """
import sys
from pathlib import Path

import huggingface_hub.constants
import torchzoo
from torchzoo.errors import WeightsError


def load():
    try:
        print(float(torchzoo.from_pretrained("me/gate").weight.double().sum()))
    except WeightsError as error:
        print("WeightsError", error)


load()
Path(sys.argv[1]).touch()  # from now on the server sends whole files
load()
huggingface_hub.constants.HF_HUB_OFFLINE = True
load()
"""


def test_an_interrupted_download_is_never_loaded_and_a_whole_one_is_kept(tmp_path):
    gate = TopKGate(64, 32, 1)
    Hub.folder, Hub.mended = gate.save_pretrained(tmp_path / "served"), tmp_path / "mended"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(Hub.mended)],
            env=os.environ | told,
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
    finally:
        server.shutdown()
    broken, *loaded = result.stdout.strip().splitlines()
    assert broken.startswith("WeightsError can't download 'me/gate' from the hub")
    expected = float(gate.weight.detach().double().sum())
    assert [float(value) for value in loaded] == [pytest.approx(expected)] * 2
