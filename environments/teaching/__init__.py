"""Short word problems of arithmetic on which the policy helps a frozen student."""

from environments.teaching.env import TeachingConfig, TeachingEnv

__all__ = ["TeachingConfig", "TeachingEnv"]
