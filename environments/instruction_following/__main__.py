"""python -m environments.instruction_following serve|process|evaluate."""

from environments.instruction_following.env import InstructionFollowingEnv

if __name__ == "__main__":
    InstructionFollowingEnv.cli()
