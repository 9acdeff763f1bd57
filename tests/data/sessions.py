"""Sessions as the runtime exports them."""

from __future__ import annotations

from typing import Any


def a_step(**over: Any) -> dict[str, Any]:
    """A step with every documented field."""
    step = {
        "step_id": 1,
        "description": "add the numbers",
        "trace": "1 + 2",
        "output": "3",
        "evaluation": {
            "score": 0.75,
            "rationale": "right",
            "judges": [
                {
                    "identifier": "accuracy",
                    "score": 0.75,
                    "rationale": "right",
                    "principles": [{"name": "p", "weight": 1.0, "description": "d"}],
                    "samples": [{"score": 0.75, "rationale": "r", "uncertainty": 0.1, "temperature": 0.2}],
                    "escalated": False,
                    "escalation_reason": None,
                }
            ],
        },
        "tool": "calculator",
        "tool_params": {"precision": 2},
        "context": {"0": "the numbers are 1 and 2"},
        "validation": {"valid": True, "rationale": "fine"},
        "attempts": 2,
        "guidance": ["look at the sign"],
        "runtime": {"ms": 12},
        "depends_on": [0],
        "artifacts": {"file": "a.txt"},
        "deliverable": {"sum": 3},
        "metadata": {"ground_truth": "3", "attempt_history": [{"attempt": 1}]},
    }
    return {**step, **over}


def a_session(**over: Any) -> dict[str, Any]:
    """A session with every documented field."""
    session = {
        "task": "sum 1 and 2",
        "final_answer": "3",
        "plan": {"steps": [{"id": 1, "description": "add the numbers", "depends_on": []}]},
        "steps": [a_step()],
        "session_reward": {"score": 0.9, "uncertainty": 0.1, "judges": []},
        "trajectory_events": [
            {"actor": "student", "type": "attempt", "payload": {"message": "is it 4?"}},
            {"actor": "teacher", "type": "guidance", "text": "count again"},
            {"actor": "student", "type": "attempt", "payload": {"message": "3"}},
        ],
        "student_learning": "count twice",
        "teacher_learning": "ask for a check",
        "learning_history": {"runs": [0.1, 0.9]},
        "adaptive_summary": {"adaptive_mode": "coach", "confidence": 0.7},
        "triage_dossier": {"task": "sum", "summary": "easy", "risks": [], "signals": [], "tags": ["math"]},
        "reward_summary": {"score": 0.9},
        "review_status": "approved",
        "personas_used": [{"persona": "student"}],
        "persona_updates": [],
        "session_metadata": {
            "session_id": 7,
            "learning_key": "sums",
            "execution_mode": "coach",
            "status": "succeeded",
            "created_at": "2026-01-02T03:04:05+00:00",
            "completed_at": "2026-01-02T03:05:05+00:00",
            "ground_truth": "three",
            "executor_system_prompt": "You add.",
            "drift": {"drift_alert": False},
        },
    }
    return {**session, **over}


def of_metadata(**metadata: Any) -> dict[str, Any]:
    """A session with other session_metadata."""
    return a_session(session_metadata=metadata)
