"""Full disks, damaged checkpoints, other options: what a trainer does, in this process, against a FAKE rollout server."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.trainer.fakes import FakeClient, FakeRolloutServer
from tests.trainer.in_memory import CHECKPOINTS, a_trainer, lines_of
from trainer.batches import stream as batch_stream
from trainer.checkpoints import folders as checkpoints
from trainer.errors import CheckpointError, TrainerError


class FullDisk(TrainerCallback):  # type: ignore[misc]
    """No file may grow larger than this, from the end of one step to the end of another."""

    def __init__(self, size_bytes: int, *, first: int, last: int) -> None:
        self._size, self._first, self._last = size_bytes, first, last
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self._first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))
        if state.global_step == self._last + 1:
            self.end()

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.mark.parametrize("size_bytes", [12_000, 30_000], ids=["weights", "optimizer"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size_bytes: int
) -> None:
    server, disk = FakeRolloutServer(), FullDisk(size_bytes, first=2, last=3)

    try:
        with caplog.at_level(logging.WARNING, logger="trainer"):
            a_trainer(tmp_path, server, callbacks=[disk], max_steps=4, **CHECKPOINTS).train()
    finally:
        disk.end()

    assert server.said("commit") == [("commit", 1), ("commit", 4), ("commit", 4)]
    assert [line.get("checkpoint/failed") for line in lines_of(tmp_path / "metrics.jsonl")] == [None, None, 1.0, 2.0]
    assert "the run goes on from the one after 1 steps if it is cut off now" in caplog.text
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-4"]
    assert checkpoints.last_complete(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-4", 4)


def test_while_the_disk_is_full_the_previous_checkpoint_stays_valid(tmp_path: Path) -> None:
    server, disk = FakeRolloutServer(), FullDisk(12_000, first=2, last=9)
    trainer = a_trainer(tmp_path, server, callbacks=[disk], max_steps=9, prefetch=0, **CHECKPOINTS)
    server.on_lease = lambda step: trainer.request_stop("test") if step == 2 else None

    try:
        trainer.train()
    finally:
        disk.end()

    assert checkpoints.last_complete(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-1", 1)
    assert server.said("commit") == [("commit", 1)]


def test_no_room_for_another_checkpoint_is_seen_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeRolloutServer()
    saved: list[int] = []
    trainer = a_trainer(tmp_path, server, **CHECKPOINTS)
    monkeypatch.setattr(checkpoints, "lack_of_room", lambda folder: None if len(saved) < 1 else "0 MiB are free")
    monkeypatch.setattr(checkpoints, "mark_complete", lambda folder, **facts: saved.append(facts["step"]))

    trainer.train()

    assert saved == [1]
    assert server.said("commit") == [("commit", 1), ("commit", 3)]


def test_a_final_model_that_does_not_fit_is_an_error_and_the_run_can_go_on(tmp_path: Path) -> None:
    server, disk = FakeRolloutServer(), FullDisk(12_000, first=3, last=9)

    try:
        with pytest.raises(CheckpointError, match="final model could not be written"):
            a_trainer(tmp_path, server, callbacks=[disk]).train()
    finally:
        disk.end()

    assert not (tmp_path / "final").exists()
    assert server.said("commit") == []


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeRolloutServer()
    a_trainer(tmp_path, server, max_steps=3, **CHECKPOINTS).train()
    newest = tmp_path / "checkpoints" / "checkpoint-3"
    os.truncate(newest / "optimizer.pt", 100)
    server.events.clear()

    with pytest.raises(TrainerError, match=r"checkpoint after 3 steps.* is after 2"):
        a_trainer(tmp_path, server, max_steps=3, **CHECKPOINTS).train()
    server.committed_step = 2  # as if the commit had not reached it
    a_trainer(tmp_path, server, max_steps=3, **CHECKPOINTS).train()

    assert f"checkpoint {newest} is damaged (optimizer.pt has 100 of" in caplog.text
    assert server.said("lease") == [("lease", 2)]
    assert checkpoints.last_complete(tmp_path / "checkpoints") == (newest, 3)


def test_folders_that_are_not_whole_push_no_whole_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeRolloutServer()
    limit: dict[str, Any] = {"save_total_limit": 2, **CHECKPOINTS}
    a_trainer(tmp_path, server, max_steps=1, **limit).train()
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir()
    seen: list[tuple[Path, int] | None] = []
    mark = checkpoints.mark_complete

    def mark_and_look(folder: Path, **facts: Any) -> None:
        seen.append(checkpoints.last_complete(folder.parent))
        mark(folder, **facts)

    monkeypatch.setattr(checkpoints, "mark_complete", mark_and_look)
    a_trainer(tmp_path, server, max_steps=4, **limit).train()

    assert [found and found[1] for found in seen] == [1, 2, 3]
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_older_ones_go_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    options: dict[str, Any] = {**CHECKPOINTS, "save_total_limit": 2}
    server = FakeRolloutServer()
    a_trainer(tmp_path, server, max_steps=2, **options).train()
    # As after a copy: times of folders say nothing about their order.
    os.utime(tmp_path / "checkpoints" / "checkpoint-2", (1, 1))
    disk = FullDisk(30_000, first=3, last=9)
    trainer = a_trainer(tmp_path, server, callbacks=[disk], max_steps=9, prefetch=0, **options)
    server.on_lease = lambda step: trainer.request_stop("test") if step == 3 else None

    try:
        trainer.train()
    finally:
        disk.end()

    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_a_stop_while_the_server_is_away_saves_the_steps_it_was_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeRolloutServer()
    trainer = a_trainer(tmp_path, server, max_steps=3, **{**CHECKPOINTS, "save_steps": 2})

    async def never_answers(*_: Any, **__: Any) -> None:
        trainer.request_stop("test")
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeClient, "ack", never_answers)
    monkeypatch.setattr(batch_stream, "STOP_GRACE_S", 0.05)

    trainer.train()

    assert checkpoints.last_complete(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-1", 1)
    assert server.said("commit") == []
    monkeypatch.undo()
    server.events.clear()
    a_trainer(tmp_path, server, max_steps=2, **CHECKPOINTS).train()
    assert server.said("lease", "commit") == [("lease", 1), ("commit", 2), ("commit", 2)]


def test_going_on_with_other_options_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeRolloutServer()
    a_trainer(tmp_path, server, max_steps=1, **CHECKPOINTS).train()

    with caplog.at_level(logging.WARNING, logger="trainer"):
        a_trainer(tmp_path, server, max_steps=2, learning_rate=0.005, epsilon_low=0.1, **CHECKPOINTS).train()

    assert "was trained with other options, from here on it is: epsilon_low: 0.1 (was 0.2); learning_rate: 0.005" in (
        caplog.text
    )


def test_going_on_with_the_same_options_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = FakeRolloutServer()
    a_trainer(tmp_path, server, max_steps=1, **CHECKPOINTS).train()

    a_trainer(tmp_path, server, max_steps=2, save_total_limit=5, **CHECKPOINTS).train()

    assert "other options" not in caplog.text


def test_the_final_model_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        a_trainer(tmp_path, FakeRolloutServer(), max_steps=1).train()
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "final" / "model.safetensors").stat().st_mode) == 0o644
