"""Write safetensors files tensor by tensor, and read the shapes from those that are there."""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from trainer.weight_sync.transports.base import NamedWeights
from trainer.weight_sync.transports.buckets import PIECE_ITEMS, TensorSpec, plan_buckets

INDEX_NAME = "model.safetensors.index.json"

# Names of the safetensors format: https://huggingface.co/docs/safetensors
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_HEADER_ALIGNMENT_BYTES = 8
_READ_BYTES = 2**20

Shard: TypeAlias = Sequence[tuple[TensorSpec, torch.Tensor]]
"""The tensors of one file, each with what it becomes there."""


@dataclass(frozen=True)
class FileRecord:
    """What a file held when it was written."""

    size_bytes: int
    crc32: str
    """Eight hex digits. Against accidents, not against malice: it takes a third of the time of SHA-256."""


def write_model(
    folder: Path, weights: NamedWeights, *, dtype: torch.dtype, shard_bytes: int
) -> tuple[dict[str, FileRecord], int]:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index, as Hugging Face names them.

    Where `weights` makes its tensors as it goes, those of one shard are in memory. None is converted as a whole.

    Args:
        dtype: that floating-point tensors are converted to.
    Returns:
        A record of each file, and the number of tensors.
    Raises:
        OSError: for example because the disk is full.
    """
    records: list[FileRecord] = []
    shard_of: dict[str, int] = {}
    size_bytes = 0
    for shard in plan_shards(weights, dtype=dtype, capacity_bytes=shard_bytes):
        shard_of |= dict.fromkeys((spec.name for spec, _ in shard), len(records))
        size_bytes += sum(spec.size_bytes for spec, _ in shard)
        records.append(write_tensors(folder / f"shard-{len(records)}", shard))
        # The next shard is gathered before this name is bound to it.
        del shard
    # Only now is it known how many there are, which is part of their names.
    names = _shard_names(len(records))
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    files = dict(zip(names, records, strict=True))
    if len(names) > 1:
        index = {
            "metadata": {"total_size": size_bytes},
            "weight_map": {tensor: names[number] for tensor, number in shard_of.items()},
        }
        files[INDEX_NAME] = write_bytes(folder / INDEX_NAME, [json.dumps(index).encode()])
    return files, len(shard_of)


def plan_shards(weights: NamedWeights, *, dtype: torch.dtype, capacity_bytes: int) -> Iterator[Shard]:
    """Cut a stream of tensors into files of at most `capacity_bytes`; a larger tensor has one for itself."""
    held: deque[torch.Tensor] = deque()

    def specs() -> Iterator[TensorSpec]:
        for name, tensor in weights:
            held.append(tensor)
            yield spec_of(name, tensor, dtype if tensor.is_floating_point() else tensor.dtype)

    for bucket in plan_buckets(specs(), capacity_bytes=capacity_bytes):
        yield [(spec, held.popleft()) for spec in bucket.specs]


def spec_of(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """Say what the tensor becomes when it is converted to `dtype`."""
    return TensorSpec(name, str(dtype).removeprefix("torch."), tuple(tensor.shape))


def write_tensors(path: Path, shard: Shard) -> FileRecord:
    """Write one safetensors file, converting the tensors piece by piece.

    Raises:
        OSError: for example because the disk is full.
    """
    # Wide items first, as the format's own writer does: each tensor then starts at a multiple of its item size.
    shard = sorted(shard, key=lambda pair: -_dtype(pair[0]).itemsize)
    return write_bytes(path, _file_content(shard))


def write_bytes(path: Path, content: Iterator[bytes | memoryview] | Sequence[bytes | memoryview]) -> FileRecord:
    """Write a file, have it on the disk, and return its record."""
    crc32 = size_bytes = 0
    with path.open("wb") as file:
        for part in content:
            crc32 = zlib.crc32(part, crc32)
            file.write(part)
            size_bytes += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes, f"{crc32:08x}")


def record_of(path: Path) -> FileRecord:
    """Read a file and say what it holds now."""
    crc32 = size_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
            size_bytes += len(chunk)
    return FileRecord(size_bytes, f"{crc32:08x}")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the safetensors files of a folder, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _file_content(shard: Shard) -> Iterator[bytes | memoryview]:
    """Yield the header's length, the header and the tensors, without gaps."""
    # Loaders refuse a file that does not say which framework its tensors are for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end_bytes = 0
    for spec, _ in shard:
        start_bytes, end_bytes = end_bytes, end_bytes + spec.size_bytes
        header[spec.name] = {
            "dtype": _DTYPES[spec.dtype_name],
            "shape": spec.shape,
            "data_offsets": [start_bytes, end_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    yield len(text).to_bytes(8, "little")
    yield text
    for spec, tensor in shard:
        yield from _content(tensor, _dtype(spec))


def _content(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    source = tensor.detach()
    if source.device.type != "cpu":
        source = source.to(dtype).cpu()
    buffer = torch.empty(min(source.numel(), PIECE_ITEMS), dtype=dtype)
    flat = source.reshape(-1)
    for start in range(0, flat.numel(), PIECE_ITEMS):
        chunk = flat[start : start + PIECE_ITEMS]
        yield _bytes_of(buffer[: chunk.numel()].copy_(chunk))


def _bytes_of(flat: torch.Tensor) -> memoryview:
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype_name)
    return dtype


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
