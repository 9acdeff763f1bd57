"""Options of an environment: from the command line, a YAML file and config_init() to one checked configuration."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.constants import ENV_NAMESPACE, NAMESPACE_SEP, OPENAI_NAMESPACE
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from atroposlib.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Servers = ServerBaseline | list[APIServerConfig]


class UsageError(ConfigError):
    """The command line or the YAML file cannot be understood."""

    code: ClassVar[str] = "usage"

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


class RootOptions(BaseModel):
    """Options that belong to the command itself."""

    config: Path | None = Field(default=None, description="YAML file with sections env and openai; flags win over it.")
    dry_run: bool = Field(default=False, description="Print the resolved configuration as YAML and stop.")
    slurm: bool = Field(default=False, description="Passed to the environment's constructor.")
    testing: bool = Field(default=False, description="Passed to the environment's constructor.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe message to show."
    )


@dataclass(frozen=True)
class Resolved:
    """What the environment is built from."""

    root: RootOptions
    env: BaseEnvConfig
    servers: Servers

    def as_yaml(self) -> str:
        """The same again as a file for --config."""
        servers = self.servers if isinstance(self.servers, list) else [self.servers]
        sections = {
            ENV_NAMESPACE: self.env.model_dump(mode="json"),
            OPENAI_NAMESPACE: [server.model_dump(mode="json") for server in servers],
            "slurm": self.root.slurm,
            "testing": self.root.testing,
        }
        text: str = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
        return text


@dataclass
class Flags:
    """Raw values given on the command line, by namespace and field."""

    root: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    openai: dict[str, Any] = field(default_factory=dict)


def resolve(env_cls: type[BaseEnv], argv: Sequence[str], *, mode_defaults: Mapping[str, Any]) -> Resolved:
    """Flags win over the YAML file, the file over mode_defaults, those over config_init().

    Raises:
        UsageError: an unknown name, a bad value, an unreadable file.
    """
    default_env, default_servers = env_cls.config_init()
    flags = parse_flags(argv, type(default_env))
    root = validate(RootOptions, flags.root, "--")
    sections = read_yaml(root.config, type(default_env)) if root.config else {}
    env_values = {**default_env.model_dump(), **mode_defaults, **sections.get(ENV_NAMESPACE, {}), **flags.env}
    root = root.model_copy(
        update={name: sections[name] for name in ("slurm", "testing") if name in sections and name not in flags.root}
    )
    return Resolved(
        root=root,
        env=validate(type(default_env), env_values, "--"),
        servers=resolve_servers(default_servers, sections.get(OPENAI_NAMESPACE), flags.openai),
    )


def parse_flags(argv: Sequence[str], env_config_cls: type[BaseEnvConfig]) -> Flags:
    """Sort `--name value...` and `--name=value` into namespaces; a bare name is a root option or a field of env."""
    flags = Flags()
    homes: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
        "": (RootOptions, flags.root),
        ENV_NAMESPACE: (env_config_cls, flags.env),
        OPENAI_NAMESPACE: (APIServerConfig, flags.openai),
    }
    for name, values in _words(argv):
        namespace, _, key = name.rpartition(NAMESPACE_SEP)
        if not namespace and key not in RootOptions.model_fields:
            namespace = ENV_NAMESPACE
        if namespace not in homes or key not in homes[namespace][0].model_fields:
            known = [
                NAMESPACE_SEP.join(filter(None, (space, field)))
                for space, (model, _) in homes.items()
                for field in model.model_fields
            ]
            raise UsageError(
                f"unknown option --{name}", _nearest(name, [*known, *env_config_cls.model_fields], prefix="--")
            )
        model, given = homes[namespace]
        given[key] = _value(name, values, model.model_fields[key].annotation)
    return flags


def read_yaml(path: Path, env_config_cls: type[BaseEnvConfig]) -> dict[str, Any]:
    """The sections of a configuration file, every key known.

    Raises:
        UsageError: no file, no YAML, an unknown key.
    """
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise UsageError(f"{path} must hold the sections env and openai, holds a {type(sections).__name__}")
    _known_keys(sections, [ENV_NAMESPACE, OPENAI_NAMESPACE, "slurm", "testing"], str(path))
    env = sections.get(ENV_NAMESPACE) or {}
    openai = sections.get(OPENAI_NAMESPACE)
    _known_keys(env, env_config_cls.model_fields, f"{path}: {ENV_NAMESPACE}")
    for server in openai if isinstance(openai, list) else [openai or {}]:
        # Upstream's example files carry a weight for each server.
        _known_keys(server, [*APIServerConfig.model_fields, "weight"], f"{path}: {OPENAI_NAMESPACE}")
    return {**sections, ENV_NAMESPACE: env}


def resolve_servers(default: Servers, from_file: Any, from_flags: Mapping[str, Any]) -> Servers:
    """The inference servers.

    A file that lists several servers replaces the default. Otherwise file and flags change the default: with a
    base_url they mean exactly one server, without one they change every server.
    """
    if isinstance(from_file, list) and len(from_file) > 1:
        if from_flags:
            raise UsageError(
                "--openai.* cannot say which of the file's servers it means", "edit the openai section of the file"
            )
        return [validate(APIServerConfig, server, "openai.") for server in from_file]
    first = from_file[0] if isinstance(from_file, list) and from_file else from_file
    changes = {**(first or {}), **from_flags}
    if not changes:
        return default
    if not isinstance(default, list):
        shared = {**default.model_dump(), **changes}
        if isinstance(default, APIServerConfig):
            return validate(APIServerConfig, shared, "--openai.")
        return (
            [validate(APIServerConfig, shared, "--openai.")]
            if changes.get("base_url")
            else validate(ServerBaseline, shared, "--openai.")
        )
    kept = default[:1] if changes.get("base_url") else default
    return [validate(APIServerConfig, {**server.model_dump(), **changes}, "--openai.") for server in kept]


def validate(model: type[M], values: Mapping[str, Any], prefix: str) -> M:
    """Build the model; its complaints in the words of the command line."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        description = describe(model, str(first["loc"][0])) if first["loc"] else ""
        hint = f"{prefix}{name}: {description}" if description else None
        text = f"{prefix}{name} {first['input']!r}: {first['msg']}" if name else first["msg"]
        raise UsageError(text, hint) from error


def _words(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values. A value may start with one dash, so negative numbers need no special spelling."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--") or word == "--":
            raise UsageError(f"unexpected argument {word!r}", "options look like --group_size 8")
        name, equals, value = word[2:].partition("=")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield name.replace("-", "_"), values


def _value(name: str, values: list[str], annotation: Any) -> Any:
    kinds = [get_origin(kind) or kind for kind in _alternatives(annotation)]
    is_list = any(kind in (list, tuple, set) for kind in kinds)
    if not values:
        if bool in kinds:
            return True
        raise UsageError(f"--{name} needs a value", f"--{name} {'A B C' if is_list else 'VALUE'}")
    if type(None) in kinds and values in (["None"], ["null"], ["none"]):
        return None
    if is_list and not (len(values) == 1 and values[0].startswith("[")):
        return values
    if len(values) > 1:
        raise UsageError(f"--{name} takes one value, got {values}", f"quote it: --{name} '{' '.join(values)}'")
    if is_list or dict in kinds:
        try:
            return yaml.safe_load(values[0])
        except yaml.YAMLError as error:
            raise UsageError(f"--{name}: {values[0]!r} is neither JSON nor YAML") from error
    return values[0]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _known_keys(section: Any, known: Any, where: str) -> None:
    if not isinstance(section, dict):
        raise UsageError(f"{where} must be a mapping of names to values, is {type(section).__name__}")
    for key in section:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}", _nearest(str(key), list(known)))


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else "--help lists every option"


def describe(model: type[BaseModel], name: str) -> str:
    """What a field means. A subclass that only gives a new default keeps its base's words."""
    fields = (cls.model_fields.get(name) for cls in model.__mro__ if issubclass(cls, BaseModel))
    return next((info.description for info in fields if info is not None and info.description), "")


def type_name(annotation: Any) -> str:
    """A type as --help shows it."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(member.value) for member in annotation)
    parts = _alternatives(annotation)
    if len(parts) > 1:
        return "|".join(type_name(part) for part in parts)
    if annotation is type(None):
        return "None"
    origin = get_origin(annotation)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(part) for part in get_args(annotation))}]"
    return getattr(annotation, "__name__", str(annotation))
