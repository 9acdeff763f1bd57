"""Weights travel in the way that suits the engines that answer, which may not be known when the trainer starts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from atroposlib.errors import ConfigError
from trainer.weight_sync.engines.control import EngineName
from trainer.weight_sync.engines.detect import resolved
from trainer.weight_sync.errors import ServerSyncError, TransferError, WeightSyncError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import Member, NamedWeights, Transport, require_time

log = logging.getLogger(__name__)

Choose: TypeAlias = Callable[[Mapping[str, EngineName]], Transport[Any]]
"""Builds a transport for engines, by URL. Raises ConfigError when none suits them."""


@dataclass
class ChosenShipment:
    """Weights to be sent, and what each transport that was tried made of them."""

    weights: NamedWeights
    weight_version: str
    prepared: dict[int, Any] = field(default_factory=dict)
    """By the transport's number."""


class ChosenTransport:
    """The transport that suits the servers. See Transport.

    Args:
        choose: called for the engines that are known now, if any, and again when servers of another engine come.
        engines: of the servers that answered already, by URL.

    Raises:
        ConfigError: no transport suits them.
    """

    def __init__(self, choose: Choose, engines: Mapping[str, EngineName]) -> None:
        self._choose = choose
        self._engines = dict(engines)
        self._transport = choose(engines) if engines else None
        self._number = 0
        self._latest: ChosenShipment | None = None
        """What is on its way, for a transport that is chosen after it was prepared."""
        self._preparing = threading.Lock()

    def prepare(self, weights: NamedWeights, weight_version: str) -> ChosenShipment:
        """See Transport.prepare. As long as no server has ever answered, this only keeps the weights."""
        kept = list(weights) if iter(weights) is weights else weights
        self._latest = shipment = ChosenShipment(kept, weight_version)
        if self._transport is not None:
            self._prepared(shipment, self._transport)
        return shipment

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """Choose if need be, and prepare for what was chosen: the engines still generate. See Transport.open.

        Raises:
            ConfigError: no transport suits the first servers that answer.
            TransferError: servers came that the chosen transport does not suit; they are the culprits. Or time was up.
        """
        deadline = time.monotonic() + timeout_s
        members = [replace(member, control=resolved(member.control)) for member in members]
        self._suit({member.control.url: member.control.engine for member in members}, deadline)
        transport = self._chosen()
        if self._latest is not None:
            self._prepared_by(deadline, self._latest, transport)
        transport.open(members, timeout_s=time_left(deadline))

    def send(self, shipment: ChosenShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        deadline = time.monotonic() + timeout_s
        transport = self._chosen()
        prepared = self._prepared(shipment, transport)
        require_time(deadline, Edge.SEND)
        transport.send(prepared, timeout_s=time_left(deadline))
        self._latest = None

    def leave(self) -> None:
        """See Transport.leave."""
        if self._transport is not None:
            self._transport.leave()

    def _chosen(self) -> Transport[Any]:
        if self._transport is None:
            raise WeightSyncError("no inference server has answered yet, so there is no way to send weights")
        return self._transport

    def _prepared_by(self, deadline: float, shipment: ChosenShipment, transport: Transport[Any]) -> None:
        """Prepare in a thread that may have been abandoned: two must not prepare the same, and the late one ends here."""
        if not self._preparing.acquire(timeout=time_left(deadline)):
            reason = "the weights were not prepared in time; raise weight_sync.timeout_s"
            raise TransferError(Edge.ATTACH, reason, {})
        try:
            self._prepared(shipment, transport)
        finally:
            self._preparing.release()
        require_time(deadline, Edge.ATTACH)

    def _prepared(self, shipment: ChosenShipment, transport: Transport[Any]) -> Any:
        if self._number not in shipment.prepared:
            shipment.prepared[self._number] = transport.prepare(shipment.weights, shipment.weight_version)
        return shipment.prepared[self._number]

    def _suit(self, engines: Mapping[str, EngineName], deadline: float) -> None:
        """Choose again if there is an engine among these that the choice did not reckon with."""
        known = set(self._engines.values())
        strangers = {url for url, engine in engines.items() if engine not in known}
        if not strangers:
            return
        try:
            transport = self._choose({**self._engines, **engines})
        except ConfigError as error:
            if self._transport is None:
                raise
            culprits = {url: ServerSyncError(url, Edge.ATTACH, str(error)) for url in strangers}
            raise TransferError(Edge.ATTACH, str(error), culprits) from error
        require_time(deadline, Edge.ATTACH)
        self.leave()
        self._transport, self._number = transport, self._number + 1
        self._engines |= engines
        log.info("weights travel by %s", type(transport).__name__)
