"""python -m environments.reasoning_tasks serve|process|evaluate."""

from environments.reasoning_tasks.env import ReasoningTasksEnv

if __name__ == "__main__":
    ReasoningTasksEnv.cli()
