"""Small training runs of splats; some of the functions are called in processes."""

import os
import time
from pathlib import Path

import torch

from torchzoo.splatting.cameras import Cameras
from torchzoo.splatting.fitting import SplatTrainer
from torchzoo.splatting.scene import GaussianScene
from torchzoo.splatting.strategy import DefaultStrategy, MCMCStrategy

VIEWS, SIZE = 6, 12


def l1(image, target):
    return (image - target).abs().mean()


def views(count=VIEWS, size=SIZE, *, dtype=torch.float32):
    """Cameras around, and pictures of coloured stripes."""
    cameras = Cameras.orbit(count, radius=3.0, width=size, height=size, dtype=dtype)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [
        (x + 3.7 * y + 2.3 * view)[..., None] + torch.tensor([0, 2, 4]) for view in range(count)
    ]
    return cameras, torch.stack(waves).to(dtype).mul(0.7).sin().mul(0.4).add(0.5)


def splats(count=25, *, sh_degree=1, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    xyz = 0.5 * torch.randn(count, 3, generator=random, dtype=dtype)
    rgb = torch.rand(count, 3, generator=random, dtype=dtype)
    scene = GaussianScene.from_points(xyz, rgb, sh_degree=sh_degree, init_opacity=0.4)
    # of a ball the gradient of the rotation is rounding, which Adam makes a step of
    scene.log_scales.data += 0.5 * torch.randn(count, 3, generator=random, dtype=dtype)
    return scene


def strategy(name):
    """A strategy that acts often in a run of twenty steps."""
    often = {"refine_start": 2, "refine_stop": 18, "refine_every": 3}
    if name == "mcmc":
        return MCMCStrategy(cap_max=40, growth=0.2, min_opacity=0.3, **often)
    if name != "default":
        return None
    sizes = {"grow_scale3d": 0.25, "prune_scale3d": 1.0, "cap_max": 45}
    return DefaultStrategy(grow_grad2d=1e-3, prune_opacity=0.2, reset_every=8, **sizes, **often)


def trainer(name="default", *, steps=20, scene=None, **options):
    options = {"loss": l1, "strategy": strategy(name), "sh_every": 5, "seed": 3} | options
    return SplatTrainer(scene or splats(), *views(), steps=steps, **options)


def train_in_process(out, steps):
    """The body of a process that is killed; it says after each step how far it is."""
    torch.set_num_threads(1)

    def progress(done, total, text):
        Path(out, "step").write_text(str(done))
        time.sleep(0.01)

    trainer(steps=steps).fit(
        out=Path(out, "checkpoints"), save_every=3, resume=True, progress=progress
    )
    Path(out, "finished").touch()


def train_on_rank(rank, folder, name):
    """One of two processes that share every step's views."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    scene = splats(dtype=torch.float64)
    if rank:  # the first process's scene counts
        scene.means.data.zero_()
    run = trainer(name, scene=scene, batch=2, steps=12)
    history = run.fit(out=Path(folder, "checkpoints"))
    torch.save((scene.state_dict(), history), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
