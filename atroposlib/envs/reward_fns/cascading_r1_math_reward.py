"""Pays for the right answer, and only then for the form."""

from __future__ import annotations

import re
from typing import Any

from atroposlib.envs.reward_fns.accuracy_reward import AccuracyReward
from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction

FORMAT_REWARD = 0.5
_FORM = re.compile(r"^<think>[^<]*</think>[^<]*$")


def cascading_r1_math_reward(completions: list[Any], solution: Any = None, **kwargs: Any) -> list[float]:
    """1.0 for the right answer, and 0.5 more when the reply is one thinking block and then the answer."""
    accuracies = AccuracyReward()(completions, solution=solution, **kwargs)
    texts = [RewardFunction.get_content(completion) for completion in completions]
    return [
        accuracy + FORMAT_REWARD * float(accuracy > 0 and _FORM.match(text) is not None)
        for accuracy, text in zip(accuracies, texts, strict=True)
    ]


registry.register_function("cascading_r1_math", cascading_r1_math_reward)
