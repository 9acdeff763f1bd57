"""What the protocol's methods raise: the documented built-in type, and one of ours at the same time."""

from __future__ import annotations

from atroposlib.errors import AtroposError, RolloutError


class TeachingTypeError(AtroposError, TypeError):
    """An argument of the wrong type."""

    code = "teaching_type"
    status = 400


class TeachingValueError(AtroposError, ValueError):
    """An argument of the right type, with an impossible value."""

    code = "teaching_value"
    status = 400


class StudentFailedError(RolloutError, RuntimeError):
    """The student could not be asked. No signal, so no reward."""

    code = "student_failed"


class TeacherFailedError(RolloutError, RuntimeError):
    """The teacher could not be asked, or said nothing."""

    code = "teacher_failed"
