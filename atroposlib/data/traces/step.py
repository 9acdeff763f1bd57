"""One step of a session: what was to be done, what the student did, what the teacher said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atroposlib.data.traces.fields import Map, first_present, from_json, items, mapping, text, wrong
from atroposlib.data.traces.rewards import Reward, reward_of

CONTEXT = ("context", "prior_results", "context_outputs")
REWARD = ("evaluation", "reward")
KNOWN = {
    *("step_id", "id", "description", "trace", "output", "tool", "tool_params", "validation", "attempts", "guidance"),
    *("runtime", "depends_on", "artifacts", "deliverable", "metadata"),
    *CONTEXT,
    *REWARD,
}


@dataclass(frozen=True)
class Step:
    """A step, its types checked."""

    step_id: str | int | None
    description: str
    trace: str
    output: str
    reward: Reward | None
    tool: str | None
    tool_params: Map | None
    context: Map | None
    """Outputs of earlier steps."""
    validation: Map | None
    """The teacher's check."""
    attempts: int
    guidance: list[str]
    """What the teacher told the student."""
    runtime: Map | float | None
    """Timing: a map, or milliseconds."""
    depends_on: list[str | int] | None
    artifacts: Map | None
    deliverable: Any
    """Any JSON."""
    metadata: Map
    """Unknown keys of the step, and over them what stands under `metadata`."""


def step_of(row: Mapping[str, Any], where: str) -> Step:
    """A step of a trace.

    Args:
        where: its place, for messages, such as `steps[2].`.
    Raises:
        DataError: a field is of another type than documented.
    """
    params = mapping(row, "tool_params", where)
    unknown = {name: value for name, value in row.items() if name not in KNOWN}
    reward_name = first_present(row, REWARD)
    return Step(
        step_id=_step_id(row, where),
        description=text(row, "description", where) or "",
        trace=text(row, "trace", where) or "",
        output=text(row, "output", where) or "",
        reward=None if reward_name is None else reward_of(row, reward_name, where),
        tool=text(row, "tool", where) or (text(params, "name", f"{where}tool_params.") if params else None),
        tool_params=params,
        context=_context(row),
        validation=mapping(row, "validation", where),
        attempts=_attempts(row, where),
        guidance=items(row, "guidance", where, of=str),
        runtime=_runtime(row, where),
        depends_on=items(row, "depends_on", where, of=(str, int)) if row.get("depends_on") is not None else None,
        artifacts=mapping(row, "artifacts", where),
        deliverable=row.get("deliverable"),
        metadata={**unknown, **(mapping(row, "metadata", where) or {})},
    )


def _step_id(row: Mapping[str, Any], where: str) -> str | int | None:
    name = first_present(row, ("step_id", "id"))
    value = None if name is None else row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
        raise wrong(f"{where}{name}", value, "a number or text")
    return value


def _context(row: Mapping[str, Any]) -> Map | None:
    """Outputs of earlier steps; what cannot be read as a map stands under `raw`."""
    name = first_present(row, CONTEXT)
    if name is None:
        return None
    value = from_json(row[name]) if isinstance(row[name], str) else row[name]
    return value if isinstance(value, dict) else {"raw": row[name]}


def _attempts(row: Mapping[str, Any], where: str) -> int:
    value = row.get("attempts")
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise wrong(f"{where}attempts", value, "a whole number")
    return value


def _runtime(row: Mapping[str, Any], where: str) -> Map | float | None:
    value = row.get("runtime")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return mapping(row, "runtime", where)
