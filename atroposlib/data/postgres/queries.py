"""The statements: values are always parameters, never a part of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atroposlib.data.config import DataConfig
from atroposlib.data.traces.filters import utc

DEFAULT_LIMIT = 1000
_SCORE = "COALESCE((s.reward->>'score')::float8, (s.reward_stats->>'score')::float8)"
_LEARNING = (
    "COALESCE(s.student_learning, r.student_learning) AS student_learning, "
    "COALESCE(s.teacher_learning, r.teacher_learning) AS teacher_learning"
)
_NO_LEARNING = "NULL AS student_learning, NULL AS teacher_learning"
_REGISTRY = " LEFT JOIN learning_registry r ON r.learning_key = s.metadata->>'learning_key'"

STEPS = (
    "SELECT session_id, step_id, trace, output, evaluation, attempts, metadata FROM step_results "
    "WHERE session_id = ANY(%s) ORDER BY session_id, step_id"
)
ATTEMPTS = (
    "SELECT session_id, step_id, attempt, evaluation FROM step_attempts "
    "WHERE session_id = ANY(%s) ORDER BY session_id, step_id, attempt"
)
NOTES = (
    "SELECT session_id, step_id, note FROM guidance_notes "
    "WHERE session_id = ANY(%s) ORDER BY session_id, step_id, sequence"
)
EVENTS = "SELECT session_id, event FROM trajectory_events WHERE session_id = ANY(%s) ORDER BY session_id, id"


@dataclass(frozen=True)
class Query:
    """A statement and its parameters."""

    text: str
    values: list[Any]


@dataclass(frozen=True)
class Condition:
    """One filter: its stage in the funnel, its SQL and its parameters."""

    stage: str
    sql: str
    values: list[Any]


def conditions(config: DataConfig) -> list[Condition]:
    """The filters of a configuration, in the order of the funnel; the same rules as for files of traces."""
    found: list[Condition] = []
    for stage, column, wanted in (
        ("status", "s.status", config.status_filters),
        ("review", "s.review_status", config.review_status_filters),
    ):
        if wanted is not None:
            found.append(Condition(f"{stage} {' or '.join(wanted)}", f"{column} = ANY(%s)", [list(wanted)]))
    if config.learning_key is not None:
        key = config.learning_key
        found.append(Condition(f"learning_key {key}", "s.metadata->>'learning_key' = %s", [key]))
    lowest = f"{_SCORE} >= %s" if config.min_reward > 0 else f"({_SCORE} IS NULL OR {_SCORE} >= %s)"
    found.append(Condition(f"reward >= {config.min_reward}", lowest, [config.min_reward]))
    if config.max_reward is not None:
        found.append(Condition(f"reward <= {config.max_reward}", f"{_SCORE} <= %s", [config.max_reward]))
    if config.start_date is not None:
        start = utc(config.start_date)
        found.append(Condition(f"from {start:%Y-%m-%d}", "s.created_at >= %s", [start]))
    if config.end_date is not None:
        end = utc(config.end_date)
        found.append(Condition(f"before {end:%Y-%m-%d}", "s.created_at < %s", [end]))
    return found


def count_query(config: DataConfig) -> Query:
    """How many sessions there are, and how many each filter leaves: one row, one column a stage."""
    columns, values = ["count(*)"], []
    found = conditions(config)
    for end in range(1, len(found) + 1):
        columns.append(f"count(*) FILTER (WHERE {_all(found[:end])})")
        values += [value for condition in found[:end] for value in condition.values]
    return Query(f"SELECT {', '.join(columns)} FROM sessions s", values)


def sessions_query(config: DataConfig, *, session_id: int | str | None = None) -> Query:
    """The sessions that pass every filter, the newest first.

    Args:
        session_id: this one alone, whatever the filters say.
    """
    learning = config.include_learning_data
    columns = (
        "s.id, s.task, s.status, s.metadata, s.final_answer, s.reward, s.reward_stats, s.reward_audit, s.review_status, "
        f"s.created_at, s.completed_at, p.plan, {_LEARNING if learning else _NO_LEARNING}"
    )
    tables = f"sessions s LEFT JOIN plans p ON p.session_id = s.id{_REGISTRY if learning else ''}"
    if session_id is not None:
        return Query(f"SELECT {columns} FROM {tables} WHERE s.id = %s", [session_id])
    found = conditions(config)
    return Query(
        f"SELECT {columns} FROM {tables} WHERE {_all(found)} ORDER BY s.created_at DESC, s.id DESC LIMIT %s OFFSET %s",
        [*(value for condition in found for value in condition.values), config.limit or DEFAULT_LIMIT, config.offset],
    )


def _all(found: list[Condition]) -> str:
    return " AND ".join(condition.sql for condition in found)
