"""Who may start a group, and which batches must wait: the staleness bound as pure arithmetic.

Batch s is trained at version s. A sequence whose oldest token has version u may be trained at version u + K at the
latest, so it must be in one of the batches up to u + K. Of all sequences not yet in a batch, those with version <= w
must therefore fit into the batches next_step .. w + K, for every w: the feasibility test of earliest-deadline-first
scheduling. A group may start when the test still holds with it; a batch may leave when the test holds for what stays
behind. Counting admissions alone is not enough: a batch filled with fresh groups while older ones are in flight would
leave the older ones too few places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The facts that the staleness bound depends on."""

    batch_size: int
    """Sequences a batch, B."""
    max_staleness: int
    """Versions, K."""
    next_step: int
    """Step of the next batch to be formed; those before it are formed."""

    def capacity_until(self, version: int) -> int:
        """Sequences of this version or older that the batches still to be formed can hold within the bound."""
        return self.batch_size * max(0, version + self.max_staleness + 1 - self.next_step)

    def is_stale(self, oldest_version: int | None) -> bool:
        """Whether a sequence of this version can no longer be trained in the next batch. Unknown is not stale."""
        return oldest_version is not None and oldest_version < self.next_step - self.max_staleness


def overfull_version(bound: Bound, pending: Mapping[int, int]) -> int | None:
    """The oldest version up to which more sequences are pending than can be trained in time; None when all fit.

    Args:
        pending: sequences queued or in flight, by oldest version.
    """
    held = 0
    for version in sorted(pending):
        held += pending[version]
        if held > bound.capacity_until(version):
            return version
    return None


def fits(bound: Bound, pending: Mapping[int, int], *, version: int, sequences: int) -> bool:
    """Whether `sequences` more of `version` can be trained in time beside what is pending."""
    return overfull_version(bound, Counter(pending) + Counter({version: sequences})) is None
