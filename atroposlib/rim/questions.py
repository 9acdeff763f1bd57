"""Puts a question to a judge model until a verdict can be read: bounded, retried, repaired once, remembered."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from atroposlib.rim.asking import Ask, JudgeCall, JudgeReply
from atroposlib.rim.cache import VerdictCache, cache_key
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.meter import Meter
from atroposlib.rim.prompts import repair_prompt
from atroposlib.rim.slots import CallSlots, Line
from atroposlib.rim.verdict import Verdict, VerdictError, parse_verdict

MAX_BROKEN_CHARS = 4000
"""Of an unreadable answer that the judge is shown again."""


class JudgeFailedError(RolloutError):
    """A judge model gave no verdict. The text says why."""


class Questions:
    """The way to the judge models."""

    def __init__(self, config: RIMConfig, ask: Ask, *, cache: VerdictCache, meter: Meter) -> None:
        self._config = config
        self._ask = ask
        self._cache = cache
        self._meter = meter
        self._all_groups = CallSlots(config.max_concurrent_judge_calls)
        self._in_flight: dict[str, asyncio.Future[Verdict | JudgeFailedError]] = {}
        """By cache key; cancelled where the one who asked was."""

    async def verdict(self, call: JudgeCall, workers: Line) -> Verdict:
        """The verdict on one question; an equal one that is being asked is waited for, and its failure is shared.

        Args:
            workers: calls in flight for one batch of trajectories.
        Raises:
            JudgeFailedError: there is none after every retry and the repair.
        """
        key = cache_key(call, self._config)
        while (asked := self._in_flight.get(key)) is not None:
            await asyncio.wait([asked])
            # Who is cancelled leaves the question to the next one.
            if not asked.cancelled():
                self._meter.totals["cache_hits"] += 1
                return _verdict_or_raise(asked.result())
        return await self._shared(key, call, workers)

    async def _shared(self, key: str, call: JudgeCall, workers: Line) -> Verdict:
        """Ask, and give whoever waits for the same the outcome."""
        outcome: asyncio.Future[Verdict | JudgeFailedError] = asyncio.get_running_loop().create_future()
        self._in_flight[key] = outcome
        try:
            verdict = await self._known_or_fresh(key, call, workers)
            outcome.set_result(verdict)
            return verdict
        except JudgeFailedError as error:
            outcome.set_result(error)
            raise
        finally:
            del self._in_flight[key]
            outcome.cancel()

    async def _known_or_fresh(self, key: str, call: JudgeCall, workers: Line) -> Verdict:
        known = await self._remembered(key)
        if known is not None:
            self._meter.totals["cache_hits"] += 1
            return known
        verdict = await self.fresh_verdict(call, workers)
        await self._remember(key, verdict)
        return verdict

    async def fresh_verdict(self, call: JudgeCall, workers: Line) -> Verdict:
        """As `verdict`, without the cache."""
        reply = await self._ask_until_answered(call, workers)
        try:
            verdict = parse_verdict(reply.text)
        except VerdictError as problem:
            verdict = await self._repaired(call, reply.text, problem, workers)
        self._meter.totals["clamped"] += verdict.is_clamped
        return verdict

    async def _repaired(self, call: JudgeCall, text: str, problem: VerdictError, workers: Line) -> Verdict:
        self._meter.totals["repairs"] += 1
        again = replace(call, broken_answer=text[:MAX_BROKEN_CHARS], repair=repair_prompt(str(problem)))
        reply = await self._ask_until_answered(again, workers)
        try:
            return parse_verdict(reply.text)
        except VerdictError as error:
            raise JudgeFailedError(f"no verdict, not when asked again either: {error}") from error

    async def _ask_until_answered(self, call: JudgeCall, workers: Line) -> JudgeReply:
        tries = self._config.judge_retries + 1
        for attempt in range(1, tries + 1):
            try:
                return await self._ask_once(call, workers, is_again=attempt > 1)
            except ModelServerError as error:
                if attempt == tries:
                    raise JudgeFailedError(f"no answer in {tries} tries: {error}") from error
            # The server knows no such request, or lets nobody in: another try would say the same.
            except (RolloutError, ConfigError) as error:
                raise JudgeFailedError(str(error)) from error
            self._meter.totals["retries"] += 1
            await asyncio.sleep(backoff_s(self._config.retry_backoff_s, attempt, jitter=random.uniform(0.75, 1.25)))
        raise AssertionError("the last try returns or raises")

    async def _ask_once(self, call: JudgeCall, workers: Line, *, is_again: bool) -> JudgeReply:
        is_urgent = call.is_large or bool(call.repair) or is_again
        async with workers.held(is_urgent=is_urgent), self._all_groups.held(is_urgent=is_urgent):
            started = time.monotonic()
            # Never kept over an await: the meter begins a new count whenever its figures are taken.
            self._meter.totals["calls"] += 1
            try:
                async with asyncio.timeout(self._config.judge_timeout):
                    reply = await self._ask(call)
            except TimeoutError:
                self._meter.totals["failed_calls"] += 1
                raise ModelServerError(f"no answer within judge_timeout, {self._config.judge_timeout:g} s") from None
            except (RolloutError, ConfigError):
                self._meter.totals["failed_calls"] += 1
                raise
            self._meter.latencies_s.append(time.monotonic() - started)
            self._meter.totals["prompt_tokens"] += reply.prompt_tokens
            self._meter.totals["completion_tokens"] += reply.completion_tokens
            priced = self._config.model_configs.of(is_large=call.is_large)
            self._meter.cost += priced.cost(reply.prompt_tokens, reply.completion_tokens)
            return reply

    async def _remembered(self, key: str) -> Verdict | None:
        if self._cache.is_on_disk:
            return await asyncio.to_thread(self._cache.get, key)
        return self._cache.get(key)

    async def _remember(self, key: str, verdict: Verdict) -> None:
        if self._cache.is_on_disk:
            await asyncio.to_thread(self._cache.put, key, verdict)
        else:
            self._cache.put(key, verdict)


def _verdict_or_raise(outcome: Verdict | JudgeFailedError) -> Verdict:
    if isinstance(outcome, JudgeFailedError):
        raise JudgeFailedError(str(outcome)) from outcome
    return outcome


def backoff_s(first_s: float, attempt: int, *, jitter: float) -> float:
    """Seconds to wait after the attempt (1: the first) has failed: doubling, times a jitter that spreads the callers."""
    return float(first_s * 2 ** (attempt - 1) * jitter)
