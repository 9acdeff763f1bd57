"""Which examples make which optimizer step: a pure function of the step, so that a resumed run needs no position. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


class Schedule:
    """Goes through all examples in a new order each epoch. The last step of an epoch may have fewer.

    Args:
        examples: how many there are; at least 1.
        batch_size: examples of a step.
        seed: of the orders.
    """

    def __init__(self, examples: int, *, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._seed = seed
        self.steps_per_epoch = max(1, math.ceil(examples / batch_size))

    def total_steps(self, *, epochs: float, max_steps: int) -> int:
        """Optimizer steps of a run; max_steps where it is over 0."""
        return max_steps if max_steps > 0 else math.ceil(epochs * self.steps_per_epoch)

    def batch(self, step: int) -> Sequence[int]:
        """The places of the examples of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self._batch_size
        indices: list[int] = self._order(epoch)[start : start + self._batch_size].tolist()
        return indices

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._examples)
