"""RIM by the name `rim` in the registry of reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.reward import RIMReward
from atroposlib.rim.trajectory import from_columns


@registry.register(name="rim")
class RIMRewardFunction(RewardFunction):
    """Pays what the judges say. Needs `prompts`; other columns as RIMReward takes them.

    Call it outside an event loop, or through an environment's run_blocking(); in a loop await RIMReward.score().

    Args:
        rim: a RIMConfig, or the keys of one.
        preset: whose judges are active where `rim` names neither judges nor a preset.
    Raises:
        ConfigError: the config is wrong, or zero_on_error is set.
    """

    def __init__(self, rim: RIMConfig | Mapping[str, Any], preset: str = "offline", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.zero_on_error:
            raise ConfigError(
                "the reward rim pays no 0 where judges fail; leave zero_on_error out, the group is left out then"
            )
        self.reward = RIMReward(rim if isinstance(rim, RIMConfig) else RIMConfig.read({"preset": preset, **rim}))

    @property
    def name(self) -> str:
        """`reward_log_name` of the config unless another name was given."""
        return self._name or self.reward.config.reward_log_name

    def compute(self, completions: list[Any], prompts: Any = None, **kwargs: Any) -> list[float]:
        """One reward for each completion.

        Raises:
            ConfigError: there are no prompts, or an event loop is running.
            RolloutError: a completion could not be judged.
        """
        if prompts is None:
            raise ConfigError("the reward rim judges answers to prompts; call it with prompts=[...]")
        given = [prompts] * len(completions) if isinstance(prompts, str) else prompts
        results = self.reward.score_blocking(from_columns(given, completions, kwargs))
        for result in results:
            if result.score is None:
                raise RolloutError(f"no judge could score a completion: {'; '.join(result.reasons)}")
        return [result.score for result in results if result.score is not None]

    def log_metrics(self, raw_rewards: Sequence[float], weighted_rewards: Sequence[float]) -> None:
        """Also log what RIMReward.take_metrics and take_explanations give."""
        super().log_metrics(raw_rewards, weighted_rewards)
        if self.wandb_logger is not None:
            self.wandb_logger.log({**self.reward.take_metrics(), **self.reward.take_explanations()})
