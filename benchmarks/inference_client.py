"""Many requests at once to one inference server: our client against raw aiohttp, the openai package, and httpx.

The server is a MOCK in another process that answers every request after the same latency, so the time beyond the
latency is what client and loopback cost. Contenders take turns; figures are medians over the rounds. `x raw` compares
seconds with raw aiohttp's; `CPU s` is this process's CPU time, which says more where other jobs share the machine.

python benchmarks/inference_client.py
python benchmarks/inference_client.py --concurrency 1500 4000 --latency 1 --rounds 3
python benchmarks/inference_client.py --concurrency 1500 --skip httpx
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import aiohttp
import httpx
from aiohttp import web

from atroposlib.envs.command_line.event_loop import run_fast
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.server_handling.vllm_server import VLLMServer
from atroposlib.envs.serving.memory import settle_memory

MODEL = "mock"
MESSAGES = [{"role": "user", "content": "How many apples are left? " * 20}]
PROMPT_IDS = list(range(1000, 1256))
REPLY_IDS = list(range(2000, 2256))
TIMEOUT_S = 120
BACKLOG = 8192

Ask: TypeAlias = Callable[[], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1500, 4000], help="requests in flight at once")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds the mock takes to answer")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each contender")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="contenders to leave out, by the first word of their name"
    )
    options = parser.parse_args()
    raise_open_files(2 * max(options.concurrency) + 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, options.latency), daemon=True)
    server.start()
    try:
        run_fast(compare(f"http://127.0.0.1:{port}/v1", options))
    finally:
        server.terminate()
        server.join()


def raise_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))


def serve(port: int, latency_s: float) -> None:
    """The mock: the same answer to everyone, after the latency."""
    chat = {
        "id": "x", "object": "chat.completion", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word " * 256}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 256, "total_tokens": 356},
    }  # fmt: skip
    content = [{"token_id": token, "logprob": -0.5, "rank": 1, "top_logprobs": []} for token in REPLY_IDS]
    versions = [{"version": "3", "start": 0, "end": len(REPLY_IDS)}]
    tokens = {
        "request_id": "x", "choices": [{"index": 0, "finish_reason": "stop", "token_ids": REPLY_IDS,
        "logprobs": {"content": content}, "weight_versions": versions}],
    }  # fmt: skip
    answers = {"/v1/chat/completions": json.dumps(chat).encode(), "/inference/v1/generate": json.dumps(tokens).encode()}

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(latency_s)
        return web.Response(body=answers[request.path], content_type="application/json")

    app = web.Application()
    app.router.add_get("/health", health)
    for path in answers:
        app.router.add_post(path, answer)
    web.run_app(app, host="127.0.0.1", port=port, backlog=BACKLOG, print=None, access_log=None)


async def compare(url: str, options: argparse.Namespace) -> None:
    await wait_for(url)
    contenders = {name: make for name, make in CONTENDERS.items() if name.split()[0] not in options.skip}
    print(
        f"latency {options.latency} s, {options.rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'concurrency':>11}  {'client':34} {'median s':>9} {'min s':>7} {'max s':>7} {'x raw':>6} {'CPU s':>6}")
    for concurrency in options.concurrency:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, make in contenders.items():
                wall_s, cpu_s = await timed(make, url, concurrency)
                seconds[name].append(wall_s)
                cpu_seconds[name].append(cpu_s)
        for name, taken in seconds.items():
            median = statistics.median(taken)
            raw = statistics.median(seconds[RAW_TOKENS if "tokens" in name else RAW_CHAT])
            print(
                f"{concurrency:>11}  {name:34} {median:9.2f} {min(taken):7.2f} {max(taken):7.2f} {median / raw:6.2f} "
                f"{statistics.median(cpu_seconds[name]):6.2f}",
                flush=True,
            )


async def wait_for(url: str) -> None:
    deadline = time.monotonic() + 30
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url):
                    return
            except aiohttp.ClientConnectionError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)


async def timed(make: Callable[[str], Any], url: str, concurrency: int) -> tuple[float, float]:
    """Seconds from the first request to the last answer, and this process's CPU time meanwhile.

    Connections are opened in that time; imports and the first request are over.
    """
    async with make(url) as ask:
        await ask()
        # As in `serve`; and what the contender before left behind is collected on nobody's account.
        settle_memory()
        start, cpu_start = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return time.perf_counter() - start, time.process_time() - cpu_start


@asynccontextmanager
async def raw_aiohttp(url: str, body: dict[str, Any]) -> AsyncIterator[Ask]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask() -> Any:
            async with session.post(url, json=body) as response:
                return await response.json()

        yield ask


@asynccontextmanager
async def plain_httpx(url: str) -> AsyncIterator[Ask]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S) as client:

        async def ask() -> Any:
            return (await client.post(f"{url}/chat/completions", json={"model": MODEL, "messages": MESSAGES})).json()

        yield ask


@asynccontextmanager
async def our_chat(url: str) -> AsyncIterator[Ask]:
    server = VLLMServer(config_of(url))
    try:
        yield lambda: server.chat_completion(messages=MESSAGES)
    finally:
        await server.close()


@asynccontextmanager
async def our_tokens(url: str) -> AsyncIterator[Ask]:
    server = VLLMServer(config_of(url))
    try:
        yield lambda: server.sample_tokens(input_ids=PROMPT_IDS, max_tokens=256)
    finally:
        await server.close()


@asynccontextmanager
async def our_manager_chat(url: str) -> AsyncIterator[Ask]:
    manager = ServerManager([config_of(url)])
    try:
        yield lambda: manager.chat_completion(messages=MESSAGES)
    finally:
        await manager.close()


@asynccontextmanager
async def our_manager_tokens(url: str) -> AsyncIterator[Ask]:
    manager = ServerManager([config_of(url)])
    try:
        yield lambda: manager.sample_tokens(input_ids=PROMPT_IDS, max_tokens=256)
    finally:
        await manager.close()


@asynccontextmanager
async def openai_package(url: str) -> AsyncIterator[Ask]:
    server = VLLMServer(config_of(url))
    messages: Any = MESSAGES
    try:
        yield lambda: server.openai.chat.completions.create(model=MODEL, messages=messages)
    finally:
        await server.close()


def config_of(url: str) -> APIServerConfig:
    return APIServerConfig(
        base_url=url, server_type="vllm", model_name=MODEL, timeout=TIMEOUT_S, num_max_requests_at_once=100_000
    )


def raw_chat(url: str) -> Any:
    return raw_aiohttp(f"{url}/chat/completions", {"model": MODEL, "messages": MESSAGES})


def raw_tokens(url: str) -> Any:
    sampling = {"max_tokens": 256, "temperature": 1.0, "n": 1, "logprobs": 0}
    body = {"model": MODEL, "token_ids": PROMPT_IDS, "sampling_params": sampling}
    return raw_aiohttp(f"{url.removesuffix('/v1')}/inference/v1/generate", body)


RAW_CHAT, RAW_TOKENS = "raw aiohttp, chat", "raw aiohttp, tokens"
CONTENDERS: dict[str, Callable[[str], Any]] = {
    RAW_CHAT: raw_chat,
    "server chat_completion": our_chat,
    "manager chat_completion": our_manager_chat,
    "openai package over aiohttp, chat": openai_package,
    "httpx 0.28, chat": plain_httpx,
    RAW_TOKENS: raw_tokens,
    "server sample_tokens": our_tokens,
    "manager sample_tokens": our_manager_tokens,
}


if __name__ == "__main__":
    main()
