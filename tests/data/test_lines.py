"""Files of rows: every kind that is read, and every way in which one can be broken."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atroposlib.data.config import DataConfig
from atroposlib.data.files import read_file
from atroposlib.data.lines import parse_object
from atroposlib.data.load import load_splits
from atroposlib.data.sources import usable_rows
from atroposlib.errors import DataError
from tests.data.conftest import Write

ROWS: list[dict[str, Any]] = [{"q": "\u2028é", "n": 1}, {"q": "b", "n": None}]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def rows_of(path: Path) -> list[dict[str, Any] | None]:
    return [entry.row for entry in read_file(path)]


def usable(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return list(usable_rows(DataConfig(dataset_path=path, **settings), Counter(), lambda row: row))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.ndjson", LINES.replace(b"\n", b"\r\n\r\n")),
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("lines.json", LINES),
        ("no_ending", LINES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert rows_of(path) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)

    assert rows_of(path) == ROWS


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"q": "a"', r"line 2: not JSON.*the last line: was the file cut"),
        (b'{"q": }\n', "line 2: not JSON"),
        (b"[1]\n", "line 2: a row is an object, not list"),
        (b'{"q": "\\ud800"}\n', "line 2: half of a surrogate pair"),
        (b'{"q": "\xff"}\n', "line 2: not JSON"),
        (b"[" * 100_000 + b"\n", "line 2: not JSON"),
        (b'{"q": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"q": "a"}\n' + line)

    with pytest.raises(DataError, match=complaint):
        usable(path)
    assert usable(path, on_bad_line="skip") == [{"q": "a"}]


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    assert parse_object('{"q": "\\ud83d\\ude00"}') == {"q": "\U0001f600"}


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_an_archive_that_was_cut_gives_what_can_be_read(tmp_path: Path, packed: Any) -> None:
    path = tmp_path / f"rows.jsonl.{'gz' if packed is gzip.compress else 'xz'}"
    whole = packed(b"".join(json.dumps({"n": n, "x": str(n) * 50}).encode() + b"\n" for n in range(4000)))
    path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(DataError, match=r"line \d+: .*(archive|not JSON)"):
        usable(path)
    kept = usable(path, on_bad_line="skip")
    assert 0 < len(kept) < 4000
    assert [row["n"] for row in kept] == list(range(len(kept)))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.parquet", "absent.jsonl.gz"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"cannot read the data set .*{name}"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_a_file_that_is_broken_as_a_whole_is_named(written: Write, name: str) -> None:
    with pytest.raises(DataError, match=name):
        rows_of(written('[{"a": 1}', name))


def test_quarantine_keeps_bad_lines_in_a_file_of_their_own(written: Write) -> None:
    path = written('{"q": 1}\n{"q": \n{"q": 2}\nx')

    for _ in range(2):  # loading twice lists them once
        assert usable(path, on_bad_line="quarantine") == [{"q": 1}, {"q": 2}]

    kept = [json.loads(line) for line in path.with_name("rows.jsonl.bad.jsonl").read_text().splitlines()]
    assert [line["line"] for line in kept] == ['{"q": ', "x"]
    assert kept[0]["place"] == f"{path}, line 2"
    assert "not JSON" in kept[0]["problem"]


def test_two_processes_that_read_a_file_together_leave_one_whole_list(written: Write) -> None:
    path = written('x\n{"q": 1}\ny\n{"q": 2}\n')
    config = DataConfig(dataset_path=path, on_bad_line="quarantine")
    readings = [usable_rows(config, Counter(), lambda row: row) for _ in range(2)]

    for _ in zip(*readings, strict=True):
        pass

    kept = [json.loads(line)["line"] for line in path.with_name("rows.jsonl.bad.jsonl").read_text().splitlines()]
    assert kept == ["x", "y"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["rows.jsonl", "rows.jsonl.bad.jsonl"]


def test_the_list_stays_whole_while_the_file_is_read_again(written: Write) -> None:
    path = written('x\n{"q": 1}\ny')
    usable(path, on_bad_line="quarantine")
    before = path.with_name("rows.jsonl.bad.jsonl").read_text()

    reading = usable_rows(DataConfig(dataset_path=path, on_bad_line="quarantine"), Counter(), lambda row: row)
    next(iter(reading))

    assert path.with_name("rows.jsonl.bad.jsonl").read_text() == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interrupted_reading_leaves_the_list_before(written: Write, interruption: type[BaseException]) -> None:
    path = written('x\n{"q": 1}\ny\n{"q": 2}')
    config = DataConfig(dataset_path=path, on_bad_line="quarantine")
    usable(path, on_bad_line="quarantine")
    before = path.with_name("rows.jsonl.bad.jsonl").read_text()

    def parse(row: dict[str, Any]) -> None:
        raise interruption

    with pytest.raises(interruption):
        list(usable_rows(config, Counter(), parse))

    assert path.with_name("rows.jsonl.bad.jsonl").read_text() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["rows.jsonl", "rows.jsonl.bad.jsonl"]


def test_a_cap_leaves_the_list_of_what_was_read(written: Write) -> None:
    path = written('x\n{"prompt": "a"}\ny\n{"prompt": "b"}\nz\n')

    load_splits(DataConfig(dataset_path=path, on_bad_line="quarantine", dataset_max_samples=2, eval_split_ratio=0))

    kept = [json.loads(line)["line"] for line in path.with_name("rows.jsonl.bad.jsonl").read_text().splitlines()]
    assert kept == ["x", "y"]


def test_a_file_that_was_mended_leaves_no_list_of_bad_lines(written: Write) -> None:
    path = written('{"q": 1}\nx')
    usable(path, on_bad_line="quarantine")
    path.write_text('{"q": 1}\n')

    assert usable(path, on_bad_line="quarantine") == [{"q": 1}]
    assert not path.with_name("rows.jsonl.bad.jsonl").exists()


def test_bad_lines_are_counted_where_a_cap_ends_the_loading(written: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = written('{"prompt": "a"}\nx\n{"prompt": "b"}\n{"prompt": "c"}\n')

    load_splits(DataConfig(dataset_path=path, on_bad_line="skip", dataset_max_samples=2, eval_split_ratio=0))

    assert "left out 1 lines" in caplog.text


def test_half_of_a_surrogate_pair_in_a_list_is_a_bad_row(written: Write) -> None:
    path = written('[{"q": "a\\ud83d\\ude00"}, {"q": "a\\ud800"}, {"q": "c"}]', "rows.json")

    assert [row["q"] for row in usable(path, on_bad_line="quarantine")] == ["a\U0001f600", "c"]
    assert "surrogate pair" in path.with_name("rows.json.bad.jsonl").read_text()


def test_rows_that_a_parser_refuses_are_bad_lines_too(written: Write) -> None:
    def parse(row: dict[str, Any]) -> int:
        if row["q"] == 2:
            raise DataError("q is 2; expected another number")
        return int(row["q"])

    path = written([{"q": 1}, {"q": 2}, {"q": 3}])
    funnel: Counter[str] = Counter()

    with pytest.raises(DataError, match="line 2: q is 2"):
        list(usable_rows(DataConfig(dataset_path=path), Counter(), parse))
    config = DataConfig(dataset_path=path, on_bad_line="quarantine")
    assert list(usable_rows(config, funnel, parse)) == [1, 3]
    assert dict(funnel) == {"read": 3, "usable": 2}
    assert '"line": "{\\"q\\": 2}"' in path.with_name("rows.jsonl.bad.jsonl").read_text()


def test_reading_is_lazy(written: Write) -> None:
    rows = usable_rows(DataConfig(dataset_path=written('{"q": 1}\nbroken\n')), Counter(), lambda row: row)

    assert next(rows) == {"q": 1}, "the broken line has not been read yet"


@given(st.binary(max_size=200))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_raises_nothing_but_data_errors(tmp_path: Path, garbage: bytes) -> None:
    for name in ("g.jsonl", "g.json", "g.jsonl.gz", "g.jsonl.xz", "g.parquet"):
        path = tmp_path / name
        path.write_bytes(garbage)
        try:
            usable(path, on_bad_line="skip")
        except DataError as error:
            assert name in str(error)  # noqa: PT017 - it may also not be raised


@given(st.text(max_size=60) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_a_line_is_an_object_or_a_data_error(line: str) -> None:
    with contextlib.suppress(DataError):
        assert isinstance(parse_object(line), dict)
