"""python -m environments.gsm8k serve|process|evaluate."""

from environments.gsm8k.env import GSM8KEnv

if __name__ == "__main__":
    GSM8KEnv.cli()
