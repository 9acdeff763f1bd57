"""A publisher whose servers come and go: it asks the pool before each publication and tells it what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import WeightSyncError
from trainer.weight_sync.pool import Pool
from trainer.weight_sync.results import PublishResult
from trainer.weight_sync.transports.base import NamedWeights


class SettablePublisher(Protocol):
    """What is needed of a WeightPublisher."""

    def set_controls(self, controls: Sequence[EngineControl]) -> None: ...  # noqa: D102
    def attach(self) -> None: ...  # noqa: D102
    def publish(self, version: int, weights: NamedWeights) -> PublishResult: ...  # noqa: D102
    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class PooledPublisher:
    """Publishes to the servers that the pool names at that moment.

    A publication that reaches nobody counts against no server: there is nobody left to protect from it.
    """

    def __init__(self, publisher: SettablePublisher, pool: Pool) -> None:
        self._publisher = publisher
        self._pool = pool

    def attach(self) -> None:
        """See WeightPublisher.attach."""
        self._refresh()
        self._publisher.attach()

    def publish(self, version: int, weights: NamedWeights) -> PublishResult:
        """See WeightPublisher.publish."""
        self._refresh()
        result = self._publisher.publish(version, weights)
        self._pool.note(result)
        return result

    def ensure_current(self, version: int, weights: NamedWeights) -> PublishResult:
        """See WeightPublisher.ensure_current. A server that has joined since is among them."""
        self._refresh()
        result = self._publisher.ensure_current(version, weights)
        self._pool.note(result)
        return result

    def close(self) -> None:
        """Leave the servers and drop all connections."""
        self._publisher.close()
        self._pool.close()

    def _refresh(self) -> None:
        controls = self._pool.refresh()
        if not controls:
            refused = "; ".join(f"{url}: {reason}" for url, reason in self._pool.membership.refused.items())
            raise WeightSyncError(
                f"no inference server can get weights{f' ({refused})' if refused else ''}: start one with"
                " `atropos inference MODEL --rollout-server URL`, or name one in inference_servers"
            )
        self._publisher.set_controls(controls)
