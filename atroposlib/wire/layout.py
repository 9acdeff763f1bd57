"""What an encoded group looks like: its columns, and what its header says.

Shapes: N sequences in the group, T tokens in all, R version runs, K candidates kept for distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

WIRE_VERSION = 1
MAX_HEADER_BYTES = 64 << 20
"""Messages and images of a group are in its header."""
NOT_SAMPLED = -1
"""Policy version of tokens that no policy sampled: the prompt, tool output, templates."""

PADDING_LOGPROB = -1e9
"""Of a candidate that is not there: positions with fewer than K candidates are filled up."""

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


@dataclass(frozen=True)
class Column:
    """What one column must look like: its safetensors dtype, its shape in the letters above, whether it may be absent."""

    dtype: str
    shape: tuple[str | int, ...]
    required: bool = True


COLUMNS: Mapping[str, Column] = {
    "tokens": Column("I32", ("T",)),
    "cu_seqlens": Column("I32", ("N+1",)),
    "loss_mask": Column("U8", ("T",)),
    "inference_logprobs": Column("F32", ("T",), required=False),
    "policy_versions": Column("I32", ("R", 2)),
    "scores": Column("F64", ("N",)),
    "advantages": Column("F32", ("T",), required=False),
    "ref_logprobs": Column("F32", ("T",), required=False),
    "labels": Column("I32", ("T",), required=False),
    "distill_token_ids": Column("I32", ("T", "K"), required=False),
    "distill_logprobs": Column("F32", ("T", "K"), required=False),
}


class GroupHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the server needs to know of a group, read from the blob's header alone."""

    group_id: str
    env_id: int
    wire_version: int
    run_id: str | None = None
    ticket: str | None = None
    oldest_version: int | None = None
    newest_version: int | None = None
    finish_reasons: tuple[str, ...] = ()
    messages: Any = None
    generation_params: dict[str, Any] | None = None
    overrides: list[dict[str, Any] | None] | None = None
    group_overrides: dict[str, Any] | None = None
    images: Any = None
    extra: dict[str, Any] = {}
