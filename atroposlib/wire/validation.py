"""What must hold of a group before it is kept: lengths, ranges, finiteness. A few vectorised passes; short columns in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from atroposlib.errors import GroupFormatError
from atroposlib.wire.layout import COLUMNS, NOT_SAMPLED, GroupHeader

Columns = Mapping[str, npt.NDArray[Any]]

MAX_ID_CHARACTERS = 200
REQUIRED = tuple(name for name, column in COLUMNS.items() if column.required)
LENGTHS = {name: str(column.shape[0]) for name, column in COLUMNS.items()}


def validate(header: GroupHeader, columns: Columns) -> None:
    """Check one group.

    Raises:
        GroupFormatError: names the group, the column, the value and what was expected.
    """
    try:
        _check_header(header)
        n, t = _check_lengths(columns)
        _check_sequences(columns["cu_seqlens"].tolist(), t)
        _check_ids(columns)
        _check_mask(columns["loss_mask"])
        _check_finite(columns)
        _check_versions(header, columns["policy_versions"], t)
        if header.finish_reasons and len(header.finish_reasons) != n:
            raise GroupFormatError(
                f"finish_reasons has {len(header.finish_reasons)} entries, expected one for each of {n} sequences"
            )
        if header.overrides and len(header.overrides) < n:
            raise GroupFormatError(
                f"overrides has {len(header.overrides)} entries, expected one for each of {n} sequences"
            )
    except GroupFormatError as error:
        raise GroupFormatError(f"group {header.group_id[:MAX_ID_CHARACTERS]!r}: {error}") from None


def _check_header(header: GroupHeader) -> None:
    if not 1 <= len(header.group_id) <= MAX_ID_CHARACTERS:
        raise GroupFormatError(f"group_id must have 1 to {MAX_ID_CHARACTERS} characters, has {len(header.group_id)}")


def _check_lengths(columns: Columns) -> tuple[int, int]:
    """N and T, when every column agrees on them."""
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise GroupFormatError(f"missing columns: {', '.join(missing)}")
    n, t = len(columns["scores"]), len(columns["tokens"])
    expected = {"T": t, "N": n, "N+1": n + 1}
    for name, column in columns.items():
        size = expected.get(LENGTHS[name])
        if size is not None and len(column) != size:
            raise GroupFormatError(f"column {name!r} has {len(column)} entries, expected {LENGTHS[name]} = {size}")
    if n == 0:
        raise GroupFormatError("holds no sequence; send at least one")
    return n, t


def _check_sequences(cu_seqlens: Sequence[int], t: int) -> None:
    rises = all(start < end for start, end in pairwise(cu_seqlens))
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != t or not rises:
        raise GroupFormatError(
            f"cu_seqlens must rise from 0 to T = {t} with no empty sequence, is {list(cu_seqlens[:8])}"
        )


def _check_ids(columns: Columns) -> None:
    for name in ("tokens", "distill_token_ids"):
        column = columns.get(name)
        if column is not None and column.size and (least := np.minimum.reduce(column, axis=None)) < 0:
            raise GroupFormatError(f"column {name!r} holds the negative id {int(least)}")


def _check_mask(loss_mask: npt.NDArray[Any]) -> None:
    if (greatest := np.maximum.reduce(loss_mask)) > 1:
        raise GroupFormatError(f"loss_mask must hold 0 and 1, holds {int(greatest)}")


def _check_finite(columns: Columns) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        for name, column in columns.items():
            if column.dtype.kind == "f" and (where := _first_not_finite(column)) is not None:
                raise GroupFormatError(
                    f"column {name!r} holds {column.reshape(-1)[where]} at position {where}; only finite numbers can be trained on"
                )


def _first_not_finite(column: npt.NDArray[Any]) -> int | None:
    # NaN and infinity survive a sum: a finite one clears the whole column in one fast pass.
    if math.isfinite(np.add.reduce(column, axis=None)):
        return None
    wrong = np.flatnonzero(~np.isfinite(column.reshape(-1)))
    return int(wrong[0]) if len(wrong) else None


def _check_versions(header: GroupHeader, runs: npt.NDArray[Any], t: int) -> None:
    rows: list[list[int]] = runs.tolist()
    covered, sampled = 0, set[int]()
    for row in rows:
        if len(row) != 2 or row[1] <= 0 or row[0] < NOT_SAMPLED:
            covered = -1
            break
        covered += row[1]
        sampled.add(row[0])
    if covered != t:
        raise GroupFormatError(f"policy_versions must be runs (version, length > 0) that cover T = {t} tokens")
    sampled.discard(NOT_SAMPLED)
    stated = (header.oldest_version, header.newest_version)
    actual = (min(sampled), max(sampled)) if sampled else (None, None)
    if stated != actual:
        raise GroupFormatError(f"header says versions {stated}, policy_versions say {actual}")
