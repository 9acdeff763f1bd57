"""Options of an environment: from the command line, a YAML file and config_init() to one checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.config_file import ConfigFile, read_config_file
from atroposlib.envs.command_line.flags import ROOT, Namespaces, Values, parse_flags
from atroposlib.envs.command_line.server_choice import Servers, resolve_servers, server_class
from atroposlib.envs.command_line.usage import UsageError, validate
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.constants import ENV_NAMESPACE, OPENAI_NAMESPACE
from atroposlib.envs.server_handling.server_baseline import ServerBaseline
from atroposlib.envs.server_pools import pools_of
from atroposlib.errors import ConfigError
from atroposlib.utils.cli import merge_dicts

__all__ = ["Defaults", "Resolved", "RootOptions", "UsageError", "resolve"]


class RootOptions(BaseModel):
    """Options that belong to the command itself."""

    config: Path | None = Field(default=None, description="YAML file with sections env and openai; flags win over it.")
    dry_run: bool = Field(default=False, description="Print the resolved configuration as YAML and stop.")
    resume: bool = Field(
        default=False,
        description="process: continue the file of an interrupted run. evaluate: skip the items that it finished.",
    )
    slurm: bool = Field(default=False, description="Find the inference servers from the SLURM variables.")
    testing: bool = Field(default=False, description="Replace the inference servers by a harness of canned answers.")
    max_n_completions: int = Field(default=8, ge=1, description="Chat requests for more choices than this are split.")
    proxy_url: str | None = Field(default=None, description="URL of the proxy for sessions of managed_server.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe message to show."
    )


@dataclass(frozen=True)
class Defaults:
    """What config_init and server_pools give, before file and flags."""

    env: BaseEnvConfig
    servers: Servers
    pools: Mapping[str, Servers | None]
    """Beside the policy's, by name."""

    @classmethod
    def of(cls, env_cls: type[BaseEnv]) -> Defaults:
        """The defaults of an environment class."""
        env, servers = env_cls.config_init()
        return cls(env, servers, pools_of(env_cls))

    def with_mode(self, mode_defaults: Mapping[str, Any]) -> Defaults:
        """The same with what a mode changes."""
        return replace(self, env=validate(type(self.env), {**_given(self.env), **mode_defaults}, "--"))

    @property
    def namespaces(self) -> Namespaces:
        """The model behind each prefix of the command line."""
        return {
            ROOT: RootOptions,
            ENV_NAMESPACE: type(self.env),
            OPENAI_NAMESPACE: server_class(self.servers),
            **{name: server_class(servers) for name, servers in self.pools.items()},
        }


@dataclass(frozen=True)
class Resolved:
    """What the environment is built from."""

    root: RootOptions
    env: BaseEnvConfig
    servers: Servers
    pools: Mapping[str, Servers | None] = field(default_factory=dict)
    """Beside the policy's, by name; None: nobody has said where it is."""
    warnings: tuple[str, ...] = ()
    """About the file; for stderr."""

    def as_yaml(self) -> str:
        """The same again as a file for --config, without the API keys."""
        shared = ("slurm", "testing", "max_n_completions", "proxy_url")
        sections = {
            ENV_NAMESPACE: self.env.model_dump(mode="json", fallback=str),
            OPENAI_NAMESPACE: _dump_servers(self.servers),
            **{name: _dump_servers(servers) for name, servers in self.pools.items() if servers},
            **{name: getattr(self.root, name) for name in shared},
        }
        text: str = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
        return text


def resolve(env_cls: type[BaseEnv], argv: Sequence[str], *, mode_defaults: Mapping[str, Any]) -> Resolved:
    """Flags win over the YAML file, the file over mode_defaults, those over config_init().

    Raises:
        UsageError: an unknown flag, a bad value, an unreadable file.
    """
    defaults = Defaults.of(env_cls)
    return resolve_values(defaults, parse_flags(argv, defaults.namespaces), mode_defaults=mode_defaults)


def resolve_values(defaults: Defaults, flags: Values, *, mode_defaults: Mapping[str, Any]) -> Resolved:
    """As resolve, from flags that are already parsed."""
    root = validate(RootOptions, flags[ROOT], "--")
    file = read_config_file(root.config, defaults.namespaces) if root.config else ConfigFile()
    sections = {ROOT: {}, **file.sections}
    below = {**_given(defaults.env), **mode_defaults}
    merged = _with_section(below, sections.get(ENV_NAMESPACE, {}), current={**dict(defaults.env), **below})
    env_values = {**merged, **flags[ENV_NAMESPACE]}
    servers = resolve_servers(defaults.servers, sections.get(OPENAI_NAMESPACE), flags[OPENAI_NAMESPACE])
    if servers is None:
        raise ConfigError("config_init() must return (config, servers); servers is None")
    return Resolved(
        root=validate(RootOptions, {**sections[ROOT], **flags[ROOT]}, "--"),
        env=validate(type(defaults.env), env_values, "--"),
        servers=servers,
        pools={
            name: resolve_servers(default, sections.get(name), flags[name], namespace=name)
            for name, default in defaults.pools.items()
        },
        warnings=file.warnings,
    )


def _given(config: BaseModel) -> dict[str, Any]:
    """The fields that were set. The others keep the class's defaults, which pydantic does not check."""
    return {**{name: getattr(config, name) for name in config.model_fields_set}, **(config.model_extra or {})}


def _with_section(
    given: Mapping[str, Any], section: Mapping[str, Any], *, current: Mapping[str, Any]
) -> dict[str, Any]:
    """What is given with a file's over it; a mapping in the file changes the keys that it names, not the whole field.

    Args:
        current: every field's value, given or not.
    """
    opened = {
        name: _with_section(value.model_dump(exclude_unset=True), part, current=dict(value))
        for name, part in section.items()
        if isinstance(part, dict) and isinstance(value := current.get(name), BaseModel)
    }
    return merge_dicts({**given, **opened}, section)


def _dump_servers(servers: Servers) -> list[dict[str, Any]]:
    listed = [servers] if isinstance(servers, ServerBaseline) else servers
    # A key that is set is a secret, and these lines end up in logs and in folders that are shared.
    secrets = [{"api_key"} if getattr(server, "api_key", None) else set() for server in listed]
    return [
        server.model_dump(mode="json", exclude=hidden, fallback=str)
        for server, hidden in zip(listed, secrets, strict=True)
    ]
