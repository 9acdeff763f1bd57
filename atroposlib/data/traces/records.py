"""Rows of single steps: what RL needs of them, or all of their fields. Open maps become JSON: tables need one type a column."""

from __future__ import annotations

from atroposlib.data.registry import Row
from atroposlib.data.traces.executor_prompt import executor_prompt
from atroposlib.data.traces.fields import to_json
from atroposlib.data.traces.session import Session
from atroposlib.data.traces.step import Step


def rl_records(session: Session) -> list[Row]:
    """One row for each step that can be done again: a prompt and everything a reward may look at."""
    return [_rl_record(session, step) for step in session.steps]


def flat_records(session: Session) -> list[Row]:
    """One row for each step, with the outcome of the session."""
    return [_flat_record(session, step) for step in session.steps]


def _rl_record(session: Session, step: Step) -> Row:
    ground_truth = step.metadata.get("ground_truth")
    ground_truth = session.ground_truth if ground_truth is None else str(ground_truth)
    return {
        "prompt": executor_prompt(session, step),
        **_core(session, step),
        **_of_session(session),
        "runtime": to_json(step.runtime),
        "artifacts": to_json(step.artifacts),
        "attempt_history": to_json(step.metadata.get("attempt_history")),
        **({} if ground_truth is None else {"ground_truth": ground_truth}),
    }


def _flat_record(session: Session, step: Step) -> Row:
    return {
        "prompt": executor_prompt(session, step),
        **_core(session, step),
        "final_answer": session.final_answer,
        "attempts": step.attempts,
        "step_metadata": to_json(step.metadata),
    }


def _core(session: Session, step: Step) -> Row:
    return {
        "source_id": session.session_id,
        "task": session.task,
        "plan": to_json(session.plan),
        "step_id": None if step.step_id is None else str(step.step_id),
        "step_description": step.description,
        "guidance_history": list(step.guidance),
        "step_context": to_json(step.context),
        "validation": to_json(step.validation),
        "tool": step.tool,
        "tool_params": to_json(step.tool_params),
        "reward_breakdown": None if step.reward is None else to_json(step.reward.breakdown),
        "reward_score": None if step.reward is None else step.reward.score,
        "step_output": step.output,
        "step_trace": step.trace,
        "depends_on": to_json(step.depends_on),
        "deliverable": to_json(step.deliverable),
        "session_metadata": to_json(session.metadata),
        "session_reward": session.score,
    }


def _of_session(session: Session) -> Row:
    return {
        "session_reward_breakdown": None if session.reward is None else to_json(session.reward.breakdown),
        "learning_history": to_json(session.learning_history),
        "student_learning": session.student_learning,
        "teacher_learning": session.teacher_learning,
        "trajectory_events": to_json(session.trajectory_events),
        "adaptive_summary": to_json(session.adaptive_summary),
        "triage_dossier": to_json(session.triage_dossier),
        "reward_summary": to_json(session.reward_summary),
        "review_status": session.review_status,
        "personas_used": to_json(session.personas_used),
        "persona_updates": to_json(session.persona_updates),
    }
