"""Where the loop of transformers meets ours: its callbacks, and what it takes for a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trainer.batches.micro_batch import RankShare

if TYPE_CHECKING:
    from trainer.grpo_trainer import GRPOTrainer


class Hooks(TrainerCallback):  # type: ignore[misc]
    """The moments of transformers' loop that the trainer needs."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Weights, optimizer and step are loaded."""
        self._trainer.begin()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_epoch_begin(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_step_end(*args, **kwargs)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """An override point of the trainer's."""
        self._trainer.on_evaluate(*args, **kwargs)


class Steps:
    """An endless loader without a length, which ends when there is no next share."""

    def __init__(self, next_share: Callable[[], RankShare | None]) -> None:
        self._next_share = next_share

    def __iter__(self) -> Iterator[RankShare]:
        while (share := self._next_share()) is not None:
            yield share
