"""Small modules that write things down: JSON lines, checkpoint markers, the step's clock, wandb's mode."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.trainer.fakes import a_config
from tests.trainer.test_checkpoints import largest_file
from trainer.checkpoints import folders as checkpoints
from trainer.errors import TrainerError
from trainer.reporting.ledger import JsonLines
from trainer.reporting.tracking import prepare_tracking
from trainer.step.clock import StepClock


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "deep" / "x.jsonl")

    lines.append({"a": 1, "b": float("nan"), "c": float("inf")})

    assert json.loads((tmp_path / "deep" / "x.jsonl").read_text()) == {"a": 1, "b": None, "c": None}
    lines.close()


def test_a_file_that_exists_is_continued(tmp_path: Path) -> None:
    for step in range(2):
        lines = JsonLines(tmp_path / "x.jsonl")
        lines.append({"step": step})
        lines.close()

    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"step": 0}\n{"ste')

    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append({"step": 1})
    lines.close()

    assert (tmp_path / "x.jsonl").read_text().splitlines() == ['{"step": 0}', '{"ste', '{"step": 1}']


def test_a_full_disk_ends_the_run_with_what_to_do_and_closing_hides_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")

    with largest_file(10):
        with pytest.raises(TrainerError, match=r"x.jsonl cannot be written: File too large.*same command"):
            lines.append({"step": 0, "text": "x" * 100})
        lines.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(TrainerError, match=r"file/x.jsonl cannot be written"):
        JsonLines(tmp_path / "file" / "x.jsonl")


def test_only_a_marked_checkpoint_counts(tmp_path: Path) -> None:
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoints.last_complete(tmp_path) is None

    for step in (2, 10):
        checkpoints.mark_complete(tmp_path / f"checkpoint-{step}", step=step, run_name="r")

    assert checkpoints.last_complete(tmp_path) == (tmp_path / "checkpoint-10", 10)


def test_the_clock_adds_up_phases() -> None:
    clock = StepClock()
    clock.start("wait")
    time.sleep(0.02)
    clock.start("train")
    seconds = clock.finish()

    assert seconds["time/wait_s"] >= 0.02
    assert seconds["time/sync_s"] == 0.0
    assert seconds["time/step_s"] == pytest.approx(seconds["time/wait_s"] + seconds["time/train_s"])
    assert clock.finish()["time/step_s"] == 0.0


@pytest.mark.parametrize(("key", "mode"), [("", "offline"), ("k" * 40, None)])
def test_wandb_without_a_key_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, mode: str | None
) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.setenv(name, "x")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))

    prepare_tracking(a_config(tmp_path, report_to=["wandb"]))

    assert os.environ.get("WANDB_MODE") == mode
