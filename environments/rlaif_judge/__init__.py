"""Replies compared by a judge model instead of a reward function."""

from environments.rlaif_judge.env import RlaifJudgeConfig, RlaifJudgeEnv

__all__ = ["RlaifJudgeConfig", "RlaifJudgeEnv"]
