"""Word problems whose groups carry a teacher's logprobs."""

from environments.teacher_distillation.env import WordProblemsConfig, WordProblemsTeacherEnv

__all__ = ["WordProblemsConfig", "WordProblemsTeacherEnv"]
