"""The update session of vLLM's own engines (nccl, ipc), which a broken transfer leaves half loaded.

They take a layer's old tensors away when the session starts and load what arrives at once. So after a failure a model has
layers of both versions, and layers without any tensors, on which the next forward pass would kill the engine. Finishing the
session puts the old tensors back where nothing has arrived, and forgets what a layer has received in part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import cast

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import time_left
from trainer.weight_sync.transports.base import Member, post

_PUT_BACK_S = 5.0


def put_back_share_s(timeout_s: float) -> float:
    """Return what of a transfer's time is kept for put_back_all, should it fail."""
    return min(_PUT_BACK_S, timeout_s / 5)


def start_clean(control: VllmControl, *, deadline: float) -> None:
    """Start an update on a server that another trainer, or a failed attempt, may have left in the middle of one.

    Raises:
        ServerSyncError: the server does not start one.
    """
    put_back(control, deadline=deadline)
    control.start_update(timeout_s=time_left(deadline))


def put_back(control: VllmControl, *, deadline: float) -> None:
    """End an update so that the engine can run again, whether or not the failed one is still open.

    Raises:
        ServerSyncError: the server does not end it.
    """
    # An error in update_weights closes the session and leaves the layers as they are: finish needs a session again.
    with contextlib.suppress(ServerSyncError):
        control.start_update(timeout_s=time_left(deadline))
    control.finish_update(None, timeout_s=time_left(deadline))


def put_back_all(
    members: Iterable[Member], receiving: Mapping[str, Future[None]], calls: ThreadPoolExecutor, *, timeout_s: float
) -> None:
    """After a failure: put_back on every server that is not stuck in the transfer. Errors are no news by then."""
    deadline = time.monotonic() + timeout_s
    # Behind a call that has not come back, another would only wait.
    free = [member for member in members if (call := receiving.get(member.control.url)) is None or call.done()]
    wait(post(calls, free, lambda control: put_back(vllm(control), deadline=deadline)).values(), timeout_s)


def vllm(control: EngineControl) -> VllmControl:
    """The phases of a transfer are vLLM's own."""
    return cast(VllmControl, control)
