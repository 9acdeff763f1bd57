"""`python -m environments.number_game serve|process|evaluate`."""

from environments.number_game.env import NumberGameEnv

if __name__ == "__main__":
    NumberGameEnv.cli()
