"""Lists as bytes: the same bytes as numpy's, and errors that say what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.wire.packing import packed


@given(st.lists(st.integers(min_value=-(2**31), max_value=2**31 - 1)))
def test_integers_are_packed_as_numpy_does(values: list[int]) -> None:
    assert packed(values, "i") == np.array(values, dtype=np.int32).tobytes()


@given(st.lists(st.floats(width=32)))
def test_floats_are_packed_as_numpy_does(values: list[float]) -> None:
    assert packed(values, "f") == np.array(values, dtype=np.float32).tobytes()


def test_numpys_integers_count_as_integers() -> None:
    values: list[Any] = [np.int64(7), True]

    assert packed(values, "i") == np.array([7, 1], dtype=np.int32).tobytes()


@pytest.mark.parametrize("bad", [1.5, "1", None, [1]])
def test_what_is_no_integer_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="no number of type 'i'"):
        packed([1, bad], "i")  # type: ignore[list-item]


def test_an_integer_out_of_range_is_an_overflow_error() -> None:
    with pytest.raises(OverflowError, match="outside of type 'i'"):
        packed([2**31], "i")
