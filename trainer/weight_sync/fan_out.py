"""One call to many servers at once, none of which can hold up the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import GRACE_S, Edge

_T = TypeVar("_T")


def on_each(
    calls: ThreadPoolExecutor,
    controls: Iterable[EngineControl],
    call: Callable[[EngineControl], _T],
    *,
    edge: Edge,
    timeout_s: float,
) -> tuple[dict[str, _T], dict[str, ServerSyncError]]:
    """Make the call on every server, each in a thread of its own.

    Args:
        timeout_s: that the call gives itself. One that outlasts it, say because its answer comes drop by drop, is abandoned.
    Returns:
        Answers and errors, by URL.
    """
    futures = {control.url: calls.submit(call, control) for control in controls}
    wait(futures.values(), timeout=timeout_s + GRACE_S)
    answers: dict[str, _T] = {}
    errors: dict[str, ServerSyncError] = {}
    for url, future in futures.items():
        if not future.done():
            future.cancel()
            errors[url] = ServerSyncError(url, edge, f"no answer within {timeout_s:.3g} s")
            continue
        try:
            answers[url] = future.result()
        except ServerSyncError as error:
            errors[url] = error
    return answers, errors
