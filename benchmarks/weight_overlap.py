"""What publishing costs sampling: tokens/s of one server with a publication every few seconds, against none.

The load is the demo's: groups of eight sequences, so many of them that the engine is always full. Windows with and without
publications take turns in one run. A window's tokens are counted by the server (vllm:generation_tokens_total). Eight
seconds between publications is a step of `make demo`. Publishing shares the cores with the engine, as in the demo.

OMP_NUM_THREADS=1 python -m benchmarks.weight_overlap
OMP_NUM_THREADS=1 python -m benchmarks.weight_overlap --arms none,recompute,keep --rounds 3 --window 40
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time

import httpx
import torch

from benchmarks.vllm_server import SMOL, running_server, trainer_weights
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.base import NamedWeights

GROUPS, GROUP_SIZE = 8, 8
PROMPT_TOKENS, MAX_TOKENS = 40, 64
ARMS = {"recompute": True, "keep": False}
"""weight_sync.recompute of each arm: whether frozen requests compute their keys and values again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="none,recompute,keep", help="none, recompute, keep")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--window", type=float, default=32.0, help="seconds")
    parser.add_argument("--period", type=float, default=8.0, help="seconds between publications")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="length of a completion")
    options = parser.parse_args()
    weights = trainer_weights(SMOL, torch.float32)
    with running_server(SMOL, max_num_seqs=GROUPS * GROUP_SIZE) as url:
        stop = threading.Event()
        clients = [threading.Thread(target=generate, args=(url, options.max_tokens, i, stop)) for i in range(GROUPS)]
        for client in clients:
            client.start()
        found: dict[str, list[float]] = {arm: [] for arm in options.arms.split(",")}
        pushes = Pushes(url, weights, options.period)
        time.sleep(5)
        for _ in range(options.rounds):
            for arm in found:
                found[arm].append(pushes.tokens_per_s(arm, options.window))
        stop.set()
        for client in clients:
            client.join()
    print(
        f"{GROUPS} groups of {GROUP_SIZE}, {options.max_tokens} tokens each, a push every {options.period:.0f} s, "
        f"windows of {options.window:.0f} s, load {os.getloadavg()[0]:.1f}"
    )
    for arm, rates in found.items():
        share = statistics.mean(rates) / statistics.mean(found["none"]) if "none" in found else float("nan")
        took = f", push {statistics.median(pushes.seconds[arm]):.2f} s" if pushes.seconds.get(arm) else ""
        print(
            f"  {arm:10} {statistics.mean(rates):6.1f} tokens/s  {share:.2f} (bar 0.90){took}  {[round(r) for r in rates]}"
        )


class Pushes:
    """Publishes at a steady pace, and counts what the server samples meanwhile."""

    def __init__(self, url: str, weights: NamedWeights, period_s: float) -> None:
        self._url = url
        self._weights = weights
        self._period_s = period_s
        self._version = 0
        self.seconds: dict[str, list[float]] = {}
        """Of every publication, by arm."""

    def tokens_per_s(self, arm: str, window_s: float) -> float:
        """Run one window. Without publications where the arm is none."""
        if arm == "none":
            return self._run(None, arm, window_s)
        publisher = connect([self._url], WeightSyncConfig(timeout_s=120, recompute=ARMS[arm]))
        publisher.attach()
        self._publish(publisher)  # meets the server, which a trainer does once
        rate = self._run(publisher, arm, window_s)
        publisher.close()
        return rate

    def _run(self, publisher: WeightPublisher | None, arm: str, window_s: float) -> float:
        before, start = sampled(self._url), time.monotonic()
        due = start + self._period_s / 2
        while time.monotonic() < start + window_s:
            time.sleep(max(0.0, min(due, start + window_s) - time.monotonic()))
            if publisher is not None and time.monotonic() < start + window_s:
                self.seconds.setdefault(arm, []).append(self._publish(publisher))
            due += self._period_s
        return (sampled(self._url) - before) / (time.monotonic() - start)

    def _publish(self, publisher: WeightPublisher) -> float:
        self._version += 1
        return publisher.publish(self._version, self._weights).seconds


def sampled(url: str) -> float:
    """Tokens that the server has sampled since it started."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def generate(url: str, max_tokens: int, seed: int, stop: threading.Event) -> None:
    """Keep one group in flight; every answer must be whole."""
    with httpx.Client(timeout=300) as http:
        question = 0
        while not stop.is_set():
            question += 1
            prompt = [1 + (seed * 7919 + question * 31 + i) % 40000 for i in range(PROMPT_TOKENS)]
            sampling = {"max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0, "n": GROUP_SIZE}
            body = {"token_ids": prompt, "sampling_params": sampling}
            choices = http.post(f"{url}/inference/v1/generate", json=body).raise_for_status().json()["choices"]
            assert [len(choice["token_ids"]) for choice in choices] == [max_tokens] * GROUP_SIZE


if __name__ == "__main__":
    main()
