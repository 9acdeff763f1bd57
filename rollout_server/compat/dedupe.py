"""Group ids for senders that make none: the same content from the same sender, sent again soon, is the same group."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from atroposlib.wire.columns import Group
from atroposlib.wire.layout import COLUMNS

DIGEST_BYTES = 16


@dataclass(frozen=True)
class GroupIds:
    """The id a group gets now, and the one it would have got a window ago."""

    current: str
    previous: str | None
    """None where repetitions are not looked for."""


@dataclass(frozen=True)
class Deduplication:
    """Makes ids from content and time, the same in every server process.

    Args:
        window_s: a repetition within this time gets the same current or previous id; 0: every group is new.
        clock: Unix time in seconds.
    """

    window_s: float
    clock: Callable[[], float] = time.time

    @property
    def is_on(self) -> bool:
        """Whether repetitions are looked for; if not, ids needs no digest."""
        return self.window_s > 0

    def ids(self, digest: str, *, ordinal: int) -> GroupIds:
        """The ids of a group.

        Args:
            digest: of its content.
            ordinal: how many groups of that content stand before it in the same request; those are no repetitions.
        """
        if not self.is_on:
            return GroupIds(f"legacy-{uuid.uuid4().hex}", None)
        window = int(self.clock() // self.window_s)
        prefix = f"legacy-{digest}-{ordinal}"
        return GroupIds(f"{prefix}-{window}", f"{prefix}-{window - 1}")


def content_digest(group: Group, *, sender: str) -> str:
    """Of everything a group holds but its id."""
    facts = (
        sender, group.env_id, group.messages, group.generation_params, group.overrides, group.group_overrides,
        group.images, group.extra,
    )  # fmt: skip
    digest = hashlib.blake2b(msgspec.json.encode(facts), digest_size=DIGEST_BYTES)
    for name in COLUMNS:
        column = getattr(group, name)
        if column is not None:
            digest.update(f"{name}{column.shape}".encode())
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
