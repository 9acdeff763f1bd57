"""Python functions written by the policy, run against tests in a sandbox."""

from environments.code_execution.env import CodeExecutionConfig, CodeExecutionEnv, Task

__all__ = ["CodeExecutionConfig", "CodeExecutionEnv", "Task"]
