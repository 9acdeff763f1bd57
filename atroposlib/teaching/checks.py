"""Arguments of the documented methods: types before values, each error with what was expected."""

from __future__ import annotations

from atroposlib.teaching.argument_types import check_text, wrong_type
from atroposlib.teaching.diagnosis import DiagnosticResult
from atroposlib.teaching.errors import TeachingValueError

LEAST_PROBE_TOKENS = 1
LEAST_GUIDANCE_TOKENS = 10


def check_probe_arguments(task: object, max_tokens: object) -> None:
    """Of diagnostic_probe.

    Raises:
        TypeError, ValueError: what is wrong.
    """
    _check_types(task, max_tokens)
    _check_values(task, max_tokens, least=LEAST_PROBE_TOKENS)


def check_guidance_arguments(task: object, diagnostic: object, max_tokens: object) -> None:
    """Of generate_guidance.

    Raises:
        TypeError, ValueError: what is wrong.
    """
    _check_types(task, max_tokens)
    if diagnostic is not None and not isinstance(diagnostic, DiagnosticResult):
        raise wrong_type("diagnostic", diagnostic, "a DiagnosticResult")
    _check_values(task, max_tokens, least=LEAST_GUIDANCE_TOKENS)
    if diagnostic is None:
        raise TeachingValueError("diagnostic must not be None: pass what diagnostic_probe returned")


def _check_types(task: object, max_tokens: object) -> None:
    check_text("task", task)
    # No NumPy number: it goes into the JSON of a request.
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise wrong_type("max_tokens", max_tokens, "a whole number")


def _check_values(task: object, max_tokens: object, *, least: int) -> None:
    if not str(task).strip():
        raise TeachingValueError("task must not be empty: give the problem that the student is to solve")
    if isinstance(max_tokens, int) and max_tokens < least:
        raise TeachingValueError(f"max_tokens={max_tokens} must be at least {least}")
