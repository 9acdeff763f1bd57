"""Whether a reply gives the right mathematical answer: by math-verify where it is installed, and by plain arithmetic."""

from __future__ import annotations

import importlib
import threading
from functools import cache
from typing import Any

from atroposlib.envs.reward_fns.answers import final_answer, gold_answer
from atroposlib.envs.reward_fns.plain_math import same_answer
from atroposlib.errors import RolloutError

TIMEOUT_S = 5


def is_right(gold: Any, text: str, *, tolerance: float = 1e-6) -> bool:
    r"""Whether the final answer in a text equals the gold answer.

    The answer is the last `\boxed{}`, what follows `####`, or the last LaTeX formula. math-verify (extra `rewards`)
    compares algebra too; without it numbers, fractions, roots, tuples, sets and equal text are recognised.

    math-verify keeps its deadline with a signal, which only the main thread of a process can: in another thread it
    has none. Run graders in worker processes where answers are long.

    Args:
        gold: the answer, bare or as GSM8K (`... #### 42`) and MATH (`\boxed{42}`) write it.
    Raises:
        RolloutError: math-verify did not finish in time, so nothing is known about the answer.
    """
    wanted, found = gold_answer(gold), final_answer(text)
    if found is not None and same_answer(wanted, found, tolerance):
        return True
    return has_math_verify() and _verified(wanted, text)


@cache
def has_math_verify() -> bool:
    """Whether math-verify is installed."""
    try:
        importlib.import_module("math_verify")
    except ModuleNotFoundError:
        return False
    return True


def _verified(gold: str, text: str) -> bool:
    library = importlib.import_module("math_verify")
    timed_out = importlib.import_module("math_verify.errors").TimeoutException
    timeout_s = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    latex = [library.LatexExtractionConfig(boxed_match_priority=0)]
    try:
        # raise_on_error, because otherwise a time-out looks like a wrong answer.
        parsed = [
            library.parse(written, extraction_config=latex, parsing_timeout=timeout_s, raise_on_error=True)
            for written in (f"${gold}$", text)
        ]
        return all(parsed) and bool(library.verify(*parsed, timeout_seconds=timeout_s, raise_on_error=True))
    except timed_out as error:
        raise RolloutError(f"math-verify did not compare with {gold[:80]!r} within {TIMEOUT_S} s") from error
    # Whatever else the parser makes of the policy's text: it is not the right answer.
    except Exception:
        return False
