"""Whole versions on a disk that the servers share: any stock vLLM or SGLang can load them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl
from trainer.weight_sync.errors import ForeignWeightsError, ServerSyncError, WeightSyncError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import Member, NamedWeights, post, require_time, settle
from trainer.weight_sync.transports.files import Stamps, VersionFolders, check_folder, copy_files, stamps
from trainer.weight_sync.transports.safetensors_file import FileRecord, tensor_shapes, write_model

log = logging.getLogger(__name__)

_SHARD_BYTES = 2 * 2**30
# A load that broke off leaves tensors behind in its last layer. They spoil the next load, which fails or mixes them in, and
# are gone in the one after: only two in a row that succeed are sure.
_MOST_RELOADS = 3
# What a model folder may hold besides its configuration, tokenizer and chat template.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".md")


@dataclass
class DiskShipment:
    """A version on disk, for every attempt to send it."""

    folder: Path
    weight_version: str
    stamps: Stamps
    """As its files were when they were written."""
    loaded: set[str] = field(default_factory=set)
    """URLs of the servers that have it since an earlier attempt."""


class DiskTransport:
    """Writes a Hugging Face folder while the engines generate, and tells the paused servers to load it. See Transport.

    Args:
        calls: runs the HTTP calls. One thread for each server at least.
        folder: every server sees it under the same path.
        keep: versions that stay there, at least 2.
        dtype: that floating-point weights are converted to, the servers' own.
        model_folder: of the model that the servers were started with, or its name on the Hub.
        shard_bytes: of one file.
    """

    def __init__(
        self,
        calls: ThreadPoolExecutor,
        *,
        folder: Path,
        keep: int,
        dtype: torch.dtype,
        model_folder: str,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._calls = calls
        self._versions = VersionFolders(folder.absolute(), keep=keep)
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._model_folder = local_model_folder(model_folder)
        self._shapes = tensor_shapes(self._model_folder)
        self._members: list[Member] = []

    def prepare(self, weights: NamedWeights, weight_version: str) -> DiskShipment:
        """Write the version.

        Raises:
            DiskFullError: there is no room for it. Earlier versions stay whole.
            ForeignWeightsError: these are weights of another model.
        """

        def fill(folder: Path) -> tuple[Mapping[str, FileRecord], int]:
            files, tensors = write_model(
                folder,
                of_this_model(weights, self._shapes, self._model_folder),
                dtype=self._dtype,
                shard_bytes=self._shard_bytes,
            )
            return {**files, **copy_files(self._model_folder, folder, companions(self._model_folder))}, tensors

        start = time.monotonic()
        needed_bytes = self._dtype.itemsize * sum(map(prod, self._shapes.values()))
        folder = self._versions.write(weight_version, fill, needed_bytes=needed_bytes)
        log.info("wrote %s in %.2f s", folder, time.monotonic() - start)
        return DiskShipment(folder, weight_version, stamps(folder))

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. There is nothing to open: remember whom to tell."""
        self._members = list(members)

    def send(self, shipment: DiskShipment, *, timeout_s: float) -> None:
        """See Transport.send.

        A server that cannot load the version loads the one again that it had.

        Raises:
            CorruptWeightsError: the files are not those that were written. No server was told to load them.
        """
        deadline = time.monotonic() + timeout_s
        # Reading all of it again would prolong the pause; who changes a file changes its stamps.
        if stamps(shipment.folder) != shipment.stamps:
            check_folder(shipment.folder)
        require_time(deadline, Edge.SEND)
        members = {member.control.url: member for member in self._members if not _has_it(member, shipment)}

        def load(control: EngineControl) -> None:
            try:
                control.load_folder(str(shipment.folder), shipment.weight_version, timeout_s=time_left(deadline))
            except ServerSyncError as error:
                fate = self._bring_back(members[control.url], deadline)
                raise ServerSyncError(control.url, Edge.SEND, f"{error.reason}; {fate}") from error
            shipment.loaded.add(control.url)

        settle(post(self._calls, members.values(), load), deadline=deadline, edge=Edge.SEND)

    def leave(self) -> None:
        """See Transport.leave."""
        self._members = []

    def _bring_back(self, member: Member, deadline: float) -> str:
        """Make a server whole again that stopped in the middle of loading, and say what became of it.

        vLLM leaves the layers that it has not come to without weights; the first step with those ends the engine.
        """
        control, version = member.control, member.weight_version
        if control.engine != "vllm":
            return f"it runs version {version} as before"
        known = self._model_folder if version == UNKNOWN_VERSION else self._versions.path(version)
        problem = ""
        in_a_row = 0
        for _ in range(_MOST_RELOADS):
            if time.monotonic() > deadline:
                # It is resumed about now; a load must not begin under requests that run.
                return f"no time was left to bring version {version} back: restart it"
            try:
                control.load_folder(str(known), version, timeout_s=time_left(deadline))
                in_a_row += 1
            except ServerSyncError as error:
                problem, in_a_row = error.reason, 0
            if in_a_row == 2:
                return f"it runs version {version} again"
        return f"it could not go back to version {version} either ({problem}): restart it"


def local_model_folder(model_folder: str) -> Path:
    """Return where the model's files are on this machine.

    Raises:
        WeightSyncError: neither a folder, nor in the cache of the Hugging Face Hub.
    """
    if Path(model_folder).is_dir():
        return Path(model_folder).absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_folder, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise WeightSyncError(
            f"model {model_folder!r} is neither a folder nor in the Hub's cache on this machine; "
            "the transport copies its configuration and tokenizer from there: download it, or correct the path"
        ) from error


def companions(model_folder: Path) -> list[str]:
    """Name the files that make weights a model folder: configuration, tokenizer, chat template, code."""
    return sorted(
        path.name
        for path in model_folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED)
    )


def of_this_model(
    weights: NamedWeights, shapes: Mapping[str, tuple[int, ...]], model_folder: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on that are the model's own.

    A server that meets a foreign tensor half way has lost the old weights already, so it is found here.

    Args:
        shapes: of the model's tensors; none are known when its folder holds no safetensors.

    Raises:
        ForeignWeightsError: the model has no tensor of that name, or one of another shape.
    """
    missing = set(shapes)
    for name, tensor in weights:
        if shapes and name not in shapes:
            raise ForeignWeightsError(name, "is unknown", str(model_folder))
        if shapes and shapes[name] != tuple(tensor.shape):
            problem = f"has shape {list(tensor.shape)} instead of {list(shapes[name])}"
            raise ForeignWeightsError(name, problem, str(model_folder))
        missing.discard(name)
        yield name, tensor
    if missing:
        log.warning(
            "servers keep what they have of %d tensors that are not published: %s", len(missing), _some(missing)
        )


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _has_it(member: Member, shipment: DiskShipment) -> bool:
    return member.control.url in shipment.loaded and member.weight_version == shipment.weight_version
