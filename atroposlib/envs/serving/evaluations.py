"""Evaluations beside training: one at a time, with a deadline, recorded, and never the end of the run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from atroposlib.envs.serving.records import RunRecords
from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from atroposlib.envs.base import BaseEnv

log = logging.getLogger(__name__)


class Evaluations:
    """Runs the environment's evaluate() in the background.

    Args:
        on_end: called when an evaluation is over, however it ended.
    """

    def __init__(self, env: BaseEnv, records: RunRecords, *, on_end: Callable[[], None]) -> None:
        self._env = env
        self._records = records
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether an evaluation runs now."""
        return self._task is not None and not self._task.done()

    def start(self, tasks: asyncio.TaskGroup, *, step: int, policy_version: int) -> None:
        """Evaluate, unless an evaluation runs already."""
        if self.is_running:
            log.warning("the last evaluation still runs: none is started at step %d", step)
            return
        self._task = tasks.create_task(self._run(step, policy_version))
        self._env.eval_runner = self._task
        self._env.eval_workers.add(self._task)
        self._task.add_done_callback(self._note_end)

    async def finish(self) -> None:
        """Wait for the one that runs; it has a deadline of its own."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self, step: int, policy_version: int) -> None:
        self._env.logged_evaluation = None
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._env.config.eval_deadline_s):
                returned = await self._env.evaluate()
        except ConfigError:
            raise
        except Exception:
            # The policy goes on learning while its measure is broken; the log says that and why.
            log.exception("evaluation at step %d failed", step)
            return
        metrics = self._env.logged_evaluation or (returned if isinstance(returned, dict) else None)
        if metrics:
            seconds = round(time.monotonic() - start, 2)
            record = {"step": step, "policy_version": policy_version, "seconds": seconds, "metrics": metrics}
            self._records.evaluation(record)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._env.eval_workers.discard(task)
        self._on_end()
