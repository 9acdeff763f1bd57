"""From an author's group to the wire's: what may be sent, and how each column comes about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.server_handling.sessions.provenance import Origin, sequence_key
from atroposlib.errors import GroupFormatError
from atroposlib.type_definitions import MASKED, ScoredDataGroup, VersionRuns
from atroposlib.wire.columns import Group
from atroposlib.wire.layout import NOT_SAMPLED, PADDING_LOGPROB
from atroposlib.wire.packing import packed

MAX_LOGPROB = 1e-3
"""Nats; above 0 by more than rounding no token was sampled: 1.0 marks those that were not."""


def drop_reason(group: ScoredDataGroup, config: BaseEnvConfig, *, max_token_len: int) -> str | None:
    """Why this group must not be sent; None when it may.

    Args:
        max_token_len: tokens of the longest sequence the trainer accepts; -1 for no limit.
    """
    n = len(group["tokens"])
    if n == 0:
        return "empty"
    if not is_sft(group):
        expected = (group.get("group_overrides") or {}).get("group_size", config.group_size)
        if n != expected and not (config.min_valid_per_group and config.min_valid_per_group <= n < expected):
            return "wrong_size"
        if config.ensure_scores_are_not_same and len(set(group["scores"])) == 1:
            return "zero_variance"
    if 0 < max_token_len < max(len(tokens) for tokens in group["tokens"]):
        return "too_long"
    return None


def is_sft(group: ScoredDataGroup) -> bool:
    """Whether the group is supervised data, which has no other sequences to be scored against."""
    if (group.get("group_overrides") or {}).get("sft"):
        return True
    overrides: Sequence[Any] = group.get("overrides") or ()
    return bool(overrides) and all(isinstance(row, dict) and bool(row.get("sft")) for row in overrides)


def finish_reasons(group: ScoredDataGroup, origins: Mapping[bytes, Sequence[Origin]]) -> list[str]:
    """Why each sequence ended, as the environment or else the engine says; "" where neither does."""
    given = group.get("finish_reasons")
    if given:
        return list(given)
    known = _origins_of(map(sequence_key, group["tokens"]), origins) if origins else ()
    return [origin.finish_reason if origin else "" for origin in known]


def wire_group(
    group: ScoredDataGroup,
    *,
    group_id: str,
    env_id: int,
    run_id: str,
    ticket: str | None,
    origins: Mapping[bytes, Sequence[Origin]],
    fallback_version: int,
) -> Group:
    """The group as columns. What the author left out is taken from the engine's own report of each sequence.

    Args:
        origins: what managed sessions reported while this group was made, by token ids.
        fallback_version: for trained tokens that no engine reported (hand-made ones): nothing older can be meant.
    Raises:
        GroupFormatError: columns do not fit, or trained tokens have no logprobs.
    """
    sequences = group["tokens"]
    keys = [sequence_key(sequence) for sequence in sequences]
    known = _origins_of(keys, origins)
    lengths = [len(sequence) for sequence in sequences]
    tokens_T = np.frombuffer(b"".join(keys), dtype=np.int32)
    labels_T = _aligned("masks", group["masks"], lengths, np.int32)
    is_trained_T = labels_T != MASKED
    reasons = finish_reasons(group, origins)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    return Group(
        group_id=group_id,
        env_id=env_id,
        run_id=run_id,
        tokens=tokens_T,
        cu_seqlens=cu_seqlens,
        loss_mask=is_trained_T.astype(np.uint8),
        inference_logprobs=_logprobs(group, known, lengths, is_trained_T),
        policy_versions=_version_runs(group, known, lengths, is_trained_T, fallback_version),
        scores=np.array(group["scores"], dtype=np.float64),
        ticket=ticket,
        finish_reasons=tuple(reasons) if all(reasons) else (),
        # Only where the author's masks say something that a 0/1 mask cannot: labels other than the tokens themselves.
        labels=labels_T if np.any(is_trained_T & (labels_T != tokens_T)) else None,
        advantages=_advantages(group, lengths),
        ref_logprobs=_aligned("ref_logprobs", group.get("ref_logprobs"), lengths, np.float32),
        distill_token_ids=_candidates(group.get("distill_token_ids"), np.int32, padding=0),
        distill_logprobs=_candidates(group.get("distill_logprobs"), np.float32, padding=PADDING_LOGPROB),
        messages=group.get("messages"),
        generation_params=group.get("generation_params"),
        overrides=group.get("overrides"),
        group_overrides=group.get("group_overrides"),
        images=group.get("images"),
    )


def _origins_of(keys: Iterable[bytes], origins: Mapping[bytes, Sequence[Origin]]) -> list[Origin | None]:
    """Of each sequence. Identical ones get theirs in the order of sampling; where there are too few, the last again."""
    taken: Counter[bytes] = Counter()
    known: list[Origin | None] = []
    for key in keys:
        candidates = origins.get(key)
        known.append(candidates[min(taken[key], len(candidates) - 1)] if candidates else None)
        taken[key] += 1
    return known


def _logprobs(
    group: ScoredDataGroup, known: Sequence[Origin | None], lengths: Sequence[int], is_trained_T: npt.NDArray[np.bool_]
) -> Any:
    """[T] the engine's logprobs where a token is trained, 0.0 elsewhere; None when they are known of no sequence."""
    given: Sequence[Sequence[float] | None]
    given = group.get("inference_logprobs") or [origin.logprobs if origin else None for origin in known]
    if all(row is None for row in given):
        return None
    for i, (row, length) in enumerate(zip(given, lengths, strict=True)):
        if row is None or len(row) != length:
            raise GroupFormatError(
                f"sequence {i}: {0 if row is None else len(row)} inference_logprobs for {length} tokens; sample with "
                "self.server.managed_server(...) and pass each node's tokens unchanged, or set group['inference_logprobs']"
            )
    logprobs_T: npt.NDArray[np.float32] = np.where(is_trained_T, _flat(given, np.float32), np.float32(0.0))
    if logprobs_T.size and float(logprobs_T.max()) > MAX_LOGPROB:
        where = int(np.searchsorted(np.cumsum(lengths), int(logprobs_T.argmax()), side="right"))
        raise GroupFormatError(
            f"sequence {where} trains a token with the logprob {float(logprobs_T.max()):g}: the engine did not sample it; "
            "mask it (prompt and few-shot turns are not the policy's), or give its inference_logprobs"
        )
    return logprobs_T


def _version_runs(
    group: ScoredDataGroup,
    known: Sequence[Origin | None],
    lengths: Sequence[int],
    is_trained_T: npt.NDArray[np.bool_],
    fallback: int,
) -> Any:
    """[R, 2] runs, none of which spans two sequences, in which every trained token has a version."""
    given: Sequence[VersionRuns | None] = group.get("policy_versions") or [
        origin.versions if origin else None for origin in known
    ]
    for runs, length in zip(given, lengths, strict=True):
        if runs is not None and (covered := sum(run_length for _, run_length in runs)) != length:
            raise GroupFormatError(f"policy_versions cover {covered} tokens of {length}")
    reported = [runs or [(NOT_SAMPLED, length)] for runs, length in zip(given, lengths, strict=True)]
    versions, run_lengths = np.array(list(chain.from_iterable(reported)), dtype=np.int32).reshape(-1, 2).T
    versions_T = np.repeat(versions, run_lengths)
    versions_T[is_trained_T & (versions_T == NOT_SAMPLED)] = fallback
    is_start_T = np.empty(len(versions_T), dtype=np.bool_)
    np.not_equal(versions_T[1:], versions_T[:-1], out=is_start_T[1:])
    is_start_T[np.cumsum([0, *lengths[:-1]])] = True
    starts = np.flatnonzero(is_start_T)
    return np.stack([versions_T[starts], np.diff(starts, append=len(versions_T))], axis=1).astype(np.int32)


def _aligned(name: str, rows: Sequence[Sequence[Any]] | None, lengths: Sequence[int], dtype: type[np.generic]) -> Any:
    """[T] a column whose every row has its sequence's length; None where there is none."""
    if rows is None or len(rows) == 0:
        return None
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(row) != length:
            raise GroupFormatError(f"sequence {i}: {len(row)} {name} for {length} tokens")
    return _flat(rows, dtype)


def _advantages(group: ScoredDataGroup, lengths: Sequence[int]) -> Any:
    """[T]; one number a sequence, bare or alone in a list, stands for all its tokens."""
    rows: Sequence[Any] | None = group.get("advantages")
    if rows is None or len(rows) == 0:
        return None
    spread: list[Any] = [
        np.full(length, np.reshape(row, -1)[0]) if np.size(row) == 1 else row
        for row, length in zip(rows, lengths, strict=True)
    ]
    return _aligned("advantages", spread, lengths, np.float32)


def _candidates(rows: Any, dtype: type[np.generic], *, padding: float) -> Any:
    """[T, K] one row a position; positions with fewer candidates are padded. None where there are none."""
    if not rows:
        return None
    positions = [position for row in rows for position in row]
    table = np.full((len(positions), max(map(len, positions), default=0)), padding, dtype=dtype)
    for i, position in enumerate(positions):
        table[i, : len(position)] = position
    return table


def _flat(rows: Any, dtype: type[np.generic]) -> Any:
    """Rows end to end; None where there are none."""
    if not rows:
        return None
    if all(type(row) is list for row in rows):
        typecode = np.dtype(dtype).char
        return np.frombuffer(b"".join([packed(row, typecode) for row in rows]), dtype=dtype)
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows])
