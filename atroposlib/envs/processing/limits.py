"""When `process` gives up: a row of items that give nothing must not go on for ever."""

from __future__ import annotations

import logging
from typing import ClassVar

from atroposlib.errors import AtroposError, RolloutError

log = logging.getLogger(__name__)

MAX_EMPTY_IN_A_ROW = 64
MAX_ERRORS_IN_A_ROW = 32
MAX_ERRORS_AT_START = 3
"""Before the first group: an environment that never worked will not work now."""


class ProcessFailedError(AtroposError):
    """`process` gave up."""

    code: ClassVar[str] = "process_failed"


class FailureLimit:
    """Counts what fails in a row."""

    def __init__(self) -> None:
        self._empty = self._errors = 0
        self._has_succeeded = False

    def note_success(self) -> None:
        """An item gave a group."""
        self._empty = self._errors = 0
        self._has_succeeded = True

    def note_failure(self, error: Exception | None) -> None:
        """An item gave nothing.

        Args:
            error: why; None where the environment returned nothing, or its groups were filtered out.
        Raises:
            ProcessFailedError: that is enough.
        """
        self._empty += 1
        if error is not None:
            self._errors += 1
            log.error("item dropped: %s", error, exc_info=None if isinstance(error, RolloutError) else error)
            limit = MAX_ERRORS_IN_A_ROW if self._has_succeeded else MAX_ERRORS_AT_START
            if self._errors >= limit:
                raise ProcessFailedError(
                    f"{self._errors} items failed and none succeeded between them, last: {type(error).__name__}: {error}"
                ) from error
        if self._empty >= MAX_EMPTY_IN_A_ROW:
            raise ProcessFailedError(
                f"{self._empty} items in a row gave no group; see the warnings above, "
                "and check what collect_trajectories returns"
            )
