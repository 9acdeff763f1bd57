"""process mode: groups into a file, with no rollout server. Items run at the same time; their groups keep the items' order."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from atroposlib.envs import wandb_logging
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.processing.limits import FailureLimit
from atroposlib.envs.processing.resume import ProcessOutput
from atroposlib.envs.processing.summary import ProcessSummary
from atroposlib.envs.progress import Advance, progress
from atroposlib.envs.serving.sending import split_result
from atroposlib.errors import ConfigError, RolloutDeadlineError, infrastructure_error
from atroposlib.frontend.jsonl2html import generate_html
from atroposlib.type_definitions import Item

log = logging.getLogger(__name__)

ITEM_TRIES = 3
"""Rollouts of one item before infrastructure failures drop it."""
WINDOW_PER_WORKER = 4
"""Items that may be finished while the first of them still runs; they wait in memory."""


@dataclass(frozen=True)
class Job:
    """An item on its way."""

    index: int
    """Its place in the file."""
    item: Item
    is_drawn: bool
    """It came from get_next_item, not out of another item."""


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    job: Job
    data: Any = None
    """A group, a list of groups, or nothing."""
    later: list[Item] = field(default_factory=list)
    """Items to roll out before new ones."""
    error: Exception | None = None


async def process(env: BaseEnv, path: Path, *, is_resumed: bool = False) -> ProcessSummary:
    """Collect total_steps groups and write those that came out; fewer when the items run out. total_steps -1: no limit.

    Args:
        path: a JSONL file; an existing one is left alone and `_1`, `_2`, ... is added. An HTML page is written beside it.
        is_resumed: go on with the newest of those files; the items that it holds are drawn and passed over.
    Raises:
        ProcessFailedError: a long row of items gave nothing.
    """
    env.process_mode = True
    env.n_groups_to_process = env.config.total_steps
    env.group_size_to_process = env.config.group_size
    await env.setup()
    _open_wandb(env)
    wanted = env.config.total_steps if env.config.total_steps >= 0 else None
    with ProcessOutput(path, is_resumed=is_resumed) as output:
        if output.path != path and not is_resumed:
            log.info("%s exists: writing %s instead; --resume goes on with the newest of them", path, output.path)
        env.config.data_path_to_save_groups = str(output.path)
        summary = ProcessSummary(path=output.path, groups_before=output.finished.groups)
        try:
            with progress("groups", wanted, done=output.finished.groups) as advance:
                await _Processor(env, output, summary, advance, wanted).run()
        finally:
            wandb_logging.close_run()
    summary.ended = time.monotonic()
    generate_html(str(summary.path), str(summary.path.with_suffix(".html")))
    return summary


def _open_wandb(env: BaseEnv) -> None:
    """No trainer names a project here; WANDB_PROJECT does, where a run is wanted."""
    project = os.environ.get("WANDB_PROJECT")
    if env.config.use_wandb and project:
        name = wandb_logging.run_name(env.display_name)
        config = env.config.model_dump(mode="json", fallback=str)
        wandb_logging.open_run(project=project, group=None, name=name, config=config)


class _Processor:
    """Draws items, rolls them out at the same time, hands the results on in the order of the items."""

    def __init__(
        self, env: BaseEnv, output: ProcessOutput, summary: ProcessSummary, advance: Advance, wanted: int | None
    ) -> None:
        self._env, self._output, self._summary, self._advance = env, output, summary, advance
        self._wanted = wanted
        self._workers: int = env.config.resolve_max_num_workers(len(env.server.servers))
        self._limit = FailureLimit()
        self._running = 0
        self._is_exhausted = False
        self._next_index = self._next_to_write = 0
        self._later: deque[Item] = deque()
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._waiting: dict[int, Outcome] = {}
        """Finished, and behind an item that still runs."""
        self._unwritable: OSError | None = None
        """Why a group could not be written to the file."""

    async def run(self) -> None:
        """Return when enough is written or nothing is left."""
        # What the environment writes goes through here: it may be told to write by an override.
        self._env.jsonl_writer = cast(Any, self)
        await self._pass_over(self._output.finished.items)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._top_up(tasks)
                if self._running == 0:
                    return
                outcome = await self._outcomes.get()
                self._running -= 1
                self._waiting[outcome.job.index] = outcome
                while self._next_to_write in self._waiting:
                    await self._finish(self._waiting.pop(self._next_to_write))
                    self._next_to_write += 1

    def write(self, group: Mapping[str, Any]) -> None:
        """One group, unless there are enough."""
        if self._is_enough(0):
            return
        try:
            self._output.write(group)
        except OSError as error:
            self._unwritable = error
            raise
        self._summary.note(group)
        self._advance()

    def close(self) -> None:
        """The file is closed by its owner."""

    def _is_enough(self, expected: int) -> bool:
        return self._wanted is not None and self._summary.groups_in_file + expected >= self._wanted

    async def _pass_over(self, n_items: int) -> None:
        for _ in range(n_items):
            if await self._env.get_next_item() is None:
                self._is_exhausted = True
                return

    async def _top_up(self, tasks: asyncio.TaskGroup) -> None:
        window = self._workers * WINDOW_PER_WORKER
        while self._running < self._workers and self._next_index - self._next_to_write < window:
            # One group is expected of every item.
            if self._is_enough(self._next_index - self._next_to_write):
                return
            job = await self._next_job()
            if job is None:
                return
            self._next_index += 1
            self._running += 1
            tasks.create_task(self._work(job))

    async def _next_job(self) -> Job | None:
        if self._later:
            return Job(self._next_index, self._later.popleft(), is_drawn=False)
        item = None if self._is_exhausted else await self._env.get_next_item()
        self._is_exhausted = item is None
        return None if item is None else Job(self._next_index, item, is_drawn=True)

    async def _work(self, job: Job) -> None:
        try:
            outcome = await _roll_out(self._env, job)
        except ConfigError:
            raise
        except Exception as error:  # the author's code: what it raises is theirs
            outcome = Outcome(job, error=infrastructure_error(error) or error)
        self._outcomes.put_nowait(outcome)

    async def _finish(self, outcome: Outcome) -> None:
        """Write an item's groups. Its failure is counted; a long row of failures ends the run."""
        before = self._summary.groups
        self._later.extend(outcome.later)
        error = await self._send(outcome) if outcome.data else outcome.error
        written = self._summary.groups - before
        self._output.end_item(written, is_drawn=outcome.job.is_drawn)
        if written:
            self._limit.note_success()
            if error is not None:
                log.error("item %d: a group was written, but not all: %s", outcome.job.index, error, exc_info=error)
            await self._log_metrics()
        elif not self._is_enough(0):
            self._summary.note_empty(error)
            if not outcome.later:
                self._limit.note_failure(error)

    async def _send(self, outcome: Outcome) -> Exception | None:
        """Hand an item's groups on. What the environment raises comes back; what ends the run is raised."""
        failure: Exception | None = None
        try:
            await self._env.handle_send_to_api(
                outcome.data, outcome.job.item, do_send_to_api=False, abort_on_any_max_length_exceeded=False
            )
        except ConfigError:
            raise
        except Exception as error:  # the author's groups, and their override
            failure = infrastructure_error(error) or error
        if self._unwritable is not None:
            raise self._unwritable
        return failure

    async def _log_metrics(self) -> None:
        try:
            await self._env.wandb_log()
        except ConfigError:
            raise
        except Exception:
            log.exception("wandb_log of the environment failed; rollouts go on")


async def _roll_out(env: BaseEnv, job: Job) -> Outcome:
    """Collect and postprocess; infrastructure failures are tried again.

    Raises:
        RolloutError, ExceptionGroup: the last of them.
    """
    for attempt in range(1, ITEM_TRIES):
        try:
            return await _try_once(env, job)
        except Exception as error:
            failure = infrastructure_error(error)
            # Another try of what was too slow would most likely take as long.
            if failure is None or isinstance(failure, RolloutDeadlineError):
                raise
            log.warning("rollout failed, attempt %d of %d: %s", attempt, ITEM_TRIES, failure)
    return await _try_once(env, job)


async def _try_once(env: BaseEnv, job: Job) -> Outcome:
    deadline_s = env.config.resolve_group_deadline_s()
    try:
        async with asyncio.timeout(deadline_s) as scope:
            data, later = split_result(await env.collect_trajectories(job.item))
            return Outcome(job, await env.postprocess_histories(data) if data else None, later)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise RolloutDeadlineError(f"the group took longer than {deadline_s} s; raise group_deadline_s") from error
    finally:
        await env.cleanup()
