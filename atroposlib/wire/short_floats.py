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
    exponent = np.floor(np.log10(magnitude)).astype(np.intp)
    result, is_fit = _rounded(exact, values, 6 - exponent)
    for places in (7, 8):
        is_open = np.flatnonzero(~is_fit)
        if not len(is_open):
            break
        result[is_open], is_fit[is_open] = _rounded(exact[is_open], values[is_open], places - exponent[is_open])
    return np.where(is_fit, result, exact)


def _rounded(
    exact: npt.NDArray[np.float64], values: npt.NDArray[np.float32], places: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """[T] each value rounded to so many decimal places, and whether it still reads as the same float32.

    Negative places round before the point.
    """
    up, down = _EXACT_POWERS.take(places, mode="clip"), _EXACT_POWERS.take(-places, mode="clip")
    # Beyond the float32 range the result is infinite, and does not compare equal.
    with np.errstate(over="ignore"):
        rounded = np.rint(exact * up / down) / up * down
        return rounded, rounded.astype(np.float32) == values
