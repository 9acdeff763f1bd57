"""Every name that old environments import is where they look for it, and is called as they call it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from typing import Any

import pytest
from pydantic import BaseModel

from atroposlib.envs.base import BaseEnv, BaseEnvConfig
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from tests.compat.sdk.surface import CALLABLES, IMPORTS

NAMES = [(module, name) for module, names in IMPORTS.items() for name in names.split()]
LINES = [
    (module, line.strip())
    for module, text in CALLABLES.items()
    for line in re.sub(r"\n {12}", " ", text).strip().splitlines()
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_name_is_imported_from_its_old_home(module: str, name: str) -> None:
    assert hasattr(import_module(module), name)


@pytest.mark.parametrize(("module", "line"), LINES, ids=[f"{m.removeprefix('atroposlib.')}:{ln}" for m, ln in LINES])
def test_a_callable_keeps_its_kind_and_its_parameters(module: str, line: str) -> None:
    kind, _, rest = line.partition(" ")
    dotted = rest.partition("(")[0]

    found = find(module, dotted)

    assert kind_of(found) == kind
    called: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    function = inspect.unwrap(called)
    assert mismatches(expected_parameters(rest), list(inspect.signature(function).parameters.values())) == []


def find(module: str, dotted: str) -> Any:
    """As it stands in its class, not bound."""
    *owners, name = dotted.split(".")
    owner = reduce(getattr, owners, import_module(module))
    return inspect.getattr_static(owner, name)


def kind_of(found: Any) -> str:
    if isinstance(found, property):
        return "property"
    if isinstance(found, (classmethod, staticmethod)):
        return type(found).__name__
    if inspect.isasyncgenfunction(inspect.unwrap(found)):
        return "asynccontextmanager"
    return "async" if inspect.iscoroutinefunction(found) else "def"


def expected_parameters(text: str) -> list[inspect.Parameter]:
    """Of `name(self, a, b=1, **kwargs)`. A default that is a name stays the name's text."""
    (definition,) = ast.parse(f"def f({text.partition('(')[2]}: pass").body
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    return list(_parameters(arguments))


def _parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    required = len(arguments.args) - len(arguments.defaults)
    for index, argument in enumerate(arguments.args):
        default = inspect.Parameter.empty if index < required else _value(arguments.defaults[index - required])
        yield inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    if arguments.vararg:
        yield inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL)
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = inspect.Parameter.empty if value is None else _value(value)
        yield inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default)
    if arguments.kwarg:
        yield inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD)


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def mismatches(old: list[inspect.Parameter], new: list[inspect.Parameter]) -> list[str]:
    """Why a call that suits the old parameters would not suit the new ones; further parameters must be optional."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [
        f"{want} is not among {new}"
        for want in old
        if want.kind in variadic and not any(p.kind == want.kind for p in new)
    ]
    places = [p for p in new if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in old if p.kind not in variadic]
    for index, want in enumerate(named):
        have = places[index] if index < len(places) else None
        if have is None or (have.name, have.kind) != (want.name, want.kind) or not _same(want.default, have.default):
            found.append(f"parameter {index}: {want} became {have}")
    extra = [p for p in new if p.name not in {p.name for p in named} and p.kind not in variadic]
    return found + [f"{p} is new and required" for p in extra if p.default is p.empty]


def _same(old: Any, new: Any) -> bool:
    if old is inspect.Parameter.empty:
        # A parameter that may be left out now suits old calls too.
        return True
    return bool(old == new) or old == getattr(new, "__name__", None)


def test_the_comparison_itself_sees_what_changes() -> None:
    old = expected_parameters("f(self, a, b=1, **kwargs)")

    for worse in (
        "f(self, b=1, a=2, **kwargs)",
        "f(self, a, b=2, **kwargs)",
        "f(self, a, b=1)",
        "f(self, a, **kwargs)",
    ):
        assert mismatches(old, expected_parameters(worse))
    assert mismatches(old, expected_parameters("f(self, a, b=1, c=2, **kwargs)")) == []


# What must be written


def test_an_environment_needs_nothing_but_items_and_a_way_to_roll_them_out() -> None:
    assert BaseEnv.__abstractmethods__ == {"get_next_item"}


def test_a_server_client_needs_a_chat_and_a_text_route() -> None:
    assert APIServer.__abstractmethods__ == {"_chat_completion_wrapper", "_completion_wrapper"}


def test_class_attributes_of_an_environment() -> None:
    assert (BaseEnv.name, BaseEnv.env_config_cls, BaseEnv.server_cls) == (None, BaseEnvConfig, APIServer)


# One name, one thing


@pytest.mark.parametrize(
    "module", ["envs.base", "envs.server_handling.server_manager", "envs.server_handling.openai_server", "envs"]
)
def test_the_server_config_is_one_class_wherever_it_is_imported_from(module: str) -> None:
    assert import_module(f"atroposlib.{module}").APIServerConfig is APIServerConfig


def test_the_namespaces_of_the_command_line() -> None:
    from atroposlib.envs import constants

    assert (constants.ENV_NAMESPACE, constants.OPENAI_NAMESPACE) == ("env", "openai")
    assert (constants.SERVER_MANAGER_NAMESPACE, constants.NAMESPACE_SEP) == ("server", ".")


def test_data_types_take_the_keys_that_environments_give() -> None:
    from atroposlib.envs.base import EvalHandlingEnum, ScoredDataGroup, ScoredDataItem
    from atroposlib.type_definitions import AgentStep, GameStep, Message, Observation

    item = {"tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "group_overrides", "overrides",
            "images", "distill_token_ids", "distill_logprobs"}  # fmt: skip
    assert item <= set(ScoredDataItem.__annotations__)
    assert item | {"generation_params", "inference_logprobs"} <= set(ScoredDataGroup.__annotations__)
    assert set(Message.__annotations__) == {"role", "content", "reward"}
    assert set(AgentStep.__annotations__) == {"step", "messages", "reward"}
    assert set(Observation.__annotations__) == {"raw", "rendered"}
    assert set(GameStep.__annotations__) == {"step", "agent_id", "observation", "action", "reward", "done", "info"}
    assert {one.name: one.value for one in EvalHandlingEnum} == {n: n for n in ("STOP_TRAIN", "LIMIT_TRAIN", "NONE")}


def test_a_group_is_made_empty_with_keywords_or_by_inheritance() -> None:
    from atroposlib.envs.base import ScoredDataGroup

    class Own(ScoredDataGroup, total=False):
        note: str

    empty: Any = ScoredDataGroup()
    empty["tokens"] = [[1]]
    empty["something_else"] = 1

    assert empty == {"tokens": [[1]], "something_else": 1}
    assert Own(scores=[1.0], note="x") == {"scores": [1.0], "note": "x"}


def test_configs_are_pydantic_models() -> None:
    assert issubclass(BaseEnvConfig, BaseModel)
    assert issubclass(APIServerConfig, BaseModel)
