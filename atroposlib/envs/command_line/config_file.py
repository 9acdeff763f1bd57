"""The YAML file of --config: its sections, and what in it is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from atroposlib.envs.command_line.flags import ROOT, Namespaces
from atroposlib.envs.command_line.usage import UsageError, nearest
from atroposlib.envs.constants import ENV_NAMESPACE

ALSO_KNOWN = frozenset({"weight"})
"""Upstream's example files carry a weight for each server."""


@dataclass(frozen=True)
class ConfigFile:
    """A file's sections by namespace, and warnings about what is ignored."""

    sections: Mapping[str, Any] = field(default_factory=dict)
    """A mapping each; the section of servers may be a list of mappings."""
    warnings: tuple[str, ...] = ()


def read_config_file(path: Path, namespaces: Namespaces) -> ConfigFile:
    """Read a file. Unknown keys are ignored, as upstream does, with a warning each.

    Args:
        namespaces: the model of each section; keys of ROOT stand at the file's top level.
    Raises:
        UsageError: no file, no YAML, a section of the wrong form.
    """
    content = _load(path)
    root_fields = namespaces[ROOT].model_fields
    names = [*filter(None, namespaces), *root_fields]
    warnings = _unknown(content, names, str(path))
    sections: dict[str, Any] = {ROOT: {key: value for key, value in content.items() if key in root_fields}}
    for namespace in filter(None, namespaces):
        section = content.get(namespace)
        sections[namespace] = {} if section is None else section
        parts = section if isinstance(section, list) and namespace != ENV_NAMESPACE else [sections[namespace]]
        for part in parts:
            where = f"{path}: {namespace}"
            _must_be_mapping(part, where)
            if not _takes_anything(namespaces[namespace]):
                warnings += _unknown(part, namespaces[namespace].model_fields, where)
    return ConfigFile(sections, tuple(warnings))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    # An empty file changes nothing.
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold the sections env and openai, holds a {type(content).__name__}")
    return content


def _must_be_mapping(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        raise UsageError(f"{where} must be a mapping of names to values, is {type(part).__name__}")


def _unknown(section: Mapping[Any, Any], known: Iterable[str], where: str) -> list[str]:
    names = list(known)
    return [
        f"{where}: unknown key {key!r} is ignored; {nearest(str(key), names)}"
        for key in section
        if key not in names and key not in ALSO_KNOWN
    ]


def _takes_anything(model: type[BaseModel]) -> bool:
    return model.model_config.get("extra") == "allow"
