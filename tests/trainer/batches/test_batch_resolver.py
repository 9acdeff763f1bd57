"""Sequences of a step, from whichever numbers a user gives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from trainer.batches.resolver import BatchSizes, resolve_batch

SIZES = st.integers(1, 12)


def resolve(**given_: Any) -> BatchSizes:
    defaults: dict[str, Any] = {"batch_size": None, "per_device": None, "accumulation": None, "ranks": 1}
    return resolve_batch(**{**defaults, **given_})


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"batch_size": 252, "per_device": 3, "ranks": 4}, BatchSizes(252, 3, 21)),
        ({"batch_size": 128, "per_device": 1, "ranks": 4}, BatchSizes(128, 1, 32)),
        ({"batch_size": 128, "ranks": 4}, BatchSizes(128, 1, 32)),
        ({"batch_size": 128, "accumulation": 8, "ranks": 4}, BatchSizes(128, 4, 8)),
        ({"per_device": 4, "ranks": 2}, BatchSizes(8, 4, 1)),
        ({"per_device": 4, "accumulation": 3, "ranks": 2}, BatchSizes(24, 4, 3)),
        ({"accumulation": 3, "ranks": 2}, BatchSizes(6, 1, 3)),
        ({"ranks": 2}, BatchSizes(64, 1, 32)),
        ({"batch_size": 10, "ranks": 4}, BatchSizes(10, 1, 3)),
    ],
)
def test_what_is_not_given_is_derived(numbers: dict[str, Any], expected: BatchSizes) -> None:
    assert resolve(**numbers) == expected


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"batch_size": 252, "per_device": 3, "ranks": 8},
            "batch_size=252 is no multiple of per_device_train_batch_size=3 x 8 ranks; nearest valid batch_size: 240 or 264",
        ),
        ({"batch_size": 12, "per_device": 5, "ranks": 2}, "valid per_device_train_batch_size for 12: 1, 2, 3, 6"),
        ({"batch_size": 10, "accumulation": 4}, "no multiple of gradient_accumulation_steps=4 x 1 ranks"),
        (
            {"batch_size": 64, "per_device": 4, "accumulation": 4, "ranks": 2},
            "gradient_accumulation_steps=8 or batch_size=32 would fit",
        ),
        ({"batch_size": 60, "group_size": 8}, "nearest valid batch_size: 56 or 64"),
        ({"batch_size": 4, "group_size": 8}, "nearest valid batch_size: 8"),
        ({"batch_size": 50, "per_device": 4, "group_size": 6}, "nearest valid batch_size: 48 or 60"),
        ({"per_device": 0}, "per_device_train_batch_size must be at least 1, is 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, is -2"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused_with_those_that_would_not(
    numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**numbers)

    assert message in str(caught.value)


@given(per_device=SIZES, accumulation=SIZES, ranks=SIZES)
def test_any_two_of_three_give_the_third(per_device: int, accumulation: int, ranks: int) -> None:
    batch_size = per_device * accumulation * ranks
    whole = BatchSizes(batch_size, per_device, accumulation)

    assert resolve(per_device=per_device, accumulation=accumulation, ranks=ranks) == whole
    assert resolve(batch_size=batch_size, per_device=per_device, ranks=ranks) == whole
    assert resolve(batch_size=batch_size, accumulation=accumulation, ranks=ranks) == whole
    assert resolve(batch_size=batch_size, per_device=per_device, accumulation=accumulation, ranks=ranks) == whole


@given(batch_size=st.integers(1, 200), per_device=SIZES, ranks=SIZES, group_size=SIZES)
def test_a_suggestion_is_valid(batch_size: int, per_device: int, ranks: int, group_size: int) -> None:
    try:
        resolve(batch_size=batch_size, per_device=per_device, ranks=ranks, group_size=group_size)
    except ConfigError as error:
        suggested = str(error).split("nearest valid batch_size: ")[1].split(";")[0].split(" or ")
        if "ranks" in str(error):
            for size in suggested:
                resolve(batch_size=int(size), per_device=per_device, ranks=ranks, group_size=group_size)
