"""What the routes share: the store, the signals that wake long-polls, and the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.compat.state import LegacyState
from rollout_server.config import ServerConfig
from rollout_server.event_log import EventLog
from rollout_server.signals import Signal
from rollout_server.stores.base import Store


@dataclass(frozen=True)
class Services:
    """Made once at start-up."""

    config: ServerConfig
    store: Store
    capacity: Signal
    """Fires when a group may start."""
    queue: Signal
    """Fires when a batch may be complete."""
    legacy: LegacyState = field(default_factory=LegacyState)
    events: EventLog = field(default_factory=EventLog)
    """What happened lately, for people who watch."""
