"""Questions that take tools to answer: a calculator and a look-up in a catalogue."""

from environments.tool_calling.env import ToolCallingConfig, ToolCallingEnv

__all__ = ["ToolCallingConfig", "ToolCallingEnv"]
