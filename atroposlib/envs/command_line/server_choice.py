"""Which inference servers an environment uses: its defaults, changed by a file and by flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from atroposlib.envs.command_line.usage import UsageError, validate
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline

Servers: TypeAlias = ServerBaseline | list[APIServerConfig]
"""A bare APIServerConfig means one server; a plain ServerBaseline, servers on the usual local ports."""


def server_class(default: Servers | None) -> type[APIServerConfig]:
    """The config class of the servers; an environment's own class is kept."""
    first = default[0] if isinstance(default, Sequence) and default else default
    return type(first) if isinstance(first, APIServerConfig) else APIServerConfig


def resolve_servers(
    default: Servers | None, from_file: Any, from_flags: Mapping[str, Any], *, namespace: str = "openai"
) -> Servers | None:
    """The inference servers.

    A file that lists several servers replaces the default. Otherwise file and flags change the default: with a
    base_url they mean exactly one server, without one they change every server.

    Raises:
        UsageError: flags beside a file of several servers, or a bad value.
    """
    cls, prefix = server_class(default), f"--{namespace}."
    if isinstance(from_file, list) and len(from_file) > 1:
        if from_flags:
            raise UsageError(
                f"{prefix}* cannot say which of the file's servers it means", f"edit the file's section {namespace}"
            )
        return [validate(cls, server, f"{namespace}.") for server in from_file]
    first = from_file[0] if isinstance(from_file, list) and from_file else from_file
    changes = {**(first or {}), **from_flags}
    if not changes:
        return default
    if default is None:
        return [validate(cls, changes, prefix)]
    if isinstance(default, ServerBaseline):
        return _changed(default, changes, prefix)
    kept = default[:1] if changes.get("base_url") else default
    return [validate(type(server), {**server.model_dump(), **changes}, prefix) for server in kept]


def _changed(default: ServerBaseline, changes: Mapping[str, Any], prefix: str) -> Servers:
    values = {**default.model_dump(), **changes}
    if isinstance(default, APIServerConfig):
        return validate(type(default), values, prefix)
    if changes.get("base_url"):
        return [validate(APIServerConfig, values, prefix)]
    return validate(type(default), values, prefix)
