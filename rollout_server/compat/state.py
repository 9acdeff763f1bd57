"""What the old protocol leaves unsaid, remembered while the server runs. Losing it repeats a batch, and loses none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from atroposlib.wire.models import EnvStatus


@dataclass(frozen=True)
class HandedOut:
    """The batch that an old trainer was given whole. Another run, session or step is another batch."""

    run_id: str
    session: int
    step: int


@dataclass
class LegacyState:
    """One server's memory of its old clients."""

    handed_out: HandedOut | None = None
    """The last one. Asking for the next one acknowledges it."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a batch is sent: nobody is given a batch of which it is not yet known whether it arrived."""
    registering: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a trainer or an environment registers."""
    carried_envs: list[EnvStatus] = field(default_factory=list)
    """Environments that were there when the run was reset; they get their env_ids in the next one."""
    largest_groups: dict[int, int] = field(default_factory=dict)
    """Sequences of the largest group that each environment sent, by env_id."""

    def note_group(self, env_id: int, n_sequences: int) -> None:
        """An environment sent a group."""
        if n_sequences > self.largest_groups.get(env_id, 0):
            self.largest_groups[env_id] = n_sequences
