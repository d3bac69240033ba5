"""A training run that is stopped at any moment goes on to the very same scene."""

import multiprocessing
import random
import shutil
import time

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from tests.splatting.runs import splats, train_in_process, train_on_rank, trainer
from torchzoo.errors import TorchzooError

STEPS = 20


class Stop(Exception):
    pass


def stop_after(step):
    def progress(done, total, text):
        if done == step:
            raise Stop

    return progress


def last_tensors(folder, step=STEPS):
    """All that the last checkpoint holds but the times."""
    tensors = load_file(folder / f"step-{step}.safetensors")
    del tensors["history.seconds"]
    return tensors


def same_tensors(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module", params=["default", "mcmc"])
def whole(request, tmp_path_factory):
    """A strategy's name, and the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    history = trainer(request.param).fit(out=folder, save_every=3)
    assert len(set(history["splats"])) > 2  # it was densified
    return request.param, folder


@pytest.mark.parametrize("step", [4, 7, 13, 20])
def test_it_goes_on_bit_for_bit(whole, tmp_path, step):
    name, folder = whole
    torch.manual_seed(7)
    with pytest.raises(Stop):
        trainer(name).fit(out=tmp_path, save_every=3, progress=stop_after(step))
    torch.manual_seed(step)  # what a new process has drawn before
    run = trainer(name)
    history = run.fit(out=tmp_path, save_every=3, resume=True)
    assert [len(values) for values in history.values()] == [STEPS] * 4
    found, expected = last_tensors(tmp_path), last_tensors(folder)
    same_tensors(found, expected)
    kinds = {key.partition(".")[0] for key in found}
    kinds_expected = {"scene", "adam", "random", "history"}
    assert kinds == kinds_expected | ({"strategy"} if name == "default" else set())
    for key, value in run.scene.state_dict().items():
        assert torch.equal(value, expected[f"scene.{key}"])


def test_a_resumed_run_has_the_same_state_at_once(whole, tmp_path):
    """Adam, the statistics and the generators are back before the next step."""
    name, folder = whole
    shutil.copytree(folder, tmp_path / "copy")
    for end in ("json", "safetensors"):
        (tmp_path / f"copy/step-{STEPS}.{end}").unlink()
    run = trainer(name)
    run._load(tmp_path / "copy")
    assert run.step == 18
    run._save(tmp_path / "again")
    same_tensors(last_tensors(tmp_path / "again", 18), last_tensors(folder, 18))


def test_the_clock_of_a_run_goes_on():
    run = trainer("none", steps=4)
    run.step, run.history["seconds"] = 2, [500.0, 1000.0]
    seconds = run.fit()["seconds"]
    assert len(seconds) == 4
    assert sorted(seconds) == seconds


def test_ten_checkpoints_are_written_unless_told_otherwise(tmp_path, monkeypatch):
    """Every so many steps, rounded up, and after the last one."""
    run, saved = trainer("none", steps=11), []
    monkeypatch.setattr(run, "_save", lambda folder: saved.append(run.step))
    run.fit(out=tmp_path)
    assert saved == [2, 4, 6, 8, 10, 11]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path):
    name, folder = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / f"step-{STEPS}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="after step 20 is damaged .*goes on from .* step 18"):
        trainer(name).fit(out=copy, save_every=3, resume=True)
    same_tensors(last_tensors(copy), last_tensors(folder))


def test_a_run_is_not_overwritten_nor_mixed_with_another(whole, tmp_path):
    name, folder = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(TorchzooError, match="holds a run; resume it, or take another folder"):
        trainer(name).fit(out=copy)
    for options, message in (
        ({"seed": 4}, "made with seed = 3, got 4; resume with the same options"),
        ({"steps": 30}, "made with steps = 20, got 30"),
        ({"rates": {"quats": 0.5}}, "made with rates = "),
        ({"batch": 2}, "made with batch = 1, got 2"),
        ({"final_batch": 2}, "made with final_batch = 1, got 2"),
        ({"dilation": 2}, "made with dilation = 1, got 2"),
        ({"sh_every": 6}, "made with sh_every = 5, got 6"),
        ({"strategy": None}, "made with "),
        ({"background": (1.0, 1.0, 1.0)}, "made with background = None"),
    ):
        with pytest.raises(TorchzooError, match=message):
            trainer(name, **options).fit(out=copy, resume=True)
    with pytest.raises(TorchzooError, match=r"made with rates|holds another scene"):
        trainer(name, scene=splats(sh_degree=0)).fit(out=copy, resume=True)


def test_without_a_checkpoint_a_resumed_run_starts(tmp_path):
    run = trainer("none", steps=2)
    run.fit(out=tmp_path, resume=True)
    assert run.step == 2
    assert run.fit() is run.history  # nothing is left to do


def reached(out):
    try:
        return int((out / "step").read_text())
    except (FileNotFoundError, ValueError):
        return 0


@pytest.mark.slow
def test_kills_change_nothing(tmp_path, monkeypatch):
    """Processes are killed (-9) at random moments of a run, and the last one finishes it."""
    steps, kills, chance, seen = 60, 8, random.Random(5), []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.splatting.runs"])
    for folder, left in (("whole", 0), ("killed", kills)):
        out = tmp_path / folder
        out.mkdir()
        while not (out / "finished").exists():
            process = context.Process(target=train_in_process, args=(out, steps), daemon=True)
            process.start()
            if left:
                enough, left = reached(out) + chance.randint(1, 6), left - 1
                while process.is_alive() and reached(out) < enough:
                    time.sleep(0.001)
                time.sleep(chance.random() / 100)  # somewhere within a step or a write
                process.kill()
                seen.append(reached(out))
            process.join(120)
            assert process.exitcode in (0, -9)
    assert 0 < max(seen) < steps
    same_tensors(
        last_tensors(tmp_path / "killed/checkpoints", steps),
        last_tensors(tmp_path / "whole/checkpoints", steps),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "default", "mcmc"])
def test_two_processes_train_as_one(tmp_path, name):
    torch.multiprocessing.spawn(train_on_rank, (str(tmp_path), name), nprocs=2)
    (one, history), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    same_tensors(one, two)
    assert [history[key] == other[key] for key in ("loss", "psnr", "splats")] == [True] * 3
    alone = trainer(name, scene=splats(dtype=torch.float64), batch=2, steps=12)
    expected = alone.fit()
    assert history["splats"] == expected["splats"]
    for key in ("loss", "psnr"):
        assert history[key] == pytest.approx(expected[key], rel=1e-8)
    for key, value in alone.scene.state_dict().items():
        torch.testing.assert_close(one[key], value, rtol=1e-6, atol=1e-8)
    resumed = trainer(name, scene=splats(dtype=torch.float64), batch=2, steps=12)
    resumed.fit(out=tmp_path / "checkpoints", resume=True)  # by one process, of a run of two
    same_tensors(resumed.scene.state_dict(), one)


@pytest.mark.slow
def test_a_batch_has_a_view_for_each_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        original, dist.get_world_size = dist.get_world_size, lambda: 2
        with pytest.raises(ValueError, match="batch: got 1, expected at least 2"):
            trainer("none", batch=1)
    finally:
        dist.get_world_size = original
        dist.destroy_process_group()
