"""Supervised data beside the rollouts of other environments."""

from environments.sft_loader.env import SFTLoaderConfig, SFTLoaderEnv

__all__ = ["SFTLoaderConfig", "SFTLoaderEnv"]
