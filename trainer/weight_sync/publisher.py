"""Bring new weights to every inference server and hear from each one which version it then runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from trainer.weight_sync.engines.control import EngineControl, PauseMode
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.fan_out import on_each
from trainer.weight_sync.passage import Passage, Prove
from trainer.weight_sync.results import PublishResult, ServerResult, failed, nobody
from trainer.weight_sync.states import ATTEMPTS, Deadlines, Edge
from trainer.weight_sync.transports.base import Member, NamedWeights, Transport
from trainer.weight_sync.versions import SentVersions

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class WeightPublisher:
    """Publishes the weights of this process (trainer rank 0) to inference servers.

    A server that fails is named in the result and the others are served without it; it is tried again at the next
    publication. Every wait is bounded. Not for use from two threads at once.

    Args:
        controls: one for each server. The publisher owns these, not those that set_controls brings.
        transport: how the weights travel.
        calls: runs the calls to the servers; four threads a server: those of a failed attempt linger until their deadline,
            and the next attempt must not queue behind them.
        timeout_s: for one transfer. A publication makes ATTEMPTS of them at most.
        pause_mode: what becomes of requests in flight. wait: those that still run after timeout_s are aborted.
        recompute: let frozen requests compute their keys and values again under the new weights, so that no token comes
            from a mixture of policies. Costs a prefill of all of them at every publication. Without it the next tokens
            attend to keys and values of the old policy, and so may requests that begin with the same prompt.
        prove: called for each server with the version that it reports, right after it generates again. A ServerSyncError
            (VERIFY) from it marks the server as failed.
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
        prove: Prove | None = None,
    ) -> None:
        self._deadlines = Deadlines.within(timeout_s)
        self._controls = {control.url: control for control in controls}
        self._passage = Passage(
            transport, calls, self._deadlines, pause_mode=pause_mode, recompute=recompute, prove=prove
        )
        self._transport = transport
        self._calls = calls
        self._own = tuple(controls)
        self._versions = SentVersions()
        self._unproven: set[str] = set()

    def set_controls(self, controls: Sequence[EngineControl]) -> None:
        """Replace the servers, between two publications.

        The caller closes the controls that it no longer passes here. Those of the last call are closed by close().
        """
        before, self._controls = self._controls, {control.url: control for control in controls}
        if any(before.get(url, control) is not control for url, control in self._controls.items()):
            # What is open holds the control of before, which its owner may have closed.
            self._passage.leave()
        for control in self._own:
            if self._controls.get(control.url) is not control:
                control.close()
        self._own = ()
        # A newcomer may have been left paused by a trainer that died.
        self._passage.suspects |= self._controls.keys() - before.keys()

    def attach(self) -> None:
        """Resume the servers that a dead trainer left paused, and open the way to every server that answers.

        Raises:
            TransferError: the servers that answer did not come to the transfer.
            WeightSyncError: no server answers.
        """
        members, errors = self._who_is_there(list(self._controls.values()))
        if not members:
            raise nobody(errors.values())
        self._passage.suspects |= set(self._controls)
        self._resume_suspects()
        try:
            self._passage.open(members)
        except TransferError:
            self._passage.leave()
            raise

    def publish(self, version: int, weights: NamedWeights) -> PublishResult:
        """Make every server run `weights` as version `version`.

        Args:
            version: the server calls it `str(version)`. Not below one that was published before.
            weights: HF checkpoint names and tensors, without a tied `lm_head.weight`.

        Raises:
            VersionOrderError: a newer version was published before.
            TakenOverError: no server runs the version, and another trainer has one of them.
            WeightSyncError: no server runs the version.
        """
        self._versions.begin(version)
        start = time.monotonic()
        results = self._send_to(list(self._controls.values()), str(version), weights)
        return PublishResult(version, time.monotonic() - start, tuple(results.values())).checked()

    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult:
        """Publish to those servers that report another version, for example after a restart, or did not prove it.

        When all are current this is one GET for each of them, at the same time.

        Raises:
            VersionOrderError, TakenOverError, WeightSyncError: as publish.
        """
        self._versions.begin(version)
        start = time.monotonic()
        self._resume_suspects()
        limit_s = self._deadlines.attach_s
        versions, errors = self._each(
            list(self._controls.values()), lambda c: c.weight_version(timeout_s=limit_s), Edge.ATTACH, limit_s
        )
        results = {url: ServerResult(url, reported, 0.0) for url, reported in versions.items()} | failed(errors)
        behind = [url for url, reported in versions.items() if reported != str(version) or url in self._unproven]
        if behind:
            log.info("not at version %d: %s", version, ", ".join(behind))
            results |= self._send_to([self._controls[url] for url in behind], str(version), weights)
        return PublishResult(version, time.monotonic() - start, tuple(results.values())).checked()

    def close(self) -> None:
        """Leave the servers and drop all connections."""
        self._passage.leave()
        self._calls.shutdown(wait=False, cancel_futures=True)
        for control in self._controls.values():
            control.close()

    def _send_to(
        self, controls: Sequence[EngineControl], weight_version: str, weights: NamedWeights
    ) -> dict[str, ServerResult]:
        """Try until the servers have the weights or have shown that they cannot take them."""
        shipment = self._transport.prepare(weights, weight_version)
        results: dict[str, ServerResult] = {}
        for attempt in range(1, ATTEMPTS + 1):
            members, absent = self._who_is_there(controls)
            results |= failed(absent)
            if not members:
                break
            controls = [member.control for member in members]
            try:
                self._passage.open(members)
                results |= self._passage.run(members, shipment, weight_version)
                break
            except TransferError as error:
                self._passage.leave()
                # As text: a handler that keeps the error would keep its frames, and in them the broken group.
                log.warning("publishing version %s, attempt %d: %s", weight_version, attempt, str(error))
                results |= failed({control.url: _blame(error, control.url) for control in controls})
                if attempt > 1:
                    controls = [control for control in controls if control.url not in error.culprits]
        self._take_note(results, weight_version)
        return results

    def _take_note(self, results: dict[str, ServerResult], weight_version: str) -> None:
        for url, result in results.items():
            if result.error is not None:
                log.warning("publication failed: %s", result.error)
                self._unproven.add(url)
            else:
                self._unproven.discard(url)
                self._versions.holds(url, weight_version)

    def _who_is_there(self, controls: Sequence[EngineControl]) -> tuple[list[Member], dict[str, ServerSyncError]]:
        probe_s, attach_s = self._deadlines.probe_s, self._deadlines.attach_s

        def member(control: EngineControl) -> Member:
            control.health(timeout_s=probe_s)
            world_size = control.world_size(timeout_s=probe_s)
            reported = control.weight_version(timeout_s=attach_s)
            self._versions.met(control.url, reported)
            return Member(control, world_size, reported)

        members, errors = self._each(controls, member, Edge.ATTACH, 2 * probe_s + attach_s)
        return list(members.values()), errors

    def _resume_suspects(self) -> None:
        """No pause of ours, or of a trainer before us, outlives the moment its server answers again."""
        suspects = [self._controls[url] for url in self._passage.suspects if url in self._controls]
        attach_s, resume_s = self._deadlines.attach_s, self._deadlines.resume_s

        def resume_if_paused(control: EngineControl) -> None:
            if control.is_paused(timeout_s=attach_s):
                log.warning("resuming %s, which a publication left paused", control.url)
                control.resume(timeout_s=resume_s)

        resumed, _ = self._each(suspects, resume_if_paused, Edge.RESUME, attach_s + resume_s)
        self._passage.suspects -= set(resumed)

    def _each(
        self, controls: Sequence[EngineControl], call: Callable[[EngineControl], _T], edge: Edge, timeout_s: float
    ) -> tuple[dict[str, _T], dict[str, ServerSyncError]]:
        return on_each(self._calls, controls, call, edge=edge, timeout_s=timeout_s)


def _blame(error: TransferError, server: str) -> ServerSyncError:
    """What the server did to the transfer, or else what the transfer did to it."""
    return error.culprits.get(server) or ServerSyncError(server, error.edge, error.reason)
