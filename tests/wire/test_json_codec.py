from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import GroupFormatError
from atroposlib.wire.columns import decode_groups, encode_group
from atroposlib.wire.json_codec import (
    EXTRA_KEY,
    KEYS,
    NO_ENV_ID,
    GroupFieldError,
    ScoredData,
    group_from_json,
    group_to_json,
    group_to_json_text,
    read_scored_data,
    split_scored_data_list,
)
from tests.builders import a_group


def there_and_back(body: dict[str, Any]) -> dict[str, Any]:
    """What a trainer is given for what an environment posted, over the stored bytes."""
    data = read_scored_data(json.dumps(body).encode())
    (group,) = decode_groups(encode_group(group_from_json(data, group_id="g")))
    answer: dict[str, Any] = json.loads(group_to_json_text(group))
    return answer


def minimal(**fields: Any) -> dict[str, Any]:
    return {"tokens": [[1, 2, 3], [4, 5]], "masks": [[-100, 2, 3], [-100, 5]], "scores": [1.0, 0.0]} | fields


TOKENS = st.integers(0, 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3)


@st.composite
def scored_data(draw: st.DrawFn) -> dict[str, Any]:
    """Any group that old servers took, as its sender wrote it."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))

    def rows(values: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [draw(st.lists(values, min_size=length, max_size=length)) for length in lengths]

    def maybe(make: Any) -> Any:
        return make() if draw(st.booleans()) else None

    tokens = rows(TOKENS)
    masks = [
        [token if draw(st.booleans()) else draw(st.sampled_from([-100, 0, 1, -1])) for token in row] for row in tokens
    ]
    counts = rows(st.integers(0, 2))
    counts[0][0] = draw(st.integers(1, 3))

    def candidates(values: st.SearchStrategy[Any]) -> list[list[list[Any]]]:
        return [[draw(st.lists(values, min_size=k, max_size=k)) for k in row] for row in counts]

    return {
        "tokens": tokens,
        "masks": masks,
        "scores": draw(
            st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=len(lengths), max_size=len(lengths))
        ),
        "advantages": maybe(lambda: rows(FLOAT32)),
        "ref_logprobs": maybe(lambda: rows(FLOAT32)),
        "messages": maybe(
            lambda: [[{"role": "user", "content": draw(JSON_VALUES), "more": draw(JSON_VALUES)}] for _ in lengths]
        ),
        "generation_params": draw(st.none() | OBJECTS),
        "inference_logprobs": maybe(lambda: rows(FLOAT32 | st.just(1.0))),
        "overrides": maybe(lambda: [draw(st.none() | OBJECTS) for _ in lengths]),
        "group_overrides": draw(st.none() | OBJECTS),
        "images": draw(JSON_VALUES),
        "env_id": draw(st.none() | st.integers(-2, 2**31 - 1)),
        "distill_token_ids": maybe(lambda: candidates(TOKENS)),
        "distill_logprobs": maybe(lambda: candidates(FLOAT32)),
    }


def as_float32(rows: Any) -> Any:
    if isinstance(rows, list):
        return [as_float32(row) for row in rows]
    return None if rows is None else float(np.float32(rows))


@given(body=scored_data())
def test_whatever_an_old_environment_sends_comes_back_to_an_old_trainer(body: dict[str, Any]) -> None:
    answer = there_and_back(body)

    single = ("advantages", "ref_logprobs", "inference_logprobs", "distill_logprobs")
    assert set(answer) == set(KEYS)
    assert {key: answer[key] for key in KEYS if key not in single} == {
        key: body[key] for key in KEYS if key not in single
    }
    assert {key: as_float32(answer[key]) for key in single} == {key: as_float32(body[key]) for key in single}


def test_logprobs_come_back_as_they_were_written() -> None:
    logprobs = [[1.0, -0.1, -0.123456], [1.0, -13.8155]]

    assert there_and_back(minimal(inference_logprobs=logprobs))["inference_logprobs"] == logprobs


def test_the_column_of_logprobs_holds_zero_where_nothing_was_sampled() -> None:
    data = read_scored_data(json.dumps(minimal(inference_logprobs=[[1.0, -0.5, -0.25], [1.0, -2.0]])).encode())

    group = group_from_json(data, group_id="g")

    assert group.inference_logprobs is not None
    assert group.inference_logprobs.tolist() == [0.0, -0.5, -0.25, 0.0, -2.0]


def test_no_environment_is_not_environment_zero() -> None:
    data = read_scored_data(json.dumps(minimal()).encode())

    group = group_from_json(data, group_id="g")

    assert group.env_id == NO_ENV_ID
    assert group_to_json(group)["env_id"] is None


@pytest.mark.parametrize("advantages", [[0.5, -0.5], [[0.5], [-0.5]]], ids=["bare", "in a list"])
def test_one_advantage_for_a_sequence_is_spread_over_its_tokens(advantages: list[Any]) -> None:
    assert there_and_back(minimal(advantages=advantages))["advantages"] == [[0.5, 0.5, 0.5], [-0.5, -0.5]]


@pytest.mark.parametrize(
    "field", ["advantages", "ref_logprobs", "inference_logprobs", "overrides", "distill_token_ids"]
)
def test_an_empty_list_is_an_absent_field(field: str) -> None:
    assert there_and_back(minimal(**{field: []}))[field] is None


def test_messages_may_be_plain_texts() -> None:
    assert there_and_back(minimal(messages=["a", "b"]))["messages"] == ["a", "b"]


def test_numbers_are_read_leniently() -> None:
    body = minimal(tokens=[[1.0, "2", 3], [4, 5]], scores=["0.5", True])

    answer = there_and_back(body)

    assert (answer["tokens"], answer["scores"]) == ([[1, 2, 3], [4, 5]], [0.5, 1.0])


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("masks", {"masks": [[1]]}),
        ("masks", {"masks": []}),
        ("scores", {"scores": [1.0]}),
        ("tokens", {"tokens": [], "masks": [], "scores": []}),
        ("tokens", {"tokens": [[]], "masks": [[]], "scores": [1.0]}),
        ("tokens", {"tokens": [[1, 2, 1 << 40], [4, 5]]}),
        ("inference_logprobs", {"inference_logprobs": [[0.5], [0.5]]}),
        ("inference_logprobs", {"inference_logprobs": [[1.0, -1e39, 0.0], [0.0, 0.0]]}),
        ("ref_logprobs", {"ref_logprobs": [[0.5], [0.5]]}),
        ("advantages", {"advantages": [[0.5, 0.5], [0.5]]}),
        ("advantages", {"advantages": [0.5]}),
        ("overrides", {"overrides": [{}]}),
        ("env_id", {"env_id": 1 << 40}),
        ("distill_logprobs", {"distill_logprobs": [[[0.1]]]}),
        (
            "distill_logprobs",
            {"distill_token_ids": [[[1], [1], [1]], [[1], [1]]], "distill_logprobs": [[[0.1], [], []], [[], []]]},
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(field: str, fields: dict[str, Any]) -> None:
    data = read_scored_data(json.dumps(minimal(**fields)).encode())

    with pytest.raises(GroupFieldError, match=field) as refused:
        group_from_json(data, group_id="g")

    assert refused.value.field == field


@pytest.mark.parametrize("field", ["scores", "inference_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(field: str, value: str) -> None:
    rows = [value, "0.5"] if field == "scores" else [f"[{value}, 0.5, 0.5]", "[0.5, 0.5]"]
    body = json.dumps(minimal())[:-1] + f', "{field}": [{", ".join(rows)}]}}'

    with pytest.raises(GroupFormatError, match=field):
        decode_groups(encode_group(group_from_json(read_scored_data(body.encode()), group_id="g")))


def test_a_list_is_cut_into_its_groups() -> None:
    parts = split_scored_data_list(json.dumps([minimal(), minimal(scores=[0.0, 1.0])]).encode())

    assert [read_scored_data(part).scores for part in parts] == [[1.0, 0.0], [0.0, 1.0]]


def test_a_list_with_a_number_that_is_none_is_cut_too() -> None:
    (part,) = split_scored_data_list(json.dumps([minimal(scores=[float("nan"), 0.0])]).encode())

    assert np.isnan(read_scored_data(part).scores[0])


@pytest.mark.parametrize("body", [b"{}", b"[", b"[1,]", b"\xff", b"[" * 100_000])
def test_what_is_no_list_is_refused(body: bytes) -> None:
    with pytest.raises(pydantic.ValidationError):
        split_scored_data_list(body)


@pytest.mark.parametrize(
    "extra",
    [
        {"unsampled_logprobs": [1.0] * 99},
        {"distill_counts": [1]},
        {"distill_counts": [-1] * 14},
        {"has_env_id": "?"},
        "?",
    ],
)
def test_a_native_sender_cannot_break_the_json_form(extra: Any) -> None:
    group = a_group()
    odd = replace(group, extra={EXTRA_KEY: extra})

    assert group_to_json(odd) == group_to_json(group)


def test_a_group_of_the_native_routes_has_the_json_form_too() -> None:
    answer = json.loads(group_to_json_text(a_group(n=1, prompt=1, completion=2, env_id=3)))

    assert answer["masks"] == [[-100, 10, 11]]
    assert answer["inference_logprobs"] == [[1.0, -0.5, -0.5]]
    assert (answer["env_id"], answer["advantages"]) == (3, None)


def test_fields_that_nobody_knows_are_ignored() -> None:
    assert isinstance(read_scored_data(json.dumps(minimal(ground_truths=["x"])).encode()), ScoredData)
