"""The data of the environments: read and checked with line numbers, split by a hash, shuffled without end."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from environments.rows import held_out, load_rows, shuffled_forever

FIELDS = {"q": str, "n": float}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_come_in_order_with_all_their_fields(tmp_path: Path) -> None:
    path = written(tmp_path, '{"q": "\u2028é", "n": 1, "more": null}\r\n\n{"q": "b", "n": 0.5}\n')

    rows = [{"q": "\u2028é", "n": 1, "more": None}, {"q": "b", "n": 0.5}]
    assert load_rows(path, fields=FIELDS) == load_rows(str(path), fields=FIELDS) == rows


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"q": "a"', "line 2: not JSON"),
        ("[1]", "line 2: a row is an object, not list"),
        ('{"q": "a"}', "line 2: field 'n' is missing; there are 'q'"),
        ('{"q": 1, "n": 1}', "line 2: field 'q' is int, expected str"),
        ('{"q": "a", "n": true}', "line 2: field 'n' is bool, expected float"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = written(tmp_path, f'{{"q": "a", "n": 1}}\n{line}\n')

    with pytest.raises(ConfigError, match=complaint):
        load_rows(path, fields=FIELDS)


def test_an_empty_file_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        load_rows(written(tmp_path, "\n"), fields=FIELDS)
    with pytest.raises(ConfigError, match="cannot read"):
        load_rows(tmp_path / "absent", fields=FIELDS)
    with pytest.raises(ConfigError, match="cannot read"):
        load_rows("absent.jsonl", fields=FIELDS)


def test_the_hub_is_asked_for_what_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "own/broken":
            raise ConnectionError("no network")
        return [{"q": "a", "n": 1}]

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)

    assert load_rows("own/set:main", fields=FIELDS, split="test") == [{"q": "a", "n": 1}]
    with pytest.raises(ConfigError, match="no network"):
        load_rows("own/broken", fields=FIELDS)
    with pytest.raises(ConfigError, match="split train, row 0: field 'x'"):
        load_rows("own/set", fields={"x": str})
    assert asked == [("own/set", "main", "test"), ("own/broken", None, "train"), ("own/set", None, "train")]


def test_without_the_hubs_library_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(ConfigError, match="pip install datasets"):
        load_rows("own/set", fields=FIELDS)


@given(st.lists(st.text(max_size=3), min_size=40, max_size=60), st.lists(st.text(max_size=3), max_size=20))
def test_a_row_stays_on_its_side_and_no_key_is_on_both(keys: list[str], more: list[str]) -> None:
    # Two keys that are known to fall on different sides, so that neither side is empty.
    rows = [{"q": key} for key in ["a", "b", "c", "d", "e", *keys]]
    train, test = held_out(rows, 0.5, "q")
    _, larger = held_out([*rows, *({"q": key} for key in more)], 0.5, lambda row: row["q"])

    assert sorted(map(json.dumps, train + test)) == sorted(map(json.dumps, rows))
    assert not {row["q"] for row in train} & {row["q"] for row in test}
    assert larger[: len(test)] == test


def test_the_share_is_about_right() -> None:
    train, test = held_out([{"q": str(i)} for i in range(2000)], 0.1, "q")

    assert len(train) + len(test) == 2000
    assert 140 < len(test) < 260


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        held_out([{"q": "a"}], share, "q")


def test_a_side_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves"):
        held_out([{"q": "a"}], 0.5, "q")


def test_every_row_comes_once_before_any_comes_again() -> None:
    def first(seed: int) -> list[int]:
        return list(islice(shuffled_forever(range(10), seed), 20))

    assert sorted(first(1)[:10]) == sorted(first(1)[10:]) == list(range(10))
    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(1)[:10] != first(1)[10:]
