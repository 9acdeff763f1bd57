"""Rows of the database's tables as sessions, in the form that trace files have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from atroposlib.data.registry import Row

OF_STEP = (
    *("description", "tool", "tool_params", "context", "prior_results", "context_outputs", "validation", "runtime"),
    *("depends_on", "artifacts", "deliverable"),
)
"""Fields of a step that the database keeps in its metadata or its plan."""


@dataclass
class Page:
    """Sessions and what belongs to them; each list as its query orders it."""

    sessions: list[Row]
    steps: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)


def trace_rows(page: Page) -> list[Row]:
    """The sessions of a page as lines of a trace file."""
    steps = _by(page.steps, "session_id")
    attempts = _by(page.attempts, "session_id", "step_id")
    notes = _by(page.notes, "session_id", "step_id")
    events = _by(page.events, "session_id")
    return [
        _session(
            session,
            steps=[
                _step(
                    step,
                    session["plan"],
                    attempts=attempts[session["id"], step["step_id"]],
                    notes=notes[session["id"], step["step_id"]],
                )
                for step in steps[(session["id"],)]
            ],
            events=[event["event"] for event in events[(session["id"],)]],
        )
        for session in page.sessions
    ]


def _session(session: Row, *, steps: list[Row], events: list[Any]) -> Row:
    metadata = session["metadata"] if isinstance(session["metadata"], dict) else {}
    of_database = {
        "session_id": session["id"],
        "status": session["status"],
        "created_at": _iso(session["created_at"]),
        "completed_at": _iso(session["completed_at"]),
    }
    copied = ("task", "final_answer", "plan", "reward_audit", "review_status")
    learning = ("student_learning", "teacher_learning")
    return {
        **{name: session[name] for name in (*copied, *learning)},
        "session_reward": session["reward"],
        "reward_summary": session["reward_stats"],
        "steps": steps,
        "trajectory_events": events,
        "session_metadata": {**metadata, **of_database},
    }


def _step(step: Row, plan: Any, *, attempts: Sequence[Row], notes: Sequence[Row]) -> Row:
    metadata = step["metadata"] if isinstance(step["metadata"], dict) else {}
    planned = _planned(plan, step["step_id"])
    found = {name: source[name] for source in (planned, metadata) for name in OF_STEP if source.get(name) is not None}
    history = [{"attempt": row["attempt"], "evaluation": row["evaluation"]} for row in attempts]
    return {
        **found,
        **{name: step[name] for name in ("step_id", "trace", "output", "evaluation", "attempts")},
        "guidance": [row["note"] for row in notes],
        "metadata": {"attempt_history": history, **metadata} if history else metadata,
    }


def _planned(plan: Any, step_id: Any) -> Mapping[str, Any]:
    steps = plan.get("steps") if isinstance(plan, dict) else None
    of_plan = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    return next((step for step in of_plan if str(step.get("id", step.get("step_id"))) == str(step_id)), {})


def _by(rows: Iterable[Row], *names: str) -> defaultdict[tuple[Any, ...], list[Row]]:
    found: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
