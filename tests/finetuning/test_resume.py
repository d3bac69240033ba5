"""A run that is stopped at any moment goes on to the very same weights."""

import dataclasses
import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.finetuning.runs import RECIPE, train, train_in_process
from torchzoo.errors import TorchzooError
from torchzoo.finetuning import checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


def same_files(one, two, last=20):
    for name in ("last", "best", f"checkpoints/step-{last}"):
        mine, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    rows = [
        json.loads((f / f"checkpoints/step-{last}.json").read_text())["state"] for f in (one, two)
    ]
    for state in rows:
        state["run"]["resumed"] = 0
        for row in state["run"]["history"]:
            row["seconds"] = 0
    assert rows[0] == rows[1]


class Stop(Exception):
    pass


def stop_after(step):
    def progress(done, total, text):
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("step", [1, 3, 5, 8, 16, 20])
def test_it_goes_on_bit_for_bit(whole, tmp_path, step):
    with pytest.raises(Stop):
        train(tmp_path, progress=stop_after(step))
    torch.manual_seed(step)  # what a new process has drawn before
    model, run = train(tmp_path, resume=True)
    assert run.resumed == (20 if step == 20 else step // 3 * 3)
    assert run.step == 20
    same_files(whole, tmp_path)
    kept = load_file(tmp_path / "checkpoints/step-20.safetensors")
    assert all(torch.equal(kept[f"model.{n}"], value) for n, value in model.state_dict().items())


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path, damage, suffix):
    with pytest.raises(Stop):
        train(tmp_path, progress=stop_after(8))
    damage(tmp_path / f"checkpoints/step-6{suffix}")
    with pytest.warns(UserWarning, match="after step 6 is damaged .*goes on from .* step 3"):
        _, run = train(tmp_path, resume=True)
    assert run.resumed == 3
    same_files(whole, tmp_path)


def test_without_a_whole_checkpoint_it_starts_and_says_so(whole, tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, progress=stop_after(4))
    flip(tmp_path / "checkpoints/step-3.safetensors")
    with pytest.warns(UserWarning, match="goes on from the start"):
        _, run = train(tmp_path, resume=True)
    assert run.resumed == 0
    same_files(whole, tmp_path)


def test_a_half_written_checkpoint_is_none(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints.save(folder, 3, {"a": torch.ones(2)}, {"b": 1})
    save_file({"a": torch.zeros(2)}, folder / "step-6.safetensors")  # killed before the JSON
    (folder / ".step-9.safetensors.x.part").write_bytes(b"half")
    found = checkpoints.load_last(folder)
    assert (found.step, found.state) == (3, {"b": 1})
    assert torch.equal(found.tensors["a"], torch.ones(2))


def test_tensors_that_share_memory_are_written_whole(tmp_path):
    tied = torch.randn(3, 4)
    checkpoints.save(tmp_path, 1, {"a": tied, "b": tied, "c": tied.T}, {})
    found = checkpoints.load_last(tmp_path).tensors
    assert all(torch.equal(found[n], t) for n, t in (("a", tied), ("b", tied), ("c", tied.T)))


def test_a_run_is_not_overwritten_nor_mixed_with_another(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(TorchzooError, match="holds a run; resume it, or take another folder"):
        train(out)
    with pytest.raises(TorchzooError, match=r"made with lr = 0.02, got 0.1; resume with the same"):
        train(out, dataclasses.replace(RECIPE, lr=0.1), resume=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    with pytest.raises(TorchzooError, match="holds another model"):
        train(out, model=model, resume=True)


def kill_until_finished(out, recipe, kills):
    """Kill processes (-9) at random moments of a run and let the last one finish."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "tests.finetuning.runs"])
    chance, reached = random.Random(kills), []
    while not (out / "finished").exists():
        process = context.Process(target=train_in_process, args=(out, recipe), daemon=True)
        process.start()
        if len(reached) < kills:
            enough, last = step_of(out) + chance.randint(1, 4), -1
            while process.is_alive() and last < enough:
                last = step_of(out)
            time.sleep(chance.random() / 100)  # somewhere within a step or a write
            process.kill()
            reached.append(step_of(out))
        process.join(60)
        assert process.exitcode in (0, -9)
    return reached


def step_of(out):
    try:
        return int((out / "step").read_text())
    except (FileNotFoundError, ValueError):
        return 0


@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, 5), pytest.param(20, 30, marks=pytest.mark.slow)]
)
def test_kills_change_nothing(tmp_path, monkeypatch, kills, epochs):
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: sums of more threads round otherwise
    train(tmp_path / "whole", recipe)
    torch.set_num_threads(threads)
    (tmp_path / "killed").mkdir()
    reached = kill_until_finished(tmp_path / "killed", recipe, kills)
    assert len(reached) == kills
    assert 0 < max(reached) < 5 * epochs
    same_files(tmp_path / "whole", tmp_path / "killed", last=5 * epochs)
