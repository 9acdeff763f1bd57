"""`python -m environments.multimodal serve|process|evaluate`."""

from environments.multimodal.env import CountSquaresEnv

if __name__ == "__main__":
    CountSquaresEnv.cli()
