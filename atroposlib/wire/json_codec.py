"""The Atropos JSON form of a group, converted once to columns and back.

Masks hold -100 where a token is not trained and its id where it is; logprobs hold 1.0 where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import NOT_SAMPLED, Group

NOT_TRAINED = -100
NO_LOGPROB = 1.0

KEYS = (
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs",
    "overrides", "group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs",
)  # fmt: skip
"""Every group that leaves in JSON carries all of these; both known trainers index them without a guard."""


class ScoredData(msgspec.Struct, kw_only=True):
    """One group as old clients post it. Unknown fields are ignored."""

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float]
    advantages: list[Any] | None = None
    """One list for each sequence, or one number for each sequence."""
    ref_logprobs: list[list[float]] | None = None
    messages: Any = None
    generation_params: dict[str, Any] | None = None
    inference_logprobs: list[list[float]] | None = None
    overrides: list[dict[str, Any] | None] | None = None
    group_overrides: dict[str, Any] | None = None
    images: Any = None
    env_id: int | None = None
    distill_token_ids: list[list[list[int]]] | None = None
    distill_logprobs: list[list[list[float]]] | None = None


def group_from_json(data: ScoredData, *, group_id: str) -> Group:
    """Columns of an old client's group. Its policy version is unknown.

    Raises:
        GroupFormatError: lists that should have one entry for each token or sequence do not.
    """
    lengths = [len(sequence) for sequence in data.tokens]
    if not lengths:
        raise GroupFormatError("tokens is empty; a group holds at least one sequence")
    for name in ("masks", "ref_logprobs", "inference_logprobs"):
        rows = getattr(data, name)
        if rows and [len(row) for row in rows] != lengths:
            raise GroupFormatError(
                f"{name} has rows of {[len(row) for row in rows][:8]} entries, tokens has {lengths[:8]}; they must be equal"
            )
    if len(data.scores) != len(lengths):
        raise GroupFormatError(f"scores has {len(data.scores)} entries, tokens has {len(lengths)} sequences")
    tokens = _flat(data.tokens, np.int32)
    masks = _flat(data.masks, np.int32)
    loss_mask = (masks != NOT_TRAINED).astype(np.uint8)
    logprobs = _flat(data.inference_logprobs, np.float32) if data.inference_logprobs else None
    return Group(
        group_id=group_id,
        env_id=data.env_id or 0,
        tokens=tokens,
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        loss_mask=loss_mask,
        inference_logprobs=None if logprobs is None else np.where(loss_mask == 1, logprobs, 0.0).astype(np.float32),
        policy_versions=np.array([[NOT_SAMPLED, len(tokens)]], dtype=np.int32),
        scores=np.array(data.scores, dtype=np.float64),
        advantages=_advantages(data.advantages, lengths),
        ref_logprobs=_flat(data.ref_logprobs, np.float32) if data.ref_logprobs else None,
        labels=masks if np.any((masks != tokens) & (loss_mask == 1)) else None,
        distill_token_ids=np.array([row for rows in data.distill_token_ids for row in rows], np.int32)
        if data.distill_token_ids
        else None,
        distill_logprobs=np.array([row for rows in data.distill_logprobs for row in rows], np.float32)
        if data.distill_logprobs
        else None,
        messages=data.messages,
        generation_params=data.generation_params,
        overrides=data.overrides,
        group_overrides=data.group_overrides,
        images=data.images,
    )


def group_to_json(group: Group) -> dict[str, Any]:
    """All 14 keys of the Atropos form, null where absent."""
    trained = group.loss_mask == 1
    labels = group.tokens if group.labels is None else group.labels
    facts: dict[str, Any] = {
        "tokens": _rows(group, group.tokens),
        "masks": _rows(group, np.where(trained, labels, NOT_TRAINED)),
        "scores": group.scores.tolist(),
        "advantages": _rows(group, group.advantages),
        "ref_logprobs": _rows(group, group.ref_logprobs),
        "inference_logprobs": None
        if group.inference_logprobs is None
        else _rows(group, np.where(trained, group.inference_logprobs.astype(np.float64), NO_LOGPROB)),
        "env_id": group.env_id,
        "distill_token_ids": _rows(group, group.distill_token_ids),
        "distill_logprobs": _rows(group, group.distill_logprobs),
    }
    return {key: facts[key] if key in facts else getattr(group, key) for key in KEYS}


def _flat(rows: Sequence[Sequence[Any]], dtype: Any) -> Any:
    try:
        return np.array([value for row in rows for value in row], dtype=dtype)
    except (OverflowError, ValueError) as error:
        raise GroupFormatError(f"a value does not fit its column: {error}") from error


def _advantages(advantages: list[Any] | None, lengths: Sequence[int]) -> Any:
    """[T] float32; one number for each sequence is spread over its tokens."""
    if not advantages:
        return None
    rows = [row if isinstance(row, list) else [row] for row in advantages]
    if [len(row) for row in rows] != list(lengths):
        if any(len(row) != 1 for row in rows) or len(rows) != len(lengths):
            raise GroupFormatError(
                f"advantages has rows of {[len(row) for row in rows][:8]} entries, tokens has {list(lengths)[:8]}"
            )
        rows = [row * length for row, length in zip(rows, lengths, strict=True)]
    return _flat(rows, np.float32)


def _rows(group: Group, column: Any) -> list[Any] | None:
    if column is None:
        return None
    return [part.tolist() for part in np.split(column, group.cu_seqlens[1:-1])]
