"""Calls of a function side by side, each in a process of its own that ends with this one.

A worker is started afresh and uses one torch thread, so that what it computes doesn't depend on
how many there are. It is no daemon: a call may start processes itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import reduce
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

GRACE = 5.0  # seconds that a worker gets to end its own processes before it is killed

Place = tuple[str, str, str]
"""A module, its file, and the name of something in it."""


def place(function: Callable[..., Any]) -> Place:
    """Where a function is, for another process to `find` it.

    Raises:
        ValueError: It is not at the top level of a module, as a lambda is not.
    """
    module = sys.modules[function.__module__]
    where = module.__name__, module.__file__ or "", function.__qualname__
    if "<" in where[2]:
        raise ValueError(
            f"function: expected one at the top level of a module, as it is called in another "
            f"process, got {where[2]}"
        )
    return where


def find(where: Place) -> Any:
    """A function by its module, or by its file where the module can't be imported by name."""
    module, file, name = where
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    return reduce(getattr, name.split("."), found)


def side_by_side(
    function: Callable[[Any, Callable[[str], None]], Any],
    inputs: Sequence[Any],
    jobs: int,
    progress: Callable[[int, str], None],
) -> Generator[tuple[int, Any]]:
    """Call `function(input, tick)` for each input, some at once.

    The workers end with the generator: close it where it may be left early.

    Args:
        function: One at the top level of a module, or of a file such as a test's; `tick` takes a
            line about its present step.
        inputs: What it is called with; they are pickled, as is what it returns.
        jobs: Most calls at once.
        progress: Called with the index of an input and a line about its present step.

    Yields:
        The index of an input and what the function returned, whichever ends first.

    Raises:
        BaseException: The first error of a call, with its traceback in the worker as a note.
        RuntimeError: A worker ended without a result.
        ValueError: See `place`.
    """
    where, waiting = place(function), list(range(len(inputs)))
    workers: dict[Connection, BaseProcess] = {}
    calls: dict[Connection, int] = {}

    def hand(pipe: Connection) -> None:
        if waiting:
            calls[pipe] = waiting.pop(0)
            with suppress(BrokenPipeError):  # a worker that has ended is noticed below
                pipe.send(inputs[calls[pipe]])

    try:
        for _ in range(min(jobs, len(inputs))):
            hand(_start(where, workers))
        while calls:
            for ready in wait(list(calls)):
                assert isinstance(ready, Connection)
                kind, value = _receive(ready, workers[ready])
                if kind == "error":
                    raise value
                if kind == "tick":
                    progress(calls[ready], value)
                    continue
                index = calls.pop(ready)
                hand(ready)
                yield index, value
    finally:
        _end(workers)


def _start(where: Place, workers: dict[Connection, BaseProcess]) -> Connection:
    """Start another worker; this end of the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, where))
    # Ctrl-C reaches every process of a terminal; that the workers end is up to this one. What is
    # blocked here stays blocked there. The tracker unblocks it when it starts: start it before.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
        workers[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return ours


def _receive(pipe: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join(GRACE)
        code = process.exitcode
        raise RuntimeError(f"a worker ended with exit code {code} and no result") from None


def _end(workers: dict[Connection, BaseProcess]) -> None:
    for process in workers.values():
        process.terminate()
    for pipe, process in workers.items():
        process.join(GRACE)
        process.kill()
        process.join()
        pipe.close()


def _work(pipe: Connection, where: Place) -> None:
    """What a worker does: call the function with what comes until it is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an error, so that calls clean up
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        value = pipe.recv()
        try:
            report = "result", find(where)(value, lambda text: pipe.send(("tick", text)))
        except SystemExit:
            raise
        except BaseException as error:
            report = "error", _portable(error)
        pipe.send(report)


def _follow() -> None:
    """End this process when the one that started it has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same where it can't be pickled, with its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{text}")
    return error
