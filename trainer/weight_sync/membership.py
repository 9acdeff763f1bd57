"""Which inference servers get weights: those of the config and those that have registered, less those that cannot take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from atroposlib.wire.models import InferenceServerStatus


@dataclass(frozen=True)
class PoolLimits:
    """When a server is no member."""

    silent_after_s: float = 30.0
    """A registered server that was not reported for so long is taken to be gone. One of the config never is."""
    failures: int = 3
    """Publications missed in a row that end in quarantine."""
    first_retry_s: float = 10.0
    """From the publication that put it there to the next try; doubles with each further failure."""
    longest_retry_s: float = 60.0

    def retry_in_s(self, failures: int) -> float:
        """How long a server rests after so many failures in a row; 0 while it is not in quarantine."""
        if failures < self.failures:
            return 0.0
        return float(min(self.longest_retry_s, self.first_retry_s * 2 ** min(failures - self.failures, 32)))


@dataclass(frozen=True)
class KnownServer:
    """What publications have shown of a server."""

    version: str | None = None
    """It reported this one after the last publication that it took part in."""
    failures: int = 0
    """Publications missed in a row."""
    failed_at: float = 0.0
    """When the last one was missed, on the pool's clock."""
    reason: str = ""
    """Why."""

    def after_success(self, version: str) -> KnownServer:
        """It runs this version."""
        return KnownServer(version=version)

    def after_failure(self, reason: str, now: float) -> KnownServer:
        """It missed a publication."""
        return replace(self, version=None, failures=self.failures + 1, failed_at=now, reason=reason)


@dataclass(frozen=True)
class Membership:
    """Who gets the next publication."""

    members: tuple[str, ...] = ()
    """Base URLs: first those of the config, in its order."""
    behind: tuple[str, ...] = ()
    """Members that are not known to run the current version: they must catch up."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Servers that would be members, with the reason why they rest."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Servers that can be no members, with the reason."""


def base_url(url: str) -> str:
    """The form in which servers are compared: without a trailing slash or /v1."""
    return url.rstrip("/").removesuffix("/v1")


def decide_membership(
    listed: Sequence[str],
    registry: Collection[InferenceServerStatus],
    known: Mapping[str, KnownServer],
    *,
    version: int,
    now: float,
    limits: PoolLimits,
) -> Membership:
    """Sort the servers. Quarantine protects the others: where all would rest, none does.

    Args:
        listed: base URLs of the config.
        registry: as the rollout server shows it.
        known: what publications have shown, by base URL.
        version: that the trainer has published last; -1: none.
        now: on the clock of KnownServer.failed_at.
    """
    entries = {base_url(entry.server.url): entry for entry in registry}
    candidates = dict.fromkeys([*map(base_url, listed), *entries])
    is_listed = set(map(base_url, listed))
    refused = {
        url: reason
        for url in candidates
        if (reason := _why_refused(entries.get(url), is_listed=url in is_listed, limits=limits))
    }
    quarantined = {
        url: reason
        for url in candidates
        if url not in refused and (reason := _why_resting(known.get(url, KnownServer()), now, limits))
    }
    able = [url for url in candidates if url not in refused]
    members = tuple(url for url in able if url not in quarantined)
    if able and not members:
        members, quarantined = tuple(able), {}
    behind = tuple(url for url in members if _is_behind(known.get(url), entries.get(url), version))
    return Membership(members, behind, quarantined, refused)


def _why_refused(entry: InferenceServerStatus | None, *, is_listed: bool, limits: PoolLimits) -> str:
    if entry is None:
        return ""
    if entry.server.role != "policy":
        return f"it is registered as {entry.server.role}, and only policy servers get weights"
    if not is_listed and entry.last_seen_s > limits.silent_after_s:
        return f"it was not reported for {entry.last_seen_s:.0f} s"
    return ""


def _why_resting(known: KnownServer, now: float, limits: PoolLimits) -> str:
    left_s = known.failed_at + limits.retry_in_s(known.failures) - now
    if known.failures < limits.failures or left_s <= 0:
        return ""
    return f"it missed {known.failures} publications in a row, next try in {left_s:.0f} s: {known.reason}"


def _is_behind(known: KnownServer | None, entry: InferenceServerStatus | None, version: int) -> bool:
    if version < 0:
        return False
    # The registry is newer than the last publication: a server that was restarted since says so there.
    if entry is not None and entry.server.policy_version != version:
        return True
    return known is None or known.version != str(version)
