"""Unaided attempts are kept: by item, by student, by prompt, over restarts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from atroposlib.teaching.baselines import FILE, BaselineCache, StudentFingerprint
from atroposlib.teaching.frozen_model import ChatReply

STUDENT = StudentFingerprint(("student",), "template", 0.7, 64, 2)
REPLIES = [ChatReply("it is 4", 5, "stop"), ChatReply("ünsure", 3, "length")]


def test_attempts_survive_a_restart(tmp_path: Path) -> None:
    cache = BaselineCache(tmp_path / "run" / FILE)
    cache.put("key", REPLIES)
    cache.close()

    again = BaselineCache(tmp_path / "run" / FILE)

    assert again.get("key") == REPLIES
    assert again.get("other") is None
    assert (again.take_reused(), again.take_reused()) == (1, 0)
    again.close()


@pytest.mark.parametrize(
    "change", [{"models": ("other",)}, {"template": "new"}, {"temperature": 0.0}, {"max_tokens": 65}, {"attempts": 3}]
)
def test_another_student_or_another_prompt_is_asked_anew(change: dict[str, Any]) -> None:
    assert STUDENT.key("2 + 2?") != replace(STUDENT, **change).key("2 + 2?")
    assert STUDENT.key("2 + 2?") != STUDENT.key("2 + 3?")
    assert STUDENT.key("2 + 2?") == replace(STUDENT).key("2 + 2?")


def test_a_file_that_is_no_cache_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not a database " * 100)

    cache = BaselineCache(tmp_path / FILE)
    cache.put("key", REPLIES)

    assert cache.get("key") == REPLIES
    assert (tmp_path / FILE).with_suffix(".broken").read_text().startswith("not a database")
    cache.close()


def test_a_file_that_is_held_by_another_is_no_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BaselineCache(tmp_path / FILE)
    cache.put("key", REPLIES)
    cache.close()
    monkeypatch.setattr("atroposlib.teaching.baselines.BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"locked.*another run_dir"):
            BaselineCache(tmp_path / FILE)

    again = BaselineCache(tmp_path / FILE)
    assert again.get("key") == REPLIES
    again.close()


def test_attempts_that_cannot_be_written_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = BaselineCache(tmp_path / FILE)
    # A file of one page more than it has is as full as a disk.
    cache._connection.execute("PRAGMA max_page_count=1")
    cache.put("key", [ChatReply("long " * 10_000, 5, "stop")])

    assert "full" in caplog.text
    assert cache.get("key") is None
    cache.close()


@pytest.mark.parametrize("row", ["no JSON", '[{"text": "it is 4"}]', "[4]", "4"])
def test_a_row_that_cannot_be_read_is_asked_again(row: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = BaselineCache(None)
    cache._connection.execute("INSERT INTO baselines VALUES ('key', ?)", (row,))

    assert cache.get("key") is None
    assert cache.take_reused() == 0
    assert "asked again" in caplog.text
    cache.put("key", REPLIES)
    assert cache.get("key") == REPLIES
    cache.close()


def test_a_table_that_is_gone_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    cache = BaselineCache(None)
    cache._connection.execute("DROP TABLE baselines")

    assert cache.get("key") is None
    assert "no such table" in caplog.text
    cache.close()


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    cache, reply = BaselineCache(tmp_path / FILE), ChatReply("it is \ud83d", 5, "stop")
    key = STUDENT.key("2 + 2 \udc80?")
    cache.put(key, [reply])

    assert cache.get(key) == [reply]
    cache.close()


def test_without_a_folder_it_forgets_at_the_end() -> None:
    cache = BaselineCache(None)
    cache.put("key", REPLIES)

    assert cache.get("key") == REPLIES
    cache.close()
