"""The sample of completions: bounded, repeatable, readable; and what RunWatch makes of a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.trainer.fakes import a_config, a_group, random_groups
from trainer.batches.step_batch import StepBatch, build_step_batch
from trainer.reporting.completions_table import (
    FILE,
    MOST_ROWS_A_STEP,
    ROWS_A_STEP,
    CompletionRow,
    CompletionsFile,
    chosen,
    rows_of,
    send_to_wandb,
)
from trainer.reporting.run_watch import ALARMS_FILE, RunWatch


def a_batch(step: int = 0, **facts: Any) -> StepBatch:
    groups = random_groups(step, sequences=256) if not facts else [a_group("g", **facts)]
    return build_step_batch(step, groups, advantage_scale="none", overlong="mask", temperature=1.0)


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_tells_prompt_and_completion_apart() -> None:
    first, second = rows_of(a_batch(prompt=(1, 2), completions=((7, 3), (4, 5, 6)), version=0), [0, 1], decode)

    assert (first.prompt, first.completion, first.reward, first.tokens) == ("1 2", "7 3", 1.0, 2)
    assert (second.prompt, second.completion, second.policy_version) == ("1 2", "4 5 6", 0)


def test_a_masked_sequence_is_told_apart_by_its_length() -> None:
    batch = a_batch(prompt=(1, 2), completions=((7, 3), (4, 5, 6)), finish_reasons=["length", "stop"])

    (row,) = rows_of(batch, [0], decode)

    assert (row.prompt, row.completion, row.is_truncated) == ("1 2", "7 3", True)


def test_a_repeated_step_shows_the_same_sequences_and_another_step_others() -> None:
    batch = a_batch()

    assert chosen(batch, probability=None, seed=1) == chosen(batch, probability=None, seed=1)
    assert chosen(batch, probability=None, seed=1) != chosen(a_batch(step=1), probability=None, seed=1)


def test_how_many_are_shown() -> None:
    batch = a_batch()

    assert len(chosen(batch, probability=None, seed=0)) == ROWS_A_STEP
    assert chosen(batch, probability=0.0, seed=0) == []
    assert 5 <= len(chosen(batch, probability=0.1, seed=0)) <= 50
    assert len(set(chosen(batch, probability=1.0, seed=0))) == MOST_ROWS_A_STEP


def test_the_file_is_bounded(tmp_path: Path) -> None:
    file = CompletionsFile(tmp_path, max_bytes=1000)
    rows = [CompletionRow(0, "g", "p" * 50, "c" * 50, 1.0, 3, False, 0)] * 2

    for _ in range(50):
        file.append(rows)

    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {FILE, "completions.1.jsonl"}
    assert all(size < 2000 for size in sizes.values())
    assert lines(tmp_path / FILE)[-1]["completion"] == "c" * 50


def watch(folder: Path, *, start_step: int = 0, **options: Any) -> tuple[RunWatch, list[CompletionRow]]:
    sent: list[CompletionRow] = []
    config = a_config(folder, **options)
    return RunWatch(config, decode=decode, start_step=start_step, send_table=sent.extend), sent


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    run, sent = watch(tmp_path)
    run.after_step(0, {}, a_batch())
    run.close()

    assert sent == []
    assert not (tmp_path / FILE).exists()


def test_completions_that_cannot_be_shown_cost_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> NoReturn:
        raise RuntimeError("no such token")

    config = a_config(tmp_path, log_completions=True)
    for run in (RunWatch(config, decode=fails), RunWatch(config, decode=decode, send_table=fails)):
        assert run.after_step(3, {}, a_batch()) == {"completion/masked_frac": pytest.approx(0.0, abs=1)}
        run.close()

    assert caplog.text.count("are not shown: RuntimeError: no such token") == 2


def test_logged_completions_go_to_the_file_and_to_the_sink(tmp_path: Path) -> None:
    run, sent = watch(tmp_path, log_completions=True)
    run.after_step(0, {}, a_batch())
    run.close()

    assert [row.completion for row in sent] == [line["completion"] for line in lines(tmp_path / FILE)]
    assert len(sent) == ROWS_A_STEP


def test_a_disk_that_is_full_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = watch(tmp_path, log_completions=True)

    def full(self: CompletionsFile, rows: Sequence[CompletionRow]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CompletionsFile, "append", full)

    assert run.after_step(0, {}, a_batch())["completion/masked_frac"] == 0.0
    run.close()


def test_masked_sequences_are_counted(tmp_path: Path) -> None:
    run, _ = watch(tmp_path)
    figures = run.after_step(0, {}, a_batch(finish_reasons=["length", "stop"]))
    run.close()

    assert figures == {"completion/masked_frac": 0.5}


def test_an_alarm_is_in_the_figures_and_in_its_file_when_it_starts_and_ends(tmp_path: Path) -> None:
    run, _ = watch(tmp_path)
    figures = [run.after_step(step, {"ess": 0.1 if step < 4 else 0.9}, a_batch()) for step in range(8)]
    run.close()

    told = {step: f["alarm/ess_low"] for step, f in enumerate(figures) if "alarm/ess_low" in f}
    assert told == {2: 1.0, 5: 0.0}
    assert [(line["step"], line["alarm"], line["is_on"]) for line in lines(tmp_path / ALARMS_FILE)] == [
        (2, "ess_low", True),
        (5, "ess_low", False),
    ]


def test_a_resumed_run_knows_which_alarms_are_on(tmp_path: Path) -> None:
    earlier = [{"step": 3, "ess": 0.9}, *({"step": step, "ess": 0.1} for step in (0, 1, 2, 3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier) + '{"step": 4, "es')
    run, _ = watch(tmp_path, start_step=3)

    figures = [run.after_step(step, {"ess": ess}, a_batch()) for step, ess in ((3, 0.1), (4, 0.9), (5, 0.9))]
    run.close()

    assert [f.get("alarm/ess_low") for f in figures] == [None, None, 0.0]


def test_wandb_gets_a_table_with_its_next_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[tuple[dict[str, Any], bool]] = []
    # FAKE run: wandb's own table, and nothing that leaves this process.
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "log", lambda figures, commit: logged.append((figures, commit)))

    send_to_wandb([])
    send_to_wandb(rows_of(a_batch(), [0, 1], decode))

    ((figures, is_committed),) = logged
    assert not is_committed
    assert figures["completions"].columns[:4] == ["step", "group_id", "prompt", "completion"]
    assert len(figures["completions"].data) == 2
