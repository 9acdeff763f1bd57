"""Each rule about groups finds what breaks it, and nothing in a group that is right."""

from __future__ import annotations

import math
from typing import Any

import pytest

from atroposlib.testing import build_group
from atroposlib.testing.group_checks import Expected, check_group, completions_differ, scores_differ

EXPECTED = Expected(group_size=2, vocab_size=259, max_token_length=8)


def broken(**columns: Any) -> dict[str, Any]:
    return {**build_group(["4", "5"], [1.0, 0.0]), **columns}


def without(name: str) -> dict[str, Any]:
    group = broken()
    del group[name]
    return group


def test_a_right_group_has_no_finding() -> None:
    assert check_group(broken(), EXPECTED) == []


GOOD = broken()
TOKENS, MASKS, LOGPROBS = GOOD["tokens"], GOOD["masks"], GOOD["inference_logprobs"]


@pytest.mark.parametrize(
    ("check", "group", "words"),
    [
        ("group_form", ["a"], "not a ScoredDataGroup"),
        ("group_form", without("scores"), "no 'scores'"),
        ("group_form", broken(tokens=[]), "return None"),
        ("group_form", broken(tokens=[1, 2]), "list of lists"),
        ("group_size", build_group(["4"], [1.0]), "group_size is 2"),
        ("column_sizes", broken(scores=[1.0]), "'scores' has 1 entries for 2"),
        ("column_sizes", broken(messages=[[]]), "'messages' has 1"),
        ("sequence_lengths", broken(masks=[MASKS[0][:-1], MASKS[1]]), "'masks' of sequence 0"),
        ("sequence_lengths", broken(inference_logprobs=[LOGPROBS[0], [*LOGPROBS[1], 0.0]]), "of sequence 1"),
        ("sequence_lengths", broken(policy_versions=[[(0, 3)], [(0, 6)]]), "cover 3 of 6"),
        ("token_range", broken(tokens=[[*TOKENS[0][:-1], 259], TOKENS[1]], masks=MASKS), "outside the vocabulary"),
        ("token_range", broken(tokens=[[*TOKENS[0][:-1], 2.0], TOKENS[1]]), "no token id"),
        ("mask_values", broken(masks=[[0, 0, 0, 0, 1, 1]] * 2), "holds 0 and 1"),
        ("mask_values", broken(masks=[[*MASKS[0][:-1], 77], MASKS[1]]), "holds 77"),
        ("mask_values", broken(masks=[[-100] * 6, MASKS[1]]), "nothing is trained"),
        ("prompt_is_masked", broken(masks=TOKENS, inference_logprobs=[[-1.0] * 6] * 2), "the prompt is not masked"),
        ("scores_are_numbers", broken(scores=[1.0, math.nan]), "nan"),
        ("scores_are_numbers", broken(scores=[1.0, None]), "None"),
        ("logprobs_are_possible", without("inference_logprobs"), "no inference_logprobs"),
        ("logprobs_are_possible", broken(inference_logprobs=[[1.0] * 6] * 2), "logprob 1.0"),
        ("logprobs_are_possible", broken(inference_logprobs=[[1.0] * 5 + [-math.inf]] * 2), "logprob"),
        ("length_is_allowed", build_group(["4", "5"], [1.0, 0.0], prompt="a long prompt"), "max_token_length is 8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_and_explained(check: str, group: Any, words: str) -> None:
    findings = check_group(group, EXPECTED)

    assert check in [finding.check for finding in findings]
    told = " ".join(f"{finding.message} {finding.fix}" for finding in findings)
    assert words in told
    assert all(finding.fix for finding in findings)


def test_a_group_may_override_its_size() -> None:
    group = build_group(["4"], [1.0], group_overrides={"group_size": 1})

    assert check_group(group, EXPECTED) == []


def test_lengths_are_not_judged_without_the_models_tokenizer() -> None:
    group = build_group(["4", "5"], [1.0, 0.0], prompt="a long prompt")

    assert check_group(group, Expected(group_size=2)) == []


def test_equal_scores_in_nearly_all_groups_are_found() -> None:
    equal, different = build_group(scores=[1.0, 1.0]), build_group()

    assert len([*scores_differ([equal] * 10)]) == 1
    assert [*scores_differ([equal, different])] == []
    assert [*scores_differ([])] == []


def test_a_sequence_that_is_only_repeated_is_found() -> None:
    assert len([*completions_differ([build_group(["4", "4"])])]) == 1
    assert [*completions_differ([build_group(["4", "4"]), build_group()])] == []
