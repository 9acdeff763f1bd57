"""Exported groups as Parquet: one row a sequence, written in row groups so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from atroposlib.errors import AtroposError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import GroupRecord, RunInfo
from rollout_server.run_database.export_json import HEADER_FACTS, TOKEN_COLUMNS

ROW_GROUP_BYTES = 32 << 20
"""Column data of a row group; about twice as much is in memory while it is written."""

Pair = tuple[GroupRecord, Group]


class ParquetMissingError(AtroposError):
    """pyarrow is not installed."""

    hint = "pip install 'atroposlib[export]', or choose --format jsonl"


def load_pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which are an extra.

    Raises:
        ParquetMissingError: they are not installed.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ParquetMissingError("--format parquet needs pyarrow, which is not installed here") from error


class ParquetWriter:
    """One row a sequence: its tokens and per-token columns as lists, its score, and its group's facts.

    Args:
        path: a new file.
        run: kept in the file's metadata as JSON, under the key atropos.run.
    """

    def __init__(self, path: Path, run: RunInfo, *, row_group_bytes: int = ROW_GROUP_BYTES) -> None:
        self._pa, parquet = load_pyarrow()
        self._schema = _schema(self._pa).with_metadata({"atropos.run": run.model_dump_json()})
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._row_group_bytes = row_group_bytes
        self._waiting: list[Pair] = []
        self._waiting_bytes = 0

    def write(self, record: GroupRecord, group: Group) -> None:
        """The sequences of one group. The arrays are held until the row group is full."""
        self._waiting.append((record, group))
        columns = [getattr(group, name) for name in TOKEN_COLUMNS]
        self._waiting_bytes += sum(column.nbytes for column in columns if column is not None)
        if self._waiting_bytes >= self._row_group_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is left and the file's end."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            columns = [_column(self._pa, field, self._waiting) for field in self._schema]
            self._writer.write_table(self._pa.table(columns, schema=self._schema))
            self._waiting.clear()
            self._waiting_bytes = 0


def _schema(pa: Any) -> Any:
    facts = [
        ("group_id", pa.string()), ("env_id", pa.int32()), ("state", pa.string()), ("step", pa.int32()),
        ("reason", pa.string()), ("sequence", pa.int32()), ("n_sequences", pa.int32()), ("score", pa.float64()),
        ("finish_reason", pa.string()),
    ]  # fmt: skip
    tokens = [
        ("tokens", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())),
        ("inference_logprobs", pa.list_(pa.float32())), ("policy_versions", pa.list_(pa.int32())),
        ("advantages", pa.list_(pa.float32())), ("ref_logprobs", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int32())), ("distill_token_ids", pa.list_(pa.list_(pa.int32()))),
        ("distill_logprobs", pa.list_(pa.list_(pa.float32()))),
    ]  # fmt: skip
    return pa.schema([*facts, *tokens, ("header", pa.string())])


_FACTS: dict[str, Callable[[GroupRecord, Group], Sequence[Any]]] = {
    "group_id": lambda record, group: [group.group_id] * group.n_sequences,
    "env_id": lambda record, group: [group.env_id] * group.n_sequences,
    "state": lambda record, group: [record.state] * group.n_sequences,
    "step": lambda record, group: [record.step] * group.n_sequences,
    "reason": lambda record, group: [record.reason] * group.n_sequences,
    "sequence": lambda record, group: range(group.n_sequences),
    "n_sequences": lambda record, group: [group.n_sequences] * group.n_sequences,
    "score": lambda record, group: group.scores.tolist(),
    "finish_reason": lambda record, group: group.finish_reasons or [None] * group.n_sequences,
    "header": lambda record, group: [_header(group)] * group.n_sequences,
}


def _header(group: Group) -> str:
    return msgspec.json.encode({name: getattr(group, name) for name in HEADER_FACTS}).decode()


def _column(pa: Any, field: Any, pairs: Sequence[Pair]) -> Any:
    fact = _FACTS.get(field.name)
    if fact is not None:
        return pa.array([value for pair in pairs for value in fact(*pair)], type=field.type)
    return _lists(pa, field.type, [(group, _tokens(group, field.name)) for _, group in pairs])


def _tokens(group: Group, name: str) -> npt.NDArray[Any] | None:
    column: npt.NDArray[Any] | None = group.versions_per_token() if name == "policy_versions" else getattr(group, name)
    return column


def _lists(pa: Any, kind: Any, parts: Sequence[tuple[Group, npt.NDArray[Any] | None]]) -> Any:
    """A list for each sequence, null for the sequences of a group without the column; values are copied once."""
    lengths, is_absent, flat = [], [], []
    for group, column in parts:
        sizes = np.diff(group.cu_seqlens)
        lengths.append(sizes if column is not None else np.zeros_like(sizes))
        is_absent.append(np.full(len(sizes), column is None))
        if column is not None:
            flat.append(column)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    values = _values(pa, kind.value_type, flat)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=pa.array(np.concatenate(is_absent)))


def _values(pa: Any, kind: Any, columns: Sequence[npt.NDArray[Any]]) -> Any:
    """[T] columns as they are; [T, K] columns as a list of K for each token."""
    if not pa.types.is_list(kind):
        return pa.concat_arrays([pa.array(column, type=kind) for column in columns] or [pa.array([], type=kind)])
    inner = [
        pa.ListArray.from_arrays(
            pa.array(np.arange(len(column) + 1, dtype=np.int32) * column.shape[1]),
            pa.array(column.reshape(-1), type=kind.value_type),
            type=kind,
        )
        for column in columns
    ]
    return pa.concat_arrays(inner or [pa.array([], type=kind)])
