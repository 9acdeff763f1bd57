"""Where the rows of a run come from, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atroposlib.data.config import DataConfig
from tests.trainer.supervised.fakes import ROWS, sft_config
from trainer.supervised.config import SFTConfig
from trainer.supervised.preparation import splits_of


def with_a_bad_line(folder: Path) -> tuple[Path, Path]:
    """A file of rows, and the one in which its bad lines are kept."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(["{half a line", *map(json.dumps, ROWS)]) + "\n")
    return path, folder / "rows.jsonl.bad.jsonl"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_keeps_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    source, bad = with_a_bad_line(tmp_path)
    options: dict[str, Any] = {"dataset_path": str(source), "on_bad_line": "quarantine"}
    config = sft_config(tmp_path / "run", data=DataConfig(**options))
    monkeypatch.setattr(SFTConfig, "process_index", property(lambda _: rank))

    splits = splits_of(config)

    assert len(splits.train) + len(splits.eval) == len(ROWS)
    assert bad.exists() is (rank == 0)
