"""What must hold of a group that an environment returned: one small function a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

from atroposlib.envs.serving.delivery import is_sft
from atroposlib.testing.findings import Finding
from atroposlib.type_definitions import MASKED, ScoredDataGroup

Group: TypeAlias = Mapping[str, Any]

PER_SEQUENCE = (
    *("tokens", "masks", "scores", "advantages", "inference_logprobs", "ref_logprobs", "policy_versions"),
    *("messages", "overrides", "images", "finish_reasons", "distill_token_ids", "distill_logprobs"),
)
PER_TOKEN = ("masks", "inference_logprobs", "ref_logprobs", "distill_token_ids", "distill_logprobs")
SAME_SCORES_SHARE = 0.9
LOGPROB_SLACK = 1e-6
"""Nats above 0 that rounding can make."""


@dataclass(frozen=True)
class Expected:
    """What the environment's config promises."""

    group_size: int
    vocab_size: int | None = None
    """None where there is no tokenizer."""
    max_token_length: int | None = None
    """None where the tokenizer is not the model's, so that lengths say nothing."""


def check_group(group: Any, expected: Expected) -> list[Finding]:
    """Every finding of one group; rules about content only where its form is right."""
    form = [*group_form(group)]
    if form:
        return form
    alignment = [finding for check in (column_sizes, sequence_lengths) for finding in check(group, expected)]
    content = [finding for check in CONTENT_CHECKS for finding in check(group, expected)] if not alignment else []
    return [*group_size(group, expected), *alignment, *content]


def group_form(group: Any) -> Iterator[Finding]:
    """A dict with tokens, masks and scores, each a list with an entry a sequence."""
    if not isinstance(group, Mapping):
        yield _error(
            "group_form",
            f"a group is a {type(group).__name__}, not a ScoredDataGroup",
            "return (ScoredDataGroup(tokens=..., masks=..., scores=...), []) from collect_trajectories",
        )
        return
    for name in ("tokens", "masks", "scores"):
        if name not in group:
            yield _error("group_form", f"a group has no {name!r}", f"set group[{name!r}], one entry a sequence")
        elif not _is_list(group[name]) or not len(group[name]):
            yield _error(
                "group_form",
                f"a group's {name!r} is {_short(group[name])}, not a list with an entry a sequence",
                "return None instead of a group when there is nothing to train on",
            )
        elif name != "scores" and not all(_is_list(row) for row in group[name]):
            yield _error(
                "group_form",
                f"a group's {name!r} holds {_short(group[name][0])} where a list of ints is meant",
                f"{name!r} is a list of lists: one list of token ids a sequence",
            )


def group_size(group: Group, expected: Expected) -> Iterator[Finding]:
    """As many sequences as group_size, or as the group's own override, says."""
    promised = (group.get("group_overrides") or {}).get("group_size", expected.group_size)
    if len(group["tokens"]) != promised and not _is_supervised(group):
        yield _error(
            "group_size",
            f"a group has {len(group['tokens'])} sequences, group_size is {promised}; it will be dropped",
            "sample config.group_size completions, or set group['group_overrides'] = {'group_size': n}",
        )


def column_sizes(group: Group, expected: Expected) -> Iterator[Finding]:
    """Every column has an entry for each sequence."""
    n = len(group["tokens"])
    for name in PER_SEQUENCE:
        column = group.get(name)
        if column and _is_list(column) and len(column) != n:
            yield _error(
                "column_sizes",
                f"{name!r} has {len(column)} entries for {n} sequences",
                f"append to {name!r} whenever you append to 'tokens', or leave it out",
            )


def sequence_lengths(group: Group, expected: Expected) -> Iterator[Finding]:
    """Per-token columns have an entry for each token."""
    for name in PER_TOKEN:
        for position, row in enumerate(group.get(name) or []):
            n_tokens = len(group["tokens"][position]) if position < len(group["tokens"]) else 0
            if _is_list(row) and len(row) != n_tokens:
                yield _error(
                    "sequence_lengths",
                    f"{name!r} of sequence {position} has {len(row)} entries for {n_tokens} tokens",
                    "take tokens, masked_tokens and logprobs from the same node of managed_server().get_state()",
                )
                break
    for position, runs in enumerate(group.get("policy_versions") or []):
        covered = sum(length for _, length in runs)
        if covered != len(group["tokens"][position]):
            yield _error(
                "sequence_lengths",
                f"'policy_versions' of sequence {position} cover {covered} of {len(group['tokens'][position])} tokens",
                "pass node.policy_versions on unchanged",
            )
            break


def token_range(group: Group, expected: Expected) -> Iterator[Finding]:
    """Token ids are ids of the tokenizer."""
    for tokens in group["tokens"]:
        wrong = [token for token in tokens if isinstance(token, bool) or not isinstance(token, Integral)]
        if wrong:
            yield _error(
                "token_range", f"'tokens' holds {_short(wrong[0])}, which is no token id", "tokens are plain ints"
            )
            return
        outside = [
            token for token in tokens if token < 0 or (expected.vocab_size is not None and token >= expected.vocab_size)
        ]
        if outside:
            yield _error(
                "token_range",
                f"token id {outside[0]} is outside the vocabulary of {expected.vocab_size} tokens",
                "tokenize with self.tokenizer, the tokenizer of the model that is trained",
            )
            return


def mask_values(group: Group, expected: Expected) -> Iterator[Finding]:
    """A mask repeats the token where it is trained and is MASKED elsewhere; something is trained."""
    for position, (tokens, masks) in enumerate(zip(group["tokens"], group["masks"], strict=True)):
        wrong = [mask for token, mask in zip(tokens, masks, strict=True) if mask not in (MASKED, token)]
        if wrong and set(masks) <= {0, 1}:
            yield _error(
                "mask_values",
                f"'masks' of sequence {position} holds 0 and 1",
                f"put the token id where the policy sampled the token, and {MASKED} elsewhere",
            )
            return
        if wrong:
            yield _error(
                "mask_values",
                f"'masks' of sequence {position} holds {wrong[0]}, neither {MASKED} nor the token at that place",
                f"build it as [{MASKED}] * len(prompt) + completion_ids",
            )
            return
        if all(mask == MASKED for mask in masks):
            yield _error(
                "mask_values",
                f"sequence {position} masks all of its {len(tokens)} tokens, so nothing is trained",
                "leave the sampled tokens unmasked, or exclude the sequence",
            )
            return


def prompt_is_masked(group: Group, expected: Expected) -> Iterator[Finding]:
    """A sequence begins with a prompt, which nobody trains."""
    if group.get("masks") and all(row and row[0] != MASKED for row in group["masks"]):
        yield Finding(
            "prompt_is_masked",
            "warning",
            "every sequence is trained from its first token on: the prompt is not masked",
            f"mask the prompt with {MASKED}; for supervised data that is what you may want",
        )


def scores_are_numbers(group: Group, expected: Expected) -> Iterator[Finding]:
    """Scores are finite."""
    for score in group["scores"]:
        if not isinstance(score, Real) or not math.isfinite(score):
            yield _error(
                "scores_are_numbers",
                f"a score is {_short(score)}, not a finite number",
                "return a float from the reward; raise atroposlib.errors.RolloutError where nothing can be paid",
            )
            return


def logprobs_are_possible(group: Group, expected: Expected) -> Iterator[Finding]:
    """Sampled tokens carry the engine's logprobs: finite, at most 0."""
    rows = group.get("inference_logprobs")
    if not rows and _is_supervised(group):
        return
    if not rows:
        yield Finding(
            "logprobs_are_possible",
            "warning",
            "groups carry no inference_logprobs: off-policy correction cannot work",
            "use rollout_group() or managed_server(), and pass node.logprobs on as 'inference_logprobs'",
        )
        return
    for position, (row, masks) in enumerate(zip(rows, group["masks"], strict=True)):
        trained = [value for value, mask in zip(row, masks, strict=True) if mask != MASKED]
        wrong = [
            value for value in trained if not isinstance(value, Real) or not -math.inf < float(value) <= LOGPROB_SLACK
        ]
        if wrong:
            yield _error(
                "logprobs_are_possible",
                f"sequence {position} has the logprob {_short(wrong[0])} on a token that is trained",
                "logprobs are nats, at most 0; 1.0 marks tokens that were not sampled, which belong masked",
            )
            return


def length_is_allowed(group: Group, expected: Expected) -> Iterator[Finding]:
    """No sequence is longer than the environment promises."""
    longest = max(len(tokens) for tokens in group["tokens"])
    if expected.max_token_length is not None and longest > expected.max_token_length:
        yield Finding(
            "length_is_allowed",
            "warning",
            f"a sequence has {longest} tokens, max_token_length is {expected.max_token_length}: it may be dropped",
            "raise max_token_length, or sample with a smaller max_tokens",
        )


CONTENT_CHECKS: tuple[Callable[[Group, Expected], Iterator[Finding]], ...] = (
    token_range,
    mask_values,
    prompt_is_masked,
    scores_are_numbers,
    logprobs_are_possible,
    length_is_allowed,
)


def scores_differ(groups: Sequence[Group]) -> Iterator[Finding]:
    """Most groups hold different scores: groups of equal scores teach nothing."""
    same = sum(len(set(group["scores"])) == 1 and not _is_supervised(group) for group in groups)
    if groups and same / len(groups) >= SAME_SCORES_SHARE:
        yield Finding(
            "scores_differ",
            "warning",
            f"{same} of {len(groups)} groups have equal scores and would be dropped (ensure_scores_are_not_same)",
            "give the mock replies that the reward tells apart (--one-of RIGHT --one-of WRONG); "
            "if they are already, the reward does not look at the reply",
        )


def completions_differ(groups: Sequence[Group]) -> Iterator[Finding]:
    """A group's sequences are sampled, not one sequence repeated."""
    repeated = sum(len(group["tokens"]) > 1 and len({tuple(row) for row in group["tokens"]}) == 1 for group in groups)
    if groups and repeated == len(groups):
        yield Finding(
            "completions_differ",
            "warning",
            "every group holds one sequence over and over",
            "sample with a temperature above 0 and n=group_size; with --text the mock itself repeats: use --one-of",
        )


def _is_supervised(group: Group) -> bool:
    """Whether nobody sampled it, so that there are no logprobs and nothing to tell apart."""
    return is_sft(cast(ScoredDataGroup, group))


def _error(check: str, message: str, fix: str) -> Finding:
    return Finding(check, "error", message, fix)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
