"""Mistakes on the command line and in YAML files, in the user's words; how options are described."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from atroposlib.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


class UsageError(ConfigError):
    """The command line or the YAML file cannot be understood."""

    code: ClassVar[str] = "usage"

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


def validate(model: type[M], values: Mapping[str, Any], prefix: str) -> M:
    """Build the model; its complaints in the words of the command line.

    Args:
        prefix: what stands before a field's name on the command line, e.g. `--openai.`.
    Raises:
        UsageError: a value is missing or of the wrong kind.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        description = describe(model, str(first["loc"][0])) if first["loc"] else ""
        hint = f"{prefix}{name}: {description}" if description else None
        # A class whose values may hold a password says so; pydantic hides them in its own text alone.
        shown = "" if model.model_config.get("hide_input_in_errors") else f" {first['input']!r}"
        text = f"{prefix}{name}{shown}: {first['msg']}" if name else first["msg"]
        raise UsageError(text, hint) from error


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint for a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else "--help lists every option"


def describe(model: type[BaseModel], name: str) -> str:
    """What a field means. A subclass that only gives a new default keeps its base's words."""
    fields = (cls.model_fields.get(name) for cls in model.__mro__ if issubclass(cls, BaseModel))
    return next((info.description for info in fields if info is not None and info.description), "")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def type_name(annotation: Any) -> str:
    """A type as --help shows it."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(member.value) for member in annotation)
    parts = alternatives(annotation)
    if len(parts) > 1:
        return "|".join(type_name(part) for part in parts)
    if annotation is type(None):
        return "None"
    origin = get_origin(annotation)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(part) for part in get_args(annotation))}]"
    return getattr(annotation, "__name__", str(annotation))
