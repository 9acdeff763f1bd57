"""Questions about small pictures."""

from environments.multimodal.env import CountSquaresConfig, CountSquaresEnv

__all__ = ["CountSquaresConfig", "CountSquaresEnv"]
