"""`torchzoo reproduce`: the report, the files, resuming, and everything that can go wrong."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

KEYS = {
    "paper",
    "verdict",
    "rule",
    "claim",
    "measurements",
    "baseline",
    "seeds",
    "seconds",
    "versions",
    "device",
}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_json_and_file_are_the_same_object(run, fake, tmp_path):
    out = tmp_path / "results"
    code, text, err = run("reproduce", "coin", "--seed", 2, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0
    assert set(found) >= KEYS
    assert (found["paper"], found["verdict"], found["seeds"]) == (901, "partly", [2, 3, 4])
    assert found["measurements"][0]["values"] == pytest.approx([0.62, 0.63, 0.64])
    assert [criterion["holds"] for criterion in found["criteria"]] == [True, False, None]
    assert json.loads((out / "coin.json").read_text()) == found
    assert (out / "coin.png").read_bytes()[:4] == b"\x89PNG"
    assert names(out) == ["coin.json", "coin.png"]
    assert err == "".join(f"coin: {n} of 3 seeds\n" for n in (1, 2, 3))


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_shows_claim_figures_criteria_and_verdict(
    run, fake, tmp_path, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run("reproduce", "901", "--budget", "smoke", "--out", tmp_path / "results")
    assert code == 0
    for part in ("The coin beats a fair one", "+20 % heads", "Table 1", "a fair coin", "10 tosses"):
        assert part in out
    rows = [line.split() for line in out.splitlines()]
    assert ["coin", "0.6", "0"] in rows
    assert [row[1] for row in rows if row[:1] in (["✓"], ["✗"], ["○"])] == [
        "holds",
        "fails",
        "void",
    ]
    assert "verdict  partly  smoke budget, 1 seed" in out
    assert "coin.json" in out


def test_the_default_folder_is_in_the_working_directory(run, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("reproduce", "coin", "--budget", "smoke")[0] == 0
    assert names(tmp_path / "torchzoo-results") == ["coin.json", "coin.png"]


def test_a_paper_that_breaks_does_not_stop_the_others(run, fake, tmp_path):
    code, out, err = run("reproduce", "--all", "--budget", "smoke", "--out", tmp_path, "--json")
    assert code == 1
    assert [result["paper"] for result in json.loads(out)] == [901]
    assert "error: paper 902: RuntimeError: the mint is closed\n" in err
    code, out, _ = run("reproduce", "--family", "moe", "--budget", "smoke", "--out", tmp_path)
    assert code == 1
    assert "did not finish" in out.splitlines()[-1]
    code, out, err = run("reproduce", "902", "--out", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: RuntimeError: the mint is closed (set TORCHZOO_DEBUG=1")


def test_an_interrupted_run_keeps_its_seeds_and_goes_on(run, fake, tmp_path):
    out = tmp_path / "results"
    (fake / "stop").touch()
    args = ("reproduce", "coin", "--seed", 3, "--out", out, "--json")
    code, text, err = run(*args)
    assert (code, text) == (130, "")
    assert err.splitlines()[-2:] == [
        "coin: the same command goes on after the finished seeds",
        "interrupted",
    ]
    assert names(out) == ["coin.partial.json"]
    assert len(json.loads((out / "coin.partial.json").read_text())["trials"]) == 2
    (fake / "stop").unlink()
    code, text, err = run(*args)
    assert code == 0
    assert "coin: goes on after 2 of 3 seeds that are finished\n" in err
    assert json.loads(text)["seeds"] == [3, 4, 5]
    assert (fake / "log.txt").read_text().split() == ["3", "4", "5", "5"]
    assert names(out) == ["coin.json", "coin.png"]


def test_seeds_side_by_side_give_the_same_figures(run, fake, tmp_path):
    figures = {}
    for jobs in (1, 2):
        out = tmp_path / f"results-{jobs}"
        code, text, err = run("reproduce", "coin", "--out", out, "--jobs", jobs, "--json")
        assert code == 0
        assert err == "".join(f"coin: {n} of 3 seeds\n" for n in (1, 2, 3))
        figures[jobs] = json.loads(text)["measurements"]
        assert names(out) == ["coin.json", "coin.png"]
    assert figures[1] == figures[2]


def test_an_error_in_one_of_two_seeds_keeps_what_is_finished(run, fake, tmp_path):
    out = tmp_path / "results"
    (fake / "stop").touch()  # at seed 5
    args = ("reproduce", "coin", "--seed", 3, "--out", out, "--jobs", 2, "--json")
    code, text, err = run(*args)
    assert (code, text) == (130, "")
    assert "Traceback" not in err
    assert names(out) == ["coin.partial.json"]
    finished = json.loads((out / "coin.partial.json").read_text())["trials"]
    assert "5" not in finished
    (fake / "stop").unlink()
    code, text, err = run(*args)
    assert code == 0
    assert f"coin: goes on after {len(finished)} of 3 seeds that are finished\n" in err
    assert json.loads(text)["measurements"][0]["values"] == pytest.approx([0.63, 0.64, 0.65])


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_exits_130_and_leaves_no_half_file(fake, tmp_path, jobs):
    source = fake / "coin.py"
    source.write_text(source.read_text().replace('"sleep": 0', '"sleep": 5.0'))
    script = (
        "import sys; from torchzoo import catalogue; from torchzoo.cli.app import main;"
        "row = catalogue.Paper(901, 'Heads', 'moe', 's', 'c', (), 'fakezoo.coins.coin');"
        "catalogue.papers = lambda: (row,);"
        "sys.exit(main(['reproduce', '901', '--out', *sys.argv[1:], '--json']))"
    )
    out = tmp_path / "results"
    process = subprocess.Popen(
        [sys.executable, "-c", script, out, "--jobs", str(jobs)],
        env={**os.environ, "PYTHONPATH": str(fake.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        process_group=0,
    )
    deadline = time.monotonic() + 120
    while not (out / "coin.partial.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    text, err = process.communicate(timeout=60)
    assert (process.returncode, text) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert names(out) == ["coin.partial.json"]
    json.loads((out / "coin.partial.json").read_text())


@pytest.mark.parametrize("args", [[], ["901", "--all"], ["--family", "moe", "--all"]])
def test_exactly_one_of_name_family_and_all(run, fake, args):
    code, out, err = run("reproduce", *args)
    assert (code, out) == (2, "")
    assert "expected one of NAME, --family and --all" in err


def test_what_is_not_built_can_not_be_reproduced(run, fake):
    assert run("reproduce", "903")[0] == 2
    code, _, err = run("reproduce", "--family", "gp")
    assert (code, err) == (1, "error: no paper of the family 'gp' has an experiment yet\n")
    assert run("reproduce", "--family", "moo")[2] == "error: no family 'moo'; did you mean moe?\n"


def test_matplotlib_is_asked_for_before_the_run(run, fake, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("reproduce", "coin", "--out", tmp_path / "results")
    assert (code, err) == (1, "error: the plot needs matplotlib: pip install torchzoo[plot]\n")
    assert not (fake / "log.txt").exists()


def test_cuda_is_asked_for_before_the_run(run, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("reproduce", "coin", "--device", "cuda", "--out", tmp_path / "results")
    assert (code, err.startswith("error: --device cuda: this torch sees no CUDA")) == (1, True)
    assert not (fake / "log.txt").exists()


def test_a_folder_that_can_not_be_made_is_an_error_before_the_run(run, fake, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run("reproduce", "coin", "--out", tmp_path / "file" / "sub")
    assert (code, err.startswith("error: can't write into ")) == (1, True)
    assert err.count("\n") == 1
    assert not (fake / "log.txt").exists()


def test_a_read_only_folder_is_an_error_before_the_run(run, fake):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        out.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            code, _, err = run("reproduce", "coin", "--out", out)
        finally:
            if root:
                os.seteuid(0)
        assert (code, err) == (1, f"error: can't write into {out}: Permission denied\n")
        assert names(out) == []
    assert not (fake / "log.txt").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a small tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_in_a_line_and_leaves_no_half_file(run, fake, tiny_disk):
    (tiny_disk / "ballast").write_bytes(b"\0" * (52 << 10))
    code, _, err = run("reproduce", "coin", "--out", tiny_disk)
    last = err.splitlines()[-1]
    assert code == 1
    assert last.startswith("error: ")
    assert "No space left on device" in last or "the disk is full" in last
    assert "ballast" in names(tiny_disk)
    assert not [name for name in names(tiny_disk) if name.endswith((".part", ".png"))]
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(b"\0" * (64 << 10))
    code, _, err = run("reproduce", "coin", "--seed", "7", "--out", tiny_disk)
    assert code == 1
    assert err.startswith("error: can't write into ")
