"""Loaders by name: which function reads the rows that a configuration asks for."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atroposlib.errors import DataError

if TYPE_CHECKING:
    from atroposlib.data.config import DataConfig

Row = dict[str, Any]
Funnel = Counter[str]
"""How many rows each stage left, in the order of the stages."""
Loader = Callable[["DataConfig", Funnel], Iterable[Row]]
"""Reads and filters the rows of a configuration, counting in the funnel what each of its stages left."""

_BUILT_IN = {
    "rows": "atroposlib.data.loaders.rows:load",
    "math": "atroposlib.data.loaders.math:load",
    "arc_atlas": "atroposlib.data.loaders.arc_atlas:load",
    "runtime_traces": "atroposlib.data.loaders.runtime_traces:load",
    "runtime_pg": "atroposlib.data.loaders.runtime_pg:load",
}
_ALIASES = {
    "get_runtime_trace_dataset": "runtime_traces",
    "get_postgres_runtime_dataset": "runtime_pg",
    "get_arc_atlas_rl_dataset": "arc_atlas",
    "get_arc_atlas_sft_dataset": "arc_atlas",
    "get_bigmath_rl_dataset": "math",
    "build_gsm8k_gkd_dataset": "math",
    "build_gsm8k_grpo_dataset": "math",
    "build_meta_math_grpo_dataset": "math",
}
_ALIAS_PACKAGES = ("custom_data.", "atlas_core.data.", "trainers.")
_REGISTERED: dict[str, Loader] = {}


def register_loader(name: str, loader: Loader) -> None:
    """Make a loader known under a name, for this process.

    Raises:
        DataError: the name is taken, or holds `.` or `:`, which stand in dotted names alone.
    """
    if name in loader_names() or {".", ":"} & set(name):
        raise DataError(f"cannot register a loader as {name!r}: taken are {', '.join(loader_names())}")
    _REGISTERED[name] = loader


def loader_names() -> list[str]:
    """Every name that `loader` can be."""
    return sorted([*_BUILT_IN, *_REGISTERED])


def canonical_name(name: str, modules: Iterable[str] = ()) -> str:
    """The registered name of a loader, or MODULE:FUNCTION where the module is one of `modules`.

    Dotted names of the data sets that ATLAS configurations name in `make_dataset_fn._target_` are taken too.

    Raises:
        DataError: there is no such loader.
    """
    if name in _BUILT_IN or name in _REGISTERED:
        return name
    if ":" in name:
        module = name.partition(":")[0]
        if module in modules:
            return name
        raise DataError(f"loader {name!r} would import {module!r}; allow it with loader_modules: [{module}]")
    if name.startswith(_ALIAS_PACKAGES) and (alias := _ALIASES.get(name.rpartition(".")[2])):
        return alias
    near = difflib.get_close_matches(name, loader_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"there is no loader {name!r}; there are {', '.join(loader_names())}, or MODULE:FUNCTION{hint}")


def find_loader(name: str) -> Loader:
    """The loader of a canonical name.

    Raises:
        DataError: its module cannot be imported, or has no such function.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, function = _BUILT_IN.get(name, name).partition(":")
    try:
        loader: Loader = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"cannot load the loader {name!r}: {error}") from error
    return loader
