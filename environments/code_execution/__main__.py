"""python -m environments.code_execution serve|process|evaluate."""

from environments.code_execution.env import CodeExecutionEnv

if __name__ == "__main__":
    CodeExecutionEnv.cli()
