"""process mode: groups into a file, with no rollout server."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.groups_file import GroupsFile
from atroposlib.errors import AtroposError, RolloutError
from atroposlib.type_definitions import ScoredDataGroup

log = logging.getLogger(__name__)

MAX_EMPTY_IN_A_ROW = 64


async def process(env: BaseEnv, path: Path) -> Path:
    """Collect total_steps groups, some at a time, and write those that came out; fewer when the items run out.

    Raises:
        AtroposError: a long row of items gave nothing.
    """
    from rich.console import Console
    from rich.progress import Progress

    env.process_mode = True
    await env.setup()
    wanted: int = env.config.total_steps
    workers = min(wanted, env.config.resolve_max_num_workers(len(env.server.servers)))
    claimed = written = empty_in_a_row = 0
    with GroupsFile(path) as file, Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("groups", total=wanted)

        async def work() -> None:
            nonlocal claimed, written, empty_in_a_row
            while claimed < wanted:
                claimed += 1
                item = await env.get_next_item()
                if item is None:
                    return
                groups = await _collect(env, item)
                if not groups:
                    claimed -= 1
                    empty_in_a_row += 1
                    if empty_in_a_row >= MAX_EMPTY_IN_A_ROW:
                        raise AtroposError(f"{empty_in_a_row} items in a row gave no group; see the warnings above")
                    continue
                empty_in_a_row = 0
                for group in groups[: wanted - written]:
                    file.write(group)
                    written += 1
                    progress.advance(bar)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
        return file.path


async def _collect(env: BaseEnv, item: object) -> list[ScoredDataGroup]:
    try:
        result = await env.collect_trajectories(item)
        outcome = result[0] if isinstance(result, tuple) else result
        outcome = await env.postprocess_histories(outcome) if outcome else None
    except RolloutError as error:
        log.warning("rollout failed, no group written: %s", error)
        return []
    finally:
        await env.cleanup()
    groups = [group for group in (outcome if isinstance(outcome, list) else [outcome]) if group]
    if env.config.ensure_scores_are_not_same:
        groups = [group for group in groups if len(set(group["scores"])) > 1]
    return groups
