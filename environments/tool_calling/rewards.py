"""What an episode is paid: the calls that were needed, and the number that it ends in."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from environments.tool_calling.tools import Catalogue, run_tool

CALLS_SHARE = 0.3
"""Of the reward; the rest is for the answer."""
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Call:
    """One call and what came of it. Two calls of a tool with the same result are as good as each other."""

    name: str
    result: str


def made_call(name: str, arguments: str, catalogue: Catalogue) -> Call:
    """Run a tool.

    Args:
        arguments: a JSON object.
    """
    return Call(name, run_tool(name, arguments, catalogue))


def call_share(made: Sequence[Call], needed: Sequence[Call]) -> float:
    """Right calls among those made or needed, whichever are more: superfluous calls cost as missing ones do."""
    if not made and not needed:
        return 1.0
    right = (Counter(made) & Counter(needed)).total()
    return right / max(len(made), len(needed))


def is_right(text: str, answer: float) -> bool:
    """Whether the last number of a text is the answer, up to 1e-4."""
    numbers = _NUMBER.findall(text)
    return bool(numbers) and math.isclose(float(numbers[-1].replace(",", "")), answer, abs_tol=1e-4)


def reward(made: Sequence[Call], needed: Sequence[Call], final_text: str | None, answer: float) -> float:
    """0 to 1.

    Args:
        final_text: the reply without calls that ended the episode; None where none was asked for, as in a single turn:
            then only the calls count.
    """
    calls = call_share(made, needed)
    if final_text is None:
        return calls
    return CALLS_SHARE * calls + (1 - CALLS_SHARE) * is_right(final_text, answer)
