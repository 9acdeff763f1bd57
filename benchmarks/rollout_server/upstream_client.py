# mypy: disable-error-code="attr-defined, import-untyped, import-not-found"
# The packages of another environment are not those that mypy sees.
"""Upstream's own client code as a load: run by the interpreter of the peer environment, not by ours.

upstream_client.py post|take URL GROUPS SEQUENCES TOKENS gzip|plain

It prints `ready`, waits for a line on stdin, works, and prints one line of JSON.
`post` sends each group with BaseEnv's sending method, eight at once; `take` asks for batches as the example trainer does.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from functools import partial
from typing import Any

import aiohttp
import requests

from atroposlib.envs.base import BaseEnv

IN_FLIGHT = 8
NO_GZIP_BYTES = 1 << 40
POLL_S = 0.02
DEADLINE_S = 300.0


def main() -> None:
    role, url, groups, sequences, tokens, encoding = sys.argv[1:]
    bodies = [a_group(i, int(sequences), int(tokens)) for i in range(int(groups))] if role == "post" else []
    print("ready", flush=True)
    sys.stdin.readline()
    start, cpu_s = time.monotonic(), time.process_time()
    if role == "post":
        asyncio.run(post_all(url, bodies, is_gzipped=encoding == "gzip"))
    else:
        take_all(url, int(groups), is_gzipped=encoding == "gzip")
    print(json.dumps({"seconds": time.monotonic() - start, "cpu_s": time.process_time() - cpu_s}), flush=True)


def a_group(number: int, sequences: int, tokens: int) -> dict[str, Any]:
    """A group as upstream's base class would send it, told apart by its group_overrides."""
    rng, prompt = random.Random(number), tokens // 4
    ids = [[rng.randrange(128_000) for _ in range(tokens)] for _ in range(sequences)]
    return {
        "tokens": ids,
        "masks": [[-100] * prompt + row[prompt:] for row in ids],
        "scores": [rng.random() for _ in range(sequences)],
        "inference_logprobs": [
            [1.0] * prompt + [-rng.expovariate(3.0) for _ in range(tokens - prompt)] for _ in range(sequences)
        ],
        "group_overrides": {"number": number},
        "env_id": 0,
    }


async def post_all(url: str, bodies: list[dict[str, Any]], *, is_gzipped: bool) -> None:
    """One session a group, as upstream does."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    options = {} if is_gzipped else {"minimum_size": NO_GZIP_BYTES}

    async def post(body: dict[str, Any]) -> None:
        # The method uses nothing of its environment.
        send = partial(BaseEnv._post_json_with_compression, None)
        async with (
            slots,
            aiohttp.ClientSession() as session,
            send(session, f"{url}/scored_data", body, **options) as answer,
        ):
            answer.raise_for_status()
            await answer.text()

    await asyncio.gather(*(post(body) for body in bodies))


def take_all(url: str, groups: int, *, is_gzipped: bool) -> None:
    """Poll /batch until every group came once."""
    headers = {} if is_gzipped else {"Accept-Encoding": "identity"}
    seen: set[int] = set()
    end = time.monotonic() + DEADLINE_S
    while len(seen) < groups:
        batch = requests.get(f"{url}/batch", headers=headers, timeout=60).json()["batch"]
        for group in batch or ():
            number = group["group_overrides"]["number"]
            if number in seen:
                raise AssertionError(f"group {number} came twice")
            seen.add(number)
        if not batch:
            if time.monotonic() > end:
                raise TimeoutError(f"{groups - len(seen)} of {groups} groups did not come back")
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
