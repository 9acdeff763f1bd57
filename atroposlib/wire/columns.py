"""The column encoding of a group: one safetensors blob, self-delimiting, checked in place.

A request or a batch is simply blobs one after another. The server reads the small header and never decodes,
copies or re-encodes the payload.

Shapes: N sequences in the group, T tokens in all, R version runs, K candidates kept for distillation.
"""

from __future__ import annotations

import math
import secrets
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as safetensors_save

from atroposlib.errors import GroupFormatError
from atroposlib.wire.layout import (
    COLUMNS,
    DTYPES,
    MAX_HEADER_BYTES,
    NOT_SAMPLED,
    WIRE_VERSION,
    Float32,
    Float64,
    GroupHeader,
    Int32,
    UInt8,
)
from atroposlib.wire.validation import validate


@dataclass(frozen=True, kw_only=True)
class Group:
    """The trajectories of one item, scored against each other, laid end to end."""

    group_id: str
    """Made by the sender; a repeated id is answered as a duplicate."""
    env_id: int
    tokens: Int32
    """[T] prompt, completion and environment tokens of every sequence, in order."""
    cu_seqlens: Int32
    """[N+1] where each sequence starts; the last entry is T."""
    loss_mask: UInt8
    """[T] 1 where the policy sampled the token."""
    policy_versions: Int32
    """[R, 2] runs of (policy version, length) that cover the T tokens; NOT_SAMPLED for prompt tokens."""
    scores: Float64
    """[N] rewards."""
    inference_logprobs: Float32 | None = None
    """[T] nats, under the policy that sampled; 0.0 where loss_mask is 0. None only from old clients that send none."""
    advantages: Float32 | None = None
    """[T] when the environment computes its own."""
    ref_logprobs: Float32 | None = None
    labels: Int32 | None = None
    """[T] only where an old client's masks say something that loss_mask cannot."""
    distill_token_ids: Int32 | None = None
    distill_logprobs: Float32 | None = None
    run_id: str | None = None
    """The run this group was made for (RunInfo.run_id); another run's group is retired. None: whichever run is open."""
    ticket: str | None = None
    """The admission ticket this group was started with."""
    finish_reasons: tuple[str, ...] = ()
    """One a sequence: stop, length, abort, tool_calls; empty when the engine did not say."""
    messages: Any = None
    generation_params: Mapping[str, Any] | None = None
    overrides: Sequence[Mapping[str, Any] | None] | None = None
    group_overrides: Mapping[str, Any] | None = None
    images: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other header facts of the sender, kept as they came."""

    @property
    def n_sequences(self) -> int:
        """Number of trajectories, N."""
        return len(self.cu_seqlens) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens of all trajectories, T."""
        return len(self.tokens)

    @property
    def version_range(self) -> tuple[int, int] | None:
        """Oldest and newest policy version that sampled a token; None when the sender does not know."""
        sampled = self.policy_versions[self.policy_versions[:, 0] != NOT_SAMPLED, 0]
        return (int(sampled.min()), int(sampled.max())) if len(sampled) else None

    def versions_per_token(self) -> Int32:
        """[T] the policy version of each token, NOT_SAMPLED where nobody sampled it."""
        return np.repeat(self.policy_versions[:, 0], self.policy_versions[:, 1]).astype(np.int32, copy=False)


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct, frozen=True):
    """What stands under __metadata__."""

    group: str
    """The JSON text of a GroupHeader."""


_RAW_HEADER = msgspec.json.Decoder(
    msgspec.defstruct(
        "RawHeader",
        [("metadata", _Metadata), *((name, TensorEntry | None, None) for name in COLUMNS)],
        rename={"metadata": "__metadata__"},
        forbid_unknown_fields=True,
        frozen=True,
    )
)
_GROUP_HEADER = msgspec.json.Decoder(GroupHeader)
_LENGTH = struct.Struct("<Q")
_EXPECTED = {name: (column.dtype, DTYPES[column.dtype], len(column.shape)) for name, column in COLUMNS.items()}

_HEADER_FIELDS = (
    "run_id",
    "ticket",
    "finish_reasons",
    "messages",
    "generation_params",
    "overrides",
    "group_overrides",
    "images",
    "extra",
)


def encode_group(group: Group) -> bytes:
    """One safetensors blob. The header metadata is a single JSON text under the key ``group``.

    Raises:
        GroupFormatError: a header fact is no JSON, or a column no numbers of its type; read_blobs checks the rest.
    """
    versions = group.version_range
    header = GroupHeader(
        group_id=group.group_id,
        env_id=group.env_id,
        wire_version=WIRE_VERSION,
        oldest_version=versions[0] if versions else None,
        newest_version=versions[1] if versions else None,
        **{name: getattr(group, name) for name in _HEADER_FIELDS},
    )
    columns = {name: _column(group, name) for name in COLUMNS if getattr(group, name) is not None}
    blob: bytes = safetensors_save(columns, metadata={"group": _header_text(header)})
    return blob


def _column(group: Group, name: str) -> npt.NDArray[Any]:
    tag, dtype, _ = _EXPECTED[name]
    try:
        return np.ascontiguousarray(getattr(group, name), dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise GroupFormatError(f"group {group.group_id!r}: column {name!r} must hold {tag} numbers: {error}") from error


def _header_text(header: GroupHeader) -> str:
    try:
        return _JSON.encode(header).decode()
    except _NO_JSON as error:
        raise GroupFormatError(
            f"group {header.group_id!r}: {_first_without_json(header)!r} must hold JSON values: {error}"
        ) from error


def _first_without_json(header: GroupHeader) -> str:
    """The field that a header cannot be encoded for."""
    for name in header.__struct_fields__:
        try:
            _JSON.encode(getattr(header, name))
        except _NO_JSON:
            return name
    return "header"


def _plain(value: Any) -> Any:
    """What JSON has for numpy's values: authors compute with them, and put them into overrides."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is none")


_JSON = msgspec.json.Encoder(enc_hook=_plain)
_NO_JSON = (TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Blob:
    """A checked view of one encoded group: header read, columns mapped, nothing copied."""

    header: GroupHeader
    columns: Mapping[str, npt.NDArray[Any]]
    data: memoryview
    """The whole blob, header included: what is stored and sent on."""

    @property
    def n_sequences(self) -> int:
        """Number of trajectories, N."""
        return len(self.columns["cu_seqlens"]) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens of all trajectories, T."""
        return len(self.columns["tokens"])

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest trajectory."""
        starts: list[int] = self.columns["cu_seqlens"].tolist()
        return max(end - start for start, end in pairwise(starts))


def read_blobs(body: bytes | memoryview) -> Iterator[Blob]:
    """Walk over blobs laid one after another, checking each whole.

    Raises:
        GroupFormatError: truncated body, lying header, missing, ragged or non-finite column.
    """
    view = memoryview(body)
    position = 0
    while position < len(view):
        blob = _read_blob(view[position:])
        yield blob
        position += len(blob.data)


def _read_blob(view: memoryview) -> Blob:
    """The blob at the start of the view."""
    raw, start = _raw_header(view)
    try:
        header = _GROUP_HEADER.decode(raw.metadata.group)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise GroupFormatError(f"group metadata: {error}") from error
    if header.wire_version > WIRE_VERSION:
        raise GroupFormatError(
            f"group {header.group_id!r} has wire_version {header.wire_version}; this server reads up to {WIRE_VERSION}: update it"
        )
    entries = {name: entry for name in COLUMNS if (entry := getattr(raw, name)) is not None}
    size = start + _tiled_bytes(entries, view, start)
    data = view[:size]
    columns = {name: _map_column(data, start, name, entry) for name, entry in entries.items()}
    validate(header, columns)
    return Blob(header=header, columns=columns, data=data)


def _raw_header(view: memoryview) -> tuple[Any, int]:
    """Parse the JSON header; returns it with the offset at which column data starts."""
    if len(view) < 8:
        raise GroupFormatError(f"a blob starts with 8 bytes of header length; only {len(view)} bytes are left")
    (length,) = _LENGTH.unpack_from(view)
    if length > MAX_HEADER_BYTES:
        raise GroupFormatError(
            f"header length {length} is over the limit of {MAX_HEADER_BYTES} bytes; is this a safetensors blob?"
        )
    if 8 + length > len(view):
        raise GroupFormatError(f"header promises {length} bytes but {len(view) - 8} are there; send whole blobs")
    text = view[8 : 8 + length]
    try:
        header = _RAW_HEADER.decode(text)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise GroupFormatError(
            f"blob header is not the safetensors header of a group: {error}; known columns: {', '.join(COLUMNS)}"
        ) from error
    # A JSON parser keeps the last of two equal keys. Quotes inside the metadata text are escaped, so this counts tensors.
    n_tensors = sum(getattr(header, name) is not None for name in COLUMNS)
    stated = bytes(text).count(b'"data_offsets"')
    if stated != n_tensors:
        raise GroupFormatError(
            f"blob header names {stated} tensors but only {n_tensors} differ: a column is there twice"
        )
    return header, 8 + length


def _tiled_bytes(entries: Mapping[str, TensorEntry], view: memoryview, start: int) -> int:
    """Bytes of column data; columns must lie side by side, with neither gaps nor overlaps."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets[0] != end or entry.data_offsets[1] < end:
            raise GroupFormatError(
                f"column {name!r} has data_offsets {list(entry.data_offsets)}, expected to start at {end}: columns lie side by side"
            )
        end = entry.data_offsets[1]
    if start + end > len(view):
        raise GroupFormatError(
            f"body ends inside a blob: its header promises {start + end} bytes, {len(view)} are there; send whole blobs"
        )
    return end


def _map_column(data: memoryview, start: int, name: str, entry: TensorEntry) -> npt.NDArray[Any]:
    tag, dtype, rank = _EXPECTED[name]
    if entry.dtype != tag:
        raise GroupFormatError(f"column {name!r} has dtype {entry.dtype}, expected {tag}")
    (begin, end), shape = entry.data_offsets, entry.shape
    count = math.prod(shape)
    if len(shape) != rank or min(shape) < 0 or end - begin != count * dtype.itemsize:
        raise GroupFormatError(
            f"column {name!r}: shape {list(shape)} of {tag} does not fit data_offsets {[begin, end]}"
            f" or the expected shape {list(COLUMNS[name].shape)}"
        )
    column: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
    return column if rank == 1 else column.reshape(shape)


def decode_group(blob: Blob) -> Group:
    """The group behind a checked view; its arrays map the blob's memory."""
    facts: dict[str, Any] = {name: getattr(blob.header, name) for name in _HEADER_FIELDS} | dict(blob.columns)
    return Group(group_id=blob.header.group_id, env_id=blob.header.env_id, **facts)


def decode_groups(body: bytes | memoryview) -> list[Group]:
    """Every group of a body of blobs, in order.

    Raises:
        GroupFormatError: as read_blobs.
    """
    return [decode_group(blob) for blob in read_blobs(body)]


def new_group_id() -> str:
    """32 hex digits: 12 of the time in milliseconds, then 80 random bits. Ids that rise keep a server's index compact."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def build_group(
    *,
    group_id: str,
    env_id: int,
    tokens: Sequence[Sequence[int]],
    loss_masks: Sequence[Sequence[int]],
    inference_logprobs: Sequence[Sequence[float]] | None,
    versions: Sequence[Sequence[tuple[int, int]]],
    scores: Sequence[float],
    **facts: Any,
) -> Group:
    """Lay per-sequence lists end to end.

    Args:
        versions: for each sequence, runs of (policy version, length) over its tokens.
        facts: the optional columns, already flat, and the header facts of Group.
    Raises:
        GroupFormatError: lists of one sequence differ in length.
    """
    columns = [tokens, loss_masks] if inference_logprobs is None else [tokens, loss_masks, inference_logprobs]
    for i, parts in enumerate(zip(*columns, strict=True)):
        lengths = [len(part) for part in parts] + [sum(length for _, length in versions[i])]
        if len(set(lengths)) > 1:
            raise GroupFormatError(
                f"group {group_id!r}, sequence {i}: tokens, loss_mask, logprobs and versions differ in length: {lengths}"
            )
    flat = [int(token) for sequence in tokens for token in sequence]
    return Group(
        group_id=group_id,
        env_id=env_id,
        tokens=np.array(flat, dtype=np.int32),
        cu_seqlens=np.cumsum([0, *(len(sequence) for sequence in tokens)], dtype=np.int32),
        loss_mask=np.array([bit for mask in loss_masks for bit in mask], dtype=np.uint8),
        inference_logprobs=None
        if inference_logprobs is None
        else np.array([value for row in inference_logprobs for value in row], dtype=np.float32),
        policy_versions=np.array([run for runs in versions for run in runs], dtype=np.int32).reshape(-1, 2),
        scores=np.array(scores, dtype=np.float64),
        **facts,
    )


__all__ = [
    "Blob",
    "Group",
    "build_group",
    "decode_group",
    "decode_groups",
    "encode_group",
    "new_group_id",
    "read_blobs",
]
