"""A game of several turns: find a hidden number from the replies higher and lower."""

from environments.number_game.env import NumberGameConfig, NumberGameEnv

__all__ = ["NumberGameConfig", "NumberGameEnv"]
