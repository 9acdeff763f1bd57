"""float32 columns as the short decimals that people write: 0.1 and not 0.10000000149011612."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_EXACT_POWERS = 10.0 ** np.arange(23)
"""Powers of ten that float64 holds exactly: an integer divided by one of them is rounded once, and right."""


def short_decimals(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The float64 nearest to the shortest decimal, of 7 to 9 digits, that reads back as the same float32.

    A JSON writer prints such a float64 in that many digits. Where no decimal of 9 digits was found (the smallest and the
    largest float32) the exact value stays.

    Args:
        values: [T] finite.
    Returns:
        [T] with `result.astype(float32) == values`.
    """
    exact = values.astype(np.float64)
    magnitude = np.abs(exact)
    magnitude[magnitude == 0.0] = 1.0
    exponent = np.floor(np.log10(magnitude)).astype(np.int64)
    result, is_open = exact.copy(), np.ones(len(values), dtype=bool)
    for digits in (7, 8, 9):
        rounded = _rounded(exact, digits - 1 - exponent)
        fits = is_open & (rounded.astype(np.float32) == values)
        result[fits] = rounded[fits]
        is_open &= ~fits
        if not is_open.any():
            break
    return result


def _rounded(values: npt.NDArray[np.float64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[T] each value rounded to so many decimal places; negative places round before the point."""
    limit = len(_EXACT_POWERS) - 1
    up, down = _EXACT_POWERS[np.clip(places, 0, limit)], _EXACT_POWERS[np.clip(-places, 0, limit)]
    # Beyond the float32 range the result is infinite, and does not compare equal.
    with np.errstate(over="ignore"):
        rounded: npt.NDArray[np.float64] = np.rint(values * up / down) / up * down
    return rounded
