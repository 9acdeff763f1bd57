"""Finds the environment class in a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from atroposlib.envs.base import BaseEnv
from atroposlib.errors import ConfigError


def load_env_class(path: Path, name: str | None = None) -> type[BaseEnv]:
    """The environment that a file defines.

    Args:
        name: which class, where there are several.
    Raises:
        ConfigError: no such file, it cannot be imported, or the class is not clear.
    """
    module = _load(path)
    found = {
        cls.__name__: cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, BaseEnv) and cls.__module__ == module.__name__
    }
    if name is not None and name in found:
        return found[name]
    # A base class that the file's other classes refine is not the one meant.
    leaves = {
        key: cls for key, cls in found.items() if not any(cls is not other and issubclass(other, cls) for other in found.values())
    }  # fmt: skip
    if name is None and len(leaves) == 1:
        return next(iter(leaves.values()))
    if not found:
        raise ConfigError(f"{path} defines no subclass of BaseEnv; write `class MyEnv(BaseEnv)` in it")
    asked = f"no environment {name!r}; it has" if name else "several environments:"
    raise ConfigError(f"{path} defines {asked} {', '.join(found)}; say which with --class NAME")


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}; give the path of the environment's Python file")
    # A name of its own: a file called json.py must not hide the module.
    spec = importlib.util.spec_from_file_location(f"checked_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # As `python FILE` would find it: neighbours can be imported, and dataclasses find their module.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module
