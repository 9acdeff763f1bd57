"""What tells the sources of rows apart: ids where data has them, else a hash of the question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ID_COLUMNS = ("source_id", "problem_id", "session_id", "id", "uuid", "idx")


def source_id_of(row: Mapping[str, Any], question: Any) -> str:
    """The row's own id, else a hash of its question: rows of one question are then of one source."""
    for name in ID_COLUMNS:
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    return hashed(question)


def hashed(value: Any) -> str:
    """16 hexadecimal digits that only equal values share."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
