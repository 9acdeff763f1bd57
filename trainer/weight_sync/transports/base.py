"""What every transport is, and what those have in common that call many servers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.states import Edge, time_left

NamedWeights: TypeAlias = Iterable[tuple[str, torch.Tensor]]
"""Hugging Face checkpoint names and tensors. A tied output layer comes once, under the name of the embedding."""


@dataclass(frozen=True)
class Member:
    """A server that answers."""

    control: EngineControl
    world_size: int
    weight_version: str
    """As it reported before this publication."""


ShipmentT = TypeVar("ShipmentT")


class Transport(Protocol[ShipmentT]):
    """A way for weights to travel. The publisher calls, in this order and again for each attempt after the first:
    prepare (once a publication), open, send; leave after a failure.

    open, send and leave run in a thread that is abandoned when it outlasts its deadline, because a collective cannot be
    called off. A transport therefore keeps what it opened in an object of its own that leave() drops, and an open or send
    whose deadline has passed does nothing more, neither to a server nor to the transport: see require_time.
    """

    def prepare(self, weights: NamedWeights, weight_version: str) -> ShipmentT:
        """Do all that can be done while the engines still generate: gather, convert, write files.

        Raises:
            WeightSyncError: it cannot be done, for example because the disk is full.
        """

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """Make sure that there is a way to just these servers. Cheap when there is one already.

        Raises:
            TransferError: they did not all come.
        """

    def send(self, shipment: ShipmentT, *, timeout_s: float) -> None:
        """Bring the weights to the members, which are paused, and make each report the shipment's version.

        Raises:
            TransferError: a server failed, or timeout_s passed. Nobody is sure to hold the new weights then.
        """

    def leave(self) -> None:
        """Give up the way to the members, so that the next open() makes a new one."""


Calls: TypeAlias = dict[str, "Future[None]"]


def post(calls: ThreadPoolExecutor, members: Iterable[Member], call: Callable[[EngineControl], None]) -> Calls:
    """Begin the call on every member at once, each in a thread of its own."""
    return {member.control.url: calls.submit(call, member.control) for member in members}


def settle(calls: Mapping[str, Future[None]], *, deadline: float, edge: Edge) -> None:
    """Wait for calls that need nothing more from this side.

    Args:
        deadline: on time.monotonic().
    Raises:
        TransferError: some failed, or are not back in time.
    """
    wait(calls.values(), timeout=time_left(deadline))
    late = [url for url, call in calls.items() if not call.done()]
    # Where one failed, the others may wait for it; where none did, who is late holds up the rest.
    culprits = failures(calls) or {url: ServerSyncError(url, edge, "no answer in time") for url in late}
    if culprits:
        raise TransferError(edge, "another server failed", culprits)


def failures(calls: Mapping[str, Future[None]]) -> dict[str, ServerSyncError]:
    """Of the calls that are back. An error that is not a server's is ours: it is raised here, not counted."""
    found: dict[str, ServerSyncError] = {}
    for url, call in calls.items():
        error = call.exception() if call.done() else None
        if isinstance(error, ServerSyncError):
            found[url] = error
        elif error is not None:
            raise error
    return found


def raise_failed(calls: Mapping[str, Future[None]]) -> None:
    """Raise RuntimeError if a call has failed."""
    if failed := failures(calls):
        # Not the failure itself: it is kept in results, and would keep the frames of this transfer alive.
        raise RuntimeError("; ".join(map(str, failed.values())))


def require_time(deadline: float, edge: Edge) -> None:
    """Stop a transfer that nobody waits for any more, before it takes its next step.

    Args:
        deadline: on time.monotonic().
    Raises:
        TransferError: it has passed.
    """
    late_s = time.monotonic() - deadline
    if late_s > 0:
        raise TransferError(
            edge, f"its time was up {late_s:.3g} s ago; raise weight_sync.timeout_s if it was too short", {}
        )
