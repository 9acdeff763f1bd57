"""What --help of an environment prints: every option with its type, default and meaning, and commands to paste."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel

from atroposlib.envs.command_line.options import Defaults, RootOptions
from atroposlib.envs.command_line.server_choice import Servers, server_class
from atroposlib.envs.command_line.usage import describe, type_name
from atroposlib.envs.constants import NAMESPACE_SEP, OPENAI_NAMESPACE

MAX_DEFAULT_CHARACTERS = 120


def usage(script: str, modes: Mapping[str, str]) -> str:
    """The first line, and what each mode does."""
    return "\n".join(
        [
            f"usage: python {script} {{{'|'.join(modes)}}} [options]",
            "",
            "commands:",
            *(f"  {mode:<10} {meaning}" for mode, meaning in modes.items()),
            "",
            f"python {script} --help lists every option",
        ]
    )


def help_text(script: str, summary: str, modes: Mapping[str, str], defaults: Defaults) -> str:
    """The whole help of an environment.

    Args:
        script: name of its file.
        summary: one line on what it does; may be empty.
        defaults: shown beside each option.
    """
    lines = [
        f"usage: python {script} {{{'|'.join(modes)}}} [options]",
        *(["", summary] if summary else []),
        "",
        "commands:",
        *(f"  {mode:<10} {meaning}" for mode, meaning in modes.items()),
        "",
        "general options:",
        *_option_lines(RootOptions(), ""),
        "",
        "environment options, with or without the prefix env. (--group_size 8 or --env.group_size 8):",
        *_option_lines(defaults.env, ""),
        "",
        "inference server options:",
        *_option_lines(_shown_server(defaults.servers), OPENAI_NAMESPACE + NAMESPACE_SEP),
        *_pool_lines(defaults),
        "",
        "Values: --name value or --name=value; lists take several words; None means absent. Flags win over --config FILE,",
        "the file over the environment's own defaults.",
        f"The file has the sections {', '.join(f'{name}:' for name in defaults.namespaces if name)}, see --dry-run.",
        "",
        "examples:",
        *_examples(script),
    ]
    return "\n".join(lines)


def command_help(script: str, mode: str, command: type[BaseModel]) -> str:
    """The help of a command class that an environment brings."""
    lines = [f"usage: python {script} {mode} [options]", "", "options:"]
    for name, info in command.model_fields.items():
        default = "" if info.is_required() else f"(default: {_shown(info.get_default(call_default_factory=True))})"
        lines.append(f"  --{name} {type_name(info.annotation)}")
        lines.append(" " * 8 + " ".join(filter(None, (describe(command, name), default))))
    return "\n".join(lines)


def _pool_lines(defaults: Defaults) -> list[str]:
    return [
        line
        for name, servers in defaults.pools.items()
        for line in ("", f"{name} server options:", *_option_lines(_shown_server(servers), name + NAMESPACE_SEP))
    ]


def _examples(script: str) -> list[str]:
    server = "--openai.base_url http://localhost:9001/v1"
    return [
        f"  python {script} serve --rollout_server_url http://localhost:8000 {server}",
        f"  python {script} process --total_steps 10 --data_path_to_save_groups groups.jsonl {server}",
        f"  python {script} process --total_steps 10 --data_path_to_save_groups groups.jsonl {server} --resume",
        f"  python {script} evaluate --data_dir_to_save_evals evals {server}",
        f"  python {script} serve --config env.yaml --group_size 16 --dry-run",
    ]


def _shown_server(servers: Servers | None) -> BaseModel:
    """One server with the defaults that all have; with several, the first."""
    first = servers[0] if isinstance(servers, list) and servers else servers
    cls = server_class(servers)
    # Not validated again: what is shown is what is there.
    return cls.model_construct(**(first.model_dump() if isinstance(first, BaseModel) else {}))


def _option_lines(model: BaseModel, prefix: str) -> list[str]:
    lines = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        default = "set" if name == "api_key" and value else _shown(value)
        lines.append(f"  --{prefix}{name} {type_name(info.annotation)}")
        meaning = describe(type(model), name)
        lines.append(" " * 8 + (f"{meaning} " if meaning else "") + f"(default: {default})")
    return lines


def _shown(default: Any) -> str:
    """As it would be typed. Prompts are options too, so it is cut."""
    text = str(default.value) if isinstance(default, Enum) else repr(default)
    return text if len(text) <= MAX_DEFAULT_CHARACTERS else f"{text[:MAX_DEFAULT_CHARACTERS]}..."
