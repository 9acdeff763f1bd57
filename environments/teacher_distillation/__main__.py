"""`python -m environments.teacher_distillation serve|process|evaluate`."""

from environments.teacher_distillation.env import WordProblemsTeacherEnv

if __name__ == "__main__":
    WordProblemsTeacherEnv.cli()
