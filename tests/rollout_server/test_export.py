"""What an exported file holds: every token, logprob and fact of the groups asked for, and nothing half-written."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atroposlib.errors import ConfigError
from atroposlib.wire.columns import Group, decode_groups, encode_group, read_blobs
from rollout_server.run_database import export, records
from rollout_server.run_database.export import parse_states, parse_steps
from rollout_server.run_database.export_parquet import ParquetWriter
from rollout_server.run_database.recorded import open_recorded
from rollout_server.stores.base import StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from tests.builders import a_group, a_run
from tests.rollout_server.recordings import RUN_NAME, record, some_batches


def rich_group(group_id: str) -> Group:
    """Every optional column and fact."""
    group = a_group(group_id)
    n_tokens, rng = group.n_tokens, np.random.default_rng(0)
    return dataclasses.replace(
        group,
        advantages=rng.random(n_tokens, dtype=np.float32),
        ref_logprobs=-rng.random(n_tokens, dtype=np.float32),
        distill_token_ids=np.arange(n_tokens * 3, dtype=np.int32).reshape(n_tokens, 3),
        distill_logprobs=-rng.random((n_tokens, 3), dtype=np.float32),
        messages=[[{"role": "user", "content": "¿Qué? 🙂"}], []],
        group_overrides={"a": 1},
    )


@pytest.fixture
async def run_folder(tmp_path: Path) -> Path:
    batches = some_batches(3)
    batches[1][0] = rich_group("rich")
    await record(tmp_path / "data", batches, queued=[a_group("waiting", version=2)])
    return tmp_path / "data"


def exported(folder: Path, *options: str, form: str = "jsonl") -> Path:
    out = folder.parent / f"out.{form}"
    assert export.main([str(folder), "--format", form, "--out", str(out), *options]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(column: Any, group: Group) -> list[Any]:
    return [part.tolist() for part in np.split(column, group.cu_seqlens[1:-1])]


async def test_json_lines_hold_every_column_and_fact_in_the_order_of_training(run_folder: Path) -> None:
    groups = lines(exported(run_folder))

    assert [(group["group_id"], group["step"]) for group in groups] == [
        ("s0-0", 0), ("s0-1", 0), ("rich", 1), ("s1-1", 1), ("s2-0", 2), ("s2-1", 2),
    ]  # fmt: skip
    sent, got = rich_group("rich"), groups[2]
    for name in ("tokens", "loss_mask", "inference_logprobs", "advantages", "ref_logprobs", "distill_token_ids"):
        assert got[name] == rows(getattr(sent, name), sent)
    assert got["policy_versions"] == [[-1, -1, -1, 0, 0, 0, 0]] * 2
    assert (got["scores"], got["messages"], got["group_overrides"]) == ([0.0, 1.0], sent.messages, {"a": 1})
    assert (got["state"], got["labels"], groups[0]["advantages"]) == ("batched", None, None)


async def test_atropos_lines_are_what_its_environments_save(run_folder: Path) -> None:
    group = lines(exported(run_folder, "--steps", "1", form="atropos"))[0]

    assert "env_id" not in group
    assert group["tokens"] == [[1, 2, 3, 10, 11, 12, 13], [1, 2, 3, 11, 12, 13, 14]]
    assert group["masks"] == [[-100, -100, -100, 10, 11, 12, 13], [-100, -100, -100, 11, 12, 13, 14]]
    assert group["scores"] == [0.0, 1.0]
    assert {"ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs"} <= set(group)


async def test_parquet_holds_a_row_a_sequence(run_folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")

    table = parquet.read_table(exported(run_folder, form="parquet"))

    found, sent = table.to_pylist(), rich_group("rich")
    assert [(row["group_id"], row["sequence"]) for row in found[:3]] == [("s0-0", 0), ("s0-0", 1), ("s0-1", 0)]
    assert len(found) == 12
    rich = [row for row in found if row["group_id"] == "rich"]
    for name in ("tokens", "loss_mask", "inference_logprobs", "advantages", "ref_logprobs", "distill_token_ids",
                 "distill_logprobs"):  # fmt: skip
        assert [row[name] for row in rich] == rows(getattr(sent, name), sent), name
    assert [row["score"] for row in rich] == [0.0, 1.0]
    assert rich[0]["labels"] is None
    assert found[0]["advantages"] is None
    assert found[0]["distill_logprobs"] is None
    assert json.loads(rich[1]["header"])["messages"] == sent.messages
    assert json.loads(table.schema.metadata[b"atropos.run"])["run_name"] == RUN_NAME


async def test_parquet_is_written_in_row_groups_as_they_fill(run_folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    recorded = open_recorded(run_folder)
    path = run_folder / "small.parquet"
    writer = ParquetWriter(path, recorded.run, row_group_bytes=1)
    for group_record, payload in recorded.groups():
        for group in decode_groups(payload):
            writer.write(group_record, group)
    writer.close()
    recorded.close()

    assert parquet.ParquetFile(path).num_row_groups == 6
    assert parquet.read_table(path).num_rows == 12


async def test_steps_and_states_choose_groups(run_folder: Path) -> None:
    def ids(*options: str) -> list[str]:
        return [group["group_id"] for group in lines(exported(run_folder, "--overwrite", *options))]

    assert ids("--steps", "1:2") == ["rich", "s1-1"]
    assert ids("--steps", "2:") == ["s2-0", "s2-1"]
    assert ids("--states", "queued") == ["waiting"]
    assert ids("--states", "queued,batched")[-1] == "waiting"


async def test_a_run_is_exported_while_its_server_writes_it(tmp_path: Path) -> None:
    await record(tmp_path / "data", some_batches(1))
    store = await SQLiteStore.open(tmp_path / "data", StoreLimits(), synchronous="normal")
    await store.append(list(read_blobs(encode_group(a_group("live", version=0)))))

    found = lines(exported(tmp_path / "data", "--states", "batched,queued"))

    await store.close()
    assert [group["group_id"] for group in found] == ["s0-0", "s0-1", "live"]


async def test_an_archived_run_is_exported_from_its_folder(tmp_path: Path) -> None:
    await record(tmp_path / "data", some_batches(1))
    store = await SQLiteStore.open(tmp_path / "data", StoreLimits(), synchronous="normal")
    await store.open_run(a_run("the next run"))
    await store.close()
    (archived,) = (tmp_path / "data" / "archive").iterdir()

    assert len(lines(exported(archived))) == 2


async def test_payload_that_is_gone_is_counted(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for segment in (run_folder / "current" / "segments").iterdir():
        segment.unlink()

    assert exported(run_folder).read_text() == ""
    assert "6 more match, but their payload is not kept" in capsys.readouterr().out


async def test_an_existing_file_is_left_alone_unless_told_otherwise(run_folder: Path) -> None:
    out = exported(run_folder)
    with pytest.raises(ConfigError, match="--overwrite"):
        exported(run_folder)
    assert len(lines(exported(run_folder, "--overwrite", "--steps", "0"))) == 2
    assert list(run_folder.parent.glob(".*partial")) == []
    assert out.exists()


async def test_a_failed_export_leaves_no_file(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(payload: memoryview) -> list[Group]:
        raise OSError("disk on fire")

    monkeypatch.setattr(export, "decode_groups", broken)

    with pytest.raises(OSError, match="on fire"):
        exported(run_folder)
    assert [path.name for path in run_folder.parent.iterdir()] == ["data"]


def test_a_folder_without_a_run_is_told_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the server's --data-dir"):
        export.main([str(tmp_path), "--out", str(tmp_path / "x.jsonl"), "--format", "jsonl"])


@pytest.mark.parametrize(
    ("text", "steps"), [("10:20", range(10, 20)), (":3", range(3)), ("7", range(7, 8)), ("0:0", range(0))]
)
def test_steps_are_written_as_slices(text: str, steps: range) -> None:
    assert parse_steps(text) == steps


def test_open_ended_steps_reach_every_step() -> None:
    assert 10**9 in parse_steps("5:")
    assert 4 not in parse_steps("5:")


@pytest.mark.parametrize("text", [":", "a:b", "1:2:3", "-1:2", ""])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="10:20"):
        parse_steps(text)


def test_unknown_states_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'trained' is not a state"):
        parse_states("batched,trained")


async def test_the_table_of_records_counts_groups(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert records.main([str(run_folder)]) == 0

    text = capsys.readouterr().out
    assert "steps 0 to 2 of 1000, 3 acknowledged" in text
    assert "6" in text.splitlines()[-1]
