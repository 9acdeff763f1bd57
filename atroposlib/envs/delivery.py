"""From an author's group to the wire's: what may be sent, and how each column comes about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.server_handling.provenance import Origin, sequence_key
from atroposlib.errors import GroupFormatError
from atroposlib.type_definitions import MASKED, ScoredDataGroup, VersionRuns
from atroposlib.wire.columns import Group, build_group
from atroposlib.wire.layout import NOT_SAMPLED


def drop_reason(group: ScoredDataGroup, config: BaseEnvConfig, *, max_token_len: int) -> str | None:
    """Why this group must not be sent; None when it may.

    Args:
        max_token_len: tokens of the longest sequence the trainer accepts; -1 for no limit.
    """
    n = len(group["tokens"])
    if n == 0:
        return "empty"
    expected = (group.get("group_overrides") or {}).get("group_size", config.group_size)
    if n != expected and not (config.min_valid_per_group and config.min_valid_per_group <= n < expected):
        return "wrong_size"
    if config.ensure_scores_are_not_same and len(set(group["scores"])) == 1:
        return "zero_variance"
    if 0 < max_token_len < max(len(tokens) for tokens in group["tokens"]):
        return "too_long"
    return None


def wire_group(
    group: ScoredDataGroup,
    *,
    group_id: str,
    env_id: int,
    run_id: str,
    ticket: str | None,
    origins: Mapping[bytes, Origin],
    fallback_version: int,
) -> Group:
    """The group as columns. What the author left out is taken from the engine's own report of each sequence.

    Args:
        origins: what managed sessions reported while this group was made, by token ids.
        fallback_version: for trained tokens that no engine reported (hand-made ones): nothing older can be meant.
    Raises:
        GroupFormatError: columns do not fit, or trained tokens have no logprobs.
    """
    tokens = group["tokens"]
    masks = group["masks"]
    known = [origins.get(sequence_key(sequence)) for sequence in tokens]
    loss_masks = [[int(label != MASKED) for label in labels] for labels in masks]
    finish_reasons = group.get("finish_reasons") or [origin.finish_reason if origin else "" for origin in known]
    return build_group(
        group_id=group_id,
        env_id=env_id,
        run_id=run_id,
        tokens=tokens,
        loss_masks=loss_masks,
        inference_logprobs=_logprobs(group, known, loss_masks),
        versions=_versions(group, known, loss_masks, fallback_version),
        scores=group["scores"],
        ticket=ticket,
        finish_reasons=tuple(finish_reasons) if all(finish_reasons) else (),
        labels=_labels(tokens, masks),
        advantages=_advantages(group),
        ref_logprobs=_flat(group.get("ref_logprobs"), np.float32),
        distill_token_ids=_flat(group.get("distill_token_ids"), np.int32),
        distill_logprobs=_flat(group.get("distill_logprobs"), np.float32),
        messages=group.get("messages"),
        generation_params=group.get("generation_params"),
        overrides=group.get("overrides"),
        group_overrides=group.get("group_overrides"),
        images=group.get("images"),
    )


def _logprobs(
    group: ScoredDataGroup, known: Sequence[Origin | None], loss_masks: list[list[int]]
) -> list[list[float]] | None:
    """The engine's logprobs where a token is trained, 0.0 elsewhere; None when they are known of no sequence."""
    given: Sequence[list[float] | None]
    given = group.get("inference_logprobs") or [origin.logprobs if origin else None for origin in known]
    if all(row is None for row in given):
        return None
    rows: list[list[float]] = []
    for i, (row, mask) in enumerate(zip(given, loss_masks, strict=True)):
        if row is None or len(row) != len(mask):
            raise GroupFormatError(
                f"sequence {i}: {0 if row is None else len(row)} inference_logprobs for {len(mask)} tokens; sample with "
                "self.server.managed_server(...) and pass each node's tokens unchanged, or set group['inference_logprobs']"
            )
        rows.append([value if bit else 0.0 for value, bit in zip(row, mask, strict=True)])
    return rows


def _versions(
    group: ScoredDataGroup, known: Sequence[Origin | None], loss_masks: list[list[int]], fallback: int
) -> list[VersionRuns]:
    given: Sequence[VersionRuns | None] = group.get("policy_versions") or [
        origin.versions if origin else None for origin in known
    ]
    return [_covered(runs, mask, fallback) for runs, mask in zip(given, loss_masks, strict=True)]


def _covered(runs: VersionRuns | None, mask: list[int], fallback: int) -> VersionRuns:
    """Runs in which every trained token has a version."""
    versions = np.full(len(mask), NOT_SAMPLED, dtype=np.int64)
    if runs is not None:
        lengths = [length for _, length in runs]
        if sum(lengths) != len(mask):
            raise GroupFormatError(f"policy_versions cover {sum(lengths)} tokens of {len(mask)}")
        versions = np.repeat([version for version, _ in runs], lengths)
    is_trained = np.array(mask, dtype=bool)
    versions = np.where(is_trained & (versions == NOT_SAMPLED), fallback, versions)
    starts = np.flatnonzero(np.diff(versions, prepend=versions[0] - 1))
    return [
        (int(versions[start]), int(end - start))
        for start, end in zip(starts, [*starts[1:], len(versions)], strict=True)
    ]


def _labels(tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> Any:
    """Only where the author's masks say something that a 0/1 mask cannot: labels other than the tokens themselves."""
    pairs = chain.from_iterable(zip(row, labels, strict=False) for row, labels in zip(tokens, masks, strict=True))
    if all(label in (MASKED, token) for token, label in pairs):
        return None
    return np.array(list(chain.from_iterable(masks)), dtype=np.int32)


def _advantages(group: ScoredDataGroup) -> Any:
    """[T]; one number a sequence stands for all its tokens."""
    rows: Sequence[list[float] | float] | None = group.get("advantages")
    if not rows:
        return None
    spread: list[float] = []
    for row, tokens in zip(rows, group["tokens"], strict=True):
        spread += row if isinstance(row, list) else [float(row)] * len(tokens)
    return np.array(spread, dtype=np.float32)


def _flat(rows: Sequence[Sequence[Any]] | None, dtype: type[np.generic]) -> Any:
    return np.array(list(chain.from_iterable(rows)), dtype=dtype) if rows else None
