"""The messages of old clients, parsed as leniently as ever, and refused in the form that FastAPI gives."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

B = TypeVar("B")
T = TypeVar("T")

Location = tuple[str | int, ...]

UNLIMITED_STEPS = 1 << 53
"""num_steps of a run whose trainer stated none; the largest integer that every JSON parser keeps."""
MAX_INT = UNLIMITED_STEPS
NAME_CHARACTERS = 180
"""Of a desired name; the rest is cut off."""
MAX_ERRORS = 100

_Int = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]


class OldMessage(BaseModel):
    """Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Registration(OldMessage):
    """What an old trainer sends."""

    batch_size: Annotated[int, Field(ge=1, le=MAX_INT)]
    """Sequences."""
    max_token_len: _Int
    checkpoint_dir: str
    save_checkpoint_interval: _Int
    starting_step: _Int
    num_steps: _Int
    """Below 1: as many as there is data for."""
    wandb_group: str | None = None
    wandb_project: str | None = None


class RegisterEnv(OldMessage):
    """What an old environment sends."""

    max_token_length: _Int
    group_size: _Int
    desired_name: str | None = None
    weight: float | None = None
    min_batch_allocation: float | None = None


class EnvIdentifier(OldMessage):
    """Which environment asks."""

    env_id: int


def parse(read: Callable[[B], T], body: B, location: Location = ("body",)) -> T:
    """What `read` makes of a body.

    Args:
        read: a pydantic `validate_json`, or anything else that raises its ValidationError.
        location: where the body stands in the request.
    Raises:
        RequestValidationError: with type, loc, msg and input of each error.
    """
    if not body:
        raise refusal("missing", location, "Field required", None)
    try:
        return read(body)
    except ValidationError as error:
        raise RequestValidationError(
            [
                {
                    "type": item["type"],
                    "loc": (*location, *item["loc"]),
                    "msg": item["msg"],
                    "input": _brief(item["input"]),
                }
                for item in error.errors(include_url=False, include_context=False)[:MAX_ERRORS]
            ]
        ) from error


def refusal(kind: str, location: Location, message: str, value: object) -> RequestValidationError:
    """A 422 answer with one error."""
    return RequestValidationError([{"type": kind, "loc": location, "msg": message, "input": _brief(value)}])


def _brief(value: Any) -> Any:
    """A bad big group must not make a big answer."""
    return value if value is None or isinstance(value, bool | int | float) else reprlib.repr(value)
