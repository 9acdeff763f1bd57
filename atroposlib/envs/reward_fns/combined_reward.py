"""A reward made of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

Normalization = Literal["none", "sum", "minmax"]


@registry.register
class CombinedReward(RewardFunction):
    """The weighted sum of other rewards.

    Args:
        rewards: names, configs (as of registry.create) or instances.
        normalization: "none"; "sum" divides by the sum of the weights; "minmax" stretches the rewards of one call
            to 0...1 (all 0.0 where they are equal).
        ignore_weights: add the rewards up as if each weighed 1, as Atropos 0.4.0 does; "sum" divides by the weights
            all the same.
    Raises:
        ConfigError: there is nothing to combine, a reward is unknown, or the weights of "sum" add up to 0.
    """

    def __init__(
        self,
        rewards: Sequence[str | Mapping[str, Any] | RewardFunction],
        normalization: Normalization = "none",
        ignore_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not rewards:
            raise ConfigError("CombinedReward needs at least one reward, e.g. rewards=['accuracy', 'format']")
        if normalization not in get_args(Normalization):
            raise ConfigError(f"normalization={normalization!r} is unknown; expected none, sum or minmax")
        self.normalization = normalization
        self.ignore_weights = ignore_weights
        self.reward_functions = [
            reward if isinstance(reward, RewardFunction) else registry.create(reward) for reward in rewards
        ]
        self.total_weight = sum(reward.weight for reward in self.reward_functions)
        if normalization == "sum" and self.total_weight == 0:
            raise ConfigError("normalization='sum' divides by the sum of the weights, which is 0; change a weight")

    @property
    def name(self) -> str:
        """combined(a,b) unless another was given."""
        return self._name or f"combined({','.join(reward.name for reward in self.reward_functions)})"

    def set_wandb_logger(self, logger: Any) -> None:
        """Log the parts too."""
        super().set_wandb_logger(logger)
        for reward in self.reward_functions:
            reward.set_wandb_logger(logger)

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Add the parts up and normalise."""
        totals = [0.0] * len(completions)
        for reward in self.reward_functions:
            raw = reward.raw_rewards(completions, **kwargs)
            weighted = [value * reward.weight for value in raw]
            reward.log_metrics(raw, weighted)
            totals = [
                total + part for total, part in zip(totals, raw if self.ignore_weights else weighted, strict=True)
            ]
        return self._normalised(totals)

    def _normalised(self, totals: list[float]) -> list[float]:
        if self.normalization == "sum":
            return [total / self.total_weight for total in totals]
        if self.normalization == "minmax" and totals:
            low, span = min(totals), max(totals) - min(totals)
            return [(total - low) / span if span else 0.0 for total in totals]
        return totals
