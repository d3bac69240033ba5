"""Running a function on several processes that talk over gloo, on one machine without a GPU.

Ranks are forked from a server process that has imported torch once, and meet through a file, so
that no port has to be free. The first error ends all ranks, and each rank's traceback is shown.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchzoo.workers import Place, find, place

PRELOAD = (
    __name__,
    "torch._dynamo",  # which an optimizer imports; longer than many a function takes
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torchzoo.moe.parallel",
)
START = 240.0  # seconds to import torch and meet
GRACE = 5.0  # seconds that the other ranks get to report after the first error


class RanksFailedError(RuntimeError):
    """Some ranks failed.

    Attributes:
        errors: For each rank that failed, its traceback or how it ended.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        self.errors = errors


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call `function(*args)` on each rank of a gloo process group.

    Args:
        function: A function at the top level of a module, or of a file such as a test's.
        world_size: Number of ranks.
        *args: Its arguments; they are pickled.
        timeout: Seconds from when all have met after which ranks that have not ended are killed.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailedError: A rank raised an error, was killed, or took too long.

    Example:
        >>> run_ranks(dist.get_world_size, 2)  # doctest: +SKIP
        [2, 2]
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD])
    where, packed = place(function), pickle.dumps(args)
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            setting = (str(Path(folder) / "rendezvous"), rank, world_size, timeout)
            process = context.Process(
                target=_rank, args=(theirs, setting, where, packed), daemon=True
            )
            process.start()
            theirs.close()
            pipes[ours] = rank
            processes.append(process)
        try:
            results, errors = _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
            stacks = {rank: Path(f"{setting[0]}.{rank}") for rank in range(world_size)}
            stuck = {rank: file.read_text() for rank, file in stacks.items() if file.is_file()}
    for rank in errors:
        code = processes[rank].exitcode
        errors[rank] = errors[rank] or f"ended with exit code {code} and no result"
        errors[rank] += f"\n{stuck[rank]}" if stuck.get(rank) else ""
    if errors:
        raise RanksFailedError(errors)
    return [results[rank] for rank in range(world_size)]


def _collect(pipes: dict[Connection, int], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and errors by rank; the error of a rank that ended without a word is empty."""
    waiting, met = dict(pipes), 0
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + START
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            late = "had not ended when time was up"
            return results, errors | dict.fromkeys(waiting.values(), late)
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                message = pickle.loads(pipe.recv_bytes())
            except EOFError:
                message = False, ""
            if message is None:
                met += 1
                deadline = time.monotonic() + (timeout if met == len(pipes) else START)
                continue
            del waiting[pipe]
            (results if message[0] else errors)[rank] = message[1]
        if errors:
            deadline = min(deadline, time.monotonic() + GRACE)
    return results, errors


def _rank(
    pipe: Connection, setting: tuple[str, int, int, float], where: Place, args: bytes
) -> None:
    """What a rank's process does: join the group, call the function, report."""
    path, rank, world_size, timeout = setting
    stack = open(f"{path}.{rank}", "w")  # noqa: SIM115 - open until the process ends
    try:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{path}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=START),
        )
        pipe.send_bytes(pickle.dumps(None))
        faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
        report = True, find(where)(*pickle.loads(args))
    except BaseException:
        report = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(report))
    if report[0]:
        with suppress(EOFError):
            pipe.recv_bytes()  # stay until all are done: others may still need this rank's sockets
