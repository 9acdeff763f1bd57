"""Groups that would harm the loss, found before they reach it. Pure: groups in, what to do with them out.

| what | what is done |
|---|---|
| token id that the model does not have | the run ends: ForeignTokensError |
| columns that do not fit together, a score that is no number | the group is left out |
| a number of a trained token that is none; more tokens than the model's context | the sequence gets no loss |
| no logprobs of the engine, where the correction needs them | trained without correction |
| more tokens than a pass takes | a pass of its own |
| no token that the policy sampled | nothing to train; its reward counts for the others |
| all rewards of a group equal | advantages are 0; nothing is computed for it |
| sampled with top_p, a penalty, ... and no logprobs of that | trained as if the policy itself had been sampled |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from atroposlib.wire.columns import Group
from trainer.errors import ForeignTokensError

LEFT_OUT_GROUPS = "batch/left_out_groups"
LEFT_OUT_SEQUENCES = "batch/left_out_sequences"
UNCORRECTED = "batch/uncorrected_sequences"
OWN_PASS = "batch/own_pass_sequences"
NO_COMPLETION = "batch/empty_completions"
RESHAPED = "batch/reshaped_sampling_groups"

_PER_TOKEN = ("loss_mask", "inference_logprobs", "advantages", "ref_logprobs", "labels")
_PER_CANDIDATE = ("distill_token_ids", "distill_logprobs")
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,),
    "frequency_penalty": (0,),
}  # fmt: skip
"""Sampling options that sample from another distribution than the model's, with the values that do not."""
_NUMBERS = ("inference_logprobs", "advantages", "ref_logprobs", "distill_logprobs")


@dataclass(frozen=True)
class BatchLimits:
    """What the run can train on."""

    vocabulary: int
    """Token ids that the model has, from 0."""
    context: int | None = None
    """Tokens of the longest sequence that the model has positions for; None where any will do."""
    pass_tokens: int = 2**31
    """Tokens of one pass."""
    needs_inference_logprobs: bool = True
    """Whether the correction compares with the engine's logprobs."""
    has_sampled_logprobs: bool = False
    """Whether these are known to be of what was sampled from, top_p and penalties included, and so correct for them."""


@dataclass(frozen=True)
class Finding:
    """Something odd."""

    metric: str
    """The counter that it raises."""
    text: str


@dataclass(frozen=True)
class CheckedBatch:
    """What of a batch is trained on."""

    groups: tuple[Group, ...]
    left_out: frozenset[tuple[int, int]]
    """(place of the group in groups, place of the sequence in the group): no loss, but their rewards count."""
    findings: tuple[Finding, ...]

    @property
    def counters(self) -> dict[str, float]:
        """For the metrics of the step; those that are not 0."""
        return {name: float(count) for name, count in Counter(finding.metric for finding in self.findings).items()}


@dataclass
class _Findings:
    """What is found in one group."""

    group: Group
    all: list[Finding] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    """Places of sequences."""

    def add(self, metric: str, text: str, *, sequence: int | None = None, leaves_out: bool = False) -> None:
        """One more, of the whole group where no sequence is named."""
        place = "" if sequence is None else f", sequence {sequence}"
        self.all.append(
            Finding(metric, f"group {self.group.group_id!r} of environment {self.group.env_id}{place}: {text}")
        )
        if sequence is not None and leaves_out:
            self.left_out.add(sequence)


def checked(groups: Sequence[Group], limits: BatchLimits) -> CheckedBatch:
    """Decide what of a batch is trained on.

    Raises:
        ForeignTokensError: a group was tokenized for another model.
    """
    kept: list[Group] = []
    left_out: set[tuple[int, int]] = set()
    findings: list[Finding] = []
    for group in groups:
        found = _Findings(group)
        problem = mismatch(group) or _bad_score(group)
        if problem is not None:
            found.add(LEFT_OUT_GROUPS, f"left out: {problem}")
        else:
            check_ids(group, limits.vocabulary)
            _check_sampling(found, limits)
            _check_sequences(found, limits)
            left_out |= {(len(kept), place) for place in found.left_out}
            kept.append(group)
        findings += found.all
    return CheckedBatch(tuple(kept), frozenset(left_out), tuple(findings))


def mismatch(group: Group) -> str | None:
    """How the columns of a group contradict each other; None where they fit."""
    n, t = group.n_sequences, group.n_tokens
    if n < 1 or len(group.scores) != n:
        return f"{len(group.scores)} scores for {n} sequences"
    starts: list[int] = group.cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != t or not all(start < end for start, end in pairwise(starts)):
        return f"cu_seqlens must rise from 0 to {t}, is {starts[:8]}"
    for name, column in _present(group, (*_PER_TOKEN, *_PER_CANDIDATE)):
        if len(column) != t:
            return f"column {name!r} has {len(column)} entries for {t} tokens"
    if int(group.policy_versions[:, 1].sum()) != t:
        return f"policy_versions cover {int(group.policy_versions[:, 1].sum())} of {t} tokens"
    if group.finish_reasons and len(group.finish_reasons) != n:
        return f"{len(group.finish_reasons)} finish_reasons for {n} sequences"
    if group.overrides and len(group.overrides) < n:
        return f"{len(group.overrides)} overrides for {n} sequences"
    ids, logprobs = group.distill_token_ids, group.distill_logprobs
    if ids is not None and logprobs is not None and ids.shape != logprobs.shape:
        return f"{logprobs.shape[1]} distill_logprobs a token for {ids.shape[1]} distill_token_ids"
    return None


def check_ids(group: Group, vocabulary: int) -> None:
    """Every token id is one of the model's.

    Raises:
        ForeignTokensError: the first column with another.
    """
    columns = dict(_present(group, ("tokens", "labels", "distill_token_ids")))
    if "labels" in columns:
        # What stands where nothing is trained is nobody's business.
        columns["labels"] = columns["labels"][group.loss_mask != 0]
    for name, column in columns.items():
        if not column.size:
            continue
        least, greatest = int(column.min()), int(column.max())
        if least < 0 or greatest >= vocabulary:
            token_id = least if least < 0 else greatest
            raise ForeignTokensError(
                group.group_id, env_id=group.env_id, column=name, token_id=token_id, vocabulary=vocabulary
            )


def _bad_score(group: Group) -> str | None:
    wrong = np.flatnonzero(~np.isfinite(group.scores))
    return f"sequence {wrong[0]} has the score {group.scores[wrong[0]]}" if len(wrong) else None


def _check_sampling(found: _Findings, limits: BatchLimits) -> None:
    options = found.group.generation_params or {}
    reshaping = [
        f"{name}={options[name]}"
        for name, neutral in _NEUTRAL.items()
        if options.get(name) is not None and options[name] not in neutral
    ]
    if reshaping and not limits.has_sampled_logprobs:
        found.add(
            RESHAPED,
            f"sampled with {', '.join(reshaping)}, and it is not known that the engine's logprobs are of that: trained as if the "
            "policy itself had been sampled. Leave these options, or train with a correction and weight_sync.probe on a vLLM "
            "with --logprobs-mode processed_logprobs",
        )


def _check_sequences(found: _Findings, limits: BatchLimits) -> None:
    group = found.group
    columns = list(_present(group, _NUMBERS))
    # One pass over the whole group: hardly any needs a closer look.
    is_sound = all(np.isfinite(column).all() for _, column in columns)
    for place, (start, end) in enumerate(pairwise(group.cu_seqlens.tolist())):
        is_sampled_L = group.loss_mask[start:end] != 0
        bad = None if is_sound else _first_bad(columns, start, end, is_sampled_L)
        if bad is not None:
            found.add(LEFT_OUT_SEQUENCES, f"gets no loss: {bad}", sequence=place, leaves_out=True)
        elif limits.context is not None and end - start > limits.context:
            text = f"gets no loss: {end - start} tokens, and the model has positions for {limits.context}; lower max_token_len"
            found.add(LEFT_OUT_SEQUENCES, text, sequence=place, leaves_out=True)
        elif not is_sampled_L.any():
            found.add(NO_COMPLETION, "holds no token that the policy sampled", sequence=place)
        else:
            _check_trained(found, place, end - start, limits)


def _check_trained(found: _Findings, place: int, length: int, limits: BatchLimits) -> None:
    if limits.needs_inference_logprobs and found.group.inference_logprobs is None and not _is_sft(found.group, place):
        text = "has no logprobs of the engine, so no correction: it is trained as if engine and trainer agreed"
        found.add(UNCORRECTED, text, sequence=place)
    if length > limits.pass_tokens:
        found.add(OWN_PASS, f"{length} tokens, over max_tokens_per_micro_batch={limits.pass_tokens}", sequence=place)


def _first_bad(
    columns: Sequence[tuple[str, npt.NDArray[Any]]], start: int, end: int, is_sampled_L: npt.NDArray[np.bool_]
) -> str | None:
    for name, column in columns:
        wrong = np.flatnonzero(~np.isfinite(column[start:end][is_sampled_L]))
        if len(wrong):
            return f"column {name!r} holds a value that is no finite number"
    return None


def _is_sft(group: Group, place: int) -> bool:
    own = (group.overrides[place] if group.overrides else None) or {}
    return bool(own.get("sft") or (group.group_overrides or {}).get("sft"))


def _present(group: Group, names: Sequence[str]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name in names:
        column = getattr(group, name)
        if column is not None:
            yield name, column
