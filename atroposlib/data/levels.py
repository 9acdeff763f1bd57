"""Difficulty: which rows of a file are of the levels that are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from atroposlib.data.config import DataConfig
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.sources import counted, local_file
from atroposlib.errors import DataError

LEVEL_COLUMNS = ("level", "difficulty")


def of_level(rows: Iterator[Row], config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """The rows of the level asked for. On the hub it is a configuration of the data set, which has been read already."""
    wanted = config.dataset_level_filter
    if wanted is None or local_file(config) is None:
        return rows
    return counted((row for row in rows if is_of_level(row, wanted)), funnel, f"level {wanted}")


def check_level(row: Row, config: DataConfig) -> None:
    """Refuse a row that levels are asked of and that has none.

    Raises:
        DataError: the row has no level.
    """
    wanted = config.dataset_level_filter
    if wanted is not None and local_file(config) is not None and _level(row) is None:
        raise DataError(
            f"dataset_level_filter={wanted} needs a column {' or '.join(LEVEL_COLUMNS)}; the columns are {', '.join(row)}"
        )


def is_of_level(row: Row, wanted: str) -> bool:
    """Whether a row is of a level: `level_4_5` names the levels 4 and 5, a name without numbers itself."""
    level, numbers = str(_level(row)), _numbers(wanted)
    return bool(numbers & _numbers(level)) if numbers else level.casefold() == wanted.casefold()


def _level(row: Row) -> Any:
    return next((row[name] for name in LEVEL_COLUMNS if row.get(name) is not None), None)


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))
