"""All ranks go on together or stop together, and each says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from atroposlib.errors import NoBatchError
from tests.trainer import fault_worker
from tests.trainer.ranks import run_ranks
from trainer import agreement
from trainer.agreement import agreed
from trainer.checkpoints import folders as checkpoints
from trainer.errors import RankError


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the other ranks say; this one is the first."""
    found: list[str | None] = []
    monkeypatch.setattr(agreement, "exchanged", lambda mine, *, ranks: [mine, *found])
    return found


def test_alone_there_is_nobody_to_ask() -> None:
    assert agreed(lambda: 5, ranks=1) == 5
    assert agreed(lambda: None, ranks=1) is None


def test_where_all_have_something_each_gets_its_own(others: list[str | None]) -> None:
    others.append(None)

    assert agreed(lambda: 5, ranks=2) == 5


def test_one_rank_that_is_told_to_stop_stops_all(others: list[str | None]) -> None:
    others.append("")

    assert agreed(lambda: 5, ranks=2) is None


def test_a_failure_elsewhere_is_named_with_its_rank(others: list[str | None]) -> None:
    others += [None, "no batch for step 3"]

    with pytest.raises(RankError, match="rank 2 cannot go on, and all ranks stop together: no batch for step 3"):
        agreed(lambda: 5, ranks=3)


def test_ones_own_failure_is_raised_as_it_is_once_the_others_know(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []

    def exchanged(mine: str | None, *, ranks: int) -> list[str | None]:
        told.append(mine)
        return [mine, None]

    monkeypatch.setattr(agreement, "exchanged", exchanged)

    def fail() -> int:
        raise NoBatchError("no batch", waiting_for="groups")

    with pytest.raises(NoBatchError) as caught:
        agreed(fail, ranks=2)
    assert caught.value.waiting_for == "groups"
    assert told == ["no batch"]


def test_a_rank_without_a_batch_leaves_no_other_hanging(tmp_path: Path) -> None:
    done = run_ranks(fault_worker.main, str(tmp_path), "starved_rank=1", "batch_deadline_s=1", "max_steps=4", ranks=2)

    assert done.returncode != 0
    reason = "no batch for step 1 within 1 s: no environment is registered"
    assert f"rank 1 ends: {reason}" in done.output
    assert f"rank 0 ends: rank 1 cannot go on, and all ranks stop together: {reason}" in done.output


@pytest.mark.parametrize("size_bytes", [12_000, 30_000], ids=["weights", "deepspeed"])
def test_a_full_disk_of_one_rank_costs_all_ranks_that_checkpoint_alone(tmp_path: Path, size_bytes: int) -> None:
    options = ["save_strategy=steps", "save_steps=1", "prefetch=0", "max_steps=3"]

    done = run_ranks(
        fault_worker.main,
        str(tmp_path),
        "deepspeed=zero2",
        "full_disk_step=1",
        f"full_disk_bytes={size_bytes}",
        *options,
        ranks=2,
    )

    assert done.returncode == 0, done.output
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert checkpoints.last_complete(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "checkpoint-3", 3)
