"""RewardFunction: pays completions, and never takes its own failure for a bad completion."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from atroposlib.errors import AtroposError, RolloutError

log = logging.getLogger(__name__)


class RewardFunction(ABC):
    """Subclass it and write `compute`; call the instance.

    Args:
        weight: every reward is multiplied by it.
        name: in metrics and error texts; None: the class name in lower case.
        zero_on_error: pay 0.0 to every completion when compute fails, as Atropos 0.4.0 does. By default a failure is
            raised, so that the group is retried or left out: a broken grader says nothing about the policy.
        config: options of the subclass that it does not name itself.
    """

    def __init__(
        self, weight: float = 1.0, name: str | None = None, zero_on_error: bool = False, **config: Any
    ) -> None:
        self.weight = weight
        self.zero_on_error = zero_on_error
        self.config = config
        self.wandb_logger: Any = None
        self._name = name

    @property
    def name(self) -> str:
        """Name in metrics."""
        return self._name or type(self).__name__.lower()

    @abstractmethod
    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One reward for each completion, without the weight.

        Args:
            completions: texts, messages, or lists of messages; get_content reads any of them.
            kwargs: what the environment knows about the item: solution, ground_truth, ...
        """

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One weighted reward for each completion.

        Raises:
            RolloutError: compute failed, and zero_on_error is not set.
        """
        raw = self.raw_rewards(completions, **kwargs)
        weighted = [reward * self.weight for reward in raw]
        self.log_metrics(raw, weighted)
        return weighted

    def raw_rewards(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """What compute gives, checked: one finite number for each completion.

        Raises:
            RolloutError: compute failed, and zero_on_error is not set. Our own errors pass through as they are.
        """
        try:
            return self._checked(self.compute(completions, **kwargs), len(completions))
        # The author's code may fail in any way; whichever, it is not the policy's doing.
        except Exception as error:
            if self.zero_on_error:
                log.warning("reward %r failed, zero_on_error pays 0.0", self.name, exc_info=True)
                return [0.0] * len(completions)
            if isinstance(error, AtroposError):
                raise
            raise RolloutError(
                f"reward {self.name!r} failed: {type(error).__name__}: {error}; "
                "mend it, or set zero_on_error=True to pay 0.0 instead"
            ) from error

    def set_wandb_logger(self, logger: Any) -> None:
        """Log the rewards of every call to `logger.log(metrics)`; None stops it."""
        self.wandb_logger = logger

    def log_metrics(self, raw_rewards: Sequence[float], weighted_rewards: Sequence[float]) -> None:
        """Log mean_raw, mean_weighted, and min and max of what was paid, under `reward/<name>/`."""
        if self.wandb_logger is None or not raw_rewards:
            return
        metrics = {
            "mean_raw": sum(raw_rewards) / len(raw_rewards),
            "mean_weighted": sum(weighted_rewards) / len(weighted_rewards),
            "min": min(weighted_rewards),
            "max": max(weighted_rewards),
        }
        self.wandb_logger.log({f"reward/{self.name}/{key}": value for key, value in metrics.items()})

    @staticmethod
    def get_content(completion: Any) -> str:
        """The text of a completion: a text, an assistant message, a choice with its message, or a list of messages.

        Returns:
            The first assistant message's text; "" where there is none.
        """
        if isinstance(completion, str):
            return completion
        if isinstance(completion, dict):
            if completion.get("role") == "assistant":
                return _text(completion.get("content"))
            message = completion.get("message")
            return _text(message.get("content")) if isinstance(message, dict) else ""
        if isinstance(completion, (list, tuple)):
            for message in completion:
                if isinstance(message, dict) and message.get("role") == "assistant":
                    return _text(message.get("content"))
        return ""

    def _checked(self, rewards: Sequence[float], n_completions: int) -> list[float]:
        values = [float(reward) for reward in rewards]
        if len(values) != n_completions:
            raise ValueError(f"{len(values)} rewards for {n_completions} completions")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"a reward is not finite: {values}")
        return values


def _text(content: Any) -> str:
    """The text of a message's content; of a list of parts, those that are text."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
