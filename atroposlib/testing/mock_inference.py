"""MOCK inference server: the routes of OpenAI, vLLM, SGLang and TRL, with scripted answers, latency and faults. It holds no model.

Nothing measured against it says anything about inference; it is the other side of tests, of `atropos check` and of
benchmarks of the environment side.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from atroposlib.testing.mock.behaviour import Dice, FaultRates, Faults, Latency
from atroposlib.testing.mock.codec import ByteCodec, Codec, TokenizerCodec
from atroposlib.testing.mock.generation import Choice, Generation, Outcome, mock_logprobs, version_spans
from atroposlib.testing.mock.http import Answer, HttpServer
from atroposlib.testing.mock.metrics import metrics_text
from atroposlib.testing.mock.policies import Policy, Prompt, PromptFunction, Reply, as_policy
from atroposlib.testing.mock.routes import Routes, Truncated, problem

VERSION_CHANGES_KEPT = 64
THREAD_START_S = 10.0


class MockInferenceServer:
    """``async with MockInferenceServer("the answer") as server`` listens on ``server.url``.

    Args:
        reply: who answers: a text, texts by turn, a policy, or a function of (prompt ids, index of the choice) that
            returns completion ids with the terminator. None: random words.
        weight_version: what it claims to run; "default" is what a fresh vLLM says.
        latency_s: time each generation takes, or a Latency.
        fault_rates: probability of each fault; `faults` makes the next ones fail exactly.
        tokenizer: real tokenizer of texts and chats; None: bytes, as byte_tokenizer().
        max_running: generations at once, the others queue; None: no limit.
        seed: random replies, latencies and faults depend on it and on the prompt, not on the order of arrival.
        keeps_requests: whether `requests` grows; switch it off in long runs.
    """

    def __init__(
        self,
        reply: Policy | Reply | str | Sequence[str] | None = None,
        weight_version: str = "0",
        latency_s: float | Latency = 0.0,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        fault_rates: FaultRates | None = None,
        tokenizer: Any = None,
        model_name: str = "mock",
        max_running: int | None = None,
        seed: int = 0,
        keeps_requests: bool = True,
    ) -> None:
        self.policy = as_policy(reply)
        self.latency_s = latency_s
        self.host, self.port = host, port
        self.faults = Faults()
        self.fault_rates = fault_rates or FaultRates()
        self.codec: Codec = ByteCodec() if tokenizer is None else TokenizerCodec(tokenizer)
        self.model_name = model_name
        self.keeps_requests = keeps_requests
        self.requests: list[dict[str, Any]] = []
        """Bodies of the generations asked for."""
        self.routes: Counter[str] = Counter()
        """Requests by path."""
        self.version_changes_at: int | None = None
        """Output token index from which `next_version` samples, as after an update in flight."""
        self.next_version = "1"
        self.in_flight = 0
        """Generations running or queued."""
        self.max_in_flight = 0
        self.totals: Counter[str] = Counter()
        """Of /metrics: prompt_tokens, generation_tokens, and generations by finish reason."""
        self._slots = asyncio.Semaphore(max_running) if max_running else None
        self._running = 0
        self._dice = Dice(seed)
        self._changes: deque[tuple[float, str]] = deque([(0.0, weight_version)], maxlen=VERSION_CHANGES_KEPT)
        self._http = HttpServer(self._handle)
        self._routes = Routes(self)

    @property
    def url(self) -> str:
        """Base URL of the OpenAI-compatible routes."""
        return f"{self.root_url}/v1"

    @property
    def root_url(self) -> str:
        """Base URL of the other routes."""
        return f"http://{self.host}:{self.port}"

    @property
    def weight_version(self) -> str:
        """What the server runs. A generation in flight while it changes gets tokens of both."""
        return self._changes[-1][1]

    @weight_version.setter
    def weight_version(self, version: str) -> None:
        self._changes.append((time.monotonic(), version))

    async def start(self) -> None:
        """Listen; after stop() on the same port again."""
        self.port = await self._http.start(self.host, self.port)

    async def stop(self) -> None:
        """As a SIGKILL looks from outside: connections reset, port closed."""
        await self._http.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Routes

    async def _handle(self, method: str, target: str, raw: bytes) -> Answer | None:
        path = target.partition("?")[0]
        self.routes[path] += 1
        if path == "/metrics":
            return Answer(200, self._metrics().encode(), "text/plain; version=0.0.4")
        try:
            body = msgspec.json.decode(raw) if raw else {}
        except msgspec.DecodeError as error:
            return _json(400, problem(f"the body is no JSON: {error}"))
        answer = await self._answer(method, path, body)
        if answer is None:
            return None
        status, content = answer
        if isinstance(content, Truncated):
            return _json(status, content.content, is_truncated=True)
        return _json(status, content)

    async def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Status and content; None: reset the connection. Replace it to answer anything else."""
        return await self._routes.answer(method, path, body)

    # Generating

    async def generate(self, body: dict[str, Any], asked: Sequence[Generation]) -> list[Outcome]:
        """One outcome a prompt; the prompts of one request run one after the other."""
        if self.keeps_requests:
            self.requests.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self._slots is None:
                return [await self._run(one) for one in asked]
            async with self._slots:
                return [await self._run(one) for one in asked]
        finally:
            self.in_flight -= 1

    async def _run(self, asked: Generation) -> Outcome:
        self._running += 1
        try:
            return await self._sample(asked)
        finally:
            self._running -= 1

    async def _sample(self, asked: Generation) -> Outcome:
        started = time.monotonic()
        key = _Once(partial(self._dice.key, asked.prompt_ids, salt=asked.seed, is_greedy=asked.is_greedy))
        choices = [self._choice(asked, index, key) for index in range(asked.n)]
        longest = max(len(choice.token_ids) for choice in choices)
        seconds = self._latency(key, longest)
        if seconds > 0:
            await asyncio.sleep(seconds)
        fault = self._fault(key)
        if fault == "hang":
            await asyncio.get_running_loop().create_future()
        for choice in choices:
            self._stamp(choice, fault, started)
        self.totals["prompt_tokens"] += len(asked.prompt_ids)
        return Outcome(choices, fault)

    def _choice(self, asked: Generation, index: int, key: _Once) -> Choice:
        # A greedy engine gives the same answer n times.
        prompt = Prompt(asked.prompt_ids, 0 if asked.is_greedy else index, self.codec, key, asked.messages)
        reply = self.policy.reply(prompt)
        token_ids = [*self.codec.encode(reply), self.codec.eos_id] if isinstance(reply, str) else list(reply)
        if asked.stop:
            text = reply if isinstance(reply, str) else self.codec.decode(token_ids)
            cuts = [text.index(stop) for stop in asked.stop if stop in text]
            token_ids = self.codec.encode(text[: min(cuts)]) if cuts else token_ids
        cut = token_ids if asked.max_tokens is None else token_ids[: asked.max_tokens]
        reason = "stop" if len(cut) == len(token_ids) else "length"
        return Choice(index, cut, mock_logprobs(len(cut)), reason)

    def _latency(self, key: _Once, n_tokens: int) -> float:
        if not isinstance(self.latency_s, Latency):
            return self.latency_s
        rng = random.Random(f"{key()}/latency") if self.latency_s.is_random else None
        return self.latency_s.draw(rng, n_tokens)

    def _fault(self, key: _Once) -> str | None:
        exact = self.faults.take()
        if exact is not None or self.fault_rates.total == 0:
            return exact
        # Drawn anew for a repetition, greedy or not: a retry may succeed.
        self.totals["draws"] += 1
        return self.fault_rates.draw(random.Random(f"{key()}/fault/{self.totals['draws']}"))

    def _stamp(self, choice: Choice, fault: str | None, started: float) -> None:
        n_tokens = len(choice.token_ids)
        if self.version_changes_at:
            at = min(self.version_changes_at, n_tokens)
            runs = [(self.weight_version, 0, at), (self.next_version, at, n_tokens)]
            choice.spans = [{"version": v, "start": start, "end": end} for v, start, end in runs if end > start]
        else:
            choice.spans = version_spans(self._changes, n_tokens, started=started, ended=time.monotonic())
        if fault == "abort":
            choice.finish_reason = "abort"
        if fault == "misalign":
            choice.logprobs = choice.logprobs[:-1]
        self.totals["generation_tokens"] += n_tokens
        self.totals[f"finished/{choice.finish_reason}"] += 1

    # Figures

    def _metrics(self) -> str:
        return metrics_text(
            self.model_name, running=self._running, waiting=self.in_flight - self._running, totals=self.totals
        )


class _Once:
    """A name that is made at first use and kept: most requests need no random numbers."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._value: str | None = None

    def __call__(self) -> str:
        if self._value is None:
            self._value = self._make()
        return self._value


@contextmanager
def in_thread(server: MockInferenceServer) -> Iterator[MockInferenceServer]:
    """Run a server on an event loop of its own, for synchronous tests and for clients whose loop may be blocked."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="mock-inference", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(THREAD_START_S)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(THREAD_START_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(THREAD_START_S)
        loop.close()


def _json(status: int, content: Any, *, is_truncated: bool = False) -> Answer:
    return Answer(status, msgspec.json.encode(content), is_truncated=is_truncated)


__all__ = [
    "FaultRates",
    "Faults",
    "Latency",
    "MockInferenceServer",
    "Policy",
    "Prompt",
    "PromptFunction",
    "Reply",
    "in_thread",
]
