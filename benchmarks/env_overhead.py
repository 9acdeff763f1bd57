"""What one environment process costs: groups/s with inference that takes no time, and how busy it keeps slow inference.

    python -m benchmarks.env_overhead groups --seconds 10 --repetitions 3
    python -m benchmarks.env_overhead busy --sequences 512 --latency 1.0
    python -m benchmarks.env_overhead busy --sequences 512 --latency 1.0 --spread 0.3

groups: mock inference answers at once, a trainer takes whatever comes; an old-style environment runs unchanged on
    ours and on atroposlib 0.4.0, each with its own rollout server, in turns. `ours-tokens` is the same over the token route.
busy: the mock takes --latency seconds a request; the figure is the mean share of --sequences that were being sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from atroposlib.client import RolloutClient
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.wire.models import RunRequest
from benchmarks.peers import peer_python
from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.processes import ROOT, free_port
from benchmarks.rollout_server.report import progress, save, table

ENV_SCRIPT = ROOT / "benchmarks" / "env_overhead_env.py"
FIRST_GROUP_S = 60.0
STOP_S = 10.0
POLL_S = 0.005
UNBOUNDED = 10**6


@dataclass(frozen=True)
class Load:
    """The shape of the work."""

    group_size: int
    tokens: int
    workers: int
    """Groups in flight."""
    batch_size: int
    """Sequences of a batch."""
    latency_s: float = 0.0
    """Median of a request's time."""
    sigma: float = 0.0
    """Lognormal spread of it."""


@dataclass(frozen=True)
class Program:
    """An environment library under measurement."""

    name: str
    server: str
    """Its rollout server, a contender's name."""
    style: str
    is_peer: bool = False

    def python(self) -> list[str]:
        """The interpreter; -P: or the packages of our folder would hide the peer's."""
        return [str(peer_python("atroposlib")), "-P"] if self.is_peer else [sys.executable]


PROGRAMS = {
    "ours": Program("ours", "ours-normal", "chat"),
    "ours-tokens": Program("ours-tokens", "ours-normal", "tokens"),
    "upstream": Program("upstream", "upstream", "chat", is_peer=True),
}


class Trainer(Protocol):
    """Takes batches as fast as they come."""

    groups: int

    async def run(self) -> None:
        """Until cancelled."""


class OurTrainer:
    """Lease and acknowledge; nothing is ever too old."""

    def __init__(self, url: str, load: Load) -> None:
        self.groups = 0
        self._url, self._load = url, load

    async def run(self) -> None:
        request = RunRequest(
            run_name="overhead", batch_size=self._load.batch_size, max_staleness=UNBOUNDED, num_steps=UNBOUNDED
        )
        async with RolloutClient(self._url) as client:
            session = (await client.open_run(request)).session
            await client.publish_policy(0, session=session)
            for step in range(UNBOUNDED):
                self.groups += len(await client.lease(step, session=session, deadline_s=FIRST_GROUP_S))
                await client.ack(step, session=session, policy_version=0)
                await client.commit(step + 1, session=session)


class OldTrainer:
    """Register and ask for batches, as upstream's example does."""

    def __init__(self, url: str, load: Load) -> None:
        self.groups = 0
        self._url, self._load = url, load

    async def run(self) -> None:
        registration = {
            "wandb_group": "g", "wandb_project": "p", "batch_size": self._load.batch_size, "max_token_len": 1 << 20,
            "checkpoint_dir": "", "save_checkpoint_interval": -1, "starting_step": 0, "num_steps": UNBOUNDED,
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=self._url, timeout=30.0) as client:
            (await client.post("/register", json=registration)).raise_for_status()
            while True:
                batch = (await client.get("/batch")).json()["batch"]
                self.groups += len(batch or [])
                if not batch:
                    await asyncio.sleep(POLL_S)


@dataclass(frozen=True)
class Result:
    """One run."""

    groups_per_s: float
    cpu_ms_per_group: float
    """CPU time of the environment process."""
    busy: float
    """Share of the sequences that the mock was sampling."""


class Mock:
    """The mock's process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}/v1"

    def read(self) -> dict[str, float]:
        """Its figures since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._process.stdout.readline())
        return figures


@contextmanager
def mock_inference(load: Load) -> Iterator[Mock]:
    """Run the mock as long as the block lasts."""
    port = free_port()
    arguments = [port, load.latency_s, load.sigma, load.tokens, load.workers * load.group_size]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.env_overhead_mock", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the mock inference server did not start; see its traceback above")
        yield Mock(process, port)
    finally:
        stop(process)


@contextmanager
def environment(program: Program, url: str, inference: str, load: Load, folder: Path) -> Iterator[psutil.Process]:
    """Run the environment as long as the block lasts."""
    numbers = [load.group_size, load.tokens, load.workers, load.batch_size]
    command = [*program.python(), str(ENV_SCRIPT), program.style, url, inference, str(folder / "tokenizer")]
    log = folder / f"{program.name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *map(str, numbers)], stdout=out, stderr=out, cwd=folder)
    try:
        yield psutil.Process(process.pid)
        if process.poll() is not None:
            raise RuntimeError(f"the environment {program.name} ended early; its log ends: {log.read_text()[-1500:]}")
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL for what does not listen."""
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def measure(program: Program, load: Load, *, seconds: float) -> Result:
    """One run of one program: its own rollout server, the mock, the environment, a trainer."""
    with (
        tempfile.TemporaryDirectory() as name,
        contender(program.server).serve() as server,
        mock_inference(load) as mock,
    ):
        folder, url = Path(name), f"http://127.0.0.1:{server.port}"
        save_byte_tokenizer(folder / "tokenizer")
        trainer: Trainer = OldTrainer(url, load) if program.is_peer else OurTrainer(url, load)
        training = asyncio.create_task(trainer.run())
        try:
            # An old environment may register only after the trainer has asked for its first batch.
            await asyncio.sleep(0.5)
            with environment(program, url, mock.url, load, folder) as process:
                await first_groups(trainer, training, process)
                return await window(trainer, process, mock, seconds=seconds)
        finally:
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)


async def first_groups(trainer: Trainer, training: asyncio.Task[None], process: psutil.Process) -> None:
    """Wait until groups come, and a moment more."""
    end = time.monotonic() + FIRST_GROUP_S
    while trainer.groups == 0:
        if training.done():
            await training
        if time.monotonic() > end or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"no group came within {FIRST_GROUP_S:.0f} s, or the environment ended")
        await asyncio.sleep(0.05)
    await asyncio.sleep(2.0)


async def window(trainer: Trainer, process: psutil.Process, mock: Mock, *, seconds: float) -> Result:
    """The figures of some seconds."""
    mock.read()
    start, groups, cpu_s = time.monotonic(), trainer.groups, cpu_of(process)
    await asyncio.sleep(seconds)
    elapsed_s, made, used_s = time.monotonic() - start, trainer.groups - groups, cpu_of(process) - cpu_s
    busy = mock.read()["busy"]
    return Result(made / elapsed_s, 1000 * used_s / max(1, made), busy)


def cpu_of(process: psutil.Process) -> float:
    """User and system seconds."""
    times = process.cpu_times()
    return times.user + times.system


def run_groups(args: argparse.Namespace) -> None:
    """Groups/s, programs in turns; medians."""
    load = Load(args.group_size, args.tokens, args.workers, args.batch_size)
    results: dict[str, list[Result]] = {name: [] for name in args.programs}
    for repetition in range(args.repetitions):
        for name in args.programs:
            progress(f"{name}, repetition {repetition + 1} of {args.repetitions}")
            results[name].append(asyncio.run(measure(PROGRAMS[name], load, seconds=args.seconds)))
    base = median(results.get("upstream", []), "groups_per_s")
    rows = [
        [name, rate := median(some, "groups_per_s"), median(some, "cpu_ms_per_group"), rate / base if base else None]
        for name, some in results.items()
    ]
    print(table(["program", "groups/s", "environment CPU ms/group", "x upstream"], rows))
    save("env-overhead-groups", {"load": vars(load), "results": {k: [vars(r) for r in v] for k, v in results.items()}})


def run_busy(args: argparse.Namespace) -> None:
    """Share of busy sampling."""
    load = Load(
        args.group_size, args.tokens, args.sequences // args.group_size, args.batch_size, args.latency, args.spread
    )
    rows, facts = [], {}
    for name in args.programs:
        progress(name)
        result = asyncio.run(measure(PROGRAMS[name], load, seconds=args.seconds))
        facts[name] = vars(result)
        rows.append([name, args.sequences, args.latency, 100 * result.busy, result.groups_per_s])
    print(table(["program", "sequences in flight", "latency s", "sampling busy %", "groups/s"], rows))
    save("env-overhead-busy", {"load": vars(load), "results": facts})


def median(results: Sequence[Result], name: str) -> float:
    """Of one figure; 0 without results."""
    return statistics.median(getattr(result, name) for result in results) if results else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.env_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    groups = commands.add_parser("groups", help="groups/s at zero latency")
    groups.set_defaults(run=run_groups)
    groups.add_argument("--workers", type=int, default=256, help="groups in flight (256)")
    groups.add_argument("--repetitions", type=int, default=3)
    busy = commands.add_parser("busy", help="share of busy sampling")
    busy.set_defaults(run=run_busy)
    busy.add_argument("--sequences", type=int, default=512, help="sequences in flight (512)")
    busy.add_argument("--latency", type=float, default=1.0, help="seconds of a request (1.0)")
    busy.add_argument(
        "--spread", type=float, default=0.0, help="sigma of a lognormal latency; 0: all requests end together (0)"
    )
    for command, programs in ((groups, ["upstream", "ours"]), (busy, ["ours-tokens"])):
        command.add_argument("--group-size", type=int, default=8)
        command.add_argument("--tokens", type=int, default=64, help="completion tokens of a sequence (64)")
        command.add_argument("--batch-size", type=int, default=512, help="sequences of a batch (512)")
        command.add_argument("--seconds", type=float, default=10.0, help="length of the measured window (10)")
        command.add_argument("--programs", nargs="+", choices=PROGRAMS, default=programs)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
