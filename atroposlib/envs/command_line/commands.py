"""Command classes: a mode of an environment as a pydantic model with run(), for those who replace or extend one.

`BaseEnv.get_cli_serve_config_cls` and its twins return them; pydantic-cli runs them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.flags import ROOT, Namespaces, Values, flag_value, flag_words
from atroposlib.envs.command_line.launching import launch, mode_defaults
from atroposlib.envs.command_line.options import Defaults, resolve_values
from atroposlib.envs.command_line.usage import UsageError, nearest, validate
from atroposlib.envs.constants import ENV_NAMESPACE, NAMESPACE_SEP
from atroposlib.utils.cli import get_double_dash_flags


class EnvCommand(BaseModel):
    """One mode of one environment; fields are named as the flags: `env.group_size`, `openai.base_url`, `slurm`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    env_cls: ClassVar[type[BaseEnv]]
    mode: ClassVar[str]

    def run(self) -> None:
        """Resolve and run the mode.

        Raises:
            UsageError: the options do not fit together.
        """
        defaults = Defaults.of(self.env_cls)
        flags = self._given(defaults.namespaces)
        changed = mode_defaults(self.env_cls, self.mode, defaults.env)
        launch(self.env_cls, self.mode, resolve_values(defaults, flags, mode_defaults=changed))

    def _given(self, namespaces: Namespaces) -> Values:
        """The values that somebody gave: pydantic-cli sets every field, the defaults too."""
        typed = get_double_dash_flags()
        given: Values = {namespace: {} for namespace in namespaces}
        for name in self.model_fields_set:
            namespace, _, key = name.rpartition(NAMESPACE_SEP)
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if namespace in given and key in namespaces[namespace].model_fields and (name in typed or not is_default):
                given[namespace][key] = getattr(self, name)
        return given


def command_class(env_cls: type[BaseEnv], mode: str) -> type[EnvCommand]:
    """The command of a mode, with the defaults of config_init and of the mode.

    Args:
        mode: serve, process or evaluate.
    """
    defaults = Defaults.of(env_cls)
    defaults = defaults.with_mode(mode_defaults(env_cls, mode, defaults.env))
    fields: dict[str, Any] = {}
    for namespace, model in defaults.namespaces.items():
        for name, info in model.model_fields.items():
            shown = (
                getattr(defaults.env, name)
                if namespace == ENV_NAMESPACE
                else info.get_default(call_default_factory=True)
            )
            key = f"{namespace}{NAMESPACE_SEP}{name}" if namespace != ROOT else name
            fields[key] = (info.annotation, Field(default=shown, description=info.description))
    made = create_model(f"{env_cls.__name__}{mode.title()}", __base__=EnvCommand, **fields)
    made.env_cls, made.mode = env_cls, mode
    return made


def overridden_command(env_cls: type[BaseEnv], mode: str) -> type[BaseModel] | None:
    """The command class of an environment that brings its own; None where it has the usual one."""
    name = f"get_cli_{mode}_config_cls"
    owner = next((cls for cls in env_cls.__mro__ if name in vars(cls)), None)
    if owner is None or owner.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    made: type[BaseModel] = getattr(env_cls, name)()
    return made


def parse_command(command: type[BaseModel], argv: Sequence[str]) -> BaseModel:
    """A command from its flags; fields of env may be named without the prefix.

    Raises:
        UsageError: an unknown flag or a value of the wrong kind.
    """
    fields = command.model_fields
    values = {}
    for name, words in flag_words(argv):
        key = next((key for key in (name, f"{ENV_NAMESPACE}{NAMESPACE_SEP}{name}") if key in fields), None)
        if key is None:
            raise UsageError(f"unknown option --{name}", nearest(name, fields, prefix="--"))
        values[key] = flag_value(name, words, fields[key].annotation)
    return validate(command, values, "--")
