"""What became of one publication, server by server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.weight_sync.errors import ServerSyncError, TakenOverError, WeightSyncError


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

    def checked(self) -> PublishResult:
        """Return this result.

        Raises:
            TakenOverError: no server runs the version, and another trainer has one of them.
            WeightSyncError: no server runs the version.
        """
        if len(self.failed) == len(self.servers):
            raise nobody(result.error for result in self.failed if result.error is not None)
        return self


def failed(errors: dict[str, ServerSyncError]) -> dict[str, ServerResult]:
    """Results of servers that never came to a transfer."""
    return {url: ServerResult(url, None, 0.0, error) for url, error in errors.items()}


def nobody(errors: Iterable[ServerSyncError]) -> WeightSyncError:
    """The error that ends a publication which reached no server."""
    known = list(errors)
    taken = next((error for error in known if isinstance(error, TakenOverError)), None)
    return taken or WeightSyncError("no inference server runs the new weights: " + "; ".join(map(str, known)))
