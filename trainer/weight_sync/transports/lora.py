"""Only a LoRA adapter travels: a small folder that each server loads under one name, in place of the last one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import AdapterError, ServerSyncError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import Member, NamedWeights, post, require_time, settle
from trainer.weight_sync.transports.files import Stamps, VersionFolders, check_folder, stamps
from trainer.weight_sync.transports.safetensors_file import (
    FileRecord,
    spec_of,
    tensor_shapes,
    write_bytes,
    write_tensors,
)

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

Shapes = Mapping[str, tuple[int, ...]]


class AdapterControl(EngineControl, Protocol):
    """An inference server that serves adapters."""

    def adapters(self, *, timeout_s: float) -> dict[str, str]:
        """The folder that each adapter was loaded from, by the adapter's name."""

    def name_version(self, weight_version: str, *, timeout_s: float) -> None:
        """Call the weights that the server runs `weight_version`."""


@dataclass(frozen=True)
class LoraShipment:
    """An adapter on disk, for every attempt to send it."""

    folder: Path
    weight_version: str
    rank: int
    stamps: Stamps
    """As its files were when they were written."""


class LoraTransport:
    """Writes a peft folder while the engines generate, and has the paused servers load it. See Transport.

    The base model stays as it is; requests that name `adapter_name` as their model sample from the policy. A server that
    refuses an adapter keeps the last one.

    Args:
        calls: runs the HTTP calls. One thread for each server at least.
        folder: every server sees it under the same path.
        keep: versions that stay there, at least 2.
        adapter_name: that the servers serve it under.
        adapter_config: as peft saves it, `r` and `lora_alpha` among the rest. Where its `base_model_name_or_path` is a
            folder, the adapter's shapes are compared with the model's.
    """

    def __init__(
        self,
        calls: ThreadPoolExecutor,
        *,
        folder: Path,
        keep: int,
        adapter_name: str,
        adapter_config: dict[str, Any],
    ) -> None:
        self._calls = calls
        self._versions = VersionFolders(folder.absolute(), keep=keep)
        self._name = adapter_name
        self._config = adapter_config
        self._shapes = _model_shapes(adapter_config)
        self._members: list[Member] = []

    def prepare(self, weights: NamedWeights, weight_version: str) -> LoraShipment:
        """Write the adapter, its tensors under peft's names, in the dtype that they have.

        Raises:
            DiskFullError: there is no room for it. Earlier versions stay whole.
            AdapterError: the tensors do not make an adapter of this model.
        """
        shard = [(spec_of(name, tensor, tensor.dtype), tensor) for name, tensor in weights]
        rank = check_adapter({spec.name: spec.shape for spec, _ in shard}, self._config, self._shapes)
        config = json.dumps(self._config, default=_as_json, indent=1).encode()

        def fill(folder: Path) -> tuple[Mapping[str, FileRecord], int]:
            files = {
                WEIGHTS_NAME: write_tensors(folder / WEIGHTS_NAME, shard),
                CONFIG_NAME: write_bytes(folder / CONFIG_NAME, [config]),
            }
            return files, len(shard)

        needed_bytes = sum(spec.size_bytes for spec, _ in shard) + len(config)
        folder = self._versions.write(weight_version, fill, needed_bytes=needed_bytes)
        return LoraShipment(folder, weight_version, rank, stamps(folder))

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. There is nothing to open: remember whom to tell."""
        self._members = list(members)

    def send(self, shipment: LoraShipment, *, timeout_s: float) -> None:
        """See Transport.send. No engine counts adapters, so a server is told the version when it shows this adapter.

        Raises:
            CorruptWeightsError: the files are not those that were written. No server was told to load them.
        """
        deadline = time.monotonic() + timeout_s
        if stamps(shipment.folder) != shipment.stamps:
            check_folder(shipment.folder)
        require_time(deadline, Edge.SEND)
        loading = post(self._calls, self._members, lambda control: self._load(control, shipment, deadline))
        settle(loading, deadline=deadline, edge=Edge.SEND)

    def leave(self) -> None:
        """See Transport.leave."""
        self._members = []

    def _load(self, control: EngineControl, shipment: LoraShipment, deadline: float) -> None:
        server = cast(AdapterControl, control)
        folder = str(shipment.folder)
        try:
            server.load_adapter(self._name, folder, timeout_s=time_left(deadline))
        except ServerSyncError as error:
            reason = explain_refusal(error.reason, rank=shipment.rank, folder=folder)
            raise ServerSyncError(control.url, Edge.SEND, reason) from error
        found = server.adapters(timeout_s=time_left(deadline)).get(self._name)
        if found != folder:
            reason = f"it took adapter {self._name!r} from {folder}, but serves {found or 'none of that name'}"
            raise ServerSyncError(control.url, Edge.SEND, reason)
        server.name_version(shipment.weight_version, timeout_s=time_left(deadline))


def check_adapter(adapter: Shapes, config: Mapping[str, Any], model: Shapes) -> int:
    """Return the adapter's highest rank if every tensor has its partner, its rank and its place in the model.

    vLLM takes tensors of a wrong width without a word and then samples from something else.

    Args:
        adapter: shapes by peft's names: [r, in] for `lora_A`, [out, r] for `lora_B`.
        model: shapes of the model's tensors, [out, in]; empty if nobody knows them.

    Raises:
        AdapterError: naming the tensor and what is wrong with it.
    """
    if not adapter:
        raise AdapterError("the adapter", "has no tensors")
    for name in adapter:
        if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            raise AdapterError(name, f"is not called {_PREFIX}<module>{_A} or {_B}, as peft saves it")
    modules = {name.removesuffix(_A).removesuffix(_B) for name in adapter}
    return max(_rank(module, adapter, config, model) for module in sorted(modules))


def explain_refusal(reason: str, *, rank: int, folder: str) -> str:
    """Add the fix to what a server said about an adapter."""
    if limit := re.search(r"max_lora_rank (\d+)", reason):
        fix = f"start it with --max-lora-rank {rank}, or train with lora_r of at most {limit.group(1)}"
    elif "No adapter found" in reason or "No such file" in reason:
        fix = f"it does not see {folder}: put weight_sync.folder on a disk that it shares with the trainer"
    else:
        return reason
    return f"{reason}; {fix}"


def _rank(module: str, adapter: Shapes, config: Mapping[str, Any], model: Shapes) -> int:
    (rank, width), (height, rank_of_b) = _matrix(module + _A, adapter), _matrix(module + _B, adapter)
    if rank != rank_of_b:
        raise AdapterError(module, f"has rank {rank} in lora_A and {rank_of_b} in lora_B")
    if not config.get("rank_pattern") and rank != config["r"]:
        raise AdapterError(module, f"has rank {rank}, but r={config['r']} in its configuration")
    base = model.get(module.removeprefix(_PREFIX) + ".weight")
    if model and base != (height, width):
        raise AdapterError(module, f"changes a matrix [{height}, {width}], in the model it is {_shown(base)}")
    return rank


def _model_shapes(config: Mapping[str, Any]) -> Shapes:
    folder = config.get("base_model_name_or_path")
    return tensor_shapes(Path(folder)) if folder and Path(folder).is_dir() else {}


def _matrix(name: str, adapter: Shapes) -> tuple[int, int]:
    shape = adapter.get(name)
    if shape is None or len(shape) != 2:
        raise AdapterError(name, f"is to be a matrix, but is {_shown(shape)}")
    return shape[0], shape[1]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _as_json(value: object) -> object:
    """Target modules are a set in peft's configuration."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
