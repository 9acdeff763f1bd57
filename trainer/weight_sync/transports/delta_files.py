"""What the delta transport puts on disk, and what it reads from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trainer.weight_sync.errors import CorruptWeightsError, DeltaBaseError, DeltaCorruptError
from trainer.weight_sync.transports.buckets import TensorSpec
from trainer.weight_sync.transports.files import VersionFolders, check_folder
from trainer.weight_sync.transports.safetensors_file import FileRecord, write_bytes, write_model

DELTA_NAME = "weights.delta"
_SHARD_BYTES = 2 * 2**30


def write_delta(versions: VersionFolders, blob: bytes, *, version: str) -> Path:
    """Write a delta and return its path.

    Raises:
        DiskFullError: there is no room for it.
        WeightSyncError: the folder cannot be written to.
    """

    def fill(folder: Path) -> tuple[Mapping[str, FileRecord], int]:
        return {DELTA_NAME: write_bytes(folder / DELTA_NAME, [blob])}, 0

    return versions.write(version, fill, needed_bytes=len(blob)) / DELTA_NAME


def write_full(
    versions: VersionFolders, tensors: Mapping[str, torch.Tensor], *, version: str, dtype: torch.dtype
) -> Path:
    """Write all tensors as safetensors and return the folder.

    Raises:
        DiskFullError: there is no room for it.
        WeightSyncError: the folder cannot be written to.
    """
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return versions.write(
        version,
        lambda folder: write_model(folder, tensors.items(), dtype=dtype, shard_bytes=_SHARD_BYTES),
        needed_bytes=needed_bytes,
    )


def read_delta(path: Path) -> bytes:
    """Read what write_delta wrote; the codec checks it.

    Raises:
        DeltaCorruptError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeltaCorruptError(f"{path}: {error.strerror}") from error


def read_full(folder: Path, *, version: str) -> dict[str, torch.Tensor]:
    """Read what write_full wrote into memory of our own: the writer may remove the files at any time.

    Raises:
        DeltaCorruptError: it cannot be read, is another version, or is not what was written.
    """
    try:
        manifest = check_folder(folder)
        tensors = {name: tensor.clone() for name, tensor in stored_tensors(folder)}
    except CorruptWeightsError as error:
        raise DeltaCorruptError(f"{error.path} {error.problem}") from error
    except (OSError, SafetensorError) as error:
        raise DeltaCorruptError(f"{folder}: {error}") from error
    if manifest.version != version:
        raise DeltaCorruptError(f"{folder} holds version {manifest.version!r} instead of {version!r}")
    return tensors


def read_checkpoint(folder: Path, specs: Sequence[TensorSpec], *, version: str) -> dict[str, torch.Tensor]:
    """Read the tensors that `specs` names from a Hugging Face folder, floating-point ones in the dtype that it says.

    Args:
        version: of these weights, for the error.
    Raises:
        DeltaBaseError: the folder has not got them.
    """
    wanted = {spec.name: getattr(torch, spec.dtype_name) for spec in specs}
    try:
        found = {
            name: tensor.to(wanted[name] if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in stored_tensors(folder)
            if name in wanted
        }
    except (OSError, SafetensorError) as error:
        raise DeltaBaseError(expected=version, found=None, reason=f"{folder}: {error}") from error
    if missing := wanted.keys() - found.keys():
        raise DeltaBaseError(expected=version, found=None, reason=f"{folder} has no tensor {min(missing)!r}")
    return found


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all safetensors files in the folder, as they are stored. They are views of the files.

    Raises:
        OSError, SafetensorError: there are no such files, or one cannot be read.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
