"""A stream of a trained video network against the same network computed whole for each frame.

A camera films photographs: it stands still, moves now and then, or pans all the time, always with
sensor noise. The network is trained on such films for a moment, with the penalty on changes and a
threshold of three times the noise; the whole network is torch's own layers with its weights and
quantised activations, so that both give the same logits. The work stated is what the kernels did:
multiplications counted by `DeltaMeter`, over those of the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from torchzoo.benchmark import OURS, Bench, Case
from torchzoo.data.photographs import PHOTOGRAPHS, camera_films
from torchzoo.sparsity import DeltaActivation, DeltaConv2d, DeltaLinear, DeltaMeter, VideoNet
from torchzoo.trainer import fit

SIDE, CHANNELS, HIDDEN, NOISE = 128, (32, 64, 128), (512,), 0.02
FRAMES, RATE = 16, 10.0
CAMERAS: dict[str, dict[str, Any]] = {
    "stands still": {"hold": FRAMES},
    "moves every 8th frame": {"hold": 8, "pan": 2.0},
    "pans": {"hold": 1, "pan": 0.5},
}
FILMED: dict[str, Any] = {"scale": 2.0, "noise": NOISE}


@cache
def trained(rate: float = RATE, side: int = SIDE, epochs: int = 4) -> VideoNet:
    """A network that tells the photographs apart, after a short training on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoNet(
            3,
            len(PHOTOGRAPHS),
            frame_size=(side, side),
            channels=CHANNELS,
            hidden=HIDDEN,
            rate=rate,
            threshold=3 * NOISE,
        )
        clips = camera_films(8, frames=4, size=side, hold=2, pan=2.0, seed=0, **FILMED)
        fit(
            model,
            VideoNet.loss,
            clips,
            epochs=epochs,
            batch_size=4,
            lr=3e-3,
            generator=torch.Generator().manual_seed(0),
        )
    return model


def film(camera: str, side: int = SIDE) -> Tensor:
    """Frames `(T, 1, S, S, 3)` of a film that training has not seen."""
    frames = camera_films(1, frames=FRAMES, size=side, seed=1, **CAMERAS[camera], **FILMED).frames
    return rearrange(frames, "1 t h w c -> t 1 h w c")


def whole(model: VideoNet) -> Callable[[Tensor], Tensor]:
    """The network of torch's own layers, for a frame as it was sent."""
    layers: list[nn.Module] = []
    for layer in model.layers:
        if isinstance(layer, DeltaConv2d):
            out, channels, *kernel = layer.weight.shape
            conv = nn.Conv2d(channels, out, (kernel[0], kernel[1]), layer.stride, layer.padding)
            conv.load_state_dict(layer.state_dict())
            layers.append(conv.to(layer.weight.device).to(memory_format=torch.channels_last))
        elif isinstance(layer, DeltaActivation):
            layers.append(_Levels(layer, 1 if isinstance(layers[-1], nn.Linear) else 3))
        elif isinstance(layer, DeltaLinear):
            if not any(isinstance(m, nn.Flatten) for m in layers):
                layers.append(nn.Flatten())
            linear = nn.Linear(layer.in_features, layer.out_features)
            linear.load_state_dict(layer.state_dict())
            layers.append(linear.to(layer.weight.device))
    network = nn.Sequential(*layers).eval()
    return lambda frame: network(frame.movedim(-1, -3))


class _Levels(nn.Module):
    """Quantised activations of a frame, channels first."""

    def __init__(self, layer: DeltaActivation, dims: int):
        super().__init__()
        step = layer.threshold.detach().abs()
        self.step = nn.Buffer(step if dims == 1 else step[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x.relu_() / self.step).mul_(self.step)


def contenders(
    device: torch.device, camera: str, side: int = SIDE, epochs: int = 4
) -> Mapping[str, Callable[[], Any]]:
    """All frames of a film but the first, which a stream has to compute whole."""
    model = trained(side=side, epochs=epochs).to(device)
    frames = film(camera, side).to(device)
    stream, network = model.to_stream(), whole(model)
    with torch.no_grad():
        _, start = stream.step(frames[0], stream.init_state((1, side, side)))
    layer = model.layers[0]
    assert isinstance(layer, DeltaConv2d)
    sent = [frames[0] * (frames[0].abs() > layer.threshold)]
    for frame in frames[1:]:
        sent.append(torch.where((frame - sent[-1]).abs() > layer.threshold, frame, sent[-1]))

    @torch.no_grad()
    def steps() -> Tensor:
        state = start
        for frame in frames[1:]:
            y, state = stream.step(frame, state)
        return y

    @torch.no_grad()
    def dense() -> Tensor:
        for frame in sent[1:]:
            y = network(frame)
        return y

    return {OURS: steps, "whole": dense}


def work(camera: str, side: int = SIDE, epochs: int = 4) -> tuple[int, int]:
    """Multiplications that the kernels did for a film but its first frame, and the whole's."""
    calls = contenders(torch.device("cpu"), camera, side, epochs)
    with DeltaMeter() as meter:
        calls[OURS]()
    return meter.macs, meter.dense_macs


def _case(camera: str, share: float) -> Case:
    macs = 56.9e6 * (FRAMES - 1) * share
    weights = 4.0 * 16.9e6
    return Case(
        f"the camera {camera}, {share:.1%} multiplied",
        partial(contenders, camera=camera),
        2 * macs,
        weights * share * (FRAMES - 1),
        2 * macs,
    )


BENCH = Bench(
    "video",
    [_case("stands still", 0.013), _case("moves every 8th frame", 0.017), _case("pans", 0.033)],
)
