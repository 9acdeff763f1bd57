"""Meet the other side over gloo, and bring a bucket across: what trainer (rank 0) and engine workers must agree on.

A worker answers no prompt while it waits for the trainer, so none of its waits is long. A dead trainer is noticed at once
before a bucket is under way, because its store is gone. In the middle of a bucket gloo notices nothing, so each bucket
has a short deadline of its own, which begins when all ranks stand ready.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeAlias

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    ProcessGroupGloo,
    TCPStore,
    Work,
)

from trainer.weight_sync.states import GRACE_S
from trainer.weight_sync.watched import run_within

READY_TIMEOUT_S = 10.0
"""Until all workers, of paused engines, stand ready for a bucket; and for the ranks to connect once all have come."""

_CONNECT_TIMEOUT_S = 3.0
_SLACK_S = 2.0
_FIRST_BYTES_PER_S = 8e6
_TIMES_SLOWER = 10
_POLL_S = 0.002
_OPEN = "open"

Meeting: TypeAlias = "tuple[TCPStore, ProcessGroupGloo]"


def bucket_timeout_s(size_bytes: int, slowest_bytes_per_s: float | None) -> float:
    """How long a bucket may be under way, which is also how long a trainer that dies meanwhile holds up an engine.

    Args:
        slowest_bytes_per_s: of the buckets that this group has seen. None: no faster than a link of 100 Mbit/s.
    """
    if slowest_bytes_per_s is None:
        return _SLACK_S + size_bytes / _FIRST_BYTES_PER_S
    return _SLACK_S + _TIMES_SLOWER * size_bytes / slowest_bytes_per_s


def joining_counter(rank_offset: int) -> str:
    """Counter of one server's workers that have reached the store and are about to open the group."""
    return f"joining/{rank_offset}"


def ready_counter(sequence: int, rank_offset: int) -> str:
    """Counter of one server's workers that stand ready to receive bucket number `sequence` of this group."""
    return f"ready/{sequence}/{rank_offset}"


def go_key(sequence: int) -> str:
    """Set by rank 0 when it begins to send bucket number `sequence`."""
    return f"go/{sequence}"


def host_store(address: str, *, timeout_s: float) -> TCPStore:
    """Open the store that the engines will look for, on a free port of this host."""
    # Not torch's rendezvous(): under torchrun that looks for a store of torchrun's.
    return TCPStore(address, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def open_rank_0(store: TCPStore, *, world_size: int, address: str, timeout_s: float) -> ProcessGroupGloo:
    """Let the workers, all of which have come to the store, open the group, and open it with them."""
    store.set(_OPEN, "1")
    return _open(store, rank=0, world_size=world_size, address=address, timeout_s=timeout_s)


def join(address: str, port: int, *, rank: int, rank_offset: int, world_size: int, timeout_s: float) -> Meeting:
    """Join the trainer's group as a worker.

    Args:
        address: of the trainer's store, as is `port`.
        rank_offset: the first rank of this worker's server.

    Raises:
        OSError: the trainer is not there.
        RuntimeError: the trainer is gone.
        TimeoutError: not all ranks came within `timeout_s`.
    """

    def meet() -> Meeting:
        store.add(joining_counter(rank_offset), 1)
        store.wait([_OPEN], timedelta(seconds=timeout_s))
        own = local_address_towards(address)
        return store, _open(store, rank=rank, world_size=world_size, address=own, timeout_s=timeout_s)

    connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
    store = run_within(lambda: _reach(address, port, connect_s), timeout_s=connect_s, name="weight-sync-reach")
    # The store's own deadline does not hold when the trainer's host falls silent instead of closing the connection.
    return run_within(meet, timeout_s=timeout_s + GRACE_S, name="weight-sync-join")


def receive(meeting: Meeting, buffer: torch.Tensor, *, sequence: int, rank_offset: int, timeout_s: float) -> None:
    """Fill the buffer with bucket number `sequence`.

    Args:
        timeout_s: from the moment that rank 0 begins to send.

    Raises:
        RuntimeError: the trainer is gone, or the bucket did not come in time.
        TimeoutError: the trainer does not send, or its host fell silent.
    """
    store, group = meeting
    # Longer than the trainer waits for us: it knows who is late, so it is to give up first.
    ready_s = READY_TIMEOUT_S + GRACE_S

    def take() -> None:
        store.add(ready_counter(sequence, rank_offset), 1)
        store.wait([go_key(sequence)], timedelta(seconds=ready_s))
        broadcast(group, buffer, timeout_s=timeout_s).wait()

    run_within(take, timeout_s=ready_s + timeout_s + GRACE_S, name="weight-sync-receive")


def broadcast(group: ProcessGroupGloo, buffer: torch.Tensor, *, timeout_s: float) -> Work:
    """Send the buffer from rank 0, or fill it on any other rank. `wait()` on what is returned."""
    return group.broadcast(buffer, 0, timedelta(seconds=timeout_s))  # type: ignore[attr-defined,no-any-return]


def wait_for_workers(
    store: TCPStore, expected: Mapping[str, int], *, deadline: float, check: Callable[[], None]
) -> set[str]:
    """Wait until each counter stands at its number, calling `check` meanwhile, which raises when all hope is gone.

    Returns:
        The counters that did not get there before `time.monotonic()` passed `deadline`.
    """
    missing = set(expected)
    while True:
        missing = {counter for counter in missing if store.add(counter, 0) < expected[counter]}
        if not missing or time.monotonic() > deadline:
            return missing
        check()
        time.sleep(_POLL_S)


def local_address_towards(host: str) -> str:
    """Return the address of this machine that `host` sees: that of the interface which leads there."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route and sends nothing
        return str(probe.getsockname()[0])


def own_address(hosts: Sequence[str]) -> str:
    """Return an address of this machine that every host reaches: loopback only if all are here."""
    seen = [local_address_towards(host) for host in hosts]
    return next((address for address in seen if not address.startswith("127.")), seen[0])


def _reach(address: str, port: int, timeout_s: float) -> TCPStore:
    # A store knocks on a closed door for three times its timeout; this fails at once.
    socket.create_connection((address, port), timeout_s).close()
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _open(store: TCPStore, *, rank: int, world_size: int, address: str, timeout_s: float) -> ProcessGroupGloo:
    """Return when all ranks are in the group. `address` is this host's, as the other ranks can reach it."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default device is whatever the host's name resolves to: often nothing that others reach.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=min(timeout_s, READY_TIMEOUT_S))
    return ProcessGroupGloo(store, rank, world_size, options)
