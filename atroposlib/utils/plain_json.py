"""What JSON does not know, as something that it does."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """`default` of json.dumps: numpy numbers and arrays, which rewards and metrics often are; anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
