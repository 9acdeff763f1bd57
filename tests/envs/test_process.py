"""process: groups into a file, in the order of the items, whatever is interrupted or fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.processing.limits import (
    MAX_EMPTY_IN_A_ROW,
    MAX_ERRORS_AT_START,
    MAX_ERRORS_IN_A_ROW,
    FailureLimit,
    ProcessFailedError,
)
from atroposlib.envs.processing.process import process
from atroposlib.envs.processing.resume import ProcessOutput, journal_of, recover, whole_items
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.type_definitions import ScoredDataGroup
from tests.envs.fakes import CountingEnv, a_scored_group

MakeEnv = Callable[..., CountingEnv]


def group_of(item: Any) -> ScoredDataGroup:
    return {**a_scored_group((float(item), -1.0)), "messages": [[{"role": "user", "content": f"item {item}"}]] * 2}


async def make_slowly(item: Any) -> Any:
    """The earlier items are the slower ones."""
    await asyncio.sleep(0.02 / (1 + item))
    return group_of(item)


def first_scores(path: Path) -> list[float]:
    return [json.loads(line)["scores"][0] for line in path.read_text().splitlines()]


def content(path: Path) -> str:
    return path.read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "groups.jsonl"


async def test_groups_stand_in_the_order_of_their_items_although_they_run_at_once(
    make_env: MakeEnv, path: Path
) -> None:
    env = make_env(make_slowly, total_steps=12, max_num_workers=4)

    summary = await process(env, path)

    assert first_scores(path) == list(range(12))
    assert (summary.groups, summary.sequences, summary.mean_reward) == (12, 24, (sum(range(12)) - 12) / 24)
    assert "12 groups, 24 sequences, mean reward 2.2500" in summary.line()
    assert (env.process_mode, env.n_groups_to_process, env.group_size_to_process) == (True, 12, 2)


async def test_no_more_items_run_at_once_than_there_are_workers(make_env: MakeEnv, path: Path) -> None:
    running = peak = 0

    async def make(item: Any) -> Any:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        running -= 1
        return group_of(item)

    env = make_env(make, total_steps=10, max_num_workers=3)
    await process(env, path)

    assert peak == 3
    assert len(env.collected) == 10, "no rollout is made that nobody asked for"


async def test_the_page_is_written_beside_the_file(make_env: MakeEnv, path: Path) -> None:
    await process(make_env(group_of, total_steps=2), path)

    assert "item 1" in path.with_suffix(".html").read_text()


async def test_it_ends_when_the_items_run_out(make_env: MakeEnv, path: Path) -> None:
    env = make_env(group_of, total_steps=100)
    env.items = iter([1, 2, 3, None])  # type: ignore[assignment]

    assert (await process(env, path)).groups == 3


async def test_minus_one_step_means_every_item(make_env: MakeEnv, path: Path) -> None:
    env = make_env(group_of, total_steps=-1)
    env.items = iter([*range(9), None])  # type: ignore[assignment]

    assert (await process(env, path)).groups == 9


async def test_a_failed_rollout_is_tried_again_and_then_counted(make_env: MakeEnv, path: Path) -> None:
    tries: list[int] = []

    async def make(item: int) -> Any:
        tries.append(item)
        if item == 1 or (item == 2 and tries.count(2) < 3):
            raise RolloutError("the engine is away")
        return group_of(item)

    summary = await process(make_env(make, total_steps=3), path)

    assert first_scores(path) == [0, 2, 3]
    assert summary.dropped == {"rollout failed": 1}
    assert (tries.count(1), tries.count(2)) == (3, 3)


async def test_infrastructure_failures_in_a_task_group_of_the_author_are_tried_again(
    make_env: MakeEnv, path: Path
) -> None:
    def make(item: int) -> Any:
        if item == 1:
            raise ExceptionGroup("of a TaskGroup", [ExceptionGroup("of another", [RolloutError("the engine is away")])])
        return group_of(item)

    env = make_env(make, total_steps=3)
    summary = await process(env, path)

    assert first_scores(path) == [0, 2, 3]
    assert summary.dropped == {"rollout failed": 1}
    assert env.collected.count(1) == 3


async def test_a_group_that_takes_too_long_is_given_up(make_env: MakeEnv, path: Path) -> None:
    async def make(item: int) -> Any:
        await asyncio.sleep(60 if item == 0 else 0)
        return group_of(item)

    summary = await process(make_env(make, total_steps=1, group_deadline_s=0.02), path)

    assert first_scores(path) == [1]
    assert summary.dropped == {"rollout failed": 1}


async def test_an_environment_that_never_gives_a_group_does_not_go_on_for_ever(make_env: MakeEnv, path: Path) -> None:
    env = make_env(lambda item: None, total_steps=10)

    with pytest.raises(ExceptionGroup) as caught:
        await process(env, path)

    assert caught.group_contains(ProcessFailedError, match=f"{MAX_EMPTY_IN_A_ROW} items in a row gave no group")
    assert len(env.collected) < 2 * MAX_EMPTY_IN_A_ROW


async def test_an_environment_that_never_worked_ends_at_once_with_its_own_error(make_env: MakeEnv, path: Path) -> None:
    def make(item: int) -> Any:
        raise KeyError("answer")

    with pytest.raises(ExceptionGroup) as caught:
        await process(make_env(make, total_steps=10), path)

    assert caught.group_contains(ProcessFailedError, match=f"{MAX_ERRORS_AT_START} items failed.*KeyError: 'answer'")


async def test_a_single_broken_item_costs_only_itself(make_env: MakeEnv, path: Path) -> None:
    def make(item: int) -> Any:
        if item == 3:
            raise KeyError("missing")
        return group_of(item)

    summary = await process(make_env(make, total_steps=6), path)

    assert first_scores(path) == [0, 1, 2, 4, 5, 6]
    assert summary.dropped == {"environment error": 1}


async def test_a_group_that_cannot_be_sent_costs_only_itself(make_env: MakeEnv, path: Path) -> None:
    def make(item: int) -> Any:
        group = group_of(item)
        if item == 1:
            del group["masks"]
        return group

    summary = await process(make_env(make, total_steps=3), path)

    assert first_scores(path) == [0, 2, 3]
    assert summary.dropped == {"environment error": 1}


async def test_a_broken_log_of_the_authors_costs_no_group(
    make_env: MakeEnv, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(wandb_metrics: Any = None) -> None:
        raise KeyError("train/percent_correct")

    env = make_env(group_of, total_steps=3)
    env.wandb_log = broken  # type: ignore[method-assign]

    assert (await process(env, path)).groups == 3
    assert "train/percent_correct" in caplog.text


async def test_a_full_disk_ends_the_run_and_is_not_the_environments_fault(
    make_env: MakeEnv, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(output: ProcessOutput, group: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ProcessOutput, "write", no_space)

    with pytest.raises(ExceptionGroup) as caught:
        await process(make_env(group_of, total_steps=3), path)

    assert caught.group_contains(OSError, match="No space left")
    assert not caught.group_contains(ProcessFailedError)


async def test_a_configuration_error_ends_the_run(make_env: MakeEnv, path: Path) -> None:
    def make(item: int) -> Any:
        raise ConfigError("no such judge")

    with pytest.raises(ExceptionGroup) as caught:
        await process(make_env(make, total_steps=6), path)

    assert caught.group_contains(ConfigError, match="no such judge")


async def test_items_that_lead_to_further_items(make_env: MakeEnv, path: Path) -> None:
    class Stages(CountingEnv):
        """Items below 100 make no group but two further items each."""

        async def collect_trajectories(self, item: int) -> Any:
            return (None, [item + 100, item + 200]) if item < 100 else (group_of(item), [])

    plain = make_env()
    env = Stages(plain.config.model_copy(update={"total_steps": 6}), plain.server.servers[0].config)
    env.items = iter([0, 1, 2, None])  # type: ignore[assignment]

    await process(env, path)

    assert sorted(first_scores(path)) == [100, 101, 102, 200, 201, 202]


async def test_an_item_of_several_groups_and_an_override_of_sending(make_env: MakeEnv, path: Path) -> None:
    class Doubling(CountingEnv):
        async def handle_send_to_api(self, scored_data: Any, item: Any = None, *args: Any, **options: Any) -> None:
            await super().handle_send_to_api([scored_data, None, group_of(item + 1000)], item, *args, **options)

    plain = make_env()
    env = Doubling(plain.config.model_copy(update={"total_steps": 3}), plain.server.servers[0].config)
    env.make = group_of

    await process(env, path)

    scores = first_scores(path)
    assert len(scores) == 3, "not more than asked for, although the last item has two"
    assert scores[1] == 1000


class Killed(BaseException):
    """As SIGKILL: nothing can be tidied up."""


async def interrupted_after(make_env: MakeEnv, path: Path, groups: int, **config: Any) -> None:
    def make(item: int) -> Any:
        if item >= groups:
            raise Killed
        return group_of(item) if item % 5 != 4 else None

    with pytest.raises((Killed, BaseExceptionGroup)):
        await process(make_env(make, total_steps=20, max_num_workers=1, **config), path)


async def test_an_interrupted_run_goes_on_with_the_items_that_are_left(make_env: MakeEnv, path: Path) -> None:
    await interrupted_after(make_env, path, 8)
    with path.open("a") as file:
        file.write('{"tokens": [[1, 2')

    env = make_env(lambda item: group_of(item) if item % 5 != 4 else None, total_steps=12, max_num_workers=4)
    summary = await process(env, path, is_resumed=True)

    assert first_scores(path) == [item for item in range(15) if item % 5 != 4]
    assert env.collected[0] == 8, "what is in the file, and what gave nothing, is not rolled out again"
    assert (summary.groups_before, summary.groups) == (7, 5)
    assert "after 7 before" in summary.line()


async def test_without_resume_the_file_is_left_alone(make_env: MakeEnv, path: Path) -> None:
    await interrupted_after(make_env, path, 3)
    before = content(path)

    env = make_env(group_of, total_steps=2)
    summary = await process(env, path)

    assert content(path) == before
    assert summary.path == path.with_name("groups_1.jsonl")
    assert env.config.data_path_to_save_groups == str(summary.path)


async def test_resuming_what_is_complete_rolls_nothing_out_and_more_steps_extend_it(
    make_env: MakeEnv, path: Path
) -> None:
    await process(make_env(group_of, total_steps=3), path)

    again, more = make_env(group_of, total_steps=3), make_env(group_of, total_steps=5)
    await process(again, path, is_resumed=True)
    await process(more, path, is_resumed=True)

    assert again.collected == []
    assert first_scores(path) == [0, 1, 2, 3, 4]


async def test_resume_with_no_file_begins_one_and_with_several_takes_the_newest(make_env: MakeEnv, path: Path) -> None:
    await process(make_env(group_of, total_steps=1), path, is_resumed=True)
    await process(make_env(group_of, total_steps=1), path)
    await process(make_env(group_of, total_steps=2), path, is_resumed=True)

    assert len(first_scores(path)) == 1
    assert len(first_scores(path.with_name("groups_1.jsonl"))) == 2


def test_only_failures_in_a_row_count() -> None:
    limit = FailureLimit()

    for _ in range(3 * MAX_EMPTY_IN_A_ROW):
        limit.note_success()
        limit.note_failure(None)
        limit.note_failure(KeyError("x"))

    limit.note_success()
    for _ in range(MAX_ERRORS_IN_A_ROW - 1):
        limit.note_failure(KeyError("x"))
    with pytest.raises(ProcessFailedError, match=f"{MAX_ERRORS_IN_A_ROW} items failed"):
        limit.note_failure(KeyError("x"))


def test_a_file_that_something_else_wrote_counts_one_item_a_line(path: Path) -> None:
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')

    finished = recover(path)

    assert (finished.groups, finished.items) == (2, 2)
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@given(
    sizes=st.lists(st.integers(0, 3), max_size=8),
    lines=st.integers(0, 24),
)
def test_only_whole_items_are_kept_and_as_many_as_there_are_lines_for(sizes: list[int], lines: int) -> None:
    journal = [{"groups": size, "drawn": True} for size in sizes]

    kept = whole_items(journal, n_lines=lines)

    assert kept == journal[: len(kept)]
    assert sum(sizes[: len(kept)]) <= lines
    assert len(kept) == len(sizes) or sum(sizes[: len(kept) + 1]) > lines


def test_a_kill_at_any_byte_loses_no_finished_item(path: Path) -> None:
    sizes = [1, 0, 2, 1]
    counter = itertools.count()
    with ProcessOutput(path, is_resumed=False) as output:
        for size in sizes:
            for _ in range(size):
                output.write({"scores": [next(counter)]})
            output.end_item(size, is_drawn=True)
    groups, journal = path.read_bytes(), journal_of(path).read_bytes()

    draw = random.Random(0)
    for _ in range(50):
        path.write_bytes(groups[: draw.randint(0, len(groups))])
        journal_of(path).write_bytes(journal[: draw.randint(0, len(journal))])
        whole_lines, whole_entries = path.read_bytes().count(b"\n"), journal_of(path).read_bytes().count(b"\n")

        finished = recover(path)

        assert finished.groups == sum(sizes[: finished.items]) == path.read_bytes().count(b"\n")
        assert finished.items == max(i for i in range(whole_entries + 1) if sum(sizes[:i]) <= whole_lines)


async def test_numbers_of_numpy_are_written_as_numbers(make_env: MakeEnv, path: Path) -> None:
    import numpy as np

    def make(item: int) -> Any:
        return {**group_of(item), "scores": [np.float32(0.5), np.int64(1)]}

    await process(make_env(make, total_steps=1), path)

    assert json.loads(content(path))["scores"] == [0.5, 1]


def test_progress_in_a_log_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from atroposlib.envs import progress as module

    monkeypatch.setattr(module, "LINE_PERIOD_S", 0.0)
    with module.progress("groups", 3, done=1) as advance:
        advance()
        advance()

    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "groups: 2/3", "groups: 3/3", "groups: 3/3",
    ]  # fmt: skip


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from atroposlib.envs.progress import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("groups", 3) as advance:
        advance(3)

    assert "3/3" in capsys.readouterr().err
