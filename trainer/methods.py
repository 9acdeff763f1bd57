"""The ways to train: for each its configuration and its trainer, imported when they are asked for. No torch until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from atroposlib.errors import ConfigError
from trainer.config import values as config_values
from trainer.config.refused import REFUSED, REFUSED_SUPERVISED
from trainer.config.schema import Schema, schema_of

DEFAULT = "grpo"


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str
    """Value of the key `method`."""
    meaning: str
    """For help texts."""
    config: str
    """Its config class, as module:class."""
    trainer: str
    """Its trainer, likewise: made from a configuration alone, and has train()."""
    refused: Mapping[str, str]
    """Keys of transformers that it does not take, with the reason."""
    required: Mapping[str, str]
    """Keys without which a run cannot begin, with what they are."""

    @cached_property
    def config_class(self) -> Any:
        """The dataclass of its options."""
        return _load(self.config)

    @cached_property
    def schema(self) -> Schema:
        """The keys of that class."""
        return schema_of(self.config_class, refused=self.refused)

    @property
    def trainer_class(self) -> Any:
        """What trains."""
        return _load(self.trainer)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="grpo",
            meaning="reinforcement learning on the batches of a rollout server",
            config="trainer.config.grpo:GRPOConfig",
            trainer="trainer.grpo_trainer:GRPOTrainer",
            refused=REFUSED,
            required={"model_name_or_path": "the policy's folder"},
        ),
        Method(
            name="sft",
            meaning="supervised fine-tuning on a data set",
            config="trainer.supervised.config:SFTConfig",
            trainer="trainer.supervised.sft_trainer:SFTTrainer",
            refused=REFUSED_SUPERVISED,
            required={"model_name_or_path": "the model's folder"},
        ),
        Method(
            name="gkd",
            meaning="distillation of a teacher into the policy",
            config="trainer.supervised.config:GKDConfig",
            trainer="trainer.supervised.gkd_trainer:GKDTrainer",
            refused=REFUSED_SUPERVISED,
            required={
                "model_name_or_path": "the student's folder",
                "teacher_model_name_or_path": "the folder or Hub id of the teacher",
            },
        ),
    )
}
"""By name."""


def method_named(name: Any, source: str) -> Method:
    """A method by its name.

    Args:
        source: where the name was found, for the message.
    Raises:
        ConfigError: there is none of this name.
    """
    if name in METHODS:
        return METHODS[name]
    near = config_values.nearest(str(name), METHODS)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"method in {source} should be one of {', '.join(METHODS)}, is {name!r}{hint}")


def method_of(config: Any) -> Method:
    """The method that a configuration is for."""
    return next(method for method in METHODS.values() if _is_of(config, method.config))


def check_required(config: Any, *keys: str) -> None:
    """A configuration that was composed names what to load. One that is made in memory may do without.

    Args:
        keys: to look at; all that the method requires, if none.
    Raises:
        ConfigError: names the first that is missing.
    """
    required = method_of(config).required
    for key in keys or required:
        if not getattr(config, key):
            raise ConfigError(f"{key} is missing; give {required[key]}, e.g. {key}=models/NAME")


def takers(key: str) -> list[str]:
    """The methods that take a key, dotted inside a group."""
    return [name for name, method in METHODS.items() if method.schema.takes(key)]


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _is_of(config: Any, path: str) -> bool:
    # By name: the classes of the other methods need not be loaded.
    module, _, name = path.partition(":")
    return any(cls.__module__ == module and cls.__name__ == name for cls in type(config).__mro__)
