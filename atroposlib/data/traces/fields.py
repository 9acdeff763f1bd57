"""Fields of a trace: taken with their types checked; maps may be JSON in a string, as databases and exports have them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.errors import DataError

Map = dict[str, Any]


def text(row: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """A text; None where it is absent.

    Raises:
        DataError: it is something else.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(f"{where}{name}", value, "text")
    return value


def number(row: Mapping[str, Any], name: str, where: str = "") -> float | None:
    """A finite number; None where it is absent.

    Raises:
        DataError: it is something else.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise wrong(f"{where}{name}", value, "a finite number")
    return float(value)


def mapping(row: Mapping[str, Any], name: str, where: str = "") -> Map | None:
    """A map, or the JSON of one; None where it is absent.

    Raises:
        DataError: it is something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = from_json(value) if value.strip() else None
    if value is not None and not isinstance(value, dict):
        raise wrong(f"{where}{name}", row[name], "an object")
    return value


def items(
    row: Mapping[str, Any], name: str, where: str = "", *, of: type | tuple[type, ...] | None = None
) -> list[Any]:
    """A list; empty where it is absent.

    Args:
        of: what each item must be.
    Raises:
        DataError: it is something else, or an item is.
    """
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(f"{where}{name}", value, "a list")
    for place, item in enumerate(value):
        if of is not None and (not isinstance(item, of) or isinstance(item, bool)):
            kinds = of if isinstance(of, tuple) else (of,)
            raise wrong(f"{where}{name}[{place}]", item, " or ".join(kind.__name__ for kind in kinds))
    return value


def first_present(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names under which there is something."""
    return next((name for name in names if row.get(name) is not None), None)


def from_json(value: str) -> Any:
    """What a string holds; the string itself where it is no JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def to_json(value: Any) -> str | None:
    """A map or list as JSON: columns of open maps fit into no table. None stays None."""
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def wrong(name: str, value: Any, expected: str) -> DataError:
    """The error of a field."""
    shown = repr(value)
    return DataError(f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}; expected {expected}")
