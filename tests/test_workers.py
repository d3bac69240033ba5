"""Calls side by side: results, ticks, errors, and workers that end with the run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from torchzoo.workers import find, place, side_by_side


def quiet(index, text):
    pass


def triple(value, tick):
    tick(f"tripling {value}")
    threads, daemon = torch.get_num_threads(), multiprocessing.current_process().daemon
    return 3 * value, os.getpid(), threads, daemon


class PickyError(Exception):
    """Can't be made of its message alone, as unpickling makes it."""

    def __init__(self, code, reason):
        super().__init__(f"{reason} ({code})")


def fail(value, tick):
    if value == "picky":
        raise PickyError(7, "no such seed")
    if value == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if value == "interrupt":
        raise KeyboardInterrupt
    return {}[value]


def wait(folder, tick):
    """Waits for long; says so by a file, and where it is ended by another."""
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"{os.getpid()}.started").write_text(str(child.pid))
    tick("waiting")
    try:
        time.sleep(600)
    finally:
        child.kill()
        child.wait()
        (folder / f"{os.getpid()}.ended").touch()


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_input_gives_its_result_in_a_process_with_one_thread():
    ticks = []
    inputs = [2.0, "a", (1,)]
    calls = side_by_side(triple, inputs, 2, lambda *tick: ticks.append(tick))
    found = dict(calls)
    assert {index: result[0] for index, result in found.items()} == {0: 6.0, 1: "aaa", 2: (1, 1, 1)}
    processes = {result[1] for result in found.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {result[2:] for result in found.values()} == {(1, False)}
    assert sorted(ticks) == [(i, f"tripling {value}") for i, value in enumerate(inputs)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("value", "error", "message", "note"),
    [
        ("seed", KeyError, "seed", "return {}[value]"),
        ("picky", RuntimeError, r"PickyError: no such seed \(7\)", "raise PickyError"),
        ("interrupt", KeyboardInterrupt, "", "raise KeyboardInterrupt"),
        ("killed", RuntimeError, "a worker ended with exit code -9 and no result", None),
    ],
)
def test_the_first_error_is_raised_with_its_traceback(value, error, message, note):
    with pytest.raises(error, match=message) as caught:
        list(side_by_side(fail, [value], 1, quiet))
    notes = getattr(caught.value, "__notes__", [])
    assert (note in notes[0]) if note else not notes
    assert not multiprocessing.active_children()


def test_workers_that_are_left_early_end_and_clean_up(tmp_path):
    def stop(index, text):
        until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        raise KeyboardInterrupt

    calls = side_by_side(wait, [tmp_path] * 3, 2, stop)
    with closing(calls), pytest.raises(KeyboardInterrupt):
        next(calls)
    assert len(list(tmp_path.glob("*.ended"))) == 2
    assert not any(alive(int(file.read_text())) for file in tmp_path.glob("*.started"))
    assert not multiprocessing.active_children()


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from torchzoo.workers import find, side_by_side\n"
        "if __name__ == '__main__':\n"
        "    wait = find(('waiting', sys.argv[1], 'wait'))\n"
        "    list(side_by_side(wait, [Path(sys.argv[2])] * 2, 2, print))\n"
    )
    (tmp_path / "main.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "main.py", __file__, tmp_path])
    until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    process.kill()
    process.wait()
    until(lambda: len(list(tmp_path.glob("*.ended"))) == 2)
    pids = [int(file.stem) for file in tmp_path.glob("*.ended")]
    until(lambda: not any(map(alive, pids)))


def test_a_function_is_found_by_its_file_where_its_module_has_no_name(tmp_path):
    (tmp_path / "lone.py").write_text(
        "class Box:\n    @staticmethod\n    def open():\n        return 4\n"
    )
    assert find(("lone_module", str(tmp_path / "lone.py"), "Box.open"))() == 4
    del sys.modules["lone_module"]
    assert find(place(triple)) is triple
    assert find(place(Path.cwd)) == Path.cwd


def test_what_other_processes_can_not_find_is_refused():
    def inner():
        pass

    for lost in (lambda: 0, inner):
        with pytest.raises(ValueError, match="function: expected one at the top level"):
            place(lost)
