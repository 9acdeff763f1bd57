"""Which policy version the inference servers run: publish after each step, catch up after a crash, re-publish.

The publisher knows how weights travel; this module knows when, and what the rollout server is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Protocol

from atroposlib.errors import AtroposError, ConfigError
from trainer.weight_sync.errors import NumericsError, TakenOverError
from trainer.weight_sync.states import Deadlines
from trainer.weight_sync.transports.base import NamedWeights

log = logging.getLogger(__name__)

IDLE_CHECK_S = 5.0
"""How often a waiting trainer looks whether an inference server came back without its weights."""

_FATAL = (TakenOverError, NumericsError, ConfigError)
"""Another trainer has the servers, none computes as this one does, or none can ever get weights: to go on would harm."""


def is_published(version: int, *, engine_version: int) -> bool:
    """Whether engines get this version: nothing older than they may already run. Every rank decides alike."""
    return version >= engine_version


def longest_s(timeout_s: float) -> float:
    """How long a publication keeps rank 0, at the very most: three attempts that pass every deadline."""
    return Deadlines.within(timeout_s).publication_s


class PublishResult(Protocol):
    """What became of one publication."""

    @property
    def version(self) -> int:
        """The version that was published."""

    @property
    def failed(self) -> Collection[object]:
        """The servers that do not run it."""


class Publisher(Protocol):
    """Brings weights to every inference server. Raises AtroposError when not one of them runs the version."""

    def attach(self) -> None:
        """Find the servers."""

    def publish(self, version: int, weights: NamedWeights) -> PublishResult:
        """Make every server run these weights as this version."""

    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult:
        """Publish to the servers that report another version."""

    def close(self) -> None:
        """Let go of the servers."""


class Publication:
    """Keeps the inference servers at the trainer's version. Lives on rank 0.

    Without a publisher there are no engines to wait for: the version then follows the step at once.

    Args:
        publisher: None when the run has no inference servers.
        announce: tells the rollout server which version the engines run.
        engine_version: the newest version that they may already run (a predecessor's); nothing older is published.
    """

    def __init__(
        self,
        publisher: Publisher | None,
        *,
        announce: Callable[[int], None],
        engine_version: int,
    ) -> None:
        self._publisher = publisher
        self._weights: NamedWeights = ()
        self._announce = announce
        self._engine_version = engine_version
        self._version = -1
        self._is_current = False
        self._idle_since = time.monotonic()

    def start(self, version: int, weights: NamedWeights) -> None:
        """Bring the engines to the first version, unless they are ahead of a trainer that resumes.

        Args:
            weights: as for after_step.
        """
        if self._publisher is not None:
            try:
                self._publisher.attach()
            except _FATAL:
                raise
            except AtroposError as error:
                log.warning("no inference server yet, going on without: %s", error)
        if version < self._engine_version:
            log.info("catching up by replay: at version %d, engines at %d", version, self._engine_version)
        if self._publish(version, weights):
            self._announce(version)

    def after_step(self, version: int, weights: NamedWeights) -> int | None:
        """Publish the weights of a finished step.

        Args:
            weights: gathered after the step. They stay those of this version until the next one begins, and until then
                while_idle may send them again.
        Returns:
            The version that the engines now run, to be acknowledged with the step; None when not one took it, or when
            they run a newer one because this trainer still catches up.
        """
        return version if self._publish(version, weights) else None

    def while_idle(self) -> None:
        """Re-publish to an inference server that was restarted. Cheap to call often; never while a step is under way."""
        is_due = time.monotonic() - self._idle_since >= IDLE_CHECK_S
        if self._publisher is None or not is_due or not self._is_published(self._version):
            return
        was_current = self._is_current
        try:
            self._publisher.ensure_current(self._version, self._weights)
            self._is_current = True
        except _FATAL:
            raise
        except AtroposError as error:
            self._is_current = False
            if was_current:
                log.warning("no inference server runs version %d: %s", self._version, error)
        if self._is_current and not was_current:
            self._announce(self._version)
        self._idle_since = time.monotonic()

    def close(self) -> None:
        """Let go of the inference servers."""
        if self._publisher is not None:
            self._publisher.close()

    def _is_published(self, version: int) -> bool:
        return is_published(version, engine_version=self._engine_version)

    def _publish(self, version: int, weights: NamedWeights) -> bool:
        self._version, self._weights = version, weights
        self._idle_since = time.monotonic()
        if not self._is_published(version):
            return False
        self._is_current = True
        if self._publisher is not None:
            try:
                result = self._publisher.publish(version, weights)
            except _FATAL:
                raise
            except AtroposError as error:
                log.warning("version %d reached no inference server, training goes on: %s", version, error)
                self._is_current = False
            else:
                if result.failed:
                    log.warning("version %d did not reach %d of the inference servers", version, len(result.failed))
        return self._is_current
