"""The prompt of one step: what the student is asked to do, with what it knows."""

from __future__ import annotations

import json
from typing import Any

from atroposlib.data.traces.session import Session
from atroposlib.data.traces.step import Step

SYSTEM = "You carry out one step of a plan. Use the context and the guidance, and answer with the result of the step."


def executor_prompt(session: Session, step: Step) -> str:
    """System text, an empty line, and then one labelled line for each thing that is known of the step.

    The system text is the step's, else the session's, else SYSTEM.
    """
    system = step.metadata.get("executor_system_prompt") or session.executor_system_prompt or SYSTEM
    lines = {
        "Task": session.task,
        "Step": "" if step.step_id is None else str(step.step_id),
        "Description": step.description,
        "Tool": step.tool or "none",
        "Tool parameters": _json(step.tool_params or {}),
        "Context": _json(step.context or {}),
        "Guidance so far": _json(step.guidance),
        "Previous validation": _json(step.validation or {}),
    }
    return f"{system}\n\n" + "\n".join(f"{label}: {value}" for label, value in lines.items())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
