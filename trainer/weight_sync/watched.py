"""Run a call that may never return, and go on without it after a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_T = TypeVar("_T")


def run_within(call: Callable[[], _T], *, timeout_s: float, name: str) -> _T:
    """Return what the call returns, or raise what it raises.

    It runs in a daemon thread of its own. Too late, that thread is abandoned: a collective cannot be called off. It must
    own what it still uses, and it does not keep the process from ending.

    Args:
        name: of the thread, for whoever looks at a hanging process.

    Raises:
        TimeoutError: the call has not come back within `timeout_s`.
    """
    outcome: Future[_T] = Future()
    threading.Thread(target=_run, args=(call, outcome), name=name, daemon=True).start()
    wait([outcome], timeout_s)
    if not outcome.done():
        raise TimeoutError(f"{name} did not return within {timeout_s:.3g} s")
    try:
        return outcome.result()
    finally:
        del outcome


def _run(call: Callable[[], _T], outcome: Future[_T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
    finally:
        # An error holds this frame. If the frame held the error, what the call worked on would outlive both.
        del call, outcome
