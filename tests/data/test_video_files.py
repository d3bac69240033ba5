"""Reading videos: a lossless file written by the test, where PyAV is installed."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchzoo.data.video_files import read_video


@pytest.fixture
def video(tmp_path):
    """Ten frames of noise, 12 x 16, losslessly coded, and the file."""
    av = pytest.importorskip("av")
    frames = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    path = tmp_path / "noise.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 12, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path, torch.from_numpy(frames).float() / 255


def test_frames_are_those_written(video):
    path, frames = video
    read = torch.stack(list(read_video(path)))
    assert read.dtype == torch.float32
    assert torch.equal(read, frames)
    assert torch.equal(torch.stack(list(read_video(str(path), every=4))), frames[::4])


def test_frames_are_scaled_and_gray(video):
    path, frames = video
    gray = torch.stack(list(read_video(path, gray=True)))
    assert gray.shape == (10, 12, 16, 1)
    luma = (frames * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    torch.testing.assert_close(gray, luma, rtol=0, atol=1e-6)
    small = next(read_video(path, size=(6, 8)))
    assert small.shape == (6, 8, 3)
    assert abs(small.mean() - frames[0].mean()) < 0.03


def test_frames_come_one_by_one_and_the_file_is_closed(monkeypatch):
    """With a stand-in for the library, so that it is tested where that is not installed."""
    decoded, calls = [], []

    class Frame:
        def __init__(self, index):
            self.index = index

        def reformat(self, **options):
            calls.append(options)
            return self

        def to_ndarray(self):
            return np.full((2, 4, 3), 51 * self.index, dtype=np.uint8)

    class Container:
        streams = SimpleNamespace(video=[0])
        closed = False

        def decode(self, video):
            for index in range(6):
                decoded.append(index)
                yield Frame(index)

        def close(self):
            self.closed = True

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    container = Container()
    opened = []
    library = SimpleNamespace(
        open=lambda *args, **kwargs: opened.append((args, kwargs)) or container
    )
    monkeypatch.setitem(sys.modules, "av", library)
    frames = read_video("/dev/video0", format="v4l2", size=(2, 4), every=2, options={"rate": "5"})
    assert opened == [(("/dev/video0",), {"format": "v4l2", "options": {"rate": "5"}})]
    torch.testing.assert_close(next(frames), torch.zeros(2, 4, 3))
    torch.testing.assert_close(next(frames), torch.full((2, 4, 3), 0.4))
    assert decoded == [0, 1, 2]
    assert calls == [{"width": 4, "height": 2, "format": "rgb24"}] * 2
    assert not container.closed
    assert len(list(frames)) == 1
    assert container.closed

    silent = Container()
    silent.streams = SimpleNamespace(video=[])
    library.open = lambda *args, **kwargs: silent
    with pytest.raises(ValueError, match=r"source: sound.mp3 has no video"):
        read_video("sound.mp3")
    assert silent.closed


def test_other_sources_are_refused(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(OSError, match="none"):
        read_video(tmp_path / "none.mp4")


def test_bad_options_are_named_before_anything_is_opened():
    with pytest.raises(ValueError, match="every: expected a number ≥ 1, got 0"):
        read_video("none.mp4", every=0)
    with pytest.raises(ValueError, match="size: expected"):
        read_video("none.mp4", size=(0, 4))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"torchzoo\[video\]"):
        read_video("none.mp4")
