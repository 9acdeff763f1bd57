"""Finds reward functions by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

Entry = type[RewardFunction] | Callable[..., Any]

_BUILT_IN = {
    "accuracy": "accuracy_reward",
    "accuracyx": "r1_reward",
    "cascading_r1_math": "cascading_r1_math_reward",
    "chandas_meter": "chandas_meter_reward",
    "combined": "combined_reward",
    "cosine_scaled": "cosine_scaled_reward",
    "crossword_format": "crossword_format_reward",
    "format": "format_reward",
    "formatreasoning": "r1_reward",
    "r1": "r1_reward",
    "reasoning_steps": "reasoning_steps_reward",
    "repetition_penalty": "repetition_penalty_reward",
    "rim": "atroposlib.rim.reward_function",
}
"""Module of each reward that comes along, in this package where it has no dot. They load on first use."""


class LegacyFunctionWrapper(RewardFunction):
    """A plain function `func(completions, **kwargs) -> rewards` as a RewardFunction.

    Args:
        func: gets those of the keyword arguments that it names, or all where it takes `**kwargs`.
        kwargs: as of RewardFunction; the rest are defaults of the function's arguments.
    """

    def __init__(self, func: Callable[..., Any], weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(weight=weight, **kwargs)
        self.func = func

    @property
    def name(self) -> str:
        """The function's name unless another was given."""
        return self._name or str(getattr(self.func, "__name__", "function"))

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Call the function."""
        known = inspect.signature(self.func).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        given = {key: value for key, value in {**self.config, **kwargs}.items() if takes_all or key in known}
        return list(self.func(completions, **given))


class RewardRegistry:
    """Reward classes and functions by name.

    `accuracy`, `accuracy_reward` and `AccuracyReward` are the same name: case, underscores and a trailing "reward"
    do not count.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._folders: list[Path] = []

    def register(self, cls: Any = None, name: str | None = None) -> Any:
        """Decorator of a class or function, with or without arguments.

        Args:
            name: its key; None: its own name in lower case without a trailing "reward".
        """
        if cls is None:
            return lambda decorated: self.register(decorated, name=name)
        self._entries[name or cls.__name__.lower().removesuffix("reward").rstrip("_")] = cls
        return cls

    def register_function(self, name: str, function: Callable[..., Any]) -> None:
        """Add a plain function under a key."""
        self._entries[name] = function

    def add_folder(self, folder: str | Path) -> None:
        """Look for unknown names in a folder too, as `<name>.py` or `<name>_reward.py`."""
        self._folders.append(Path(folder))

    def list_registered(self) -> list[str]:
        """Keys that `get` knows: those registered, and those of this package."""
        return sorted({*self._entries, *_BUILT_IN})

    def get(self, name: str) -> Entry:
        """The class or function of a name; its module is loaded if need be.

        Raises:
            ConfigError: nothing has this name, or its file does not load.
        """
        found = self._look_up(name)
        if found is None:
            self._load(name)
            found = self._look_up(name)
        if found is None:
            raise ConfigError(
                f"unknown reward function {name!r}; known: {', '.join(self.list_registered())}. Register yours with "
                "@registry.register, or name the folder of its file with registry.add_folder"
            )
        return found

    def create(self, name_or_config: str | Mapping[str, Any], **kwargs: Any) -> RewardFunction:
        """An instance.

        Args:
            name_or_config: a name, or {"type": name, "params": {...}, "weight": 0.5, ...}.
            kwargs: defaults; the config's entries win over them, and those of params over both.
        Raises:
            ConfigError: nothing has this name, the config has no type, or the class does not take the options.
        """
        if isinstance(name_or_config, str):
            name, options = name_or_config, dict(kwargs)
        else:
            given = dict(name_or_config)
            if "type" not in given:
                raise ConfigError(f"a reward config needs a type, e.g. {{'type': 'accuracy'}}; got {given!r}")
            name, params = given.pop("type"), given.pop("params", None) or {}
            options = {**kwargs, **given, **params}
        entry = self.get(name)
        if not _is_reward_class(entry):
            return LegacyFunctionWrapper(entry, **options)
        try:
            return entry(**options)
        except TypeError as error:
            raise ConfigError(f"reward function {name!r} does not take {options!r}: {error}") from error

    def load_required_functions(self, config: Any) -> set[str]:
        """Load every reward function that a config names in a field that ends in `reward_functions` or `reward_funcs`.

        Args:
            config: a model, an object or a mapping; nested ones, `datasets` for instance, are searched too.
        Returns:
            The names.
        Raises:
            ConfigError: one of them is unknown.
        """
        names = set(_named_rewards(config))
        for name in names:
            self.get(name)
        return names

    def _look_up(self, name: str) -> Entry | None:
        exact = self._entries.get(name)
        if exact is not None:
            return exact
        wanted = _plain(name)
        return next((entry for key, entry in self._entries.items() if _plain(key) == wanted), None)

    def _load(self, name: str) -> None:
        wanted = _plain(name)
        module_name = next((module for key, module in _BUILT_IN.items() if _plain(key) == wanted), None)
        if module_name is not None:
            in_package = "" if "." in module_name else "atroposlib.envs.reward_fns."
            importlib.import_module(f"{in_package}{module_name}")
        elif name.isidentifier():  # never a path
            stems = (name, f"{name}_reward")
            files = (folder / f"{stem}.py" for folder in self._folders for stem in stems)
            file = next((file for file in files if file.is_file()), None)
            if file is not None and self._look_up_in(_run_file(file), name) is None:
                raise ConfigError(f"{file} defines no reward class or function named {name!r} or {name}_reward")

    def _look_up_in(self, module: ModuleType, name: str) -> Entry | None:
        """What a file registered under the name, else what it defines under it; that is registered then."""
        found = self._look_up(name)
        if found is not None:
            return found
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        matching = [value for key, value in own.items() if _plain(key) == _plain(name) and callable(value)]
        if matching:
            # A class is preferred to a legacy function of the same name.
            self._entries[name] = found = sorted(matching, key=_is_reward_class)[-1]
        return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").removesuffix("reward")


def _is_reward_class(entry: Any) -> bool:
    return isinstance(entry, type) and issubclass(entry, RewardFunction)


def _run_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"atroposlib_user_rewards.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # Any error of the user's file, syntax included.
    except Exception as error:
        raise ConfigError(f"the reward file {file} does not load: {type(error).__name__}: {error}") from error
    return module


def _named_rewards(config: Any) -> Iterator[str]:
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for key, value in fields.items():
        if str(key).endswith(("reward_functions", "reward_funcs")):
            for reward in value or ():
                yield reward["type"] if isinstance(reward, Mapping) else str(reward)
        else:
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Mapping) or hasattr(part, "__dict__"):
                    yield from _named_rewards(part)


registry = RewardRegistry()
"""The registry that configs and environments use."""
