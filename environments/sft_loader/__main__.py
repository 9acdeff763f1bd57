"""python -m environments.sft_loader serve|process|evaluate."""

from environments.sft_loader.env import SFTLoaderEnv

if __name__ == "__main__":
    SFTLoaderEnv.cli()
