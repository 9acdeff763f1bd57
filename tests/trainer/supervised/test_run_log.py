"""The record of a run: what rank 0 cannot write ends all ranks, before they wait for it in a collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import AtroposError, ConfigError
from tests.trainer.supervised.fakes import sft_config
from trainer import agreement
from trainer.errors import RankError
from trainer.reporting.ledger import JsonLines
from trainer.supervised.config import SFTConfig
from trainer.supervised.run_log import RunLog


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What this rank tells the others, who are well."""
    told: list[str | None] = []

    def exchanged(mine: str | None, *, ranks: int) -> list[str | None]:
        told.append(mine)
        return [mine, *[None] * (ranks - 1)]

    monkeypatch.setattr(agreement, "exchanged", exchanged)
    return told


def one_of_two(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, rank: int = 0) -> SFTConfig:
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda _: 2))
    monkeypatch.setattr(SFTConfig, "process_index", property(lambda _: rank))
    return sft_config(run_dir)


def test_a_record_that_cannot_be_opened_is_told_to_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str | None]
) -> None:
    run_log = RunLog(one_of_two(tmp_path / "run", monkeypatch), {})
    # A configuration refuses a file that is there before it.
    (tmp_path / "run").write_text("in the way")

    with pytest.raises(ConfigError), run_log.opened(start_step=0, total_steps=1):
        pass

    assert "cannot be written" in str(heard[-1])


def test_a_line_that_cannot_be_written_is_told_to_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str | None]
) -> None:
    def full(*_: Any) -> None:
        raise AtroposError("no space left")

    run_log = RunLog(one_of_two(tmp_path, monkeypatch), {})

    with run_log.opened(start_step=0, total_steps=1):
        monkeypatch.setattr(JsonLines, "append", full)
        with pytest.raises(AtroposError, match="no space"):
            run_log.evaluated(1, {"eval_loss": 1.0})

    assert heard[-1] == "no space left"


def test_the_others_hear_that_rank_0_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_of_two(tmp_path, monkeypatch, rank=1)
    monkeypatch.setattr(agreement, "exchanged", lambda mine, *, ranks: ["run_dir cannot be written", mine])

    with pytest.raises(RankError, match="rank 0"), RunLog(config, {}).opened(start_step=0, total_steps=1):
        pass
