"""Encode what changed between two versions of a model's weights, without loss. Pure; both sides use it.

A blob is a prefix, a header in JSON and a body. The body holds blocks of at most BLOCK_ELEMENTS elements of one tensor:
nothing where no bit changed; the new bits where that is smaller; else what delta_blocks makes of the changed elements.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.weight_sync.errors import DeltaBaseError, DeltaCorruptError
from trainer.weight_sync.transports.buckets import TensorSpec
from trainer.weight_sync.transports.delta_blocks import Bits, Encoding, decode_sparse, encode_block

BLOCK_ELEMENTS = 2**20
"""Small enough for a core's cache, large enough that its Huffman tables cost nothing."""

_PREFIX = struct.Struct("<8sII")  # magic, bytes of the header, CRC-32 of the header
_MAGIC = b"ATRDELT1"


@dataclass(frozen=True)
class TensorDelta:
    """The header's entry for one tensor."""

    spec: TensorSpec
    changed: int
    """Elements whose bits differ."""
    checksum: int
    """CRC-32 of the new tensor's bytes."""
    blocks: tuple[tuple[Encoding, int], ...]
    """Encoding and bytes of each block, in order."""


@dataclass(frozen=True)
class DeltaHeader:
    """What a blob says of itself."""

    base_version: str
    version: str
    block_elements: int
    body_bytes: int
    body_checksum: int
    tensors: tuple[TensorDelta, ...]

    @property
    def changed(self) -> int:
        """Elements whose bits differ, of all tensors."""
        return sum(tensor.changed for tensor in self.tensors)


def layout(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """Names, dtypes and shapes, in order of names."""
    return [
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in sorted(tensors.items())
    ]


def is_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether the two hold the same bits under the same names."""
    return layout(first) == layout(second) and all(
        np.array_equal(_bits(tensor), _bits(second[name])) for name, tensor in first.items()
    )


def encode_delta(
    base: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], *, base_version: str, version: str
) -> bytes:
    """Encode `new` relative to `base`: CPU tensors of the same names, dtypes and shapes.

    Raises:
        DeltaBaseError: the two do not have the same layout.
        ValueError: a dtype is none that can be transferred.
    """
    specs = layout(new)
    _check_layout(specs, base, base_version)
    entries: list[TensorDelta] = []
    body: list[bytes] = []
    for spec in specs:
        entry, blocks = _encode_tensor(spec, _bits(base[spec.name]), _bits(new[spec.name]))
        entries.append(entry)
        body += blocks
    body_checksum = 0
    for block in body:
        body_checksum = zlib.crc32(block, body_checksum)
    header = _header_to_json(
        DeltaHeader(base_version, version, BLOCK_ELEMENTS, sum(map(len, body)), body_checksum, tuple(entries))
    )
    return b"".join([_PREFIX.pack(_MAGIC, len(header), zlib.crc32(header)), header, *body])


def read_header(blob: bytes) -> DeltaHeader:
    """Parse and check the header.

    Raises:
        DeltaCorruptError: this is no delta, or not what was written.
    """
    return _open(blob)[0]


def apply_in_place(tensors: Mapping[str, torch.Tensor], blob: bytes, *, base_version: str) -> Callable[[], None]:
    """Turn contiguous CPU tensors from the base into the new version, for a fraction of what a copy of all would cost.

    Args:
        tensors: more of them than the blob names are ignored.
        base_version: what they are.
    Returns:
        What makes them the base again. It holds the old bits of all that changed.
    Raises:
        DeltaCorruptError: the blob is not what was written. Nothing has changed.
        DeltaBaseError: the blob was made from another base. Nothing has changed.
    """
    header, body = _open(blob)
    if header.base_version != base_version:
        raise DeltaBaseError(expected=header.base_version, found=base_version)
    _check_layout([entry.spec for entry in header.tensors], tensors, base_version)
    changes: list[_Change] = []

    def undo() -> None:
        for change in changes:
            change.block[change.where] = change.old

    try:
        offset = 0
        for entry in header.tensors:
            size = sum(size for _, size in entry.blocks)
            bits = _bits(tensors[entry.spec.name])
            for change in _changes(entry, bits, body[offset : offset + size], header.block_elements):
                changes.append(change)
                change.block[change.where] = change.new
            offset += size
            if zlib.crc32(bits.data) != entry.checksum:
                reason = f"tensor {entry.spec.name!r} comes out with another checksum, so its base has other values"
                raise DeltaBaseError(expected=header.base_version, found=base_version, reason=reason)
    except BaseException:
        undo()
        raise
    return undo


def _encode_tensor(spec: TensorSpec, old: Bits, new: Bits) -> tuple[TensorDelta, list[bytes]]:
    changed = 0
    described: list[tuple[Encoding, int]] = []
    written: list[bytes] = []
    for old_block, new_block in zip(_blocks(old, BLOCK_ELEMENTS), _blocks(new, BLOCK_ELEMENTS), strict=True):
        positions = np.flatnonzero(old_block != new_block)
        changed += positions.size
        encoding, data = encode_block(positions, old_block, new_block)
        described.append((encoding, len(data)))
        written.append(data)
    return TensorDelta(spec, changed, zlib.crc32(new.data), tuple(described)), written


@dataclass(frozen=True)
class _Change:
    block: Bits
    where: npt.NDArray[np.int32] | slice
    old: Bits
    new: Bits


def _changes(entry: TensorDelta, bits: Bits, data: memoryview, block_elements: int) -> Iterator[_Change]:
    offset = 0
    for block, (encoding, size) in zip(_blocks(bits, block_elements), entry.blocks, strict=True):
        part = data[offset : offset + size]
        offset += size
        if encoding is Encoding.DENSE:
            yield _Change(block, slice(None), block.copy(), np.frombuffer(part, dtype=block.dtype))
        elif encoding is Encoding.SPARSE:
            positions, steps = decode_sparse(part, block.dtype)
            old = block[positions]
            yield _Change(block, positions, old, old + steps)


def _bits(tensor: torch.Tensor) -> Bits:
    """View the elements as integers: -0.0 differs from 0.0, and a NaN equals itself."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits: Bits = flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")
    return bits


def _blocks(bits: Bits, elements: int) -> Iterator[Bits]:
    return (bits[start : start + elements] for start in range(0, bits.size, elements))


def _check_layout(specs: list[TensorSpec], base: Mapping[str, torch.Tensor], base_version: str) -> None:
    found = {spec.name: spec for spec in layout(base)}
    for spec in specs:
        if found.get(spec.name) != spec:
            reason = f"it needs {spec}, the base holds {found.get(spec.name)}"
            raise DeltaBaseError(expected=base_version, found=base_version, reason=reason)


def _open(blob: bytes) -> tuple[DeltaHeader, memoryview]:
    if len(blob) < _PREFIX.size:
        raise DeltaCorruptError(f"it has {len(blob)} bytes, fewer than its prefix of {_PREFIX.size}")
    magic, header_bytes, header_checksum = _PREFIX.unpack_from(blob)
    if magic != _MAGIC:
        raise DeltaCorruptError(f"it begins with {magic!r}, not with {_MAGIC!r}")
    body = memoryview(blob)[_PREFIX.size + header_bytes :]
    json_text = blob[_PREFIX.size : _PREFIX.size + header_bytes]
    if zlib.crc32(json_text) != header_checksum:
        raise DeltaCorruptError("its header has another checksum than was written")
    header = _header_from_json(json_text)
    if len(body) != header.body_bytes:
        raise DeltaCorruptError(f"its body has {len(body)} bytes of {header.body_bytes}")
    if zlib.crc32(body) != header.body_checksum:
        raise DeltaCorruptError("its body has another checksum than was written")
    return header, body


def _header_to_json(header: DeltaHeader) -> bytes:
    tensors = [
        {
            "name": entry.spec.name,
            "dtype": entry.spec.dtype_name,
            "shape": entry.spec.shape,
            "changed": entry.changed,
            "checksum": entry.checksum,
            "blocks": entry.blocks,
        }
        for entry in header.tensors
    ]
    fields = {
        "base_version": header.base_version,
        "version": header.version,
        "block_elements": header.block_elements,
        "body_bytes": header.body_bytes,
        "body_checksum": header.body_checksum,
        "tensors": tensors,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _header_from_json(text: bytes) -> DeltaHeader:
    fields = json.loads(text)
    tensors = [
        TensorDelta(
            TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])),
            entry["changed"],
            entry["checksum"],
            tuple((Encoding(encoding), size) for encoding, size in entry["blocks"]),
        )
        for entry in fields.pop("tensors")
    ]
    return DeltaHeader(**fields, tensors=tuple(tensors))
