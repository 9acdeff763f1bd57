"""One passage of a group of servers through the states: paused, sending, verifying, resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from trainer.weight_sync.engines.control import EngineControl, PauseMode
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.fan_out import on_each
from trainer.weight_sync.results import ServerResult
from trainer.weight_sync.states import GRACE_S, Deadlines, Edge, State, advance
from trainer.weight_sync.transports.base import Member, Transport
from trainer.weight_sync.watched import run_within

log = logging.getLogger(__name__)

_T = TypeVar("_T")

Prove: TypeAlias = Callable[[EngineControl, str], None]
"""Ask a server that generates again for a proof that it runs this version. Raises ServerSyncError (VERIFY) when it does not."""

_RESUMES = 2


class Passage:
    """Takes servers through the states, once a call. None of its steps outlasts its deadline, whatever a server does.

    Args:
        calls: runs the calls to the servers.
        pause_mode: wait is given `deadlines.drain_s`; requests that still run then are aborted.
        recompute: see WeightPublisher.
        prove: a paused engine answers no prompt, so it is asked right after its resume. For `deadlines.send_s` at most.
    """

    def __init__(
        self,
        transport: Transport[Any],
        calls: ThreadPoolExecutor,
        deadlines: Deadlines,
        *,
        pause_mode: PauseMode,
        recompute: bool,
        prove: Prove | None,
    ) -> None:
        self.suspects: set[str] = set()
        """URLs of servers that may stand still: their pause or resume went unanswered, so one may yet come to pass."""
        self._transport = transport
        self._calls = calls
        self._deadlines = deadlines
        self._pause_mode = pause_mode
        self._recompute = recompute
        self._prove = prove

    def open(self, members: Sequence[Member]) -> None:
        """Open the way to the servers.

        Raises:
            TransferError: they did not come in time.
        """
        self._watched(lambda: self._transport.open(members, timeout_s=self._deadlines.send_s), Edge.ATTACH, members)

    def run(self, members: Sequence[Member], shipment: object, weight_version: str) -> dict[str, ServerResult]:
        """Bring the shipment to the servers.

        Raises:
            TransferError: they did not all get through the transfer. They are resumed nevertheless.
        """
        controls = [member.control for member in members]
        errors: dict[str, ServerSyncError] = {}
        unanswered: set[str] = set()
        suspects = set(self.suspects)
        self.suspects.update(control.url for control in controls)
        state = State.IDLE
        start = time.monotonic()
        try:
            state = advance(state, Edge.PAUSE)
            self._pause(controls, unanswered)
            state = advance(state, Edge.SEND)
            self._watched(lambda: self._transport.send(shipment, timeout_s=self._deadlines.send_s), Edge.SEND, members)
            state = advance(state, Edge.VERIFY)
            errors = self._verify(controls, weight_version)
        finally:
            advance(state, Edge.RESUME)
            frozen = self._resume(controls)
            self.suspects = suspects | set(frozen) | unanswered
        seconds = time.monotonic() - start
        errors = frozen | errors
        errors |= self._proved([control for control in controls if control.url not in errors], weight_version)
        return {
            url: ServerResult(url, None if url in errors else weight_version, seconds, errors.get(url))
            for url in (control.url for control in controls)
        }

    def leave(self) -> None:
        """Give up the way to the servers. What does not go in time is left to the process's end."""
        limit_s = self._deadlines.leave_s
        try:
            run_within(self._transport.leave, timeout_s=limit_s, name="weight-sync-leave")
        except TimeoutError as error:
            log.warning("%s; its connections stay open", error)

    def _watched(self, call: Callable[[], None], edge: Edge, members: Sequence[Member]) -> None:
        """The collective side may be stuck for good, for example in NCCL: then it is left behind."""
        try:
            run_within(call, timeout_s=self._deadlines.send_s + GRACE_S, name=f"weight-sync-{edge}")
        except TimeoutError as error:
            servers = ", ".join(member.control.url for member in members)
            raise TransferError(edge, f"{error}; servers {servers}", {}) from None

    def _pause(self, controls: Sequence[EngineControl], unanswered: set[str]) -> None:
        left: Sequence[EngineControl] = controls
        if self._pause_mode == "wait":
            _, busy = self._each(controls, self._drain, Edge.PAUSE, self._deadlines.drain_s)
            unanswered.update(busy)
            left = [control for control in controls if control.url in busy]
            for error in busy.values():
                log.warning("requests in flight did not end in time, aborting them: %s", error)
        mode: PauseMode = "keep" if self._pause_mode == "keep" else "abort"
        pause_s = self._deadlines.pause_s
        _, errors = self._each(
            left, lambda c: c.pause(mode, recompute=self._reset_frozen, timeout_s=pause_s), Edge.PAUSE, pause_s
        )
        unanswered.update(errors)
        if errors:
            raise TransferError(Edge.PAUSE, "", errors)

    def _drain(self, control: EngineControl) -> None:
        control.pause("wait", recompute=False, timeout_s=self._deadlines.drain_s)

    @property
    def _reset_frozen(self) -> bool:
        """After wait and abort no request is frozen: what is queued has no keys and values yet."""
        return self._recompute and self._pause_mode == "keep"

    def _verify(self, controls: Sequence[EngineControl], weight_version: str) -> dict[str, ServerSyncError]:
        limit_s = self._deadlines.verify_s
        may_keep_cache = self._pause_mode == "keep" and not self._recompute

        def verify(control: EngineControl) -> None:
            reported = control.weight_version(timeout_s=limit_s)
            if reported != weight_version:
                reason = f"it reports version {reported!r}, not {weight_version!r}"
                raise ServerSyncError(control.url, Edge.VERIFY, reason)
            is_empty = control.reset_prefix_cache(recompute=self._reset_frozen, timeout_s=limit_s)
            if not is_empty and not may_keep_cache:
                raise ServerSyncError(control.url, Edge.VERIFY, "it did not let go of its prefix cache")

        return self._each(controls, verify, Edge.VERIFY, 2 * limit_s)[1]

    def _resume(self, controls: Sequence[EngineControl]) -> dict[str, ServerSyncError]:
        limit_s = self._deadlines.resume_s
        frozen: dict[str, ServerSyncError] = {}
        for _ in range(_RESUMES):
            _, frozen = self._each(controls, lambda c: c.resume(timeout_s=limit_s), Edge.RESUME, limit_s)
            for error in frozen.values():
                log.warning("%s", error)
            controls = [control for control in controls if control.url in frozen]
        return frozen

    def _proved(self, controls: Sequence[EngineControl], weight_version: str) -> dict[str, ServerSyncError]:
        prove = self._prove
        if prove is None:
            return {}
        return self._each(controls, lambda c: prove(c, weight_version), Edge.VERIFY, self._deadlines.send_s)[1]

    def _each(
        self, controls: Sequence[EngineControl], call: Callable[[EngineControl], _T], edge: Edge, timeout_s: float
    ) -> tuple[dict[str, _T], dict[str, ServerSyncError]]:
        return on_each(self._calls, controls, call, edge=edge, timeout_s=timeout_s)
