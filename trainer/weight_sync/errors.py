"""Errors of weight synchronisation."""

from __future__ import annotations

from collections.abc import Mapping

from atroposlib.errors import AtroposError
from trainer.weight_sync.states import Edge


class WeightSyncError(AtroposError):
    """New weights could not be brought to any inference server."""

    code = "weight_sync"


class ServerSyncError(WeightSyncError):
    """One inference server failed on one edge of a publication."""

    code = "weight_sync_server"

    def __init__(self, server: str, edge: Edge, reason: str) -> None:
        super().__init__(f"inference server {server} failed to {edge}: {reason}")
        self.server = server
        self.edge = edge
        self.reason = reason


class TransferError(WeightSyncError):
    """A transfer to a group of servers broke. Nobody in it is sure to hold the new weights.

    `culprits` failed while the group was whole; every other server in it was only dragged along.
    """

    code = "weight_sync_transfer"

    def __init__(self, edge: Edge, reason: str, culprits: Mapping[str, ServerSyncError]) -> None:
        super().__init__("; ".join(map(str, culprits.values())) or f"the transfer failed to {edge}: {reason}")
        self.edge = edge
        self.reason = reason
        self.culprits = dict(culprits)
