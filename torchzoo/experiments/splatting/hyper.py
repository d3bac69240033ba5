"""Paper 63: do splats that are Gaussian in an embedding too make better avatars than offsets?

A ray-traced head is filmed under random codes, and scenes whose splats follow the code are trained
on the same frames; they differ in how an embedding becomes offsets. Besides, conditioning through
the precision is timed against conditioning through the covariance.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from torchzoo.benchmark import peak_bytes
from torchzoo.common.images import psnr, ssim
from torchzoo.data.splat_scenes import surface_points
from torchzoo.data.splat_worlds import CODE, world
from torchzoo.experiment import Claim, Context, Criterion, Experiment, Measurement, Measurements
from torchzoo.ops import hyper_condition
from torchzoo.splatting import (
    AnimatableScene,
    Cameras,
    GaussianScene,
    HyperGaussian,
    HyperGaussianHead,
    SplatEmbedding,
    photometric_loss,
)
from torchzoo.splatting.schedules import adam, base_rates, means_decay, set_rates

DIRECT, STATIC, FREE, HYPER = (
    "direct head",
    "direct head, static offsets",
    "free linear maps",
    "HyperGaussians",
)
ARMS = (DIRECT, STATIC, FREE, HYPER)
FIGURES = ("PSNR", "SSIM", "masked PSNR", "ms a step")
SIZES = {"position": 3, "rotation": 4, "scale": 3, "color": 3}
LATENT, NETWORK_RATE, SPLAT_RATE = 8, 1e-3, 1e-2
MASKED = 0.1
"""Share of the head's inside that counts as detail."""
OUT_DIM, LATENTS, REPEATS, PAGE = 3, (8, 32, 64), 2, 4096


class Film(NamedTuple):
    """Frames of a head: cameras, codes `(T, 6)`, pictures `(T, H, W, 3)`, coverage `(T, H, W)`."""

    cameras: Cameras
    codes: Tensor
    images: Tensor
    alpha: Tensor


def film(frames: int, size: int, seed: int, random: torch.Generator) -> Film:
    """Every third frame from the front, the others from cameras that swing around either side."""
    index = torch.arange(frames)
    swing = 20 + 40 * torch.rand(frames, generator=random)
    angle = torch.deg2rad(swing) * torch.tensor([0.0, 1.0, -1.0])[index % 3]
    eyes = 4 * torch.stack([angle.sin(), -angle.cos(), torch.full_like(angle, 0.05)], -1)
    cameras = Cameras.look_at(eyes, (0.0, 0.0, 0.15), width=size, height=size, fov=25.0)
    codes = 2 * torch.rand(frames, CODE, generator=random) - 1
    views = [
        world("avatar", seed, code=code).render(camera)
        for camera, code in zip(cameras, codes, strict=True)
    ]
    images, alpha = (torch.cat(parts) for parts in list(zip(*views, strict=True))[:2])
    return Film(cameras, codes, images, alpha)


def detail(shown: Film) -> Tensor:
    """Where pictures change most, of the pixels amid the head, `(T, H, W)` bool."""
    padded = F.pad(rearrange(shown.images, "t h w c -> t c h w"), (1, 1, 1, 1), mode="replicate")
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    slope = (down.square() + across.square()).sum(1)
    amid = -F.max_pool2d(-shown.alpha, 3, 1, 1) > 0.999
    chosen = torch.zeros_like(amid)
    for mask, steep, inside in zip(chosen, slope, amid, strict=True):
        count = round(MASKED * int(inside.sum()))
        mask.view(-1)[torch.where(inside, steep, -1.0).flatten().topk(count).indices] = True
    return chosen


class DirectHead(nn.Module):
    """One linear layer from embeddings to all offsets, perhaps with static ones for each splat."""

    def __init__(self, num: int, *, static: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, sum(SIZES.values()))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.own = nn.Parameter(torch.zeros(num, sum(SIZES.values()))) if static else None

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Offsets by name."""
        offsets = self.linear(z) if self.own is None else self.linear(z) + self.own
        return dict(zip(SIZES, offsets.split([*SIZES.values()], -1), strict=True))


class FreeHead(nn.Module):
    """A linear map `W_n z + b_n` of each splat's own."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num, LATENT, sum(SIZES.values())))
        self.bias = nn.Parameter(torch.zeros(num, sum(SIZES.values())))

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Offsets by name."""
        offsets = torch.einsum("bnd,ndm->bnm", z, self.weight) + self.bias
        return dict(zip(SIZES, offsets.split([*SIZES.values()], -1), strict=True))


def build(arm: str, points: Tensor, colors: Tensor, seed: int) -> AnimatableScene:
    """An arm's scene; all begin with the same splats, network and pictures."""
    torch.manual_seed(seed)
    base = GaussianScene.from_points(points, colors, sh_degree=1)
    embed = SplatEmbedding(len(points), CODE, LATENT, anchors=points)
    head: nn.Module
    if arm == HYPER:
        head = HyperGaussianHead(len(points), LATENT, color=True)
    elif arm == FREE:
        head = FreeHead(len(points))
    else:
        head = DirectHead(len(points), static=arm == STATIC)
    return AnimatableScene(base, embed, head)


class Run:
    """The training of one arm, step by step."""

    def __init__(self, model: AnimatableScene, scale: float, steps: int) -> None:
        self.model, self.steps, self.done = model, steps, 0
        own = [name for name, _ in model.base.named_parameters()]
        known = base_rates(own, "short", steps=steps, scene_scale=scale)
        self.rates = {f"base.{name}": rate for name, rate in known.items()}
        for name, _ in model.named_parameters():
            shared = name.startswith(("embed.", "head.linear."))
            self.rates.setdefault(name, NETWORK_RATE if shared else SPLAT_RATE)
        self.optimizer = adam(model)
        self.seconds: list[float] = []

    def step(self, shown: Film, frame: int) -> None:
        """One step of Adam on one frame."""
        started = time.perf_counter()
        image = self.model.render(shown.cameras[frame], shown.codes[frame]).image
        assert image is not None
        photometric_loss(image, shown.images[frame : frame + 1]).backward()
        decay = means_decay(self.done, self.steps)
        means = {"base.means": self.rates["base.means"] * decay}
        set_rates(self.optimizer, self.rates | means, 1.0, 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - started)
        self.done += 1


@torch.no_grad()
def quality(model: AnimatableScene, shown: Film) -> tuple[float, float, float]:
    """Means over frames of PSNR, SSIM, and PSNR where the detail is."""
    image = model.render(shown.cameras, shown.codes).image
    assert image is not None
    scores = []
    for found, truth, mask in zip(image.clamp(0, 1), shown.images, detail(shown), strict=True):
        first, second = (rearrange(x, "h w c -> 1 c h w") for x in (found, truth))
        masked = psnr(found[None, mask], truth[None, mask])
        scores.append((psnr(first, second).item(), ssim(first, second).item(), masked.item()))
    whole, likeness, fine = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    return whole, likeness, fine


def through_covariance(z: Tensor, mean: Tensor, factor: Tensor, out_dim: int) -> Tensor:
    """Conditional means `(N, m)` by the covariance form.

    Args:
        z: Latents, `(N, d)`.
        mean: `(N, m + d)`, the attribute first.
        factor: Whose lower triangles are Cholesky factors of the covariances, `(N, m + d, m + d)`.
        out_dim: m.
    """
    covariance = factor.tril() @ factor.tril().mT
    latent = torch.linalg.cholesky(covariance[:, out_dim:, out_dim:])
    solved = torch.cholesky_solve((z - mean[:, out_dim:])[..., None], latent)
    return mean[:, :out_dim] + (covariance[:, :out_dim, out_dim:] @ solved).squeeze(-1)


def cost(num: int, latents: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds and megabytes of conditioning forward and backward, by both forms."""
    figures = dict[str, float]()
    for d in latents:
        items, z = HyperGaussian(num, d, OUT_DIM), torch.randn(num, d, requires_grad=True)
        given = [items.mean_out, items.mean_latent, items.raw_l11, items.l21]
        mean = torch.zeros(num, OUT_DIM + d, requires_grad=True)
        factor = torch.eye(OUT_DIM + d).repeat(num, 1, 1).requires_grad_()

        def precision(z: Tensor = z, given: list[Any] = given) -> None:
            hyper_condition(z, *given).sum().backward()

        def covariance(z: Tensor = z, mean: Tensor = mean, factor: Tensor = factor) -> None:
            through_covariance(z, mean, factor, OUT_DIM).sum().backward()

        for name, call in (("precision", precision), ("covariance", covariance)):
            held = peak_bytes(call, torch.device("cpu")) or 0  # gradients, first made here, too
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            figures[f"{name}, d={d}: ms"] = 1000 * statistics.median(seconds)
            figures[f"{name}, d={d}: MB"] = max(held, PAGE) / 1e6
    return figures


def trial(context: Context) -> dict[str, float]:
    """Quality and time of all arms on one head, and the cost of both forms."""
    options, seed = context.options, context.seed
    context.progress("film")
    random = torch.Generator().manual_seed(seed)
    train, test = (
        film(options[name], options["size"], seed, random) for name in ("frames", "test_frames")
    )
    views = train.cameras
    points, colors = surface_points(world("avatar", seed), views, options["splats"], seed=seed)
    steps = options["steps"]
    runs = {arm: Run(build(arm, points, colors, seed), views.scene_scale, steps) for arm in ARMS}
    while (done := runs[HYPER].done) < steps:
        if done % 25 == 0:
            context.progress(f"step {done} of {steps}")
        if done % len(views) == 0:
            order = torch.randperm(len(views), generator=random).tolist()
        for run in runs.values():  # in turns, so that all have the same machine
            run.step(train, order[done % len(views)])
    figures = dict[str, float]()
    for arm, run in runs.items():
        found = (*quality(run.model, test), 1000 * statistics.median(run.seconds))
        figures |= {f"{arm}: {name}": value for name, value in zip(FIGURES, found, strict=True)}
    context.progress("cost")
    return figures | cost(options["items"], LATENTS)


def gain(measured: Measurements, figure: str, over: str = DIRECT) -> Measurement:
    """What HyperGaussians are ahead of another arm, seed by seed."""
    return measured[f"{HYPER}: {figure}"] - measured[f"{over}: {figure}"]


def _better(measured: Measurements) -> tuple[bool, str]:
    whole, fine = gain(measured, "PSNR"), gain(measured, "masked PSNR")
    seeds = ", ".join(
        f"{a:+.2f} and {b:+.2f}" for a, b in zip(whole.values, fine.values, strict=True)
    )
    return min(*whole.values, *fine.values) > 0, f"{seeds} dB by seed, all and detail"


def _finer(measured: Measurements) -> tuple[bool, str]:
    whole, fine = gain(measured, "PSNR"), gain(measured, "masked PSNR")
    return fine.mean >= whole.mean, f"{fine} dB on detail, {whole} dB on all"


def _not_static(measured: Measurements) -> tuple[bool, str]:
    ahead, free = gain(measured, "PSNR", STATIC), gain(measured, "PSNR", FREE)
    control = f"over free linear maps, the same functions otherwise parametrised, {free} dB"
    return ahead.mean >= 0, f"{ahead} dB; {control}"


def _time(measured: Measurements) -> tuple[bool, str]:
    ours, theirs = (measured[f"{arm}: ms a step"] for arm in (HYPER, DIRECT))
    ratio = ours.mean / theirs.mean
    return ratio <= 1.15, f"{ratio:.2f} times; {ours} ms against {theirs} ms"


def _cheap(measured: Measurements) -> tuple[bool, str]:
    faster, smaller = (
        measured[f"covariance, d=32: {unit}"].mean / measured[f"precision, d=32: {unit}"].mean
        for unit in ("ms", "MB")
    )
    return (
        faster >= 5 and smaller >= 4,
        f"{faster:.1f} times as fast, 1/{smaller:.1f} of the memory",
    )


def plot(measured: Measurements, figure: Any) -> None:
    """Quality of the arms, and the cost of both forms over the size of the latent."""
    quality, times = figure.subplots(1, 2, width_ratios=(1.5, 1))
    colors = ("0.6", "tab:orange", "tab:green", "tab:blue")
    for k, (arm, color) in enumerate(zip(ARMS, colors, strict=True)):
        for place, name in enumerate(("PSNR", "masked PSNR")):
            found = measured[f"{arm}: {name}"]
            label = arm if not place else None
            spot = place + 0.2 * (k - 1.5)
            quality.bar(spot, found.mean, 0.18, yerr=found.std_error, color=color, label=label)
    means = [measured[f"{a}: {n}"].mean for a in ARMS for n in ("PSNR", "masked PSNR")]
    quality.set_ylim(min(means) - 2, max(means) + 2.5)
    quality.set_xticks([0, 1], ["all pixels", "detail"])
    quality.set_ylabel("PSNR of unseen codes (dB)")
    quality.set_title("heads that follow a code", fontsize=10)
    quality.legend(fontsize=8, ncols=2, loc="upper center")
    for name, color in (("covariance", "tab:orange"), ("precision", "tab:blue")):
        values = [measured[f"{name}, d={d}: ms"].mean for d in LATENTS]
        times.plot(LATENTS, values, "o-", color=color, label=f"through the {name}")
    times.set_xscale("log", base=2)
    times.set_yscale("log")
    times.set_xticks(LATENTS, [str(d) for d in LATENTS])
    times.set_xlabel("size of the latent")
    times.set_ylabel("milliseconds, forward and backward")
    times.set_title("conditioning", fontsize=10)
    times.legend(fontsize=8)
    times.grid(alpha=0.3)


EXPERIMENT = Experiment(
    paper=63,
    claim=Claim(
        statement=(
            "Splats that are Gaussian in a learned embedding too, and are conditioned on it, make "
            "better avatars than plain ones, above all in fine detail; conditioning through the "
            "precision makes that cheap."
        ),
        figure="better numbers and looks on 19 subjects, in place of a deformation network's head",
        source="abstract",
    ),
    setup=(
        "A ray-traced head that follows a code of six numbers (jaw, eyes, sun, brows), another one "
        "a seed: 48 frames of 48 x 48 pixels of random codes, every third from the front, the "
        "others from cameras that swing 20 to 60 degrees to either side; 16 frames of other codes "
        "are held out. 1,000 splats from points of the head at rest; a network of two layers of 64 "
        "takes encoded place and code to embeddings of 8 numbers; places, rotations, scales and "
        "colours get offsets. 250 steps on single frames: splats at the rates of short runs, "
        "network 0.001, numbers of single splats in the head 0.01. Detail is the tenth of the "
        "pixels amid the head where the picture changes most. Conditioning is timed with 20,000 "
        "attributes of 3 numbers."
    ),
    baseline=(
        "The same network with a linear layer in place of HyperGaussians; that with a learned "
        "offset for each splat; and a free linear map for each splat, which makes the same "
        "functions. The same frames, steps and rates"
    ),
    criteria=(
        Criterion(
            "held-out PSNR above the direct head's, on all pixels and on detail, in every seed",
            _better,
        ),
        Criterion("mean gain over the direct head on detail at least that on all pixels", _finer),
        Criterion("mean PSNR at least that of the direct head with static offsets", _not_static),
        Criterion("a step takes at most 1.15 times as long as with the direct head", _time),
        Criterion(
            "conditioning on 32 latents through the precision at least 5 times as fast as through "
            "the covariance, in a quarter of the memory at most",
            _cheap,
        ),
    ),
    budgets={
        "full": {
            "seeds": 3,
            "frames": 48,
            "test_frames": 16,
            "size": 48,
            "splats": 1000,
            "steps": 250,
            "items": 20_000,
        },
        "large": {
            "seeds": 3,
            "frames": 48,
            "test_frames": 16,
            "size": 64,
            "splats": 1000,
            "steps": 1500,
            "items": 100_000,
        },
        "smoke": {
            "seeds": 1,
            "frames": 6,
            "test_frames": 3,
            "size": 16,
            "splats": 60,
            "steps": 4,
            "items": 20,
        },
    },
    trial=trial,
    plot=plot,
)
