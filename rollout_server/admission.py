"""Who may start a group, and which batches must wait: the staleness bound and the environments' shares as pure arithmetic.

Batch s is trained at version s. A sequence whose oldest token has version u may be trained at version u + K at the
latest, so it must be in one of the batches up to u + K. Of all sequences not yet in a batch, those with version <= w
must therefore fit into the batches next_step .. w + K, for every w: the feasibility test of earliest-deadline-first
scheduling. A group may start when the test still holds with it; a batch may leave when the test holds for what stays
behind. Counting admissions alone is not enough: a batch filled with fresh groups while older ones are in flight would
leave the older ones too few places.

Source: Liu and Layland 1973, doi:10.1145/321738.321743, for unit jobs with deadlines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    def after_next_batch(self) -> Bound:
        """The bound once the next batch has left."""
        return Bound(self.batch_size, self.max_staleness, self.next_step + 1)


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
    held, is_counted = 0, False
    for older in sorted(pending):
        if older >= version and not is_counted:
            held, is_counted = held + sequences, True
            if older > version and held > bound.capacity_until(version):
                return False
        held += pending[older]
        if held > bound.capacity_until(older):
            return False
    return is_counted or held + sequences <= bound.capacity_until(version)


def must_leave(bound: Bound, pending: Mapping[int, int]) -> int:
    """Sequences, oldest first, that the next batch must take so that the rest can still be trained in time."""
    later, held, excess = bound.after_next_batch(), 0, 0
    for version in sorted(pending):
        held += pending[version]
        excess = max(excess, held - later.capacity_until(version))
    return excess


def must_wait_for(bound: Bound, pending: Mapping[int, int], queued: Mapping[int, int]) -> int | None:
    """A version of which groups in flight must join the next batch, whatever it is made of; None when there is none.

    Args:
        queued: of the pending sequences, those in the queue, by oldest version.
    """
    later, held, here = bound.after_next_batch(), 0, 0
    for version in sorted(pending):
        held += pending[version]
        here += queued.get(version, 0)
        if held - min(here, bound.batch_size) > later.capacity_until(version):
            return version
    return None


@dataclass(frozen=True)
class Claim:
    """What the sharing of tickets needs to know of one environment."""

    weight: float
    """Its share of the trained tokens, against the others'."""
    tokens_per_sequence: float
    """Measured mean; 1.0 for every environment while one of them is unmeasured."""
    sequences_held: int
    """Queued or in flight."""


def may_take(mine: Claim, waiting: Iterable[Claim], *, sequences: int, capacity: int) -> bool:
    """Whether an environment may take `sequences` more places while others wait for one.

    All that starts is trained, so the mix of environments is decided here, where groups start. An environment alone may
    take everything; while others wait it may hold no more than its weighted share, counted in tokens.

    Args:
        waiting: live environments whose last request was not met in full.
        capacity: sequences that may be queued or in flight in all.
    """
    others = [claim for claim in waiting if claim.weight > 0]
    if not others:
        return True
    shares = [claim.weight / claim.tokens_per_sequence for claim in (mine, *others)]
    if mine.weight <= 0:
        return False
    return mine.sequences_held + sequences <= max(sequences, capacity * shares[0] / sum(shares))
