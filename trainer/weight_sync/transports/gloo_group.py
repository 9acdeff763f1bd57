"""Meet the other side: the store, the gloo group and the counters that trainer and engines share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    ProcessGroupGloo,
    TCPStore,
    Work,
)

JOINING = "joining"
"""Counter of workers that have reached the store and are about to open the group."""

BUCKET_TIMEOUT_S = 10.0
"""For one broadcast, which begins when every rank stands ready. A peer that dies in the middle of a payload goes
unnoticed by gloo until this has passed, and the engine stands still as long."""

_POLL_S = 0.002


def bucket_counter(sequence: int) -> str:
    """Counter of workers that stand ready to receive bucket number `sequence` of this group."""
    return f"bucket/{sequence}"


def host_store(address: str, *, timeout_s: float) -> TCPStore:
    """Open the store that the engines will look for, on a free port of this host."""
    return TCPStore(address, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def reach_store(address: str, port: int, *, timeout_s: float) -> TCPStore:
    """Connect to the trainer's store."""
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def open_group(store: TCPStore, *, rank: int, world_size: int, address: str, timeout_s: float) -> ProcessGroupGloo:
    """Open the gloo group. Returns when all ranks are in it; none of its operations outlasts `timeout_s`.

    Args:
        address: of this host, as the other ranks can reach it.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default device is whatever the host's name resolves to: often nothing that others reach.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupGloo(store, rank, world_size, options)


def broadcast(group: ProcessGroupGloo, buffer: torch.Tensor, *, timeout_s: float) -> Work:
    """Send the buffer from rank 0, or fill it on any other rank. `wait()` on what is returned."""
    timeout = timedelta(seconds=min(timeout_s, BUCKET_TIMEOUT_S))
    return group.broadcast(buffer, 0, timeout)  # type: ignore[attr-defined,no-any-return]


def wait_for_count(store: TCPStore, counter: str, count: int, *, deadline: float, check: Callable[[], None]) -> None:
    """Wait until `counter` stands at `count`, calling `check` meanwhile, which raises when all hope is gone.

    Raises:
        TimeoutError: `time.monotonic()` passed `deadline`.
    """
    while (arrived := store.add(counter, 0)) < count:
        check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{arrived} of {count} inference workers came to {counter!r} in time")
        time.sleep(_POLL_S)


def local_address_towards(host: str) -> str:
    """Return the address of this machine that `host` sees: that of the interface which leads there."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route and sends nothing
        return str(probe.getsockname()[0])
