"""How long new weights take into a running vLLM server, against the least it could take, and what a request sees of it.

Limit: a raw gloo broadcast of the same bytes between two processes, plus the engine's own loading of what it holds.
Rounds alternate between our push and the limit, so both see the same load. In a second part a streamed request runs:
its pause is the largest gap between two of its tokens.

OMP_NUM_THREADS=1 python -m benchmarks.weight_push
OMP_NUM_THREADS=1 python -m benchmarks.weight_push --models 1b --rounds 3 --trainer-dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection

import httpx
import torch
import torch.distributed as dist

from benchmarks.vllm_server import CallTimes, model_folder, running_server, trainer_weights
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.base import NamedWeights

PIECE_BYTES = 64 * 2**20
PROMPT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "1b"], help="135m, 1b (random) or a folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trainer-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--bucket-mib", type=float, default=WeightSyncConfig.bucket_mib)
    options = parser.parse_args()
    times = CallTimes()
    for name in options.models:
        with model_folder(name) as folder:
            weights = trainer_weights(folder, getattr(torch, options.trainer_dtype))
            print(f"\n{name}: {bytes_sent(weights) / 2e6:.0f} M parameters, {options.trainer_dtype} in the trainer")
            with running_server(folder) as url, raw_broadcast() as broadcast:
                publisher = connect([url], WeightSyncConfig(timeout_s=120, bucket_mib=options.bucket_mib))
                publisher.attach()
                setting = Setting(publisher, weights, url, folder, times)
                compare_with_limit(setting, broadcast, options.rounds)
                watch_a_request(setting, options.rounds)
                publisher.close()


@dataclass
class Setting:
    """A running server and who publishes to it."""

    publisher: WeightPublisher
    weights: NamedWeights
    url: str
    folder: str
    times: CallTimes
    version: int = 0

    def push(self) -> float:
        """Publish once. Returns the seconds that it took."""
        self.version += 1
        return self.publisher.publish(self.version, self.weights).seconds


def bytes_sent(weights: NamedWeights) -> int:
    return 2 * sum(tensor.numel() for _, tensor in weights)


def compare_with_limit(setting: Setting, broadcast: Broadcast, rounds: int) -> None:
    setting.push()  # opens the group, warms everything
    setting.times.take()
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        push_s = setting.push()
        calls, transfer_s = setting.times.take()
        ours = {"push": push_s, "transfer": transfer_s, "commit": calls.pop("commit")}
        limit = {
            "convert": converting_s(setting.weights),
            "broadcast": broadcast(bytes_sent(setting.weights)),
            "reload": reloading_s(setting),
        }
        rows.append(ours | limit | calls)
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(f"  medians of {rounds}, seconds:", ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    for loading, text in {"commit": "loading inside the engine", "reload": "reload from the page cache"}.items():
        ratio = found["push"] / (found["broadcast"] + found[loading])
        print(f"  push / (broadcast + {text}): {ratio:.2f} (bar 1.5)")


def watch_a_request(setting: Setting, rounds: int) -> None:
    pauses = [pause_and_transfer(setting) for _ in range(rounds)]
    gap_s, transfer_s, usual_s = (statistics.median(column) for column in zip(*pauses, strict=True))
    print(
        f"  a running request: largest gap {gap_s:.3f} s, transfer {transfer_s:.3f} s, ratio {gap_s / transfer_s:.2f} "
        f"(bar 1.2); usual gap {usual_s:.3f} s; load {os.getloadavg()[0]:.1f}"
    )


def converting_s(weights: NamedWeights) -> float:
    """Seconds to convert and copy the weights as the transport has to: a part of the push that is not in the limit."""
    start = time.monotonic()
    for _, tensor in weights:
        torch.empty(tensor.shape, dtype=torch.bfloat16).copy_(tensor)
    return time.monotonic() - start


def reloading_s(setting: Setting) -> float:
    """Seconds for the engine to load the same weights from a folder in the page cache."""
    start = time.monotonic()
    body = {"method": "reload_weights", "kwargs": {"weights_path": os.path.abspath(setting.folder)}}
    httpx.post(f"{setting.url}/collective_rpc", json=body, timeout=120).raise_for_status()
    return time.monotonic() - start


def pause_and_transfer(setting: Setting) -> tuple[float, float, float]:
    """Push while a request streams. Returns its largest gap, the transfer's seconds, its median gap."""
    arrivals: list[float] = []
    is_running, is_pushed = threading.Event(), threading.Event()

    def stream() -> None:
        prompt = [1] * PROMPT_TOKENS
        body = {"model": "policy", "prompt": prompt, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{setting.url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    was_pushed = is_pushed.is_set()
                    arrivals.append(time.monotonic())
                    if len(arrivals) == 8:
                        is_running.set()
                    if was_pushed:
                        return

    request = threading.Thread(target=stream)
    request.start()
    assert is_running.wait(120)
    setting.times.take()
    setting.push()
    is_pushed.set()
    request.join()
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return max(gaps), setting.times.take()[1], statistics.median(gaps)


class Broadcast:
    """Rank 0 of a group of two processes."""

    def __init__(self, orders: Connection) -> None:
        self._orders = orders
        self._piece = torch.ones(PIECE_BYTES, dtype=torch.uint8)

    def __call__(self, size_bytes: int) -> float:
        """Seconds to broadcast so many bytes, piece by piece, until the other side has them all."""
        self._orders.send(size_bytes)
        dist.barrier()
        start = time.monotonic()
        for length in pieces(size_bytes):
            dist.broadcast(self._piece[:length], 0)
        dist.barrier()
        return time.monotonic() - start


@contextmanager
def raw_broadcast() -> Iterator[Broadcast]:
    ours, theirs = multiprocessing.Pipe()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    receiver = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs, store.port), daemon=True)
    receiver.start()
    dist.init_process_group("gloo", store=store, rank=0, world_size=2)
    yield Broadcast(ours)
    ours.send(0)
    receiver.join()
    dist.destroy_process_group()


def receive(orders: Connection, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=1, world_size=2)
    piece = torch.empty(PIECE_BYTES, dtype=torch.uint8)
    while size_bytes := orders.recv():
        dist.barrier()
        for length in pieces(size_bytes):
            dist.broadcast(piece[:length], 0)
        dist.barrier()
    dist.destroy_process_group()


def pieces(size_bytes: int) -> Iterator[int]:
    for start in range(0, size_bytes, PIECE_BYTES):
        yield min(PIECE_BYTES, size_bytes - start)


if __name__ == "__main__":
    main()
