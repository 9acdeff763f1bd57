"""The whole configuration of a run as YAML, each option with its origin; kept beside what comes of it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from atroposlib.errors import ConfigError
from trainer.config.fingerprint import is_secret
from trainer.methods import method_of

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig
    from trainer.supervised.config import DatasetTrainingConfig

    AnyConfig = GRPOConfig | DatasetTrainingConfig

RESOLVED_CONFIG = "trainer_resolved.yaml"
"""Every option of the run with its origin, in run_dir."""


def keep(config: AnyConfig) -> None:
    """Write the resolved configuration beside what comes of it, in RESOLVED_CONFIG.

    Raises:
        ConfigError: run_dir cannot be written.
    """
    path = Path(config.run_dir) / RESOLVED_CONFIG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{describe(config, config.origins)}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r} cannot be written: {error.strerror}") from error


def describe(config: AnyConfig, origins: dict[str, str]) -> str:
    """The whole configuration as YAML, each key with where its value comes from.

    Args:
        origins: of the keys that were set, dotted inside a group.
    """
    method = method_of(config)
    schema = method.schema
    lines = [_line("method", method.name, origins.get("method"))]
    for key in schema.keys:
        value = getattr(config, key)
        if key not in schema.groups:
            lines.append(_line(key, value, origins.get(key)))
            continue
        prefix = f"{key}." if key in schema.named_groups else ""
        # Written once, where the method has it: see Schema.nested.
        inner = [name for name in schema.groups[key] if prefix or name not in schema.keys]
        lines.append(f"{key}:")
        lines += [f"  {_line(name, getattr(value, name), origins.get(f'{prefix}{name}'))}" for name in inner]
    return "\n".join(lines)


def _line(key: str, value: Any, origin: str | None) -> str:
    shown = "<hidden>" if is_secret(key) and value else _plain(value)
    text = yaml.safe_dump(shown, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return f"{key}: {text}  # {origin or 'default'}"


def _plain(value: Any) -> Any:
    """Enums and other objects of transformers as YAML knows them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "value"):
        return value.value
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
