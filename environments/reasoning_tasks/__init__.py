"""Any of reasoning-gym's tasks, one or several at a time."""

from environments.reasoning_tasks.env import ReasoningTasksConfig, ReasoningTasksEnv
from environments.reasoning_tasks.problems import Problem

__all__ = ["Problem", "ReasoningTasksConfig", "ReasoningTasksEnv"]
