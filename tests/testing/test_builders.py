"""Builders make what environments return and the wire accepts."""

from __future__ import annotations

import pytest

from atroposlib.testing import build_group, build_item
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.type_definitions import MASKED


def test_an_item_is_aligned_and_masks_its_prompt() -> None:
    item = build_item("2+2=", "4", 0.5)

    lengths = {len(item["tokens"]), len(item["masks"]), len(item["inference_logprobs"] or [])}
    assert lengths == {6}
    assert item["masks"][:4] == [MASKED] * 4
    assert item["masks"][4:] == item["tokens"][4:]
    assert item["scores"] == 0.5
    assert sum(length for _, length in item["policy_versions"] or []) == 6


def test_ids_are_those_of_the_tokenizer_given() -> None:
    assert build_item("a", "b", tokenizer=byte_tokenizer())["tokens"] == build_item("a", "b")["tokens"]


def test_an_unfinished_item_has_no_terminator() -> None:
    item = build_item("a", "b", is_terminated=False)

    assert len(item["tokens"]) == 2
    assert item["finish_reason"] == "length"


def test_a_group_has_one_entry_a_completion_and_takes_other_columns() -> None:
    group = build_group(["a", "b", "c"], [0.0, 1.0, 2.0], group_overrides={"group_size": 3}, messages=None)

    assert len(group["tokens"]) == len(group["finish_reasons"] or []) == 3
    assert group["scores"] == [0.0, 1.0, 2.0]
    assert group["group_overrides"] == {"group_size": 3}
    assert group["messages"] is None


def test_scores_must_be_as_many_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        build_group(["a", "b"], [1.0])
