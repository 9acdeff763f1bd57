"""Keeps a loss or gradient that is no number out of the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import NonFiniteError, TrainerError

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 3
"""This many batches in a row with a skipped optimizer step end the run."""


class StepGuard:
    """Skips optimizer steps and counts them. What it is given is the same on every rank, and so is what it does.

    Args:
        is_deepspeed: DeepSpeed has taken its step, or skipped it for the same reason, before anyone else can.
    """

    def __init__(self, *, is_deepspeed: bool) -> None:
        self._is_deepspeed = is_deepspeed
        self.skipped = 0
        """Optimizer steps of the current batch."""
        self._in_a_row = 0

    def start(self) -> None:
        """A new batch."""
        self.skipped = 0

    def check(self, grad_norm: float, model: Any, accelerator: Any, *, loss: float = 0.0) -> None:
        """Take the gradients away where they or the loss are no numbers: optimizers leave parameters without one alone.

        Raises:
            TrainerError: DeepSpeed did not.

        Args:
            loss: of the whole batch; a step of it that was skipped before explains one that is no number.
        """
        if self._is_deepspeed:
            was_skipped = bool(accelerator.optimizer_step_was_skipped)
            if not was_skipped and not math.isfinite(grad_norm):
                raise TrainerError(
                    "DeepSpeed has taken a step with a gradient that is no number, so the weights are none either: go on from "
                    "the last checkpoint, with ZeRO stage 1 to 3 and without bf16.check_grad_overflow=false"
                )
            self.skipped += was_skipped
        elif not math.isfinite(grad_norm) or not (self.skipped or math.isfinite(loss)):
            model.zero_grad(set_to_none=True)
            self.skipped += 1

    def finish(self, step: int, *, report: Callable[[], Path | None] = lambda: None) -> None:
        """The batch is done.

        Args:
            report: writes down what the batch was, where the run ends with it; returns the file, None without one.
        Raises:
            NonFiniteError: too many in a row were skipped.
        """
        self._in_a_row = self._in_a_row + 1 if self.skipped else 0
        if self.skipped:
            log.warning("step %d: skipped %d optimizer steps: loss or gradient is not finite", step, self.skipped)
        if self._in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteError(step, in_a_row=self._in_a_row, report=report())
