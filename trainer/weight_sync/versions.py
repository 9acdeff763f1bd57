"""Which versions this trainer sent, and so what a server's answer means."""

from __future__ import annotations

from trainer.weight_sync.engines.control import UNKNOWN_VERSION
from trainer.weight_sync.errors import TakenOverError, VersionOrderError


class SentVersions:
    """The versions that one trainer sent, and what each server reported when it was first met.

    Two trainers that send equal numbers are told apart as soon as one of them is a version ahead.
    """

    def __init__(self) -> None:
        self._sent: set[str] = set()
        self._newest: int | None = None
        self._expected: dict[str, str] = {}

    def begin(self, version: int) -> None:
        """Count `version` as sent from now on, since any server may get it even if the publication fails.

        Raises:
            VersionOrderError: a newer one was sent already.
        """
        if self._newest is not None and version < self._newest:
            raise VersionOrderError(version, newest=self._newest)
        self._newest = version
        self._sent.add(str(version))

    def met(self, server: str, reported: str) -> None:
        """Judge what a server reports.

        A first meeting accepts any version: a predecessor's. Later it is one of ours, or UNKNOWN_VERSION after a restart.

        Raises:
            TakenOverError: it is another trainer's.
        """
        expected = self._expected.setdefault(server, reported)
        if reported not in self._sent and reported not in (expected, UNKNOWN_VERSION):
            raise TakenOverError(server, found=reported, expected=expected)

    def holds(self, server: str, version: str) -> None:
        """Note that the server was seen to run `version`."""
        self._expected[server] = version
