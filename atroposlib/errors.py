"""The exception tree: every error that this project raises on purpose, and the HTTP status each one travels as."""

from __future__ import annotations

from typing import ClassVar


class AtroposError(Exception):
    """Base of all our errors. The text carries the facts and the fix."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500


class ConfigError(AtroposError):
    """A configuration value is missing, unknown or contradicts another."""

    code = "config"
    status = 400


class DataError(ConfigError):
    """A data set cannot be used: a file, row or column is not as it should be. Names the file and the line."""

    code = "data"


class ProtocolError(AtroposError):
    """A message breaks the wire contract. The request changed nothing."""

    code = "protocol"
    status = 422


class GroupFormatError(ProtocolError):
    """A group's columns do not fit together, or one of them holds an impossible value."""

    code = "group_format"


class NoRunError(AtroposError):
    """No trainer has registered a run yet."""

    code = "no_run"
    status = 409


class UnknownEnvError(AtroposError):
    """The environment id or session is not known to this server: register again."""

    code = "unknown_env"
    status = 409


class FencedError(AtroposError):
    """A newer trainer took the run over; this one must stop."""

    code = "fenced"
    status = 409


class StepError(AtroposError):
    """The step asked for is not the one this run can serve."""

    code = "step"
    status = 409


class QueueFullError(AtroposError):
    """The server holds as much as it may; try again later."""

    code = "queue_full"
    status = 429


class OverloadedError(AtroposError):
    """The server has too many request bytes in flight; try again later."""

    code = "overloaded"
    status = 429


class UnauthenticatedError(AtroposError):
    """No bearer token, or one that the server does not know."""

    code = "unauthenticated"
    status = 401


class ForbiddenError(AtroposError):
    """The token's role, or the page that the request comes from, may not do this."""

    code = "forbidden"
    status = 403


class MisdirectedError(AtroposError):
    """The Host header names another machine than the one this server is open on."""

    code = "misdirected"
    status = 421


class BodyTooLargeError(ProtocolError):
    """The request body is larger than the server takes."""

    code = "body_too_large"
    status = 413


class BodyTimeoutError(ProtocolError):
    """The request body did not arrive in time."""

    code = "body_timeout"
    status = 408


class BodyEncodingError(ProtocolError):
    """The request body is cut short, or its content encoding is broken or not understood."""

    code = "body_encoding"
    status = 400


class MediaTypeError(ProtocolError):
    """The request body's content type is not the one of the route."""

    code = "media_type"
    status = 415


class StoreUnavailableError(AtroposError):
    """The rollout server's store did not answer within its deadline; nothing is known to be lost, try again later."""

    code = "store_unavailable"
    status = 503


class ServerUnreachableError(AtroposError):
    """The rollout server did not answer within the deadline."""

    code = "unreachable"
    status = 503


class RolloutError(AtroposError):
    """A rollout failed for reasons outside the policy (time-out, dead server): no reward, not a reward of 0."""

    code = "rollout"


class RolloutDeadlineError(RolloutError):
    """A group took longer than its deadline."""


class JudgesFailingError(RolloutError):
    """Judge models fail so often that rewards would say more about them than about the policy. The text says why."""


def infrastructure_error(error: BaseException) -> RolloutError | None:
    """The first RolloutError, where error is one, or a group (of a TaskGroup) of nothing else; otherwise None."""
    if isinstance(error, RolloutError):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    found = [infrastructure_error(member) for member in error.exceptions]
    return None if None in found else found[0]


class RunChangedError(AtroposError):
    """A group belongs to another run than the one that is open."""

    code = "run_changed"


class SpoolError(AtroposError):
    """The spool of undelivered groups cannot be used: it is full, or another process has it."""

    code = "spool"


class NoBatchError(AtroposError):
    """No batch came within the deadline. The text names what the server waits for."""

    code = "no_batch"

    def __init__(self, text: str, *, waiting_for: str = "") -> None:
        super().__init__(text)
        self.waiting_for = waiting_for
        """In the server's words; empty where it has not said."""


class ModelServerError(RolloutError):
    """An inference server refused or failed a request."""

    code = "inference"


class PromptLogprobsError(RolloutError, ValueError):
    """An inference server gave no logprobs of the prompt, or not in a form that can be read."""

    code = "prompt_logprobs"


class UnknownSessionError(AtroposError):
    """The session was deleted, or nobody used it for too long: open another one."""

    code = "unknown_session"
    status = 404


def _subclasses(cls: type[AtroposError]) -> list[type[AtroposError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _subclasses(child))]


def error_from_wire(code: str, detail: str, status: int) -> AtroposError:
    """Raise on the client what the server raised: the type by its code, the text unchanged."""
    # A type that only refines another travels as that one: the refinement is of the process that made it.
    by_code = {cls.code: cls for cls in _subclasses(AtroposError) if "code" in vars(cls)}
    cls = by_code.get(code)
    if cls is None:
        cls = ProtocolError if 400 <= status < 500 else AtroposError
    return cls(detail)
