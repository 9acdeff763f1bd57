"""One session of a runtime trace.

Task, final answer, plan, steps and events stand at the top; other fields there or in session_metadata, and the top wins.
The session's id is looked for in session_metadata first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from atroposlib.data.source_ids import hashed
from atroposlib.data.traces.fields import Map, first_present, items, mapping, text
from atroposlib.data.traces.rewards import Reward, reward_of
from atroposlib.data.traces.step import Step, step_of
from atroposlib.errors import DataError


@dataclass(frozen=True)
class Session:
    """A session, its types checked. What is not named here stays in `raw`."""

    raw: Map
    """The whole line."""
    metadata: Map
    """session_metadata."""
    task: str
    final_answer: str
    plan: Map | None
    steps: list[Step]
    reward: Reward | None
    trajectory_events: list[Map]
    student_learning: str | None
    teacher_learning: str | None
    learning_history: Map | None
    adaptive_summary: Map | None
    triage_dossier: Map | None
    reward_summary: Map | None
    review_status: str | None
    personas_used: list[Any]
    persona_updates: Any
    learning_key: str | None
    status: str | None
    execution_mode: str | None
    ground_truth: str | None
    executor_system_prompt: str | None
    created_at: str | None
    completed_at: str | None

    @property
    def session_id(self) -> str:
        """Its id; without one a hash of the task, so that runs of one task count as one source."""
        for place in (self.metadata, self.raw):
            name = first_present(place, ("session_id", "id"))
            if name is not None:
                return str(place[name])
        return hashed(self.task)

    @property
    def score(self) -> float | None:
        """The session's reward; without one the score of its summary."""
        if self.reward is not None and self.reward.score is not None:
            return self.reward.score
        score = (self.reward_summary or {}).get("score")
        return float(score) if isinstance(score, (int, float)) and not isinstance(score, bool) else None

    @property
    def created(self) -> datetime | None:
        """When it began, UTC where it names no zone; None where it is not said, or not as ISO 8601."""
        try:
            found = datetime.fromisoformat(self.created_at) if self.created_at else None
        except ValueError:
            return None
        return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def session_of(row: Mapping[str, Any]) -> Session:
    """A session of a line.

    Raises:
        DataError: the task is missing, or a field is of another type than documented.
    """
    metadata = mapping(row, "session_metadata") or {}
    # The top wins: exports copy newer values there.
    merged = {**metadata, **{name: value for name, value in row.items() if value is not None}}
    task = text(row, "task")
    if not task or not task.strip():
        raise DataError(f"task is {task!r}; expected the user's request (fields: {', '.join(row) or 'none'})")
    reward_name = first_present(merged, ("session_reward", "reward"))
    return Session(
        raw=dict(row),
        metadata=metadata,
        task=task,
        final_answer=text(row, "final_answer") or "",
        plan=mapping(row, "plan"),
        steps=[step_of(step, f"steps[{place}].") for place, step in enumerate(items(row, "steps", of=dict))],
        reward=None if reward_name is None else reward_of(merged, reward_name),
        trajectory_events=items(row, "trajectory_events", of=dict),
        student_learning=text(merged, "student_learning"),
        teacher_learning=text(merged, "teacher_learning"),
        learning_history=mapping(merged, "learning_history"),
        adaptive_summary=mapping(merged, "adaptive_summary"),
        triage_dossier=mapping(merged, "triage_dossier"),
        reward_summary=mapping(merged, "reward_summary"),
        review_status=text(merged, "review_status"),
        personas_used=items(merged, "personas_used"),
        persona_updates=merged.get("persona_updates"),
        learning_key=text(merged, "learning_key"),
        status=text(merged, "status"),
        execution_mode=text(merged, "execution_mode"),
        ground_truth=_as_text(merged.get("ground_truth")),
        executor_system_prompt=text(merged, "executor_system_prompt"),
        created_at=text(merged, "created_at"),
        completed_at=text(merged, "completed_at"),
    )


def plan_steps(plan: Map | None) -> list[Map]:
    """The steps of a reviewed plan: id, description, depends_on."""
    return [] if plan is None else items(plan, "steps", "plan.", of=dict)


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)
