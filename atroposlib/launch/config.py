"""The config file of `atropos up`: its sections, overrides, and errors that name the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from atroposlib.errors import ConfigError
from atroposlib.launch.inference import InferenceConfig
from atroposlib.launch.processes import RestartConfig
from atroposlib.launch.trainer_section import TrainerSection

Scalar = bool | int | float | str
OptionValue = Scalar | dict[str, Any] | list[Any] | None
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class LaunchConfigError(ConfigError):
    """The config cannot work. `hint` tells the fix."""

    def __init__(self, problem: str, *, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


class Section(BaseModel):
    """A part of the config: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RolloutServerSection(Section):
    """The rollout server."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    data_dir: Path | None = None
    """Its store; RUN/rollout_server if absent."""
    options: dict[str, Scalar] = {}
    """Further options of the server: {synchronous: normal} becomes --synchronous normal."""


class InferenceSection(InferenceConfig):
    """The inference server: one that we start, or the url of one that runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = ""
    """Absent: the model of the run."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    base_url: str | None = Field(default=None, alias="url", pattern=r"^https?://")
    """Of a server that runs already, without /v1. We then start none, and the keys about starting one are idle."""
    ready_timeout_s: float = Field(default=300.0, gt=0)
    """How long it may take to load the model."""


class FrozenSection(InferenceSection):
    """An inference server that never gets weights: a student, a teacher, a judge."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    weight_transfer: Literal["none"] = "none"
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables, over those of processes.inference; CUDA_VISIBLE_DEVICES says on which GPUs it runs."""


class EnvironmentSection(Section):
    """One environment process."""

    command: Path
    """The environment's .py file, or its folder with __main__.py."""
    name: str = ""
    """In the view, the logs and the ledger; the file's name if absent."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts of one item, scored against each other."""
    servers: list[str] = []
    """Names of frozen servers that it asks; [student] gives it --student.base_url, --student.model_name and
    --student.server_type."""
    options: dict[str, OptionValue] = {}
    """Further options: {max_token_length: 512} becomes --env.max_token_length 512; a dotted name stays as it is. Mappings
    and lists are written as JSON."""

    @model_validator(mode="after")
    def _group_size_stands_once(self) -> EnvironmentSection:
        if {"group_size", "env.group_size"} & self.options.keys():
            raise ValueError("group_size belongs beside options, not in it")
        return self

    @property
    def label(self) -> str:
        """The name, or the file's."""
        return self.name or self.command.stem


MOCK_MODEL = Path("mock")
"""As the model of a run: nothing but its processes is to be tried."""

POLICY_FLAGS = frozenset({"env", "openai"})
"""Flags of an environment, --env.* and --openai.*, that tell it of itself and of the policy."""


class EvaluationSection(Section):
    """Held-out evaluation around the training."""

    before: bool = True
    after: bool = True


class ProcessSection(Section):
    """How one kind of process is run."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    command: list[str] | None = None
    """Replaces the program (its arguments stay), e.g. [nsys, profile, python, -m, trainer.cli]."""
    env: dict[str, str] = {}
    """Environment variables, over ours."""
    grace_s: float | None = Field(default=None, gt=0)
    """Between SIGTERM and SIGKILL; 30 for the trainer, which saves a checkpoint, and 10 for the others if absent."""


class ProcessesSection(Section):
    """Settings by kind of process."""

    rollout_server: ProcessSection = ProcessSection()
    inference: ProcessSection = ProcessSection()
    environment: ProcessSection = ProcessSection()
    trainer: ProcessSection = ProcessSection()


class UpConfig(Section):
    """One run of the whole loop on one machine."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder; a second run of the name gets NAME-2."""
    runs_dir: Path = Path("runs")
    """Where run folders go."""
    seed: int = Field(default=0, ge=0)
    """Of the items' order and of the trainer."""
    model: Path
    """Folder of the Hugging Face checkpoint to train. mock: a tiny random one, which is made in the run's folder; every
    inference server is then an `atropos mock-inference` with the answers of its extra_args, and no weights travel."""
    rollout_server: RolloutServerSection = RolloutServerSection()
    inference: InferenceSection = InferenceSection()
    """Of the policy."""
    frozen: dict[ServerName, FrozenSection] = {}
    """Further inference servers, whose models are not trained, by name."""
    environments: list[EnvironmentSection] = Field(min_length=1)
    trainer: TrainerSection = TrainerSection()
    trainer_ranks: int = Field(default=1, ge=1)
    """Processes of the trainer; more than one start through torchrun."""
    evaluation: EvaluationSection = EvaluationSection()
    processes: ProcessesSection = ProcessesSection()
    restart: RestartConfig = RestartConfig()

    @model_validator(mode="after")
    def _batches_hold_whole_groups(self) -> UpConfig:
        for index, environment in enumerate(self.environments):
            size, batch = environment.group_size, self.trainer.batch_size
            if batch % size:
                below, above = batch // size * size, (batch // size + 1) * size
                nearest = f"{below} or {above}" if below else str(above)
                raise ValueError(
                    f"trainer.batch_size={batch} is not a multiple of environments.{index}.group_size={size}, "
                    f"and a batch never splits a group; nearest valid batch_size: {nearest}"
                )
        labels = [environment.label for environment in self.environments]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two environments are named {twice[0]!r}; give each its own name")
        return self

    @field_validator("frozen")
    @classmethod
    def _frozen_servers_have_names_of_their_own(cls, frozen: dict[str, FrozenSection]) -> dict[str, FrozenSection]:
        for name in sorted(POLICY_FLAGS & frozen.keys()):
            raise ValueError(
                f"{name!r} is no name for a frozen server: --{name}.* are flags of the policy's; choose another, "
                "such as student, teacher or judge"
            )
        return frozen

    @model_validator(mode="after")
    def _asked_servers_are_there(self) -> UpConfig:
        for index, environment in enumerate(self.environments):
            if missing := sorted(set(environment.servers) - self.frozen.keys()):
                raise ValueError(
                    f"environments.{index}.servers names {missing[0]!r}, and frozen has "
                    f"{', '.join(self.frozen) or 'no server'}: add frozen.{missing[0]}, or correct the name"
                )
        return self

    @property
    def is_mock(self) -> bool:
        """Whether there is no real model."""
        return self.model == MOCK_MODEL

    def absolute(self) -> UpConfig:
        """The same with absolute paths, so that it means the same from any folder."""
        environments = [
            environment.model_copy(update={"command": environment.command.absolute()})
            for environment in self.environments
        ]
        return self.model_copy(
            update={
                "runs_dir": self.runs_dir.absolute(),
                "model": self.model if self.is_mock else self.model.absolute(),
                "environments": environments,
                "frozen": {name: _with_absolute_model(section) for name, section in self.frozen.items()},
            }
        )

    def to_yaml(self) -> str:
        """Every key with its value, defaults included."""
        plain = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(plain, sort_keys=False, width=100)


def _with_absolute_model(section: FrozenSection) -> FrozenSection:
    """A folder by its whole path; the id of a model on the Hub stays as it is."""
    if not section.model or not Path(section.model).is_dir():
        return section
    return section.model_copy(update={"model": str(Path(section.model).absolute())})


Kind = Literal["rollout_server", "inference", "environment", "trainer"]


def load_config(path: Path, overrides: Sequence[str] = ()) -> UpConfig:
    """Read the file, apply the overrides, check everything that can be checked without starting anything.

    Raises:
        LaunchConfigError: with the fix.
    """
    raw = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return UpConfig.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, path) from None


def check_files(config: UpConfig) -> None:
    """Raise LaunchConfigError when a file that the run needs is missing."""
    if not config.is_mock and not (config.model / "config.json").is_file():
        what = "is not a checkpoint: it has no config.json" if config.model.is_dir() else "does not exist"
        raise LaunchConfigError(
            f"model: the folder {config.model} {what}",
            hint="`make demo` or `python scripts/prepare_model.py` prepares the demo model; "
            "for another one set model=FOLDER; model=mock needs none",
        )
    for index, environment in enumerate(config.environments):
        if not (environment.command.is_file() or (environment.command / "__main__.py").is_file()):
            raise LaunchConfigError(
                f"environments.{index}.command: {environment.command} is neither a file nor a folder with __main__.py",
                hint=f"relative paths start at the current folder, {Path.cwd()}",
            )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-5 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise LaunchConfigError(
            f"cannot read the config {path}: {error.strerror}", hint="try --config configs/demo.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LaunchConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise LaunchConfigError(f"{path} must hold keys and values", hint="see configs/demo.yaml")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value: trainer.max_steps=3, environments.0.options.env.max_token_length=64."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise LaunchConfigError(
            f"{override!r} is no override", hint="overrides look like trainer.max_steps=3, after the options"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    parts = key.split(".")
    if "options" in parts[:-1]:
        # Names of options may have dots themselves.
        index = parts.index("options") + 1
        parts = [*parts[:index], ".".join(parts[index:])]
    _set(raw, parts, value, key)


def _set(node: Any, parts: list[str], value: Any, key: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise LaunchConfigError(
                f"{key}: there is no entry {head!r} in a list of {len(node)}", hint="entries count from 0"
            )
        index: Any = int(head)
    elif isinstance(node, dict):
        index = head
        if rest and node.get(head) is None:
            node[head] = {}
    else:
        raise LaunchConfigError(f"{key}: {head!r} cannot be set inside the value {node!r}")
    if rest:
        _set(node[index], rest, value, key)
    else:
        node[index] = value


def _explain(error: ValidationError, path: Path) -> LaunchConfigError:
    """The first problem in the user's words; the number of further ones."""
    problems = error.errors()
    # An unknown key is often the cause of a missing one.
    first = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            known = list(_keys_at(UpConfig, first["loc"][:-1]))
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            where = ".".join(str(part) for part in first["loc"][:-1]) or path.name
            return LaunchConfigError(f"unknown key {place!r}{more}", hint=f"{hint}keys of {where}: {', '.join(known)}")
        case "missing":
            return LaunchConfigError(f"{path}: the key {place!r} is missing{more}", hint="see configs/demo.yaml")
        case "value_error":
            text = str(first["ctx"]["error"])
            return LaunchConfigError(f"{place}: {text}{more}" if place else f"{text}{more}")
        case _:
            return LaunchConfigError(f"{place}={first['input']!r}: {first['msg']}{more}")


def _keys_at(model: type[BaseModel], place: Sequence[str | int]) -> Iterator[str]:
    """Names of the keys of the section at this place."""
    section = _section_at(model, place)
    if section is not None:
        for name, info in section.model_fields.items():
            yield info.alias or name


def _section_at(model: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel] | None:
    is_name = False
    for part in place:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        info: Mapping[str, Any] = model.model_fields
        if part not in info:
            return None
        annotation = info[part].annotation
        is_name = getattr(annotation, "__origin__", None) is dict
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return None
        model = sections[0]
    return model
