"""What a server costs while many environments wait for leave to start and nothing can start."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass

import msgspec

from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.exchanges import post_json
from benchmarks.rollout_server.http_connection import JSON_HEADER, HttpConnection
from benchmarks.rollout_server.processes import Server
from benchmarks.rollout_server.report import progress, save, table

WAIT_S = 20.0
SETTLE_S = 5.0
ANSWER_TIMEOUT_S = WAIT_S + 30.0
EXAMPLES = """examples:
  python -m benchmarks.rollout_server idle
  python -m benchmarks.rollout_server idle --environments 100 --seconds 25 --server ours-memory
"""


@dataclass(frozen=True)
class IdleFigures:
    """Over the measured span."""

    server: str
    environments: int
    seconds: float
    answers: int
    """Long-polls that ended with no ticket and were asked again."""
    cpu_percent: float
    """Of one core."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "idle", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=int, default=1000, help="environments that wait (1000)")
    parser.add_argument("--seconds", type=float, default=30.0, help="span that is measured (30)")
    parser.add_argument("--server", default="ours-normal", help="contender (ours-normal)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fill the run's only place, let everybody wait, read the server's CPU clock."""
    with contender(args.server).serve() as server:
        progress(f"{args.server}: registering {args.environments} environments")
        requests = _register(server.port, args.environments)
        progress(f"{args.server}: {args.environments} environments wait for {args.seconds:.0f} s")
        figures = asyncio.run(_wait_all(args.server, server, requests, args.seconds))
    columns = ["server", "environments", "seconds", "long-polls ended", "CPU, % of a core"]
    print(table(columns, [list(asdict(figures).values())]))
    save("idle", {"idle": asdict(figures)})


def _register(port: int, environments: int) -> list[bytes]:
    """The requests that will wait, one for each environment. A group of the first takes the only place."""
    with HttpConnection(port) as connection:
        run_request = {"run_name": "idle", "batch_size": 1, "max_staleness": 0, "num_steps": 10}
        session = post_json(connection, "/v1/run", run_request)["session"]
        policy = msgspec.json.encode({"session": session, "policy_version": 0})
        connection.call(b"POST", "/v1/policy", policy, JSON_HEADER).expect(204)
        asks = []
        for i in range(environments):
            env = post_json(connection, "/v1/envs", {"name": f"env-{i}", "group_size": 1})
            asks.append({"env_id": env["env_id"], "session": env["session"], "sequences": 1, "wait_s": WAIT_S})
        taken = post_json(connection, "/v1/tickets", {**asks[0], "count": 1024, "wait_s": 0})
        if not taken["tickets"]:
            raise RuntimeError("the run has no place to fill; the measurement would mean nothing")
    return [_http_post(port, "/v1/tickets", msgspec.json.encode(ask)) for ask in asks]


def _http_post(port: int, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _wait_all(name: str, server: Server, requests: list[bytes], seconds: float) -> IdleFigures:
    answers = 0

    async def wait_for_ever(request: bytes) -> None:
        nonlocal answers
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            while True:
                writer.write(request)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await _read_answer(reader)
                if b'"tickets":[]' not in answer:
                    raise RuntimeError(f"expected a long-poll without a ticket, got {answer[:300]!r}")
                answers += 1
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(wait_for_ever(request)) for request in requests]
        await asyncio.sleep(SETTLE_S)
        start, cpu_s, answered = time.monotonic(), server.cpu_s(), answers
        await asyncio.sleep(seconds)
        span = time.monotonic() - start
        used = server.cpu_s() - cpu_s
        figures = IdleFigures(name, len(requests), span, answers - answered, 100 * used / span)
        for task in waiting:
            task.cancel()
    return figures


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    body = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"ticket request failed: {head[:100]!r} {body[:300]!r}")
    return body
