"""Instructions whose fulfilment a program can check."""

from environments.instruction_following.env import (
    Instruction,
    InstructionFollowingConfig,
    InstructionFollowingEnv,
)

__all__ = ["Instruction", "InstructionFollowingConfig", "InstructionFollowingEnv"]
