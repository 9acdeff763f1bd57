"""Files of a data set: lines of JSON, one JSON list, or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from atroposlib.data.entries import Entry
from atroposlib.data.lines import HALF_A_PAIR, holds_half_a_pair, may_hold_half_a_pair, read_lines
from atroposlib.errors import DataError

LINE_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.xz", ".ndjson.gz", ".ndjson.xz")
FILE_ENDINGS = (*LINE_ENDINGS, ".json", ".parquet")


def is_file_name(name: str) -> bool:
    """Whether a source is meant as a file, though it may not be there."""
    return name.endswith(FILE_ENDINGS)


def read_file(path: Path) -> Iterator[Entry]:
    """Every row of a file, in its order. What has no ending that we know is read as lines of JSON.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_json(path) if path.suffix == ".json" else read_lines(path)


def _read_json(path: Path) -> Iterator[Entry]:
    """A list of objects; a .json file that holds lines of objects is read as such."""
    try:
        with path.open("rb") as file:
            first = next((line.strip()[:1] for line in file if line.strip()), b"")
        if first != b"[":
            yield from read_lines(path)
            return
        text = path.read_bytes()
        rows = json.loads(text)
    except OSError as error:
        raise DataError(f"cannot read the data set {str(path)!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; write a list of objects, or one object a line") from error
    is_doubtful = may_hold_half_a_pair(text)
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        is_broken = is_doubtful and holds_half_a_pair(row)
        yield Entry(place, None, HALF_A_PAIR, ascii(row)) if is_broken else as_entry(place, row)


def _read_parquet(path: Path) -> Iterator[Entry]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: Parquet files need `pip install pyarrow`; install it, or write lines of JSON"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield as_entry(f"{path}, row {number}", row)
    # The library's own errors are of ValueError, OSError and further kinds.
    except Exception as error:
        raise DataError(f"cannot read the data set {str(path)!r} after row {number}: {error}") from error


def as_entry(place: str, row: Any) -> Entry:
    """A row that needed no parsing."""
    if isinstance(row, dict):
        return Entry(place, row)
    return Entry(place, None, f"a row is an object, not {type(row).__name__}", repr(row))
