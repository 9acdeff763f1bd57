"""The engine's side of the delta transport, without the engine: what it holds, and what a file makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from trainer.weight_sync.engines.control import UNKNOWN_VERSION
from trainer.weight_sync.errors import DeltaBaseError
from trainer.weight_sync.transports.delta_codec import apply_in_place, read_header
from trainer.weight_sync.transports.delta_files import read_checkpoint, read_delta, read_full, stored_tensors


class DeltaReceiver:
    """Brings an engine from one version to the next. Keeps a copy of the version that it runs in host memory.

    Args:
        model_folder: what the engine was started with, and goes on from.
        load: makes the engine run these tensors, by Hugging Face names; on an error it runs the old ones, or a mixture.
    """

    def __init__(self, model_folder: Path, load: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        self._model_folder = model_folder
        self._load = load
        self._tensors: dict[str, torch.Tensor] | None = None
        self._version: str | None = UNKNOWN_VERSION

    def receive(self, path: Path, *, version: str, is_delta: bool) -> None:
        """Make the engine run the version at this path. On an error it goes on with the old one.

        Args:
            path: of a delta, or of a folder with the whole version.
        Raises:
            DeltaCorruptError: the file is not what was written.
            DeltaBaseError: it is a delta from weights that this engine does not hold.
        """
        if is_delta:
            self._receive_delta(path, version)
        else:
            self._receive_whole(path, version)

    def _receive_whole(self, path: Path, version: str) -> None:
        new = read_full(path, version=version)
        try:
            self._load(new)
        except BaseException:
            self._load_old()
            raise
        self._tensors, self._version = new, version

    def _receive_delta(self, path: Path, version: str) -> None:
        blob = read_delta(path)
        header = read_header(blob)
        if self._version != header.base_version:
            raise DeltaBaseError(expected=header.base_version, found=self._version)
        if self._tensors is None:
            specs = [tensor.spec for tensor in header.tensors]
            self._tensors = read_checkpoint(self._model_folder, specs, version=header.base_version)
        undo = apply_in_place(self._tensors, blob, base_version=header.base_version)
        try:
            self._load(self._tensors)
        except BaseException:
            undo()
            self._load_old()
            raise
        self._version = version

    def _load_old(self) -> None:
        """Load the old tensors over a mixture. Until that has worked no delta fits."""
        version, self._version = self._version, None
        self._load(self._tensors if self._tensors is not None else dict(stored_tensors(self._model_folder)))
        self._version = version
