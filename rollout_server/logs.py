"""Log lines of the server: text for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

FIELDS = ("request_id", "route", "run_name", "step", "group_id", "env_id", "status", "duration_s")
"""What a line may carry besides its text: given as logging's extra=, or by the request under way."""

request_fields: ContextVar[Mapping[str, str | int]] = ContextVar("request_fields")
"""Facts of the request under way: request_id and route, and the step or others from its path."""


def set_up(level: str, style: Literal["text", "json"]) -> None:
    """Send all log lines of this process to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):  # its lines go through ours
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, getattr(logging, level.upper())))
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """The fields that this line carries."""
    facts: dict[str, object] = {**request_fields.get({})}
    facts.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
    return facts


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the fields, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, text, then the fields as name=value. Control characters are escaped: one record is one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = "".join(f" {name}={value}" for name, value in facts_of(record).items())
        text = (record.getMessage() + facts).replace("\r", "\\r").replace("\n", "\\n")
        line = f"{time} {record.levelname.lower():7} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
