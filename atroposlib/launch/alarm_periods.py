"""When the trainer's alarms were on, from what it wrote: alarm/NAME in metrics.jsonl, and the texts in alarms.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atroposlib.launch.jsonl import Line

PREFIX = "alarm/"


@dataclass(frozen=True)
class AlarmPeriod:
    """An alarm from its start to its end."""

    name: str
    first_step: int
    end_step: int | None
    """The step that it was over with; None where it was on when the run ended."""
    text: str
    """What it said when it started."""


def alarm_periods(steps: Sequence[Line], told: Sequence[Line]) -> list[AlarmPeriod]:
    """Every period, in the order of their starts.

    Args:
        steps: the surviving history of metrics.jsonl.
        told: lines of alarms.jsonl. Of a step that was taken again, the last line counts.
    """
    texts = {(line.get("alarm"), line.get("step")): str(line.get("text", "")) for line in told if line.get("is_on")}
    starts: dict[str, int] = {}
    periods: list[AlarmPeriod] = []

    def close(name: str, end: int | None) -> None:
        first = starts.pop(name)
        periods.append(AlarmPeriod(name, first, end, texts.get((name, first), "")))

    for line in steps:
        for key, value in line.items():
            name = key.removeprefix(PREFIX)
            if name == key:
                continue
            if value:
                starts.setdefault(name, int(line["step"]))
            elif name in starts:
                close(name, int(line["step"]))
    for name in list(starts):
        close(name, None)
    return sorted(periods, key=lambda period: (period.first_step, period.name))
