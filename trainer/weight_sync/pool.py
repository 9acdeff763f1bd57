"""The inference servers of a run as the trainer sees them: who gets weights, what each runs, and what the registry is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from atroposlib.errors import AtroposError
from atroposlib.wire.models import InferenceServer, InferenceServerStatus
from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.membership import KnownServer, Membership, PoolLimits, base_url, decide_membership
from trainer.weight_sync.results import PublishResult, ServerResult
from trainer.weight_sync.states import Edge

log = logging.getLogger(__name__)


class Registry(Protocol):
    """The rollout server's list of inference servers. Every call raises AtroposError when it does not answer soon."""

    def servers(self) -> list[InferenceServerStatus]:
        """Everyone on the list."""

    def report(self, servers: Sequence[InferenceServer]) -> None:
        """Put these on the list, or renew their entries."""


class Pool:
    """Follows the servers over the publications of one trainer. Lives on the thread that publishes.

    Args:
        listed: base URLs of the config.
        registry: None: only the listed ones.
        control_for: makes the control of a server, by base URL.
        takes_registered: those that the config does not list get weights too; else the registry only says more of the listed ones.
    """

    def __init__(
        self,
        listed: Sequence[str],
        registry: Registry | None,
        control_for: Callable[[str], EngineControl],
        *,
        takes_registered: bool = True,
        limits: PoolLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listed = tuple(listed)
        self._registry = registry
        self._control_for = control_for
        self._takes_registered = takes_registered
        self._limits = limits or PoolLimits()
        self._clock = clock
        self._known: dict[str, KnownServer] = {}
        self._controls: dict[str, EngineControl] = {}
        self._entries: dict[str, InferenceServerStatus] = {}
        """The registry as it was last read, by base URL."""
        self._told: dict[str, str] = {}
        """The problem that the registry was last told of a server."""
        self._version = -1
        self.membership = Membership()
        """As of the last refresh()."""

    def refresh(self) -> list[EngineControl]:
        """The servers for the next publication. A registry that does not answer leaves everything as it was."""
        self._read_registry()
        before = self.membership
        self.membership = now = decide_membership(
            self._listed,
            list(self._entries.values()),
            self._known,
            version=self._version,
            now=self._clock(),
            limits=self._limits,
        )
        _log_changes(before, now)
        self._drop_gone({*now.members, *now.quarantined})
        for url in now.members:
            if url not in self._controls:
                self._controls[url] = self._control_for(url)
        return [self._controls[url] for url in now.members]

    def note(self, result: PublishResult) -> None:
        """Take in what became of a publication, and tell the registry.

        A server that does not answer an idle check has missed no publication: it is asked again with the next version.
        """
        now, is_again = self._clock(), result.version == self._version
        self._version = result.version
        reports = []
        for server in result.servers:
            url, known = base_url(server.server), self._known.get(base_url(server.server), KnownServer())
            if server.error is None:
                self._known[url] = known.after_success(str(server.weight_version))
            elif not (is_again and server.error.edge is Edge.ATTACH):
                self._known[url] = known.after_failure(server.error.reason, now)
            if report := self._report_of(url, server):
                reports.append(report)
        self._report(reports)

    def close(self) -> None:
        """Drop all connections."""
        self._drop_gone(set())

    def _read_registry(self) -> None:
        if self._registry is None:
            return
        try:
            entries = {base_url(entry.server.url): entry for entry in self._registry.servers()}
        except AtroposError as error:
            log.warning("the registry of inference servers does not answer, going on with what is known: %s", error)
            return
        listed = set(map(base_url, self._listed))
        self._entries = {url: entry for url, entry in entries.items() if self._takes_registered or url in listed}

    def _report_of(self, url: str, result: ServerResult) -> InferenceServer | None:
        """What to tell of a server. A failure is told once: more would make a dead server look alive."""
        problem = self._problem(url, result)
        is_old_news = bool(problem) and self._told.get(url) == problem
        self._told[url] = problem
        if is_old_news:
            return None
        registered = self._entries[url].server if url in self._entries else InferenceServer(url=url)
        version = registered.policy_version if result.weight_version is None else int(result.weight_version)
        return registered.model_copy(update={"policy_version": version, "problem": problem})

    def _problem(self, url: str, result: ServerResult) -> str:
        if result.error is None:
            return ""
        is_resting = self._limits.retry_in_s(self._known[url].failures) > 0
        what = "quarantined, it keeps missing publications" if is_resting else "it missed a publication"
        return f"{what}: failed to {result.error.edge}: {result.error.reason}"[:1000]

    def _report(self, reports: Sequence[InferenceServer]) -> None:
        if self._registry is None or not reports:
            return
        try:
            self._registry.report(reports)
        except AtroposError as error:
            log.warning("the registry does not take the versions of the inference servers: %s", error)

    def _drop_gone(self, kept: set[str]) -> None:
        for url in [url for url in self._controls if url not in kept]:
            self._controls.pop(url).close()
            # A server that comes back under the same URL begins anew.
            self._known.pop(url, None)
            self._told.pop(url, None)


def _log_changes(before: Membership, now: Membership) -> None:
    for url in now.members:
        if url not in before.members:
            word = "tries again" if url in before.quarantined else "joins"
            catches_up = " and catches up" if url in now.behind else ""
            log.info("inference server %s %s%s", url, word, catches_up)
    for url, reason in now.quarantined.items():
        if url not in before.quarantined:
            log.warning("inference server %s is in quarantine: %s", url, reason)
    for url, reason in now.refused.items():
        if url not in before.refused:
            log.info("inference server %s gets no weights: %s", url, reason)
    for url in before.members:
        if url not in {*now.members, *now.quarantined, *now.refused}:
            log.info("inference server %s has left", url)
