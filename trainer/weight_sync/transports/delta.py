"""Send what changed since the last version, through files: a server that holds that version gets the delta, any other all.

At the learning rates of RL few elements of a bfloat16 weight change in a step; benchmarks/weight_delta.py measures it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl
from trainer.weight_sync.errors import DeltaBaseError, ServerSyncError, TransferError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import Member, NamedWeights, post, require_time, settle
from trainer.weight_sync.transports.delta_codec import encode_delta, is_same, layout, read_header
from trainer.weight_sync.transports.delta_files import read_checkpoint, write_delta, write_full
from trainer.weight_sync.transports.disk import local_model_folder, of_this_model
from trainer.weight_sync.transports.files import VersionFolders
from trainer.weight_sync.transports.safetensors_file import tensor_shapes
from trainer.weight_sync.transports.stock_update import start_clean, vllm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeltaShipment:
    """A version for every attempt to send it: in host memory, and as a delta if there was a base."""

    version: str
    tensors: dict[str, torch.Tensor]
    base_version: str | None
    delta: Path | None
    delivered: set[str] = field(default_factory=set)
    """URLs of the servers that have it since an earlier attempt."""


class DeltaTransport:
    """Writes deltas while the engines generate, and tells the paused servers to apply them. See Transport.

    This process keeps a copy of the last version in host memory, and two of them while it prepares the next.

    Args:
        calls: runs the HTTP calls. One thread for each server at least.
        folder: every server sees it under the same path. One trainer at a time writes there.
        keep: deltas, and whole versions, that stay there, at least 2.
        dtype: that floating-point weights are converted to, the servers' own.
        model_folder: of the model that the servers were started with, or its name on the Hub.
    """

    def __init__(
        self, calls: ThreadPoolExecutor, *, folder: Path, keep: int, dtype: torch.dtype, model_folder: str
    ) -> None:
        self._calls = calls
        self._deltas = VersionFolders(folder.absolute() / "deltas", keep=keep)
        self._fulls = VersionFolders(folder.absolute() / "full", keep=keep)
        self._dtype = dtype
        self._model_folder = local_model_folder(model_folder)
        self._shapes = tensor_shapes(self._model_folder)
        self._last: DeltaShipment | None = None
        self._full: Path | None = None
        self._writing = threading.Lock()
        self._members: list[Member] = []
        self._failed: set[str] = set()

    def prepare(self, weights: NamedWeights, weight_version: str) -> DeltaShipment:
        """Compare the weights with those of the last version and write the difference.

        Raises:
            DiskFullError: there is no room for it.
            ForeignWeightsError: these are weights of another model.
        """
        tensors = dict(self._on_host(weights))
        last = self._last
        if last is not None and last.version == weight_version and is_same(last.tensors, tensors):
            # Once more, for a server that came late or is not trusted to have it.
            self._last = replace(last, delivered=set())
        else:
            self._last, self._full = self._compare(tensors, weight_version), None
        return self._last

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """Write the whole version if a member needs it: the engines still generate. See Transport.open.

        Raises:
            DiskFullError: there is no room for it.
            TransferError: it was not written in time.
        """
        deadline = time.monotonic() + timeout_s
        self._members = list(members)
        last = self._last
        if last is None or self._full is not None:
            return
        if all(_has_it(member, last) or self._takes_delta(member, last) for member in members):
            return
        # The thread of an attempt that was given up may still write.
        if not self._writing.acquire(timeout=time_left(deadline)):
            reason = f"version {last.version} is still being written; raise weight_sync.timeout_s"
            raise TransferError(Edge.ATTACH, reason, {})
        try:
            if self._full is None:
                self._write_full(last)
        finally:
            self._writing.release()
        require_time(deadline, Edge.ATTACH)

    def send(self, shipment: DeltaShipment, *, timeout_s: float) -> None:
        """See Transport.send. A server that fails runs its old weights, and gets a whole version next time."""
        deadline = time.monotonic() + timeout_s
        members = [member for member in self._members if not _has_it(member, shipment)]
        updates = {member.control.url: self._update_info(member, shipment) for member in members}

        def update(control: EngineControl) -> None:
            try:
                start_clean(vllm(control), deadline=deadline)
                vllm(control).update_weights(updates[control.url], timeout_s=time_left(deadline))
                vllm(control).finish_update(shipment.version, timeout_s=time_left(deadline))
            except ServerSyncError:
                self._failed.add(control.url)
                raise
            self._failed.discard(control.url)
            shipment.delivered.add(control.url)

        settle(post(self._calls, members, update), deadline=deadline, edge=Edge.SEND)

    def leave(self) -> None:
        """See Transport.leave. The whole version is written anew when it is needed: it may be what was wrong."""
        self._members = []
        self._full = None

    def _write_full(self, shipment: DeltaShipment) -> None:
        start = time.monotonic()
        path = write_full(self._fulls, shipment.tensors, version=shipment.version, dtype=self._dtype)
        log.info("version %s: wrote %s in %.2f s", shipment.version, path, time.monotonic() - start)
        if self._last is not None and self._last.tensors is shipment.tensors:
            self._full = path

    def _on_host(self, weights: NamedWeights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in of_this_model(weights, self._shapes, self._model_folder):
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            # A copy even where nothing is converted: the trainer goes on to change its own.
            yield name, tensor.detach().to("cpu", dtype, copy=True).contiguous()

    def _compare(self, tensors: dict[str, torch.Tensor], version: str) -> DeltaShipment:
        start = time.monotonic()
        try:
            base_version, base = self._base_for(tensors)
            blob = encode_delta(base, tensors, base_version=base_version, version=version)
        except DeltaBaseError as error:
            log.info("version %s goes out whole: %s", version, error)
            return DeltaShipment(version, tensors, None, None)
        path = write_delta(self._deltas, blob, version=version)
        changed, elements = read_header(blob).changed, sum(tensor.numel() for tensor in tensors.values())
        log.info(
            "version %s: %.2f %% of the elements changed since %s, %.1f MB, wrote %s in %.2f s",
            *(version, 100 * changed / elements, base_version, len(blob) / 1e6, path, time.monotonic() - start),
        )
        return DeltaShipment(version, tensors, base_version, path)

    def _base_for(self, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
        if self._last is not None:
            return self._last.version, self._last.tensors
        # Servers that nobody has sent anything to run the model's own weights.
        return UNKNOWN_VERSION, read_checkpoint(self._model_folder, layout(tensors), version=UNKNOWN_VERSION)

    def _takes_delta(self, member: Member, shipment: DeltaShipment) -> bool:
        is_at_base = shipment.delta is not None and member.weight_version == shipment.base_version
        return is_at_base and member.control.url not in self._failed

    def _update_info(self, member: Member, shipment: DeltaShipment) -> dict[str, object]:
        is_delta = self._takes_delta(member, shipment)
        path = shipment.delta if is_delta else self._full
        return {"path": str(path), "version": shipment.version, "is_delta": is_delta}


def _has_it(member: Member, shipment: DeltaShipment) -> bool:
    return member.control.url in shipment.delivered and member.weight_version == shipment.version
