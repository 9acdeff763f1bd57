"""The vLLM worker's side of the delta transport. vLLM loads it through `vllm_plugin.register`.

Each worker reads the file for itself, and keeps a copy of the weights in host memory to apply the next delta to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from trainer.weight_sync.errors import WeightSyncError
from trainer.weight_sync.transports.delta_receiver import DeltaReceiver
from trainer.weight_sync.transports.disk import local_model_folder
from trainer.weight_sync.vllm_plugin.whole_model import load_whole_model


@dataclass
class DeltaInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: there is nobody to meet."""


@dataclass
class DeltaUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One version, in a file that this worker can read."""

    path: str
    version: str
    is_delta: bool


class DeltaEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads versions from files, whole ones or deltas from the version that runs."""

    init_info_cls = DeltaInitInfo
    update_info_cls = DeltaUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver = DeltaReceiver(_folder_of(self.model_config.model), self._load)

    def init_transfer_engine(self, init_info: DeltaInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: the model is touched when a whole version has been read and checked."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the version that `update_info` describes."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: DeltaUpdateInfo) -> None:
        """See DeltaReceiver.receive."""
        self._receiver.receive(Path(update_info.path), version=update_info.version, is_delta=update_info.is_delta)

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to leave. The copy stays: the engine still runs that version."""

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        load_whole_model(self.model, self.model_config, tensors.items())


def _folder_of(model: str) -> Path:
    try:
        return local_model_folder(model)
    except WeightSyncError:
        # Then the first version must come whole; that is no reason not to start.
        return Path(model)
