"""CPU that an environment spends on sending: lists to columns and out, against JSON and gzip by upstream's own client code.

    python -m benchmarks.send_cost
    python -m benchmarks.send_cost --shape 16x8192 --groups 16

Both start from the same lists of Python numbers, as environments make them, and end when the server has answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from atroposlib.client import RolloutClient
from atroposlib.envs.command_line.event_loop import run_fast
from atroposlib.envs.serving.courier import Courier
from atroposlib.envs.serving.delivery import wire_group
from atroposlib.envs.serving.membership import Membership
from atroposlib.wire.columns import new_group_id
from atroposlib.wire.models import EnvRequest, RunRequest
from benchmarks.peers import peer_python
from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.exchanges import register_json
from benchmarks.rollout_server.http_connection import HttpConnection
from benchmarks.rollout_server.json_route import CLIENT
from benchmarks.rollout_server.processes import ROOT
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.rollout_server.shapes import Shape
from benchmarks.rollout_server.upstream_client import a_group

BATCH_SIZE = 1 << 16
IN_FLIGHT = 8
TIMEOUT_S = 330.0


def run(args: argparse.Namespace) -> None:
    """Measure both, print seconds of CPU a million tokens, and the ratio."""
    shape: Shape = args.shape
    figures = {name: _measure(name, shape, args.groups) for name in ("upstream", "ours")}
    rows = [[name, cpu_s, figures["upstream"] / cpu_s] for name, cpu_s in figures.items()]
    print(table(["sender", "CPU s/M tokens", "upstream / this"], rows))
    save("send-cost", {"shape": str(shape), "groups": args.groups, "cpu_s_per_million_tokens": figures})


def _measure(name: str, shape: Shape, groups: int) -> float:
    progress(f"{name}: {groups} groups of {shape}")
    numbers = [str(number) for number in (groups, shape.sequences, shape.tokens_each)]
    is_peer = name == "upstream"
    with contender("upstream" if is_peer else "ours-normal").serve() as server:
        url = f"http://127.0.0.1:{server.port}"
        if is_peer:
            with HttpConnection(server.port) as connection:
                register_json(connection, batch_size=BATCH_SIZE, group_size=shape.sequences)
            command = [str(peer_python("atroposlib")), "-P", str(CLIENT), "post", url, *numbers, "gzip"]
        else:
            command = [sys.executable, "-m", "benchmarks.send_cost", "--send-to", url, *numbers]
        done = subprocess.run(
            command, input="go\n", capture_output=True, text=True, check=True, timeout=TIMEOUT_S, cwd=ROOT
        )
    cpu_s: float = json.loads(done.stdout.splitlines()[-1])["cpu_s"]
    return cpu_s / (groups * shape.tokens / 1e6)


def send(url: str, groups: int, sequences: int, tokens: int) -> None:
    """Our sender, in a process of its own: prints the CPU seconds it used."""
    bodies = [_as_authors_write(a_group(number, sequences, tokens)) for number in range(groups)]
    print(json.dumps({"cpu_s": run_fast(_send(url, bodies, sequences))}))


async def _send(url: str, bodies: list[Any], sequences: int) -> float:
    async with RolloutClient(url) as client:
        request = RunRequest(run_name="send", batch_size=BATCH_SIZE, max_staleness=1000, num_steps=1000)
        await client.open_run(request)
        env = EnvRequest(name="send", group_size=sequences, max_token_len=1 << 20)
        membership = Membership(client, env, deadline_s=TIMEOUT_S)
        info = await membership.join()
        courier = Courier(client, membership, None)
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def post(body: Any) -> None:
            async with slots:
                group = wire_group(
                    body, group_id=new_group_id(), env_id=info.env_id, run_id=info.run.run_id, ticket=None, origins={},
                    fallback_version=0,
                )  # fmt: skip
                await courier.deliver(group)

        sending = asyncio.create_task(courier.run())
        cpu_s = time.process_time()
        await asyncio.gather(*(post(body) for body in bodies))
        cpu_s = time.process_time() - cpu_s
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return cpu_s


def _as_authors_write(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "env_id"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.send_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=Shape.parse, default="8x2048", help="sequences x tokens (8x2048)")
    parser.add_argument("--groups", type=int, default=256, help="groups sent (256)")
    parser.add_argument("--send-to", nargs=4, metavar=("URL", "GROUPS", "SEQUENCES", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send_to:
        url, *numbers = args.send_to
        send(url, *map(int, numbers))
    else:
        run(args)


if __name__ == "__main__":
    main()
