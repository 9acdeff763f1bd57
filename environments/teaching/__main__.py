"""`python -m environments.teaching serve|process|evaluate`."""

from environments.teaching.env import TeachingEnv

if __name__ == "__main__":
    TeachingEnv.cli()
