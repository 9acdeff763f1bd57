"""A checkpoint is whole or does not count: markers, damage, full disks, permissions."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.checkpoints import folders as checkpoints
from trainer.checkpoints.folders import MARKER


def a_checkpoint(folder: Path, step: int) -> Path:
    """With a file of each kind."""
    path = folder / f"checkpoint-{step}"
    (path / "global_step1").mkdir(parents=True)
    save_file({"weight": torch.zeros(64)}, path / "model.safetensors")
    torch.save({"moment": torch.zeros(64)}, path / "optimizer.pt")
    torch.save({"moment": torch.zeros(64)}, path / "global_step1" / "rank_0.pt")
    (path / "trainer_state.json").write_text("{}")
    checkpoints.mark_complete(path, step=step, run_name="r", settings={"beta": 0.1})
    return path


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("model.safetensors", cut_short, "model.safetensors has "),
        ("model.safetensors", overwrite, "model.safetensors is no file of its kind"),
        ("optimizer.pt", overwrite, "optimizer.pt is no file of its kind"),
        ("global_step1/rank_0.pt", cut_short, "global_step1/rank_0.pt has "),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        (MARKER, cut_short, "its marker cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None], text: str
) -> None:
    older, newest = a_checkpoint(tmp_path, 2), a_checkpoint(tmp_path, 10)
    assert checkpoints.last_complete(tmp_path) == (newest, 10)

    damage(newest / file)

    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_complete(tmp_path) == (older, 2)
    assert f"checkpoint {newest} is damaged ({text}" in caplog.text


def test_a_marker_of_another_program_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / MARKER).write_text(json.dumps([1, 2]))

    assert checkpoints.last_complete(tmp_path) is None


def test_the_settings_come_back_as_they_were(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 2)

    assert checkpoints.settings_of(folder) == {"beta": 0.1}
    assert checkpoints.settings_of(tmp_path) == {}


def test_an_earlier_attempt_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, 2)

    checkpoints.clear(folder)
    checkpoints.clear(folder)

    assert not folder.exists()


def test_the_oldest_go_and_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10, 20):
        a_checkpoint(tmp_path, step)

    checkpoints.rotate(tmp_path, limit=2, best="checkpoint-4")

    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-20"}


def test_what_stands_after_the_newest_whole_one_is_removed(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        a_checkpoint(tmp_path, step)

    checkpoints.clear_after(tmp_path, 4)

    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_a_finished_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    old, new = tmp_path / "final", tmp_path / "final.draft"
    for folder, name in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / name).touch()

    checkpoints.put_in_place(new, old)

    assert [path.name for path in old.iterdir()] == ["new"]
    assert not new.exists()


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """As on a full disk: no file of this process may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"weight": torch.zeros(10_000)}, path),
        lambda path: torch.save({"weight": torch.zeros(10_000)}, path),
        lambda path: path.write_bytes(b"x" * 10_000),
    ],
    ids=["safetensors", "torch", "python"],
)
def test_what_a_full_disk_raises_is_known_as_such(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with largest_file(4096), pytest.raises(Exception) as caught:  # noqa: PT011 (which type it is, is the question)
        write(tmp_path / "file")

    assert checkpoints.is_write_failure(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("x"), KeyError("y")])
def test_other_errors_are_not_blamed_on_the_disk(error: Exception) -> None:
    assert not checkpoints.is_write_failure(error)


def test_room_is_measured_by_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10, 10))
    assert checkpoints.lack_of_room(tmp_path) is None

    a_checkpoint(tmp_path, 2)

    assert re.search("0 MiB are free.*the largest one", checkpoints.lack_of_room(tmp_path) or "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
    assert checkpoints.lack_of_room(tmp_path) is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_permissions_that_new_files_get(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        save_file({"weight": torch.zeros(4)}, tmp_path / "model.safetensors")
        checkpoints.follow_umask(tmp_path)
    finally:
        os.umask(old)

    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"model.safetensors": mode}
