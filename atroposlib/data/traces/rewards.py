"""Reward objects of traces: a score, how sure it is, and the judges that gave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atroposlib.data.traces.fields import Map, from_json, items, number, text, wrong


@dataclass(frozen=True)
class Reward:
    """What a step or a session was paid."""

    score: float | None
    uncertainty: float | None
    rationale: str | None
    judges: list[Map]
    """Each with identifier, score, rationale, principles, samples, escalated and escalation_reason, where given."""
    raw: Map
    """The whole object, unknown keys included."""

    @property
    def breakdown(self) -> Map:
        """As one object, with all keys; `raw` is what was given under it, or else the whole."""
        given = self.raw.get("raw")
        known = {"score": self.score, "rationale": self.rationale, "judges": self.judges}
        return {**self.raw, **known, "raw": self.raw if given is None else given}


def reward_of(row: Mapping[str, Any], name: str, where: str = "") -> Reward | None:
    """The reward under a name: an object, JSON of one, or the score alone. None where it is absent.

    Raises:
        DataError: it, its score or its judges are something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = from_json(value) if value.strip() else None
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = {"score": value}
    if not isinstance(value, dict):
        raise wrong(f"{where}{name}", row[name], "an object with a score")
    inside = f"{where}{name}."
    judges = items(value, "judges", inside, of=dict)
    for place, judge in enumerate(judges):
        _check_judge(judge, f"{inside}judges[{place}].")
    return Reward(
        score=number(value, "score", inside),
        uncertainty=number(value, "uncertainty", inside),
        rationale=text(value, "rationale", inside),
        judges=judges,
        raw=value,
    )


def _check_judge(judge: Map, where: str) -> None:
    text(judge, "identifier", where)
    number(judge, "score", where)
    text(judge, "rationale", where)
    items(judge, "principles", where)
    for place, sample in enumerate(items(judge, "samples", where, of=dict)):
        for name in ("score", "uncertainty", "temperature"):
            number(sample, name, f"{where}samples[{place}].")
