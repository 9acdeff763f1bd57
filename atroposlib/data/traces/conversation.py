"""Sessions as chats for distillation: the teacher speaks as the assistant, and the last turn, which is learnt, is the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from atroposlib.data.answers import marked_answer
from atroposlib.data.registry import Row
from atroposlib.data.traces.session import Session, plan_steps
from atroposlib.type_definitions import Message

ROLES = {
    "student": "user",
    "user": "user",
    "executor": "user",
    "runtime_student": "user",
    "teacher": "assistant",
    "coach": "assistant",
    "atlas_teacher": "assistant",
    "assistant": "assistant",
    "system": "system",
    "runtime": "system",
}
"""Role of each actor; what other actors say is left out."""
TEXT_KEYS = ("message", "text", "guidance", "content")
CONTAINERS = ("payload", "event", "data", "body", "output")
SUCCEEDED = "succeeded"


def conversation_records(session: Session, *, every_teacher_turn: bool) -> list[Row]:
    """Chats that end in a turn of the assistant: the last one of the session, or one for each. Without such turns none."""
    messages = [*_opening(session), *(_of_events(session) or _of_steps(session))]
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [_record(session, messages[: end + 1]) for end in (ends if every_teacher_turn else ends[-1:])]


def _record(session: Session, messages: list[Message]) -> Row:
    ground_truth = _ground_truth(session)
    return {
        "messages": messages,
        "session_id": session.session_id,
        "source_id": session.session_id,
        "learning_key": session.learning_key,
        "reward": session.score,
        "task": session.task,
        **({} if ground_truth is None else {"ground_truth": ground_truth}),
        "prompt_text": "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1]),
        "completion_text": messages[-1]["content"],
        "metadata": {
            "execution_mode": session.execution_mode,
            "status": session.status,
            "created_at": session.created_at,
            "completed_at": session.completed_at,
            "student_learning": session.student_learning,
            "teacher_learning": session.teacher_learning,
        },
    }


def _ground_truth(session: Session) -> str | None:
    """What the session says is right; else what it ended in, where it succeeded and that is a bare or a marked answer."""
    if session.ground_truth is not None or session.status != SUCCEEDED:
        return session.ground_truth
    ended = session.final_answer.strip()
    # Of several lines without a mark nobody can tell which is the answer.
    return marked_answer(ended) or (ended if ended and "\n" not in ended else None)


def _opening(session: Session) -> list[Message]:
    """The task and the plan, as the system's word."""
    steps = [str(step.get("description") or "").strip() for step in plan_steps(session.plan)]
    lines = [f"{number}. {description}" for number, description in enumerate(filter(None, steps), start=1)]
    return [{"role": "system", "content": "\n".join([session.task, *(["", "Plan:", *lines] if lines else [])])}]


def _of_events(session: Session) -> list[Message]:
    found: list[Message] = []
    for event in session.trajectory_events:
        role = ROLES.get(_actor(event))
        said = text_in(event) if role else None
        if role and said:
            found.append({"role": role, "content": said})
    return found


def _of_steps(session: Session) -> list[Message]:
    """Without events: what the teacher told the student at each step, and what came of it."""
    found: list[Message] = []
    for step in session.steps:
        said = step.output.strip() or step.trace.strip()
        # In this order: the output is that of the last attempt, which had heard the guidance.
        found += [{"role": "assistant", "content": note} for note in step.guidance if note.strip()]
        found += [{"role": "user", "content": said}] if said else []
    return found


def _actor(event: Mapping[str, Any]) -> str:
    """Events name who speaks at the top, or in what they carry."""
    places = [event, *(event[name] for name in CONTAINERS if isinstance(event.get(name), dict))]
    named = (place.get(name) for place in places for name in ("actor", "role"))
    return next((value.strip().lower() for value in named if isinstance(value, str)), "")


def text_in(value: Any, *, depth: int = 8) -> str | None:
    """The first text under message, text, guidance or content, here or in what is nested; None without any."""
    if isinstance(value, str):
        return value.strip() or None
    if depth == 0:
        return None
    if isinstance(value, list):
        return _first(text_in(item, depth=depth - 1) for item in value if isinstance(item, (str, dict, list)))
    if not isinstance(value, dict):
        return None
    direct = _first(text_in(value.get(name), depth=depth - 1) for name in TEXT_KEYS)
    # Below the top a bare string may be anything: an id, a name.
    nested = (item for name, item in value.items() if name not in TEXT_KEYS and isinstance(item, (dict, list)))
    return direct or _first(text_in(item, depth=depth - 1) for item in nested if not _is_strings(item))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _first(found: Iterable[str | None]) -> str | None:
    return next(filter(None, found), None)
