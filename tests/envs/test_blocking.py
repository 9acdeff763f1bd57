"""Blocking graders off the event loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from atroposlib.envs.blocking import BlockingPool
from atroposlib.errors import RolloutError


@pytest.fixture
async def pool() -> AsyncIterator[BlockingPool]:
    made = BlockingPool(2)
    yield made
    made.close()


async def test_the_loop_runs_on_while_a_grader_blocks(pool: BlockingPool) -> None:
    release = threading.Event()

    async def let_go() -> None:
        release.set()

    grade = asyncio.create_task(pool.run(release.wait, 10.0, timeout_s=5.0))
    await let_go()

    assert await grade is True


async def test_no_more_graders_run_at_once_than_workers(pool: BlockingPool) -> None:
    running, peak, lock = 0, 0, threading.Lock()

    def grade() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    await asyncio.gather(*(pool.run(grade, timeout_s=5.0) for _ in range(8)))

    assert peak == 2


async def test_a_grader_that_hangs_is_no_signal_and_holds_up_nobody(pool: BlockingPool) -> None:
    hang = threading.Event()
    for _ in range(4):
        with pytest.raises(RolloutError, match=r"wait took longer than 0\.01 s"):
            await pool.run(hang.wait, 10.0, timeout_s=0.01)

    assert await pool.run(sum, [1, 2], timeout_s=5.0) == 3
    hang.set()


HANGS = """
import asyncio, time
from atroposlib.envs.blocking import BlockingPool
from atroposlib.errors import RolloutError

async def main():
    pool = BlockingPool(1)
    try:
        await pool.run(time.sleep, 600, timeout_s=0.01)
    except RolloutError:
        print("no signal")
    pool.close()

asyncio.run(main())
"""


def test_a_grader_that_hangs_does_not_keep_the_process_from_ending() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=15, check=True)

    assert ended.stdout == "no signal\n"


async def test_a_pool_of_the_graders_own_that_broke_is_its_error(pool: BlockingPool) -> None:
    def grade() -> None:
        raise BrokenProcessPool("mine")

    with pytest.raises(BrokenProcessPool, match="mine"):
        await pool.run(grade, timeout_s=5.0)


async def test_a_graders_own_error_comes_through(pool: BlockingPool) -> None:
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 1, 0, timeout_s=5.0)


def tell_and_hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def is_gone(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(timeout=5)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


async def test_a_process_that_hangs_or_dies_is_replaced(pool: BlockingPool, tmp_path: Path) -> None:
    # spawn takes a moment, which counts: so the first call gets plenty.
    process_id = await pool.run(os.getpid, timeout_s=10.0, in_process=True)
    assert process_id != os.getpid()

    with pytest.raises(RolloutError, match="tell_and_hang took longer"):
        await pool.run(tell_and_hang, str(tmp_path / "pid"), timeout_s=2.0, in_process=True)
    assert await asyncio.to_thread(is_gone, int((tmp_path / "pid").read_text()))
    with pytest.raises(RolloutError, match="died"):
        await pool.run(os._exit, 3, timeout_s=10.0, in_process=True)

    assert await pool.run(divmod, 7, 2, timeout_s=10.0, in_process=True) == (3, 1)
