"""Bring new weights to every inference server and hear from each one which version it then runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.weight_sync.engines.control import EngineControl, PauseMode
from trainer.weight_sync.errors import ServerSyncError, TransferError, WeightSyncError
from trainer.weight_sync.states import Deadlines, Edge, State, advance
from trainer.weight_sync.transports.base import Member, NamedWeights, Transport

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# The first attempt finds out who died or was restarted; the second goes without the dead; the third also goes
# without a server that answers and yet spoils the transfer.
_ATTEMPTS = 3


@dataclass(frozen=True)
class ServerResult:
    """What became of one server."""

    server: str
    weight_version: str | None
    """As the server reports it; None when it failed."""
    seconds: float
    """For how long its generation stood still."""
    error: ServerSyncError | None = None


@dataclass(frozen=True)
class PublishResult:
    """What became of one publication."""

    version: int
    seconds: float
    servers: tuple[ServerResult, ...]

    @property
    def failed(self) -> tuple[ServerResult, ...]:
        """The servers that do not run this version, each with its error."""
        return tuple(result for result in self.servers if result.error is not None)


class WeightPublisher:
    """Publishes the weights of this process (trainer rank 0) to inference servers.

    A server that fails is named in the result and the others are served without it; it is tried again at the next
    publication. Every wait is bounded. Not for use from two threads at once.

    Args:
        controls: one for each server.
        transport: how the weights travel.
        calls: runs the calls to the servers; four threads a server: those of a failed attempt linger until their deadline,
            and the next attempt must not queue behind them.
        timeout_s: for one transfer. A publication tries three times at most.
        pause_mode: what becomes of requests in flight.
        recompute: let frozen requests compute their keys and values again under the new weights, so that no token comes
            from a mixture of policies. Costs a prefill of all of them at every publication. Without it the next tokens
            attend to keys and values of the old policy, and so may requests that begin with the same prompt.
    """

    def __init__(
        self,
        controls: Sequence[EngineControl],
        transport: Transport[Any],
        calls: ThreadPoolExecutor,
        *,
        timeout_s: float = 60.0,
        pause_mode: PauseMode = "keep",
        recompute: bool = True,
    ) -> None:
        if not controls:
            raise ValueError("a weight publisher needs at least one inference server")
        self._deadlines = Deadlines.within(timeout_s)
        self._pause_mode = pause_mode
        self._recompute = recompute
        self._controls = {control.url: control for control in controls}
        self._transport = transport
        self._calls = calls

    def attach(self) -> None:
        """Open the group with every server that answers, and resume those that a dead trainer left paused.

        Raises:
            WeightSyncError: no server answers.
        """
        members, errors = self._who_is_there(list(self._controls.values()))
        if not members:
            raise WeightSyncError(_joined(errors.values()))
        self._transport.open(members, timeout_s=self._deadlines.send_s)
        self._each([member.control for member in members], self._resume_if_paused)

    def publish(self, version: int, weights: NamedWeights) -> PublishResult:
        """Make every server run `weights` as version `version`.

        Args:
            version: the server calls it `str(version)`.
            weights: HF checkpoint names and tensors, without a tied `lm_head.weight`.

        Raises:
            WeightSyncError: not one server runs the version.
        """
        start = time.monotonic()
        results = self._send_to(list(self._controls.values()), str(version), weights)
        return _checked(PublishResult(version, time.monotonic() - start, tuple(results.values())))

    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult:
        """Publish to those servers that report another version, for example after a restart.

        When all are current this is one GET for each of them, at the same time.

        Raises:
            WeightSyncError: not one server runs the version.
        """
        start = time.monotonic()
        versions, errors = self._each(
            list(self._controls.values()), lambda c: c.weight_version(timeout_s=self._deadlines.attach_s)
        )
        results = {url: ServerResult(url, reported, 0.0) for url, reported in versions.items()}
        results |= {url: ServerResult(url, None, 0.0, error) for url, error in errors.items()}
        behind = [self._controls[url] for url, reported in versions.items() if reported != str(version)]
        if behind:
            log.info("not at version %d: %s", version, ", ".join(control.url for control in behind))
            results |= self._send_to(behind, str(version), weights)
        return _checked(PublishResult(version, time.monotonic() - start, tuple(results.values())))

    def close(self) -> None:
        """Leave the servers and drop all connections."""
        self._transport.leave()
        self._calls.shutdown(wait=False, cancel_futures=True)
        for control in self._controls.values():
            control.close()

    def _send_to(
        self, controls: Sequence[EngineControl], weight_version: str, weights: NamedWeights
    ) -> dict[str, ServerResult]:
        """Try until the servers have the weights or have shown that they cannot take them."""
        shipment = self._transport.prepare(weights, weight_version)
        results: dict[str, ServerResult] = {}
        for attempt in range(1, _ATTEMPTS + 1):
            members, absent = self._who_is_there(controls)
            results |= {url: ServerResult(url, None, 0.0, error) for url, error in absent.items()}
            if not members:
                break
            controls = [member.control for member in members]
            try:
                self._transport.open(members, timeout_s=self._deadlines.send_s)
                results |= self._round(controls, shipment, weight_version)
                break
            except TransferError as error:
                self._transport.leave()
                # As text: a handler that keeps the error would keep its frames, and in them the broken group.
                log.warning("publishing version %s, attempt %d: %s", weight_version, attempt, str(error))
                for url in (control.url for control in controls):
                    blamed = error.culprits.get(url) or ServerSyncError(url, error.edge, error.reason)
                    results[url] = ServerResult(url, None, 0.0, blamed)
                if attempt > 1:
                    controls = [control for control in controls if control.url not in error.culprits]
        for result in results.values():
            if result.error is not None:
                log.warning("version %s: %s", weight_version, result.error)
        return results

    def _round(
        self, controls: Sequence[EngineControl], shipment: object, weight_version: str
    ) -> dict[str, ServerResult]:
        """Take the servers once through the state machine.

        Raises:
            TransferError: they did not all get through the transfer. They are resumed nevertheless.
        """
        limits = self._deadlines
        failures: dict[str, ServerSyncError] = {}
        state = State.IDLE
        start = time.monotonic()
        try:
            state = advance(state, Edge.PAUSE)
            _, unpaused = self._each(controls, self._pause)
            if unpaused:
                raise TransferError(Edge.PAUSE, "", unpaused)
            state = advance(state, Edge.SEND)
            self._transport.send(shipment, timeout_s=limits.send_s)
            state = advance(state, Edge.VERIFY)
            _, failures = self._each(controls, lambda c: self._verify(c, weight_version))
        finally:
            advance(state, Edge.RESUME)
            _, frozen = self._each(controls, lambda c: c.resume(timeout_s=limits.resume_s))
            for error in frozen.values():
                log.warning("%s", error)
        failures = frozen | failures
        seconds = time.monotonic() - start
        return {
            url: ServerResult(url, None if url in failures else weight_version, seconds, failures.get(url))
            for url in (control.url for control in controls)
        }

    def _pause(self, control: EngineControl) -> None:
        control.pause(self._pause_mode, recompute=self._recompute, timeout_s=self._deadlines.pause_s)

    def _verify(self, control: EngineControl, weight_version: str) -> str:
        reported = control.weight_version(timeout_s=self._deadlines.verify_s)
        if reported != weight_version:
            raise ServerSyncError(control.url, Edge.VERIFY, f"it reports version {reported!r}, not {weight_version!r}")
        is_empty = control.reset_prefix_cache(recompute=self._recompute, timeout_s=self._deadlines.verify_s)
        if self._recompute and not is_empty:
            raise ServerSyncError(control.url, Edge.VERIFY, "it did not let go of its prefix cache")
        return reported

    def _who_is_there(self, controls: Sequence[EngineControl]) -> tuple[list[Member], dict[str, ServerSyncError]]:
        probe_s = self._deadlines.probe_s

        def member(control: EngineControl) -> Member:
            control.health(timeout_s=probe_s)
            return Member(
                control,
                control.world_size(timeout_s=probe_s),
                control.weight_version(timeout_s=self._deadlines.attach_s),
            )

        members, errors = self._each(controls, member)
        return list(members.values()), errors

    def _resume_if_paused(self, control: EngineControl) -> None:
        if control.is_paused(timeout_s=self._deadlines.attach_s):
            log.info("resuming %s, which another trainer left paused", control.url)
            control.resume(timeout_s=self._deadlines.resume_s)

    def _each(
        self, controls: Sequence[EngineControl], call: Callable[[EngineControl], _T]
    ) -> tuple[dict[str, _T], dict[str, ServerSyncError]]:
        """Make the call on every server at once. Each call has its own deadline, so all of them end."""
        answers: dict[str, _T] = {}
        errors: dict[str, ServerSyncError] = {}
        for url, future in {c.url: self._calls.submit(call, c) for c in controls}.items():
            try:
                answers[url] = future.result()
            except ServerSyncError as error:
                errors[url] = error
        return answers, errors


def _checked(result: PublishResult) -> PublishResult:
    if len(result.failed) == len(result.servers):
        raise WeightSyncError(_joined(server.error for server in result.failed if server.error is not None))
    return result


def _joined(errors: Iterable[ServerSyncError]) -> str:
    return "no inference server runs the new weights: " + "; ".join(str(error) for error in errors)
