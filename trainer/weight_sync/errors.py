"""Errors of weight synchronisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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


class NumericsError(WeightSyncError):
    """An inference server and the trainer give the same tokens different logprobs: training would learn from noise."""

    code = "numerics"

    def __init__(self, server: str, *, figures: str, cause: str, fix: str) -> None:
        super().__init__(
            f"inference server {server} and the trainer disagree: {figures}; most likely {cause}\nhint: {fix}"
        )
        self.server = server


class TakenOverError(ServerSyncError):
    """A server reports a version that this trainer never sent: another trainer publishes to it."""

    code = "weight_sync_taken_over"

    def __init__(self, server: str, *, found: str, expected: str) -> None:
        super().__init__(
            server,
            Edge.ATTACH,
            f"it reports version {found!r} where this trainer left {expected!r}: another trainer publishes to it; "
            "stop that trainer, or give each trainer servers of its own",
        )
        self.found = found
        self.expected = expected


class VersionOrderError(WeightSyncError):
    """A version was to be published after a newer one."""

    code = "weight_sync_version_order"

    def __init__(self, version: int, *, newest: int) -> None:
        super().__init__(
            f"version {version} cannot be published after version {newest}; versions only rise: number it "
            f"{newest + 1}, or start a new publisher to go back to older weights"
        )
        self.version = version
        self.newest = newest


class DeltaCorruptError(WeightSyncError):
    """A file of weights, whole or delta, is not what was written."""

    code = "weight_delta_corrupt"

    def __init__(self, reason: str) -> None:
        super().__init__(f"these weights are truncated or corrupt: {reason}; write them again")


class DeltaBaseError(WeightSyncError):
    """A delta was made from other weights than those that it is to be applied to."""

    code = "weight_delta_base"

    def __init__(self, *, expected: str, found: str | None, reason: str = "") -> None:
        super().__init__(
            f"the delta's base is version {expected!r}, held is version {found!r}"
            f"{': ' if reason else ''}{reason}; send the full weights"
        )
        self.expected = expected
        self.found = found


class CorruptWeightsError(WeightSyncError):
    """A file of a version on disk is not what was written."""

    code = "weight_files_corrupt"

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}; it is not loaded: find out who writes to that folder, then publish again")
        self.path = path
        self.problem = problem


class DiskFullError(WeightSyncError):
    """A version does not fit on the disk. Nothing of it is left there."""

    code = "weight_files_disk_full"

    def __init__(self, folder: Path, version: str, *, needed_bytes: int, free_bytes: int, keep: int) -> None:
        super().__init__(
            f"no room in {folder} for version {version}: it takes about {needed_bytes:,} bytes, {free_bytes:,} are free; "
            f"make room, set weight_sync.folder to another disk, or keep fewer versions (weight_sync.keep={keep}, at least 2)"
        )
        self.folder = folder
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ForeignWeightsError(WeightSyncError):
    """The weights do not belong to the model that the servers run."""

    code = "weight_sync_foreign"

    def __init__(self, name: str, problem: str, model_folder: str) -> None:
        super().__init__(
            f"tensor {name!r} {problem}, in {model_folder}; train and serve the same model, under the names of its checkpoint"
        )
        self.name = name


class AdapterError(WeightSyncError):
    """The tensors do not make a LoRA adapter of the model."""

    code = "weight_sync_adapter"

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}; publish the adapter of the model that the servers run, as peft names it")
        self.name = name
