# mypy: disable-error-code="import-untyped, import-not-found"
# The packages of another environment are not those that mypy sees.
"""put, get and clear on TransferQueue: run by the interpreter of its own environment, not by ours.

transfer_queue_client.py GROUPS_PER_BATCH SEQUENCES TOKENS SECONDS THREADS

A row is a sequence. Each thread puts a batch under new keys, gets it back, compares a row and clears it. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import psutil
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

LOGICAL_CPUS = 8
"""Ray would wait for ever for the controller and the storage units on a machine of two cores."""


def main() -> None:
    groups, sequences, tokens, seconds, threads = (int(part) for part in sys.argv[1:])
    ray.init(num_cpus=LOGICAL_CPUS, include_dashboard=False, log_to_driver=False)
    tq.init()
    batches = Batches(groups * sequences, tokens)
    batches.pass_one("warm-up")
    cpu_s, start = tree_cpu_s(), time.monotonic()
    workers = [threading.Thread(target=batches.pass_until, args=(i, start + seconds)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    span = time.monotonic() - start
    print(json.dumps({"groups_per_s": batches.passed * groups / span, "cpu_s": (tree_cpu_s() - cpu_s) / span}))
    tq.close()
    ray.shutdown()


class Batches:
    """One batch of rows, sent again and again under new keys."""

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows = rows
        self.passed = 0
        self._lock = threading.Lock()
        self._fields = TensorDict(
            {
                "tokens": torch.randint(0, 128_000, (rows, tokens), dtype=torch.int32),
                "loss_mask": torch.ones((rows, tokens), dtype=torch.uint8),
                "inference_logprobs": -torch.rand((rows, tokens)),
                "reward": torch.rand((rows, 1), dtype=torch.float64),
            },
            batch_size=rows,
        )

    def pass_one(self, name: str) -> None:
        keys = [f"{name}-{row}" for row in range(self.rows)]
        tq.kv_batch_put(keys=keys, partition_id="train", fields=self._fields)
        back = tq.kv_batch_get(keys=keys, partition_id="train")
        # Rows may come back as one nested tensor: compare the last of them.
        if len(back) != self.rows or not torch.equal(back["tokens"].unbind()[-1], self._fields["tokens"][-1]):
            raise AssertionError(f"batch {name} came back altered")
        tq.kv_clear(keys=keys, partition_id="train")

    def pass_until(self, thread: int, end: float) -> None:
        number = 0
        while time.monotonic() < end:
            self.pass_one(f"{thread}-{number}")
            number += 1
            with self._lock:
                self.passed += 1


def tree_cpu_s() -> float:
    """Everything that Ray started, and this process."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
