"""Processes that train together: real ones, with the variables that torchrun gives its ranks.

They are forked from a process that has imported everything: to import torch, transformers and DeepSpeed takes longer than
what most of these tests train.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from unittest.mock import patch

import torch

from tests.processes import free_port

Main = Callable[[Sequence[str]], int | None]
"""What a rank does with its arguments; returns its exit status, or nothing."""

_processes = multiprocessing.get_context("forkserver")
# One thread each: spinning OpenMP threads of several processes on few cores stop each other.
_VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_GRACE_S = 30.0
"""For the other ranks, once one has failed."""


@dataclass(frozen=True)
class Finished:
    """What came of it."""

    returncode: int
    """0, or that of the first rank that failed."""
    output: str
    """stdout and stderr of all ranks."""


def run_ranks(main: Main, *arguments: str, ranks: int = 1, timeout_s: float = 240.0) -> Finished:
    """Run `main(arguments)` in so many processes, and see them to their end. A single one is no rank of anything.

    Raises:
        AssertionError: some still ran after `timeout_s`; they are dead now.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        started = _start(main, arguments, ranks, output.name)
        try:
            returncode = _end(started, time.monotonic() + timeout_s)
        finally:
            for rank in started:
                rank.kill()
                rank.join()
                rank.close()
        finished = Finished(returncode if returncode is not None else -1, output.read())
    assert returncode is not None, f"still running after {timeout_s} s:\n{finished.output}"
    return finished


def _start(main: Main, arguments: Sequence[str], ranks: int, output: str) -> list[ForkServerProcess]:
    variables = dict(_VARIABLES)
    if ranks > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    return [start_forked(_be_rank, main, arguments, {**variables, **each}, output) for each in own]


def start_forked(target: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Start a process that has everything imported. Kill it."""
    _processes.set_forkserver_preload(["tests.trainer.preloaded"])
    process = _processes.Process(target=target, args=arguments, daemon=True)
    with patch.dict(os.environ, _VARIABLES):  # for the process that it is forked from, should that start now
        process.start()
    return process


def _end(started: list[ForkServerProcess], deadline: float) -> int | None:
    """The exit status; None when there was no end in time."""
    running, returncode = {rank.sentinel: rank for rank in started}, 0
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            rank = running.pop(sentinel)  # type: ignore[arg-type]  # sentinels are numbers
            rank.join()
            if rank.exitcode and not returncode:
                returncode = rank.exitcode
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return returncode if returncode or not running else None


def _be_rank(main: Main, arguments: Sequence[str], variables: dict[str, str], output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.exit(main(arguments))
