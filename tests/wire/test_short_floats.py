from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.wire.short_floats import short_decimals

FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8)


@given(values=FLOATS)
def test_a_short_decimal_reads_back_as_the_same_float32(values: list[float]) -> None:
    column = np.array(values, dtype=np.float32)

    printed = json.dumps(short_decimals(column).tolist())

    assert np.array(json.loads(printed), dtype=np.float32).tobytes() == column.tobytes()


@pytest.mark.parametrize(
    "text", ["0.1", "-0.123456", "-2.5", "1.0", "-13.8155", "1e-06", "0.0", "-0.7133499", "16777216.0"]
)
def test_what_people_write_comes_back_as_they_wrote_it(text: str) -> None:
    column = np.array([float(text)], dtype=np.float32)

    assert json.dumps(short_decimals(column).tolist()) == f"[{text}]"


@given(value=st.floats(min_value=-1e6, max_value=-(2.0**-20), width=32))
def test_a_logprob_takes_nine_digits_at_most(value: float) -> None:
    (short,) = short_decimals(np.array([value], dtype=np.float32)).tolist()

    assert short == float(f"{short:.9g}")
