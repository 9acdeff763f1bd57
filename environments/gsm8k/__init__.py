"""Grade-school word problems in the format of GSM8K: reason first, then `#### answer`."""

from environments.gsm8k.env import GSM8KConfig, GSM8KEnv, Problem

__all__ = ["GSM8KConfig", "GSM8KEnv", "Problem"]
