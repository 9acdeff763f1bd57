"""Calls the user's reward functions as TRL does, and makes one reward of what they give."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.server_handling.engines.http_client import is_infrastructure_failure
from atroposlib.errors import AtroposError, ConfigError, RolloutError
from trainer.errors import RewardFunctionError

# F: reward functions, N: completions

RewardFunc: TypeAlias = Callable[..., Any] | str
"""Called with prompts, completions and every other column as lists of N; gives N numbers, None for one that it cannot
judge. May be async. A name is that of a registered reward function."""

OnThread: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a blocking call beside the event loop."""


class RewardFunctions:
    """All reward functions of a run, as one.

    Args:
        functions: one, or several.
        weights: of each; 1 if absent.
    Raises:
        ConfigError: there is none, one cannot be called, or the weights do not fit or are all 0.
    """

    def __init__(self, functions: RewardFunc | Sequence[RewardFunc], weights: Sequence[float] | None = None) -> None:
        given = _listed(functions)
        self._functions = [_callable_of(function) for function in given]
        self._arguments = [_names_of(function) for function in self._functions]
        self.names = _distinct([_name_of(function) for function in self._functions])
        """For messages and metrics."""
        self.weights = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
        if not given:
            raise ConfigError("reward_funcs is empty; give at least one function, e.g. reward_funcs=my_reward")
        if len(self.weights) != len(given):
            raise ConfigError(f"{len(self.weights)} reward_weights for {len(given)} reward_funcs; give one for each")
        if not any(self.weights) or not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"reward_weights={self.weights}; give finite numbers, at least one of them not 0")

    async def score(
        self, columns: Mapping[str, Sequence[Any]], *, on_thread: OnThread, timeout_s: float
    ) -> list[list[float | None]]:
        """What each function gives, [F][N].

        Args:
            columns: prompts, completions and the rest, N values each.
            on_thread: runs functions that are not async, with a time limit of its own.
            timeout_s: for each async function.
        Raises:
            RewardFunctionError: one failed, or gave something other than N numbers.
            RolloutError: one raised it, could not reach something over the network, or took too long.
        """
        return await all_or_none(self._score_one(i, columns, on_thread, timeout_s) for i in range(len(self._functions)))

    async def _score_one(
        self, index: int, columns: Mapping[str, Sequence[Any]], on_thread: OnThread, timeout_s: float
    ) -> list[float | None]:
        function, known, name = self._functions[index], self._arguments[index], self.names[index]
        call = partial(function, **{key: values for key, values in columns.items() if known is None or key in known})
        try:
            given = call() if _is_async(function) else await on_thread(call)
            given = await _within(timeout_s, given, name) if inspect.isawaitable(given) else given
        except AtroposError:
            raise
        except (Exception, SystemExit) as error:
            raise _explained(error, name) from error
        return _checked(given, len(columns["completions"]), name)


async def _within(timeout_s: float, given: Awaitable[Any], name: str) -> Any:
    scope = asyncio.timeout(timeout_s)
    try:
        async with scope:
            return await given
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise RolloutError(
            f"reward function {name!r} took longer than {timeout_s:g} s; raise reward_timeout_s"
        ) from error


def _explained(error: BaseException, name: str) -> AtroposError:
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, Exception) and is_infrastructure_failure(error):
        # A judge that cannot be reached says nothing about the policy.
        return RolloutError(f"reward function {name!r} got no answer: {what}")
    return RewardFunctionError(
        f"reward function {name!r} failed: {what}; return None for a completion that it cannot judge"
    )


def combined(rewards_FN: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float | None]:
    """[N] weighted sums over the functions that judged a completion; None where none of a weight did."""
    return [_weighted_sum(rewards_F, weights) for rewards_F in zip(*rewards_FN, strict=True)]


def _weighted_sum(rewards_F: Sequence[float | None], weights: Sequence[float]) -> float | None:
    judged = [weight * r for weight, r in zip(weights, rewards_F, strict=True) if r is not None and weight]
    return sum(judged) if judged else None


def _checked(given: Any, n: int, name: str) -> list[float | None]:
    try:
        rewards = [None if reward is None else float(reward) for reward in given]
    except (TypeError, ValueError) as error:
        raise RewardFunctionError(
            f"reward function {name!r} returned {given!r:.80}; expected a list of {n} numbers, one for each completion"
        ) from error
    if len(rewards) != n:
        raise RewardFunctionError(
            f"reward function {name!r} returned {len(rewards)} rewards for {n} completions; return one for each"
        )
    if not all(reward is None or math.isfinite(reward) for reward in rewards):
        raise RewardFunctionError(
            f"reward function {name!r} returned {rewards}; return None for a completion that it cannot judge"
        )
    return rewards


def with_reward_model(
    functions: RewardFunc | Sequence[RewardFunc] | None, reward_model: RewardFunc | None
) -> RewardFunc | Sequence[RewardFunc] | None:
    """The reward functions, with a reward model as the last of them if there is one."""
    if reward_model is None:
        return functions
    return [*([] if functions is None else _listed(functions)), reward_model]


def _listed(functions: RewardFunc | Sequence[RewardFunc]) -> list[RewardFunc]:
    return [functions] if isinstance(functions, str) or callable(functions) else list(functions)


def _callable_of(function: RewardFunc) -> Callable[..., Any]:
    if isinstance(function, str):
        return registry.create(function)
    if isinstance(function, nn.Module):
        raise ConfigError(
            f"reward_funcs or reward_model holds a {type(function).__name__}, a model that takes token ids: give a function "
            "f(prompts, completions, **columns) that scores the texts with it"
        )
    if not callable(function):
        raise ConfigError(
            f"reward_funcs holds {function!r:.80}, which cannot be called; give functions f(prompts, completions, **columns)"
        )
    return function


def _names_of(function: Callable[..., Any]) -> set[str] | None:
    """Arguments that a function takes; None: all that there are."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def _name_of(function: Callable[..., Any]) -> str:
    own = function if hasattr(function, "__name__") else type(function)
    return str(getattr(function, "name", None) or getattr(own, "__name__", "reward"))


def _distinct(names: Sequence[str]) -> list[str]:
    """The second of a name gets a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return distinct


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
