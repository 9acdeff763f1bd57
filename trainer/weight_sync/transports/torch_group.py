"""A process group with peers that open theirs by torch's own `tcp://` rendezvous, as SGLang does. This side is rank 0.

The group is known to nobody but its owner: it is none of torch.distributed's, so the trainer's default group is as before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Literal, TypeAlias

import torch
from torch._C._distributed_c10d import Backend
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work  # type: ignore[attr-defined]

GroupBackend: TypeAlias = Literal["gloo", "nccl"]

_FIRST_DEVICE = {"gloo": "cpu", "nccl": "cuda"}
"""torch keeps a backend's keys under the first device type that it serves."""


def begin_to_open(
    port: int, *, backend: GroupBackend, group_name: str, world_size: int, address: str, timeout_s: float
) -> Future[Backend]:
    """Open the group in a thread of its own. It ends when all ranks are there, after `timeout_s`, or with the store.

    Over gloo the group is there when all ranks are in it; over NCCL they meet in the first broadcast.

    Args:
        port: of the store that is hosted here.
        address: of this host, as the other ranks can reach it.
    Returns:
        The group; RuntimeError: not all ranks came.
    """
    limit = timedelta(seconds=timeout_s)
    outcome: Future[Backend] = Future()

    def run() -> None:
        try:
            # A connection of its own: who drops the hosted store thereby ends every rank's wait, this one's too.
            store = TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
            # The peers' keys: a prefix by whoever made the store, then torch's own for the group and the device.
            keys = PrefixStore(f"{group_name}/", PrefixStore(group_name, store))
            keys = PrefixStore(f"{_FIRST_DEVICE[backend]}/", keys)
            open_rank_0 = _open_gloo if backend == "gloo" else _open_nccl
            outcome.set_result(open_rank_0(keys, world_size, address, limit))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="weight-sync-meet", daemon=True).start()
    return outcome


def broadcast(group: Backend, buffer: torch.Tensor, *, timeout_s: float) -> Work:
    """Begin to send the buffer from rank 0. Over gloo it fails after `timeout_s`; over NCCL only `bury` ends it."""
    return group.broadcast(buffer, 0, timedelta(seconds=timeout_s))  # type: ignore[attr-defined,no-any-return]


def bury(group: Backend, in_flight: Sequence[Work]) -> None:
    """Close the group when nothing is in flight any more. Returns at once: a gloo operation cannot be called off."""

    def end() -> None:
        # Freeing a group waits for its operations with the interpreter's lock held, so they end first.
        for work in in_flight:
            with suppress(RuntimeError):
                group.abort()
                work.wait()

    threading.Thread(target=end, name="weight-sync-bury", daemon=True).start()


def drop_later(store: TCPStore, *, after_s: float) -> None:
    """Close the store when those who are on their way to it have come: who finds it closed knocks for half an hour."""
    timer = threading.Timer(after_s, id, [store])
    timer.daemon = True
    timer.start()


def _open_gloo(keys: PrefixStore, world_size: int, address: str, limit: timedelta) -> Backend:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default device is whatever the host's name resolves to: often nothing that others reach.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    return ProcessGroupGloo(keys, 0, world_size, options)


def _open_nccl(keys: PrefixStore, world_size: int, _address: str, limit: timedelta) -> Backend:
    # Absent from a torch without CUDA.
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = limit
    return ProcessGroupNCCL(keys, 0, world_size, options)
