"""`python -m environments.tool_calling serve|process|evaluate`."""

from environments.tool_calling.env import ToolCallingEnv

if __name__ == "__main__":
    ToolCallingEnv.cli()
