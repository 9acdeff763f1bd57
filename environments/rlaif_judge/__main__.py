"""`python -m environments.rlaif_judge serve|process|evaluate`."""

from environments.rlaif_judge.env import RlaifJudgeEnv

if __name__ == "__main__":
    RlaifJudgeEnv.cli()
