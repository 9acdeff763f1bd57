"""Types of what callers give: NumPy's numbers are numbers, a bool is none."""

from __future__ import annotations

import reprlib
from numbers import Integral, Real

from atroposlib.teaching.errors import TeachingTypeError


def check_number(name: str, value: object) -> None:
    """Of an argument or a field that is to be a real number.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(name, value, "a number")


def check_whole_number(name: str, value: object) -> None:
    """Of an argument or a field that is to be a whole number.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong_type(name, value, "a whole number")


def check_text(name: str, value: object) -> None:
    """Of an argument or a field that is to be a text.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise wrong_type(name, value, "a text")


def wrong_type(name: str, value: object, expected: str) -> TeachingTypeError:
    """The error of an argument or a field that is not what was expected."""
    return TeachingTypeError(f"{name} must be {expected}, not {reprlib.repr(value)} ({type(value).__name__})")
