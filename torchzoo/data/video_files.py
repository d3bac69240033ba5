"""Frames of a video file or a camera, one at a time, as the streaming models take them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_video(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    gray: bool = False,
    every: int = 1,
    format: str | None = None,
    options: dict[str, str] | None = None,
) -> Iterator[Tensor]:
    """Read frames of anything that FFmpeg reads, through PyAV: files, addresses, cameras.

    Frames are decoded when they are asked for, so that a camera's stream may have no end. The
    source is opened at once and closed after the last frame, or when the iterator goes.

    Args:
        source: A path or address; of a camera its device, with `format`.
        size: Height and width to which frames are scaled; None: theirs.
        gray: One channel, the luma (of Rec. 601), instead of red, green and blue.
        every: Take the first of so many frames.
        format: The container or device's format where the name doesn't tell: `"v4l2"` for
            `/dev/video0` on Linux, `"avfoundation"` on macOS, `"dshow"` on Windows.
        options: FFmpeg's options of the format, such as `{"framerate": "30"}`.

    Yields:
        Frames `(H, W, C)`, float32 in [0, 1], with C = 3 or, gray, 1.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: `every` or a side below 1, or a source without a video stream.
        OSError: The source is missing or can't be opened; PyAV's `FFmpegError` where it can't be
            decoded.

    Example:
        A camera, a frame at a time:

            state = model.init_state((1, 120, 160))
            for frame in read_video("/dev/video0", format="v4l2", size=(120, 160)):
                logits, state = model.step(frame[None], state)
    """
    if every < 1:
        raise ValueError(f"every: expected a number ≥ 1, got {every}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected a height and a width ≥ 1, got {size}")
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "read_video needs PyAV: pip install 'torchzoo[video]' (or pip install av)"
        ) from error
    container = av.open(str(source), format=format, options=options or {})
    if not container.streams.video:
        container.close()
        raise ValueError(f"source: {source} has no video stream")
    return _frames(container, size, gray, every)


def _frames(
    container: Any, size: tuple[int, int] | None, gray: bool, every: int
) -> Iterator[Tensor]:
    height, width = size or (None, None)
    luma = torch.tensor([[0.299], [0.587], [0.114]])
    with container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % every == 0:
                array = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
                values = torch.from_numpy(array).to(torch.float32) / 255
                yield values @ luma if gray else values
