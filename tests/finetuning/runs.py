"""A small run with all that a resume has to bring back; its functions are called in processes."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from torchzoo.finetuning import Recipe, classification, finetune

RECIPE = Recipe(epochs=4, batch_size=12, lr=0.02, accumulate=2, ema=0.8, save_every=3, seed=5)


def data(rows=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def network(norm=True, dropout=0.2):
    torch.manual_seed(2)
    parts = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2)]
    return nn.Sequential(*(part for part in parts if norm or not isinstance(part, nn.BatchNorm1d)))


def train(out, recipe=RECIPE, progress=lambda *_: None, model=None, **options):
    model = model or network()
    rows = data()
    options = {"out": out, "device": "cpu", **options}
    run = finetune(model, classification(), rows, rows, recipe, progress=progress, **options)
    return model, run


def train_in_process(out, recipe):
    """The body of a process that is killed; it says after each step how far it is."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives

    def progress(done, total, text):
        Path(out, "step").write_text(str(done))
        time.sleep(0.01)

    train(out, recipe, progress, resume=True)
    Path(out, "finished").touch()


def train_on_rank(port, recipe, sharded=None):
    """One rank of several; gives its weights, or where it went on, and its history."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sharded is not None:
        for resume in (False, True):  # the second only loads the last checkpoint
            plain = network(norm=False, dropout=0.0)
            _, run = train(sharded, recipe, model=plain, fsdp=True, resume=resume)
        return run.resumed, run.history
    model, run = train(None, recipe, model=network(norm=False, dropout=0.0))
    return {name: value.numpy() for name, value in model.state_dict().items()}, run.history
